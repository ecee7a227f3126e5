"""Which parameter follows which rule, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dion_dtensor import Dion, Dion2, Muon, audit, param_groups
from tests.dtensor.small import Small, optimizer_of


def test_groups_claim_each_parameter_once_and_say_why() -> None:
    model = Small()
    rows = {row.name: row for row in audit(optimizer_of(model)).rows}
    assert set(rows) == {name for name, _ in model.named_parameters()}
    assert {name for name, row in rows.items() if row.rule == "muon"} == {"up.weight", "down.weight"}
    assert rows["embedding.weight"].why == "embedding"
    assert rows["lm_head.weight"].why == "output head"
    assert rows["up.bias"].why == "1-D"
    assert rows["up.weight"].scale == pytest.approx((2**0.5,))
    assert "12x6" in str(audit(optimizer_of(model)))


def test_tied_head_follows_the_embedding() -> None:
    model = Small()
    model.lm_head.weight = model.embedding.weight
    groups = param_groups(model)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(set(names))
    assert "embedding.weight" in [name for name, _ in groups[1]["params"]]


def test_exclude_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'attention' matches no parameter"):
        param_groups(Small(), exclude=["attention"])
    excluded = param_groups(Small(), exclude=[r"^up\."])
    assert [name for name, _ in excluded[0]["params"]] == ["down.weight"]


def test_scalar_rule_must_take_any_shape() -> None:
    with pytest.raises(ValueError, match="scalar='dion'"):
        param_groups(Small(), scalar="dion")


def test_matrix_rule_refuses_a_vector_by_name() -> None:
    model = Small()
    with pytest.raises(ValueError, match=r"up\.bias \(\[12\] float32 on one device\): muon takes matrices"):
        Muon(list(model.named_parameters()))


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (Muon, {"lr": -1.0}, "lr"),
        (Muon, {"mu": 1.0}, "mu"),
        (Muon, {"momentum": "mean"}, "momentum"),
        (Muon, {"polynomial": "express"}, "polynomial"),
        (Muon, {"scale": "spectral"}, "scale"),
        (Muon, {"epsilon": 0.0}, "epsilon"),
        (Muon, {"polynomial": ((1.0, 2.0),)}, "polynomial"),
        (Muon, {"compute_dtype": torch.float16}, "compute_dtype"),
        (Muon, {"momentum_dtype": torch.float16}, "momentum_dtype"),
        (Muon, {"lr": torch.ones(2)}, "lr"),
        (Muon, {"weight_decay": float("nan")}, "weight_decay"),
        (Dion, {"rank_fraction": 0.0}, "rank_fraction"),
        (Dion, {"rank_fraction": 1.5}, "rank_fraction"),
        (Dion, {"rank_multiple": 0}, "rank_multiple"),
    ],
)
def test_bad_hyperparameters_are_named(kind: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kind([nn.Parameter(torch.ones(3, 2))], **options)


def test_hyperparameters_of_another_rule_are_refused() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    for key in ("rank_fraction", "eps", "nestrov", "seed", "compute_dtype", "betas"):
        with pytest.raises(ValueError, match=rf"\['{key}'\] are no hyperparameters of 'muon'"):
            Muon([{"params": [weight], key: 0.5}])
    with pytest.raises(ValueError, match="'scale'"):
        Muon([{"params": [weight], "algorithm": "adamw", "scale": "keller"}])


def test_groups_of_another_matrix_rule_are_refused() -> None:
    with pytest.raises(ValueError, match="no group follows 'dion'"):
        Dion(param_groups(Small()), rank_fraction=0.25)


def test_names_that_differ_by_a_wrapper_only_are_refused() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    class Outer(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.module = Inner()
            self._orig_mod = Inner()

    with pytest.raises(ValueError, match="same name"):
        param_groups(Outer())
    del (outer := Outer())._orig_mod
    assert [name for name, _ in param_groups(outer)[0]["params"]] == ["weight", "module.weight"]


class Mixed(nn.Module):
    """A convolution, experts, a fused weight, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.experts = nn.Parameter(torch.ones(4, 8, 6))
        self.attention = nn.Linear(8, 16, bias=False)
        self.out = nn.Linear(8, 8)


def test_convolutions_experts_and_fused_weights_are_cut() -> None:
    model = Mixed()
    groups = param_groups(
        model, algorithm="dion2", split={r"attention": (8, 4, 4)}, heads={r"^out\.weight$": 2}
    )
    rows = {row.name: row for row in audit(Dion2(groups, compile=False)).rows}
    assert rows["stem.weight"].matrices == "1 of 8x27"
    assert rows["stem.weight"].why == "convolution"
    assert rows["experts"].matrices == "4 of 8x6"
    assert rows["attention.weight"].matrices == "1 of 8x8, 1 of 4x8, 1 of 4x8"
    assert rows["attention.weight"].scale == pytest.approx((1, 0.5**0.5, 0.5**0.5))
    assert rows["out.weight"].matrices == "2 of 4x8"
    assert {rows["stem.bias"].rule, rows["out.bias"].rule} == {"adamw"}


def test_a_pattern_that_matches_nothing_or_twice_is_refused() -> None:
    for options in ({"split": {"nowhere": (8, 8)}}, {"heads": {"nowhere": 2}}):
        with pytest.raises(ValueError, match="pattern 'nowhere' matches no parameter"):
            param_groups(Mixed(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"attention\.weight is matched by"):
        param_groups(Mixed(), split={"attention": (8, 8)}, heads={"weight": 2})


def test_strict_audit_fails_closed() -> None:
    model = Mixed()
    muon = Muon(param_groups(model, exclude=["out"]), compile=False)
    assert len(audit(muon, strict=True).rows) == len(list(model.parameters()))
    adamw = Muon(
        [{"params": [("experts", model.experts)], "algorithm": "adamw"}, *param_groups(model.out)],
        compile=False,
    )
    with pytest.raises(
        ValueError, match=r"not orthonormalized:\n  experts \(\[4, 8, 6\] float32 on one device\)"
    ):
        audit(adamw, strict=True)


@pytest.mark.parametrize("make_model", ["vit_b_16", "resnet18", "convnext_tiny"])
def test_torchvision_models_are_claimed_whole(make_model: str) -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = getattr(models, make_model)()
    groups = param_groups(model, algorithm="muon")
    claimed = [name for group in groups for name, _ in group["params"]]
    assert sorted(claimed) == sorted(name for name, _ in model.named_parameters())
    by_rule = {name: (group["algorithm"], group["split"]) for group in groups for name, _ in group["params"]}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert by_rule[f"{name}.weight"] == ("muon", "flatten")
    head = {"vit_b_16": "heads.head.weight", "resnet18": "fc.weight", "convnext_tiny": "classifier.2.weight"}
    assert by_rule[head[make_model]][0] == "adamw"
