"""Ends a rank that hangs, and says where: the collective, and the bucket of parameters that it was for."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HANG_EXIT = 3


@contextmanager
def watched(seconds: float, rank: int, report: Callable[[str], None]) -> Iterator[None]:
    """Ends this process if the block takes longer, after `report` was told in what it hung.

    Args:
        seconds: the limit.
        rank: for the message.
        report: called with one line; the whole stack goes to standard error.
    """
    main = threading.get_ident()

    def end() -> None:
        frame = sys._current_frames().get(main)
        line = f"rank {rank} hung for {seconds:g} s {where(frame)}"
        try:
            print(line, file=sys.stderr)
            traceback.print_stack(frame, limit=30)
            sys.stderr.flush()
            report(line)
        finally:
            os._exit(HANG_EXIT)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def where(frame: FrameType | None) -> str:
    """In words: the innermost call into torch.distributed, and the parameters that the innermost bucket has."""
    collective = bucket = ""
    innermost = ""
    while frame is not None:
        module, name = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        innermost = innermost or f"{module}.{name}"
        if module.startswith(("torch.distributed", "torch._C", "torch.ops")) and not name.startswith("_"):
            collective = collective or name
        members = getattr(frame.f_locals.get("self"), "members", None)
        if not bucket and isinstance(members, list) and members and hasattr(members[0], "name"):
            names = [str(member.name) for member in members]
            bucket = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
        frame = frame.f_back
    place = f"in the collective {collective!r} ({innermost})" if collective else f"in {innermost}"
    return f"{place}, bucket of {bucket}" if bucket else place
