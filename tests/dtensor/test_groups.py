"""Which parameter follows which rule, and what is refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dion_dtensor import Dion, Dion2, Muon, NorMuon, audit, param_groups
from dion_dtensor.optimizer import OrthonormalOptimizer
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


def test_a_pattern_may_be_any_name_of_a_tied_parameter() -> None:
    model = Small()
    model.lm_head.weight = model.embedding.weight
    *_, rest = param_groups(model, exclude=["lm_head"])
    assert rest["reasons"]["embedding.weight"] == "excluded"
    model.down.weight = nn.Parameter(torch.ones(12, 6))
    model.up.weight = model.down.weight
    (matrices, _) = param_groups(model, heads={r"^down\.": 2})
    assert [(name, matrices["split"]) for name, _ in matrices["params"]] == [("up.weight", "heads(2)")]


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


class Wrapped(nn.Module):
    """As DistributedDataParallel names a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("head", ["fc", "classifier", "score", "heads", "output"])
def test_a_head_is_found_within_wrappers(head: str) -> None:
    model = nn.Sequential(
        OrderedDict({"body": nn.Linear(4, 4, bias=False), head: nn.Linear(4, 4, bias=False)})
    )
    for wrapped in (model, torch.compile(model), Wrapped(model), Wrapped(torch.compile(model))):
        matrices, rest = param_groups(wrapped)
        assert [name for name, _ in matrices["params"]] == ["body.weight"]
        assert rest["reasons"] == {f"{head}.weight": "output head"}


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
        param_groups(Mixed(), split={"attention": (8, 8)}, heads={"tion.weight": 2})


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


class Conv1D(nn.Module):
    """As Hugging Face's: the weight is stored as [in, out]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


class Tables(nn.Module):
    """What is no matrix although it has dims enough."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.ones(1, 1, 8))
        self.pos_embedding = nn.Parameter(torch.ones(1, 5, 8))
        self.relative_position_bias_table = nn.Parameter(torch.ones(9, 3))
        self.layer_scale = nn.Parameter(torch.ones(8, 1, 1))
        self.layer_weight = nn.Parameter(torch.ones(8, 1, 1))
        self.norm_scale = nn.Parameter(torch.ones(4, 8))
        self.D = nn.Parameter(torch.ones(2, 8))
        self.learned_queries = nn.Parameter(torch.ones(5, 8))
        self.scale_shift_table = nn.Parameter(torch.ones(6, 8))
        self.registers, self.codebook = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(9, 8))
        self.freqs = nn.Parameter(torch.ones(2, 3, 3, 8))
        for name in ("gain", "alpha", "beta", "gamma", "scales"):
            self.register_parameter(name, nn.Parameter(torch.ones(4, 8)))
        self.down_proj_bias = nn.Parameter(torch.ones(4, 8))
        self.A_log = nn.Parameter(torch.ones(8, 4))
        self.tokenizer = nn.Linear(8, 8, bias=False)


def test_tables_and_scales_are_no_matrices() -> None:
    groups = param_groups(Tables())
    rows = {row.name: row for row in audit(Muon(groups, compile=False), strict=True).rows}
    assert {name: (row.rule, row.why) for name, row in rows.items()} == {
        "class_token": ("adamw", "embedding"),
        "pos_embedding": ("adamw", "embedding"),
        "relative_position_bias_table": ("adamw", "embedding"),
        "layer_scale": ("adamw", "no matrix, by its name"),
        "layer_weight": ("adamw", "no stack of matrices"),
        "norm_scale": ("adamw", "no matrix, by its name"),
        "D": ("adamw", "no matrix, by its name"),
        **dict.fromkeys(("scale_shift_table", "registers", "codebook"), ("adamw", "embedding")),
        **dict.fromkeys(("learned_queries", "freqs"), ("adamw", "no matrix, by its name")),
        **dict.fromkeys(("gain", "alpha", "beta", "gamma", "scales"), ("adamw", "no matrix, by its name")),
        "down_proj_bias": ("adamw", "no matrix, by its name"),
        "A_log": ("adamw", "no matrix, by its name"),
        "tokenizer.weight": ("muon", "matrix"),
    }


def test_a_conv1d_steps_as_the_linear_layer_that_it_is() -> None:
    """Its scale, its blocks and its heads are those of the transpose."""
    model = nn.ModuleDict({"c_attn": Conv1D(24, 8), "c_fc": Conv1D(32, 8), "q": Conv1D(8, 8)})
    linear = nn.ModuleDict({name: nn.Linear(8, len(layer.bias)) for name, layer in model.items()})
    with torch.no_grad():
        for name, layer in model.items():
            linear[name].weight.copy_(layer.weight.mT)
            layer.weight.grad = torch.randn_like(layer.weight)
            linear[name].weight.grad = layer.weight.grad.mT.contiguous()
    options: dict[str, Any] = {"split": {r"c_attn\.weight": (8, 8, 8)}, "heads": {r"^q\.weight": 2}}
    for algorithm in ("muon", "normuon"):
        ours, theirs = (
            {"muon": Muon, "normuon": NorMuon}[algorithm](
                param_groups(m, algorithm, **options), compile=False
            )
            for m in (model, linear)
        )
        matrices = {row.name: row.matrices for row in audit(ours).rows}
        assert matrices["c_attn.weight"] == "1 of 8x8, 1 of 8x8, 1 of 8x8"
        assert matrices["c_fc.weight"] == "1 of 32x8"
        ours.step()
        theirs.step()
        for name, layer in model.items():
            torch.testing.assert_close(layer.weight, linear[name].weight.mT, rtol=1e-5, atol=1e-6)


