"""Which layers count as heads where no model says so, and what a name says of a weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dion_dtensor import Muon, audit, param_groups


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
    assert reasons_of(nn.LSTM(8, 8))["weight_ih_l0"] == asked
    assert reasons_of(model, split={"qkv": (8, 8, 8)})["qkv.weight"] == "2-D, rows(8, 8, 8)"


class RowsOfExperts(nn.Module):
    """As of DBRX and megablocks: the experts of a weight lie one below the other."""

    def __init__(self, count: Any = 4) -> None:
        super().__init__()
        self.moe_num_experts = count
        self.w1 = nn.Parameter(torch.ones(4 * 6, 8))
        self.odd = nn.Parameter(torch.ones(26, 8))
        self.router, self.turned = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(8, 4))
        self.up = nn.Linear(8, 24, bias=False)


def test_experts_in_the_rows_of_one_weight_say_so() -> None:
    reasons = reasons_of(RowsOfExperts())
    assert reasons.pop("w1") == "matrix; of several? see split"
    assert set(reasons.values()) == {"matrix"}
    for count in (1, None, nn.Identity()):
        assert set(reasons_of(RowsOfExperts(count)).values()) == {"matrix"}
    model = RowsOfExperts()
    rows = {row.name: row for row in audit(Muon(param_groups(model, heads={"w1": 4}), compile=False)).rows}
    assert (rows["w1"].matrices, rows["w1"].why) == ("4 of 6x8", "2-D, heads(4)")


class Experts(nn.Module):
    """As torchtitan's gpt-oss has them: the letters of their dims in the names, and biases [experts, outputs]."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp1_weight_EGD = nn.Parameter(torch.ones(4, 12, 8))
        self.mlp1_bias_EG = nn.Parameter(torch.ones(4, 12))
        self.bias_hidden = nn.Parameter(torch.ones(4, 8))


def test_biases_of_experts_are_no_matrices() -> None:
    groups = param_groups(Experts())
    rules = {name: group["algorithm"] for group in groups for name, _ in group["params"]}
    assert rules == {"mlp1_weight_EGD": "muon", "mlp1_bias_EG": "adamw", "bias_hidden": "adamw"}
    assert reasons_of(Experts())["mlp1_bias_EG"] == "no matrix, by its name"
    layers = nn.ModuleDict({"bias_proj": nn.Linear(8, 8, bias=False)})
    assert reasons_of(layers)["bias_proj.weight"] == "matrix"  # a layer, whatever it makes


def test_one_of_several_layers_holds_one_matrix() -> None:
    inner = nn.ModuleDict({"wq": nn.Linear(8, 8, bias=False), "wqkv": nn.Linear(8, 24, bias=False)})
    reasons = reasons_of(nn.ModuleDict({"qkv_linear": inner}))
    assert reasons["qkv_linear.wq.weight"] == "matrix"
    assert reasons["qkv_linear.wqkv.weight"] == "matrix; of several? see split"


def test_a_depthwise_convolution_is_no_matrix_unless_it_is_asked_for() -> None:
    model = nn.ModuleDict(
        {
            "conv1d": nn.Conv1d(8, 8, 4, groups=8, bias=False),
            "multiplied": nn.Conv2d(3, 96, 4, groups=3, bias=False),
            "grouped": nn.Conv1d(8, 16, 4, groups=2, bias=False),
            "up": nn.ConvTranspose1d(8, 8, 2, groups=8, bias=False),
        }
    )
    assert reasons_of(model) == {
        "conv1d.weight": "depthwise convolution, a vector for each channel",
        "multiplied.weight": "convolution in groups; of several? see split",
        "grouped.weight": "convolution in groups; of several? see split",
        "up.weight": "depthwise convolution, a vector for each channel",
    }
    groups = param_groups(model, split={"conv1d": "flatten"})
    rules = {name: (group["algorithm"], group["split"]) for group in groups for name, _ in group["params"]}
    assert rules["conv1d.weight"] == ("muon", "flatten")
    assert rules["up.weight"] == ("adamw", None)
    audit(Muon(groups, compile=False), strict=True)


