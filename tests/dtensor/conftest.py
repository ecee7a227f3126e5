from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.dtensor.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """Process groups by their size, shared between all tests of a worker; a smaller one ends before a larger starts."""
    groups: dict[int, Ranks] = {}

    def get(world: int) -> Ranks:
        if world not in groups:
            for other in list(groups):
                groups.pop(other).close()
            groups[world] = Ranks(world)
        return groups[world]

    yield get
    for group in groups.values():
        group.close()
