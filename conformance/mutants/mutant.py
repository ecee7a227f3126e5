"""What a mutant is, and how a mistake is put in and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

ORACLE, PRODUCTION, GATHERING = "the oracle", "dion_dtensor", "a gathering port"
"""Whose code is changed. The gathering port assembles every tensor and asks the oracle: right on every mesh."""

Applied = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: what is wrong.
        subject: whose code is changed.
        level: the first level that has to notice.
        algorithms: whose cases are run; at L3 and L4 the first only.
        applied: the context in which the subject is wrong.
        layouts: at L3 and L4, the layouts whose cases are run, as in the cases' ids.
        dtype: of the cases. Production takes other ways in float32 than in float64.
        kind: name of the optimizer class of a gathering mutant, which needs no context.
    """

    name: str
    subject: str
    level: str
    algorithms: tuple[str, ...]
    applied: Applied | None = None
    layouts: tuple[str, ...] = ()
    dtype: str = "float64"
    kind: str = ""


@contextmanager
def attribute(owner: Any, name: str, wrong: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` is `wrong(original)` until the end; works on frozen dataclasses and properties too.

    Raises:
        LookupError: `owner` has no such attribute: the mutant has to be written anew.
    """
    if name not in vars(owner):
        raise LookupError(f"{owner!r} has no {name!r}: this mutant no longer fits the code")
    original = vars(owner)[name]
    set_ = (
        setattr
        if isinstance(owner, type) or hasattr(owner, "__path__") or _is_module(owner)
        else object.__setattr__
    )
    set_(owner, name, wrong(original))
    try:
        yield
    finally:
        set_(owner, name, original)


def _is_module(owner: Any) -> bool:
    return type(owner).__name__ == "module"
