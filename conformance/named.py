"""What a user names as ``module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

__all__ = ["look_here", "named_function"]


def look_here() -> None:
    """Find modules that lie in the current folder, as `python -m` does."""
    sys.path.insert(0, os.getcwd())


def named_function(kind: str, text: str) -> Any:
    """The function that ``text`` names.

    Args:
        kind: what it makes, for the error.
        text: ``module:function``.

    Raises:
        ValueError: no such module or function.
    """
    module, _, function = text.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind} {text!r}: {error}") from error
