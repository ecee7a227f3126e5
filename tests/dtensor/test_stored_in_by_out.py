"""Weights whose rows are inputs, experts that are cut, and heads of models that other modules hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dion_dtensor import Dion2, Muon, audit, param_groups


class Experts(nn.Module):
    """A gate and up above a down projection of every expert, stored as asked for."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(gate_up.clone())
        self.down_proj = nn.Parameter(down.clone())


def stepped(model: nn.Module, grads: list[Tensor], kind: type[Any], **options: Any) -> list[Tensor]:
    optimizer = kind(param_groups(model, algorithm=kind.__name__.lower(), **options), lr=0.1, compile=False)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad.clone()
    optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", [Muon, Dion2])
@pytest.mark.parametrize(
    ("out_in", "in_out"),
    [
        ({}, {}),
        ({"heads": {"gate_up": 2}}, {"heads": {"gate_up": 2}}),
        ({"split": {"gate_up": (5, 5)}}, {"split": {"gate_up": (5, 5)}}),
        ({"split": {"gate_up": (7, 3)}}, {"split": {"gate_up": (7, 3)}}),
        ({"split": {"gate_up": "interleaved_rows((1, 1), 5)"}},) * 2,
    ],
)
def test_experts_stored_as_in_by_out_step_as_their_transposes(
    kind: type[Any], out_in: dict[str, Any], in_out: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(3, 10, 8, dtype=torch.float64), torch.randn(3, 8, 5, dtype=torch.float64)]
    grads = [torch.randn_like(tensor) for tensor in tensors]
    straight = stepped(Experts(*tensors), grads, kind, **out_in)
    turned = [[tensor.mT.contiguous() for tensor in some] for some in (tensors, grads)]
    across = stepped(Experts(*turned[0]), turned[1], kind, **in_out)
    for one, other in zip(straight, across, strict=True):
        torch.testing.assert_close(one, other.mT, rtol=1e-12, atol=1e-12)


def test_each_expert_s_gate_and_up_are_matrices_of_their_own() -> None:
    torch.manual_seed(0)
    weight, grad = torch.randn(3, 10, 8, dtype=torch.float64), torch.randn(3, 10, 8, dtype=torch.float64)
    model = Experts(weight, torch.randn(3, 8, 5, dtype=torch.float64))
    fused, _ = stepped(model, [grad, torch.zeros(3, 8, 5, dtype=torch.float64)], Muon, heads={"gate_up": 2})
    for expert in range(3):
        for rows in (slice(0, 5), slice(5, 10)):
            alone = nn.Linear(8, 5, bias=False, dtype=torch.float64)
            alone.weight.data.copy_(weight[expert, rows])
            (expected,) = stepped(alone, [grad[expert, rows]], Muon)
            torch.testing.assert_close(fused[expert, rows], expected, rtol=1e-12, atol=1e-12)


def test_a_module_may_say_that_its_experts_are_stored_as_in_by_out() -> None:
    model = nn.Module()
    model.up_proj = nn.Parameter(torch.ones(3, 8, 20))
    assert audit(Muon(param_groups(model), compile=False)).rows[0].matrices == "3 of 8x20"
    model.is_transposed = True  # type: ignore[assignment]
    (row,) = audit(Muon(param_groups(model), compile=False)).rows
    assert (row.matrices, row.scale) == ("3 of 20x8", pytest.approx((2.5**0.5,)))


def test_the_rows_of_a_transposed_convolution_are_inputs() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, bias=False), nn.Conv2d(6, 4, 3, bias=False))
    rows = audit(Muon(param_groups(model), compile=False)).rows
    assert {row.name: (row.matrices, row.scale) for row in rows} == {
        "0.weight": ("1 of 4x54", pytest.approx((13.5**0.5,))),
        "1.weight": ("1 of 4x54", pytest.approx((13.5**-0.5,))),
    }


