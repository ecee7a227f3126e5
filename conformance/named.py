"""What a user names as ``module:function``."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["named_function"]


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
