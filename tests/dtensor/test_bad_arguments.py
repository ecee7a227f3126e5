"""Arguments of the wrong kind are refused by name as the optimizer is made."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from dion_dtensor import Dion, Dion2, Muon, NorMuon

BAD: list[tuple[type[Any], str, Any, str]] = [
    (Muon, "lr", True, "must be a number"),
    (Muon, "mu", "0.9", "must be a number"),
    (Muon, "mu", None, "must be a number"),
    (Muon, "epsilon", "1e-8", "must be a number"),
    (Muon, "epsilon", math.inf, "must be finite and positive"),
    (Muon, "nesterov", "no", "must be True or False"),
    (Muon, "cautious", 2, "must be True or False"),
    (Muon, "maximize", None, "must be True or False"),
    (Muon, "compile", "no", "must be True or False"),
    (Muon, "validate", None, "must be True or False"),
    (Muon, "atomic", 1, "must be True or False"),
    (Muon, "averaged", "no", "must be True or False"),
    (Muon, "capture", "yes", "must be True or False"),
    (Muon, "max_bucket_bytes", "8M", "must be a positive whole number, or None"),
    (Muon, "max_bucket_bytes", 1.5, "must be a positive whole number, or None"),
    (Muon, "compute_dtype", "bf16", "must be torch"),
    (Muon, "polynomial", ((math.nan, 1.0, 1.0),), "finite numbers"),
    (NorMuon, "beta2", "1", "must be a number"),
    (Dion2, "fraction", "1/4", "must be a number"),
    (Dion, "rank_fraction", None, "must be a number"),
    (Dion, "resync_every", True, "must be a positive whole number, or None"),
    (Dion, "seed", "x", "must be a whole number"),
]


@pytest.mark.parametrize(("optimizer", "name", "value", "message"), BAD, ids=lambda one: str(one)[:20])
def test_refused_by_name(optimizer: type[Any], name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        optimizer([nn.Parameter(torch.ones(4, 3))], **{name: value})


def test_betas_of_words() -> None:
    rest = {"params": [nn.Parameter(torch.ones(3))], "algorithm": "adamw", "betas": ("0.9", 0.95)}
    with pytest.raises(ValueError, match=r"betas=.* must be two numbers"):
        Muon([{"params": [nn.Parameter(torch.ones(4, 3))]}, rest])