class Holder(nn.Module):
    """As a LightningModule holds a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, nn.CrossEntropyLoss()


def test_the_head_of_a_model_that_a_module_holds_is_found() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4, bias=False), "fc": nn.Linear(4, 2, bias=False)})
    for held in (Holder(model), Holder(Holder(model))):
        prefix = "model." if held.model is model else "model.model."
        matrices, rest = param_groups(held)
        assert [name for name, _ in matrices["params"]] == [f"{prefix}body.weight"]
        assert rest["reasons"] == {f"{prefix}fc.weight": "output head"}


def test_the_only_layer_of_a_stage_has_no_head() -> None:
    layer = nn.ModuleDict({"query": nn.Linear(4, 4, bias=False), "output": nn.Linear(4, 4, bias=False)})
    stage = nn.ModuleDict({"layers": nn.ModuleDict({"3": layer})})
    (matrices,) = param_groups(stage)
    assert [name for name, _ in matrices["params"]] == ["layers.3.query.weight", "layers.3.output.weight"]


@pytest.mark.parametrize(
    "split", [{"gate_up": "experts(rows(5, 5))"}, {"gate_up": "rows(5, 5)"}, {"gate_up": (5, 5)}]
)
def test_a_split_says_the_rows_of_the_logical_matrix_in_any_form(split: dict[str, Any]) -> None:
    model = Experts(torch.randn(3, 8, 10), torch.randn(3, 5, 8))
    groups = {
        group["split"]: [name for name, _ in group["params"]] for group in param_groups(model, split=split)
    }
    assert groups == {"experts(columns(5, 5))": ["gate_up_proj"], "experts(columns(8))": ["down_proj"]}
    whole = param_groups(model, split={"gate_up": "experts"})
    assert [group["split"] for group in whole] == ["experts(columns(10))", "experts(columns(8))"]


def test_a_gate_and_up_that_are_interleaved_are_not_cut_into_halves() -> None:
    model = Experts(torch.randn(3, 8, 10), torch.randn(3, 5, 8))
    model.is_concatenated = False  # type: ignore[assignment]
    for options in ({"heads": {"gate_up": 2}}, {"split": {"gate_up": (5, 5)}}):
        with pytest.raises(ValueError, match=r"gate_up_proj \[3, 8, 10\].*'interleaved_rows\(\(1, 1\), 5\)'"):
            param_groups(model, **options)  # type: ignore[arg-type]
    groups = param_groups(model, split={"gate_up": "interleaved_rows((1, 1), 5)"})
    assert "experts(interleaved_columns((1, 1,), 5))" in [group["split"] for group in groups]


def test_what_cannot_be_cut_is_told_by_name() -> None:
    model = Experts(torch.randn(3, 8, 10), torch.randn(3, 5, 8))
    with pytest.raises(ValueError, match=r"gate_up_proj \[3, 8, 10\], stored as \[in, out\].*divide by 3"):
        param_groups(model, heads={"gate_up": 3})
    with pytest.raises(TypeError, match=r"heads=\{'gate_up': \(5, 5\)\} must be a number"):
        param_groups(model, heads={"gate_up": (5, 5)})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"so many equal blocks are heads\(2\)"):
        param_groups(model, split={"gate_up": 2})  # type: ignore[dict-item]
    tied = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'0' is to cut matrices, but matches only 0\.weight \(embedding\)"):
        param_groups(tied, heads={"0": 2})
    assert param_groups(tied, heads={"0": 2}, missing_ok=True)


class Pretrained(nn.Module):
    """Names its output as Hugging Face's do, and holds a pooler that is called a head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.ModuleDict({"dense": nn.Linear(4, 4, bias=False)})
        self.predictions = nn.Linear(4, 9, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.predictions


def test_a_model_may_name_its_output_itself() -> None:
    matrices, rest = param_groups(Pretrained())
    assert matrices["reasons"] == {"head.dense.weight": "matrix"}
    assert rest["reasons"] == {"predictions.weight": "output head"}


@pytest.mark.parametrize("name", ["ctc_head", "head", "cls_score", "token_classifier"])
def test_a_linear_is_a_head_by_its_name(name: str) -> None:
    model = nn.ModuleDict(
        {"body": nn.ModuleDict({"proj": nn.Linear(4, 4, bias=False), name: nn.Linear(4, 2)})}
    )
    assert param_groups(model)[-1]["reasons"][f"body.{name}.weight"] == "output head"


def test_small_parameters_that_modules_hold_are_no_matrices() -> None:
    model = nn.Module()
    for name, shape in {"pos_bias_u": (4, 8), "biases": (4, 8), "latents": (6, 8), "D": (1, 8)}.items():
        model.register_parameter(name, nn.Parameter(torch.ones(shape)))
    model.gate = nn.Linear(8, 1, bias=False)
    matrices, rest = param_groups(model)
    assert [name for name, _ in matrices["params"]] == ["gate.weight"]
    assert len(rest["params"]) == 4
    audit(Muon([matrices, rest], compile=False), strict=True)


class QuantEmbedding(nn.Module):
    """As a quantized model has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(9, 4))


def test_embeddings_are_known_in_other_clothes() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Embedding(9, 4))
    for model in (normed, nn.Sequential(QuantEmbedding())):
        (rest,) = param_groups(model)
        assert "embedding" in rest["reasons"].values()
