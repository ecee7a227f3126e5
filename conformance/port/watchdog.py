"""Ends a rank that hangs, and says where: the collective, and the bucket of parameters that it was for."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HANG_EXIT = 3
OTHERS_SECONDS = 2.0
"""Between a rank's words and its end, for the ranks that wait for it to say so: ended, they could not."""
OPERATORS = ("_c10d_functional.", "c10d.", "dion_dtensor.")
"""Of compiled graphs, and of what this package starts by itself, the operators that wait for other ranks."""


@contextmanager
def watched(seconds: float, rank: int, report: Callable[[str, bool], None]) -> Iterator[None]:
    """Ends this process if the block takes longer, after `report` was told in what it hung.

    Args:
        seconds: the limit.
        rank: for the message.
        report: called with one line, and whether it waits for other ranks; the whole stack goes to standard error.
    """
    main = threading.get_ident()

    def end() -> None:
        frame = sys._current_frames().get(main)
        place, waits = where(frame)
        line = f"rank {rank} hung for {seconds:g} s {place}"
        try:
            print(line, file=sys.stderr)
            traceback.print_stack(frame, limit=30)
            sys.stderr.flush()
            report(line, waits)
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
    collective = parameters = innermost = ""
    entered = False
    while frame is not None:
        module, name = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        innermost = innermost or f"{module}.{name}"
        operator = str(frame.f_locals.get("self", "")) if module == "torch._ops" else ""
        # Of its frames the one that was called, which says more than the wait in which it ends.
        if not entered and operator.startswith(OPERATORS):
            collective = operator
        elif (
            not entered
            and module.startswith("torch.distributed")
            and not name.startswith("_")
            and name != "wrapper"
        ):
            collective = name
        entered = entered or (bool(collective) and not module.startswith("torch."))
        parameters = parameters or _parameters(frame)
        frame = frame.f_back
    place = f"in the collective {collective!r} ({innermost})" if collective else f"in {innermost}"
    return (f"{place}, {parameters}" if parameters else place), bool(collective)


def _parameters(frame: FrameType) -> str:
    """The bucket whose method it is, or the parameters that its function was given."""
    own = getattr(frame.f_locals.get("self"), "members", None)
    for members, kind in ((own, "bucket"), (frame.f_locals.get("members"), frame.f_code.co_name)):
        if isinstance(members, list) and members and hasattr(members[0], "name"):
            more = f" and {len(members) - 1} more" if len(members) > 1 else ""
            return f"{kind} of {members[0].name}{more}"
    return ""
