"""The text that the job trains on, and its batches."""

from __future__ import annotations

from importlib import resources

import torch
from torch import Tensor

TEXT = "new_testament.txt"


def read_text() -> Tensor:
    """The shipped text (conformance/data/README.md names its source) as bytes, uint8 `[974298]`."""
    raw = resources.files("conformance.data").joinpath(TEXT).read_bytes()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def batch(text: Tensor, step: int, *, sequences: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The global batch of a step, the same on every rank: inputs and next bytes, int64 `[sequences, length]`.

    Raises:
        ValueError: the text is shorter than one sequence.
    """
    if text.numel() < length + 1:
        raise ValueError(f"a text of {text.numel()} bytes has no sequence of {length + 1}")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(text.numel() - length, (sequences,), generator=generator)
    windows = text[starts[:, None] + torch.arange(length + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