def test_convolutions_are_cut_by_groups_and_into_blocks() -> None:
    model = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(8, 12, 3, groups=4, bias=False),
            "grouped_up": nn.ConvTranspose1d(8, 6, 2, groups=2, bias=False),
            "to_qkv": nn.Conv2d(8, 20, 1, bias=False),
            "depthwise": nn.Conv1d(6, 6, 2, groups=6, bias=False),
        }
    )
    groups = param_groups(
        model,
        split={"to_qkv": (10, 5, 5)},
        heads={r"^grouped\.": 4, "grouped_up": 2, "depthwise": 6},
    )
    optimizer = Muon(groups, compile=False)
    rows = {row.name: (row.matrices, row.why) for row in audit(optimizer, strict=True).rows}
    assert rows == {
        "grouped.weight": ("4 of 3x18", "convolution in groups, flatten(heads(4))"),
        "grouped_up.weight": ("2 of 4x6", "transposed convolution in groups, flatten(heads(2))"),
        "to_qkv.weight": ("1 of 10x8, 1 of 5x8, 1 of 5x8", "convolution, flatten(rows(10, 5, 5))"),
        "depthwise.weight": (
            "6 of 1x2",
            "depthwise convolution, a vector for each channel, flatten(heads(6))",
        ),
    }
    assert [g["split"] for g in groups if g.get("weight_storage") == "in_out"] == ["flatten(heads(2))"]
    with pytest.raises(
        ValueError, match=r"grouped_up.weight.*rows of a transposed convolution are its inputs"
    ):
        param_groups(model, split={"grouped_up": (4, 4)})
    bare = nn.ParameterDict({"kernel": nn.Parameter(torch.ones(6, 2, 3, 3))})
    assert [group["split"] for group in param_groups(bare, heads={"kernel": 2})] == ["flatten(heads(2))"]
    with pytest.raises(ValueError, match=r"to_qkv.weight.*a matrix of 7 rows, not the shape \[20, 8\]"):
        param_groups(model, split={"to_qkv": (3, 4)})


def test_columns_by_heads_are_one_matrix() -> None:
    model = nn.Module()
    model.q = nn.Parameter(torch.ones(12, 3, 4))
    model.experts = nn.Parameter(torch.ones(11, 3, 4))
    model.temperature = nn.Parameter(torch.ones(1, 1, 1))
    model.bounds = nn.Parameter(torch.ones(8, 1, 8))
    model.conv = nn.Conv1d(4, 12, 3, bias=False)
    model.transposed = nn.ConvTranspose1d(12, 3, 4, bias=False)
    groups = param_groups(model)
    splits = {
        name: (group["split"], group.get("weight_storage")) for group in groups for name, _ in group["params"]
    }
    assert splits == {
        "q": ("flatten", None),
        "experts": ("experts", None),
        "temperature": (None, None),
        "bounds": (None, None),
        "conv.weight": ("flatten", None),
        "transposed.weight": ("flatten", "in_out"),
    }
    (group,) = param_groups(nn.ParameterDict({"q": model.q}), split={"q": "experts"})
    assert group["split"] == "experts"


class Detector(nn.Module):
    """The heads of torchvision's region proposals: both or neither."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_logits, self.bbox_pred = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 12, 1)


def test_a_convolution_to_the_classes_is_a_head() -> None:
    model = nn.ModuleDict(
        {
            "backbone": nn.Conv2d(3, 8, 1),
            "classifier": nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1)),
            "ctc_head": nn.Conv1d(8, 5, 1),
            "wide_head": nn.Conv1d(8, 5, 3),
            "conv_head": nn.Conv2d(8, 16, 1),
            "aux_classifier": nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1)),
            "mask_head": nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)),
            "feature_head": nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),
            "rpn": nn.ModuleDict({"head": Detector()}),
        }
    )
    reasons = reasons_of(model)
    assert reasons["classifier.2.weight"] == reasons["ctc_head.weight"] == "output head"
    assert reasons["classifier.0.weight"] == reasons["backbone.weight"] == "convolution"
    assert reasons["aux_classifier.1.weight"] == "output head"
    for name in (
        "wide_head",
        "conv_head",
        "aux_classifier.0",
        "mask_head.0",
        "mask_head.1",
        "feature_head.0",
    ):
        assert reasons[f"{name}.weight"] == "convolution"
    assert reasons["rpn.head.cls_logits.weight"] == reasons["rpn.head.bbox_pred.weight"] == "convolution"


def test_a_weight_is_a_matrix_whatever_it_is_called() -> None:
    model = nn.ParameterDict(
        {name: nn.Parameter(torch.ones(8, 8)) for name in ("D", "W_beta", "w_queries", "bias_proj_weight")}
    )
    assert set(reasons_of(model).values()) == {"matrix"}
    model["norm_scale"] = nn.Parameter(torch.ones(8, 8))
    assert reasons_of(model)["norm_scale"] == "no matrix, by its name"
    assert reasons_of(model, split={"norm_scale": "heads(2)"})["norm_scale"].endswith("heads(2)")
