"""A split as plain text, which goes through any checkpoint of a param group.

``"rows(768, 256, 256)"``, ``"columns(768, 768, 768)"``, ``"heads(12)"``, ``"interleaved_rows((3, 1, 1), 4)"``,
``"interleaved_columns((1, 1), 64)"``, ``"experts"``, ``"flatten"``; and experts and convolutions that are cut in turn:
``"experts(rows(64, 64))"``, ``"flatten(heads(4))"``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Sequence

from dion_dtensor.matrices import (
    SPLITS,
    Columns,
    Experts,
    Flatten,
    Heads,
    InterleavedColumns,
    InterleavedRows,
    Rows,
    Split,
)

__all__ = ["parse_split"]

BLOCKS: dict[str, type[Split]] = {
    "rows": Rows,
    "columns": Columns,
    "heads": Heads,
    "interleaved_rows": InterleavedRows,
    "interleaved_columns": InterleavedColumns,
}
OUTER: dict[str, Callable[[Split | None], Split]] = {"experts": Experts, "flatten": Flatten}


def parse_split(split: Split | str | Sequence[int] | None) -> Split | None:
    """A split from its text, a sequence of rows' sizes, or a split itself.

    Raises:
        TypeError: neither a text, nor sizes, nor a split.
        ValueError: a text that says no split, or sizes that are not positive.
    """
    if split is None or isinstance(split, SPLITS):
        return split
    if not isinstance(split, str):
        if not isinstance(split, Iterable):
            raise TypeError(
                f"split={split!r} must be the sizes of blocks of rows, such as (q, k, v), or a split or its text; "
                f"so many equal blocks are heads({split})"
            )
        return Rows(*split)
    if split in OUTER:
        return OUTER[split](None)
    match = re.fullmatch(r"(\w+)\((.*)\)", split)
    if match and match[1] in OUTER:
        inner = parse_split(match[2]) if match[2].partition("(")[0] in BLOCKS else None
        if inner is None:
            how = "experts are cut into blocks, as in experts(rows(gate, up))"
            if match[1] == "flatten":
                how = "a convolution is cut into blocks, as in flatten(heads(groups))"
            raise ValueError(f"split={split!r}: {how}")
        return OUTER[match[1]](inner)
    if match and match[1] in BLOCKS:
        try:
            arguments = ast.literal_eval(f"({match[2]},)")
            made: Split = BLOCKS[match[1]](*arguments)
        except (SyntaxError, TypeError, ValueError) as error:
            raise ValueError(f"split={split!r} cannot be read: {error}") from error
        return made
    raise ValueError(
        f"split={split!r} is unknown; write rows(q, k, v), columns(q, k, v), heads(count), "
        "interleaved_rows((q, k, v), groups), interleaved_columns((q, k, v), groups), experts, "
        "experts(rows(gate, up)), flatten or flatten(heads(groups))"
    )