def test_a_conv1d_is_one_as_a_subclass_too() -> None:
    model = nn.ModuleDict({"c_fc": type("FSDPConv1D", (Conv1D,), {})(32, 8)})  # as fully_shard makes it
    (group, _) = param_groups(model)
    assert group["split"] == "columns(32)"


@pytest.mark.parametrize("make_model", ["vit_b_16", "resnet18", "convnext_tiny", "swin_t"])
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
            depthwise = module.groups == module.in_channels > 1
            assert by_rule[f"{name}.weight"] == (("adamw", None) if depthwise else ("muon", "flatten"))
    head = {
        "vit_b_16": "heads.head.weight",
        "resnet18": "fc.weight",
        "convnext_tiny": "classifier.2.weight",
        "swin_t": "head.weight",
    }
    assert by_rule[head[make_model]][0] == "adamw"
    tables = ("class_token", "pos_embedding", "layer_scale", "relative_position_bias_table")
    assert {by_rule[name][0] for name in claimed if name.rsplit(".", 1)[-1] in tables} <= {"adamw"}


def test_the_audit_of_an_optimizer_whose_parameters_were_replaced_says_so() -> None:
    optimizer = Muon([(name, nn.Parameter(torch.ones(3, 4))) for name in ("one", "other")])
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 \(muon\), now \[3, 4\].*is not the one"):
        audit(optimizer)


def test_one_pattern_needs_no_list_and_may_match_nothing_if_that_is_said() -> None:
    matrices, rest = param_groups(Small(), exclude="down")
    assert [name for name, _ in matrices["params"]] == ["up.weight"]
    assert rest["reasons"]["down.weight"] == "excluded"
    assert "up.weight" not in rest["reasons"]
    with pytest.raises(ValueError, match=r"exclude pattern 'decoder' matches no parameter"):
        param_groups(Small(), exclude="decoder")
    assert len(param_groups(Small(), exclude="decoder", split={"qkv": (2, 2)}, missing_ok=True)) == 2


def test_the_first_fsdp_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):  # torch's needs a process group to be made
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._fsdp_wrapped_module = module

    with pytest.raises(ValueError, match=r"block is wrapped by FullyShardedDataParallel .*fully_shard"):
        param_groups(nn.ModuleDict({"block": FullyShardedDataParallel(Small())}))


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "old_weight_norm"])
def test_a_normalized_weight_is_sorted_as_the_weight(norm: str) -> None:
    old, new = torch.nn.utils.weight_norm, torch.nn.utils.parametrizations
    make = old if norm == "old_weight_norm" else getattr(new, norm)
    model = nn.ModuleDict(
        {"conv": make(nn.Conv1d(6, 8, 3)), "up": make(nn.Linear(6, 8)), "head": make(nn.Linear(8, 4))}
    )
    rows = {row.name: row for row in audit(Muon(param_groups(model), compile=False)).rows}
    matrices = {name.split(".")[0]: row.matrices for name, row in rows.items() if row.rule == "muon"}
    assert matrices == {"conv": "1 of 8x18", "up": "1 of 8x6"}
    left = {row.why for row in rows.values() if row.rule != "muon"}
    assert left == {"1-D", "output head"} | (
        set() if norm == "spectral_norm" else {"magnitudes of a weight norm"}
    )


def test_groups_do_not_share_a_learning_rate_that_schedules_write_into() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Conv1d(3, 8, 3))
    groups = [g for g in param_groups(model, lr=torch.tensor(0.1)) if g["algorithm"] == "muon"]
    assert len(groups) == 2
    assert groups[0]["lr"] is not groups[1]["lr"]


def test_empty_parameters_are_no_matrices() -> None:
    groups = param_groups(nn.Linear(6, 0))
    assert [group["algorithm"] for group in groups] == ["adamw"]


def test_reasons_are_not_saved_with_the_groups() -> None:
    """torch.distributed.checkpoint would write all of them for each parameter."""
    optimizer = optimizer_of(Small())
    assert all("reasons" not in group for group in optimizer.state_dict()["param_groups"])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["reasons"] = {"of": "an older version"}
    optimizer.load_state_dict(saved)
    assert all("reasons" not in group for group in optimizer.param_groups)
    assert {row.why for row in audit(optimizer).rows} >= {"embedding", "output head"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: param_groups(list(Small().parameters())), TypeError, "an nn.Module .* given a list"),
        (lambda: audit(torch.optim.SGD(Small().parameters())), TypeError, "of this package, not a SGD"),
        (lambda: param_groups(Small(), scalar="sgd"), ValueError, r"choose from \['adamw', 'lion'\]"),
        (
            lambda: Muon(Small().parameters(), betas=(0.9, 0.9)),
            TypeError,
            r"no betas; .*groups\[-1\]\['betas'\]",
        ),
        (lambda: Muon(Small().parameters(), ns_steps=5), TypeError, "no ns_steps; .*It takes atomic, "),
        (lambda: Muon([nn.Parameter(torch.eye(2))], momentum=0.9), ValueError, "its factor is mu"),
        (
            lambda: Muon([nn.Parameter(torch.eye(2))], scale="match_rms_adamw"),
            ValueError,
            "is 'moonlight' here; choose from",
        ),
        (
            lambda: OrthonormalOptimizer([], algorithm="muon", options={"muu": 0.5}, lr=0.1),
            TypeError,
            "muon takes no muu. It takes .*mu, ",
        ),
    ],
)
def test_what_others_call_otherwise_is_refused_with_its_name_here(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
