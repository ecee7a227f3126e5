"""The safetensors format, read and written with numpy alone.

A file is an 8-byte little-endian length, that many bytes of JSON, and the arrays. What is written here is canonical:
names sorted, no gaps, the header padded with spaces to a multiple of eight, so equal arrays make equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES: dict[str, np.dtype[Any]] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
"""The dtypes that vectors use."""


class VectorError(ValueError):
    """A vector file that cannot be trusted or understood; the message names the file and the way out."""


def to_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The canonical safetensors file of named arrays.

    Raises:
        TypeError: a dtype that vectors do not use.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    parts, start = [], 0
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        little = array.dtype.newbyteorder("<")
        if little not in names:
            raise TypeError(f"{name} has dtype {array.dtype}; vectors hold {', '.join(DTYPES)}")
        data = array.astype(little, copy=False).tobytes()
        header[name] = {
            "dtype": names[little],
            "shape": list(np.shape(arrays[name])),
            "data_offsets": [start, start + len(data)],
        }
        parts.append(data)
        start += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def from_bytes(content: bytes, where: str) -> dict[str, NDArray[Any]]:
    """The named arrays of a safetensors file, read-only.

    Args:
        content: the whole file.
        where: how messages call it.

    Raises:
        VectorError: truncated, not safetensors, or an entry that does not fit its bytes.
    """
    if len(content) < 8:
        raise VectorError(f"{where} is truncated: {len(content)} bytes; install the package again")
    size = int.from_bytes(content[:8], "little")
    if size > len(content) - 8:
        raise VectorError(f"{where} is truncated or no safetensors file: its header should have {size} bytes")
    try:
        header = json.loads(content[8 : 8 + size])
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        body, arrays = content[8 + size :], {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            if not 0 <= begin <= end <= len(body):
                raise VectorError(f"{where} is truncated: {name} lies beyond its end")
            arrays[name] = np.frombuffer(body[begin:end], dtype=dtype).reshape(shape)
    except VectorError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VectorError(f"{where} is no safetensors file of vectors: {error!r}") from error
    return arrays
