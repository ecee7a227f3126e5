"""Ends a rank that hangs, and says where: the collective, and the bucket of parameters that it was for."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from dion_dtensor.buckets import Bucket
from dion_dtensor.members import Member

HANG_EXIT = 3
OTHERS_SECONDS = 2.0
"""Between a rank's words and its end, for the ranks that wait for it to say so: ended, they could not."""
NAMED = 4
"""So many parameters of a bucket are named."""
OPERATORS = ("_c10d_functional.", "c10d.", "dion_dtensor.")
"""Of compiled graphs, and of what this package starts by itself, the operators that wait for other ranks."""


@contextmanager
def watched(seconds: float, rank: int, report: Callable[[str, bool, str], None]) -> Iterator[None]:
    """Ends this process if the block takes longer, after `report` was told in what it hung.

    Args:
        seconds: the limit.
        rank: for the message.
        report: called with one line, whether it waits for other ranks, and the whole stack; the line alone goes to
            standard error.
    """
    main = threading.get_ident()

    def end() -> None:
        frame = sys._current_frames().get(main)
        place, waits = where(frame)
        line = f"rank {rank} hung for {seconds:g} s {place}"
        try:
            sys.stderr.write(f"{line}\n")  # in one call: other ranks write there too
            sys.stderr.flush()
            report(line, waits, "".join(traceback.format_stack(frame, limit=30)))
            time.sleep(OTHERS_SECONDS)
        finally:
            os._exit(HANG_EXIT)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def where(frame: FrameType | None) -> tuple[str, bool]:
    """In words: the innermost call into torch.distributed, and the parameters that it is for; whether there is one."""
    collective = innermost = caller = bucket = parameters = ""
    while frame is not None:
        module, name = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        innermost = innermost or f"{module}.{name}"
        operator = str(frame.f_locals.get("self", "")) if module == "torch._ops" else ""
        # Of its frames the one that was called, which says more than the wait in which it ends.
        if not caller and operator.startswith(OPERATORS):
            collective = operator
        elif (
            not caller
            and module.startswith("torch.distributed")
            and not name.startswith("_")
            and name != "wrapper"
        ):
            collective = name
        if collective and not caller and not module.startswith("torch."):
            caller = f"{module}.{name}"
        bucket = bucket or _bucket(frame)
        parameters = parameters or _parameters(frame)
        frame = frame.f_back
    place = f"in the collective {collective!r} of {caller or innermost}" if collective else f"in {innermost}"
    # The bucket whose step it is, before what some function in it was given.
    told = bucket or parameters
    return (f"{place}, {told}" if told else place), bool(collective)


def _bucket(frame: FrameType) -> str:
    """The parameters of our bucket whose method it is."""
    own = frame.f_locals.get("self")
    return f"bucket of {_names(own.members)}" if isinstance(own, Bucket) else ""


def _parameters(frame: FrameType) -> str:
    """The parameters that our function was given, such as those of all buckets before the first one's step."""
    members = frame.f_locals.get("members")
    if isinstance(members, list | tuple) and members and all(isinstance(one, Member) for one in members):
        return f"parameters {_names(members)}"
    return ""


def _names(members: Sequence[Member]) -> str:
    """The first few by name, and how many there are besides."""
    named = ", ".join(member.name for member in members[:NAMED])
    return f"{named} and {len(members) - NAMED} more" if len(members) > NAMED else named
