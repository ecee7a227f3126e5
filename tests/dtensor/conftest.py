from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dtensor.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Eight ranks, started once for all tests of a worker; a smaller mesh leaves the others idle."""
    pool = Ranks(8)
    yield pool
    pool.close()
