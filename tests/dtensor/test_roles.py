"""Which layers count as heads where no model says so, and what a name says of a weight."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from dion_dtensor import param_groups


class Translator(nn.Module):
    """An embedding, a Linear of any name that gives a number for each of its rows, and others."""

    def __init__(self, name: str, positions: int = 12) -> None:
        super().__init__()
        self.positions = nn.Embedding(positions, 8)
        self.source = nn.Embedding(50, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)])
        self.add_module(name, nn.Linear(8, 50, bias=False))


def reasons_of(model: nn.Module, **options: Any) -> dict[str, str]:
    return {key: why for group in param_groups(model, **options) for key, why in group["reasons"].items()}


def test_a_layer_onto_the_vocabulary_is_a_head_by_any_name() -> None:
    reasons = reasons_of(Translator("linear"))
    assert reasons["linear.weight"] == "output head, by its shape"
    assert reasons["layers.0.weight"] == reasons["layers.1.weight"] == "matrix"
    twice = Translator("first")
    twice.second = nn.Linear(8, 50, bias=False)
    assert not any("head" in why for why in reasons_of(twice).values())  # which of them is not said
    places = nn.ModuleDict({"pos": nn.Embedding(50, 8), "up": nn.Linear(8, 50), "square": nn.Embedding(8, 8)})
    assert not any("head" in why for why in reasons_of(places).values())
    named = Translator("first")
    named.lm_head = nn.Linear(8, 20, bias=False)
    assert reasons_of(named) | {"first.weight": "matrix", "lm_head.weight": "output head"} == reasons_of(
        named
    )


@pytest.mark.parametrize("name", ["decoder", "generator", "output_layer", "to_logits", "unembed"])
def test_layers_at_the_top_may_be_heads_by_name(name: str) -> None:
    model = nn.ModuleDict({"inner": nn.Linear(8, 8), name: nn.Linear(8, 5)})
    assert reasons_of(model)[f"{name}.weight"] == "output head"
    assert reasons_of(nn.ModuleDict({"block": model}))[f"block.{name}.weight"] == "matrix"
    module = nn.ModuleDict({name: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))})
    assert set(reasons_of(module).values()) == {"matrix", "1-D"}


def test_what_may_hold_several_matrices_says_so() -> None:
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(8, 2), "qkv": nn.Linear(8, 24), "up": nn.Linear(8, 8)}
    )
    reasons = reasons_of(model)
    asked = "matrix; of several? see split"
    assert reasons["attention.in_proj_weight"] == reasons["qkv.weight"] == asked
    assert reasons["up.weight"] == "matrix"
    assert reasons_of(model, split={"qkv": (8, 8, 8)})["qkv.weight"] == "2-D, rows(8, 8, 8)"
