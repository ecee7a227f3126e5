"""The bar that commands show while they work."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

__all__ = ["live_bar"]


def live_bar(console: Console, amount: ProgressColumn | None = None) -> Progress:
    """A bar on a terminal, gone when it is done; nothing elsewhere.

    Args:
        console: where.
        amount: says how much is done; None for "3/12".
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        amount or MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
