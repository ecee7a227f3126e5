"""How joined ranks tell rank 0 what becomes of them while a collective hangs.

They speak through the process group's store, over a connection of their own: a rank that waits in a collective may hold
the group's.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

POLL_SECONDS = 0.25
LAST_WORDS = 60.0
"""Seconds that a rank which is to end waits for rank 0 to write the report: with it the launcher ends all ranks."""
ANSWER_SECONDS = 10.0
_runs = 0


class SideChannel:
    """Words from every rank to rank 0, and rank 0's farewell to all.

    To be made by all ranks, once the process group is there. What is said after the store has gone is lost.
    """

    def __init__(self, index: int, count: int) -> None:
        global _runs
        _runs += 1  # the launcher's store outlives a process group, and a restart of the ranks
        store: Any = dist.distributed_c10d._get_default_store()
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        own = TCPStore(
            store.host, store.port, is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=ANSWER_SECONDS),
        )  # fmt: skip
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store: Any = PrefixStore(f"conformance/{attempt}/{_runs}", own)
        self._index = index
        self._said = 0
        self._heard = {rank: 0 for rank in range(count) if rank != index}
        self._lock = threading.Lock()

    def say(self, kind: str, content: object) -> None:
        """Tells rank 0; from any thread."""
        words = pickle.dumps((kind, content))
        with self._lock, suppress(RuntimeError):  # torch's network errors are RuntimeErrors
            self._store.set(f"{self._index}/{self._said}", words)
            self._said += 1

    def heard(self) -> Iterator[tuple[int, str, Any]]:
        """Rank, kind and content of all that the others have said since the last call; for rank 0."""
        with suppress(RuntimeError):
            for rank in self._heard:
                while self._store.check([key := f"{rank}/{self._heard[rank]}"]):
                    kind, content = pickle.loads(self._store.get(key))
                    self._store.delete_key(key)
                    self._heard[rank] += 1
                    yield rank, kind, content

    def say_farewell(self) -> None:
        """Lets the ranks go that wait for it; for rank 0."""
        with suppress(RuntimeError):
            self._store.set("farewell", "")

    def await_farewell(self) -> None:
        """Returns when rank 0 has written all it knows, or does not answer."""
        limit = time.monotonic() + LAST_WORDS
        with suppress(RuntimeError):
            while time.monotonic() < limit and not self._store.check(["farewell"]):
                time.sleep(POLL_SECONDS)
