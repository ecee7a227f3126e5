"""On one device: each step against the oracle, from a shared state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dion_ref
from dion_dtensor.orthonormalize import POLYNOMIALS
from dion_dtensor.orthonormalize.polynomial import norm_factor_of
from dion_dtensor.philox import normal
from dion_dtensor.scale import SCALES, scale_factor
from dion_dtensor.selection import column_sums, row_sums
from dion_ref.philox import normal as oracle_normal
from tests.dtensor.programs import OPTIMIZERS

STATE_FIELDS = {
    "muon": ["momentum"],
    "normuon": ["momentum", "variance"],
    "dion": ["momentum", "Q"],
    "orth_dion": ["momentum", "Q"],
    "dion2": ["momentum"],
    "dion3": ["momentum", "variance"],
    "adamw": ["exp_avg", "exp_avg_sq"],
    "lion": ["exp_avg"],
}


def step_errors(
    algorithm: str,
    shapes: list[tuple[int, ...]],
    gradients: list[list[Tensor]],
    *,
    device: str = "cpu",
    compile: bool = False,
    **options: Any,
) -> list[float]:
    """The relative error of weights, P Q^T-relevant state and all, for each step, from the optimizer's own state."""
    generator = torch.Generator().manual_seed(1)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(device))
        for shape in shapes
    ]
    named = [(f"layer{index}.weight", parameter) for index, parameter in enumerate(parameters)]
    common = {"lr": 0.03, "weight_decay": 0.2, "cautious": options.pop("cautious", False)}
    group = {"params": named, "algorithm": algorithm, **common, **options}
    if algorithm == "orth_dion":
        group |= {"algorithm": "dion", "right_factor": "orthonormalize"}
    optimizer = OPTIMIZERS[algorithm]([group], compile=compile)
    oracle = dion_ref.ALGORITHMS[algorithm]
    hyper = oracle.Hyper(**common, **options)
    states = [oracle.init(p.detach().cpu(), hyper, name=name) for name, p in named]
    errors = []
    for step in gradients:
        old = [parameter.detach().clone() for parameter in parameters]
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.to(device, copy=True)
        optimizer.step()
        for index, (parameter, gradient) in enumerate(zip(parameters, step, strict=True)):
            expected, states[index] = oracle.step(old[index].cpu(), gradient, states[index], hyper)
            errors.append(relative((parameter.detach() - old[index]).cpu(), expected - old[index].cpu()))
            for key in STATE_FIELDS[algorithm]:
                ours, theirs = optimizer.state[parameter][key].cpu(), getattr(states[index], key)
                if key == "Q":
                    ours = ours * (ours * theirs).sum(0, keepdim=True).sign()
                errors.append(relative(ours, theirs))
                # From a shared state: what the oracle has, but for the signs of Q.
                optimizer.state[parameter][key].copy_(theirs)
    return errors


def relative(ours: Tensor, theirs: Tensor) -> float:
    size = float(theirs.norm())
    return float((ours - theirs).norm()) / size if size else float((ours - theirs).norm())


def random_gradients(shapes: list[tuple[int, ...]], steps: int = 3, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for _ in range(steps)
    ]


SHAPES: list[tuple[int, ...]] = [(6, 4), (4, 6), (6, 4), (5, 5), (1, 1), (1, 5), (5, 1)]

MUON_OPTIONS = [
    {},
    {"nesterov": True},
    {"momentum": "ema"},
    {"momentum": "ema", "nesterov": True, "polynomial": "keller", "epsilon": 1e-7, "scale": "keller"},
    {"momentum": "ema", "nesterov": True, "polynomial": "keller", "epsilon": 1e-7, "epsilon_rule": "clamp"},
    {"polynomial": "you", "scale": "nvidia", "epsilon": 1e-15, "epsilon_rule": "clamp"},
    {"polynomial": "polar_express_gns", "scale": "moonlight", "norm_factor": 1.05},
    {"polynomial": ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0)), "scale": None},
    {"cautious": True, "mu": 0.8},
    {"momentum": "ema", "bias_correction": True, "mu": 0.0},
    {
        "momentum": "ema",
        "bias_correction": True,
        "nesterov": True,
        "scale": "keller",
        "weight_storage": "in_out",
    },
]


@pytest.mark.parametrize("options", MUON_OPTIONS, ids=str)
def test_muon_follows_the_oracle(options: dict[str, Any]) -> None:
    assert max(step_errors("muon", SHAPES, random_gradients(SHAPES), **options)) < 1e-13


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_fraction": 0.5},
        {"rank_fraction": 0.26, "rank_multiple": 2},
        {"scale": None, "cautious": True},
        {"weight_storage": "in_out"},
    ],
    ids=str,
)
def test_dion_follows_the_oracle(options: dict[str, Any]) -> None:
    assert max(step_errors("dion", SHAPES, random_gradients(SHAPES), **options)) < 1e-11


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("normuon", {}),
        ("normuon", {"nesterov": True, "momentum": "ema", "beta2": 0.9, "variance_epsilon": 1e-10}),
        ("normuon", {"momentum": "ema", "bias_correction": True, "weight_storage": "in_out"}),
        ("normuon", {"scale": "moonlight", "polynomial": "keller", "cautious": True}),
        ("dion2", {}),
        ("dion2", {"fraction": 1.0, "weight_storage": "in_out"}),
        ("dion2", {"fraction": 0.07, "mu": 0.5, "cautious": True, "scale": "keller"}),
        ("dion3", {}),
        ("dion3", {"fraction": 1.0, "beta2": 0.5}),
        ("dion3", {"fraction": 0.55, "polynomial": "you", "epsilon_rule": "clamp"}),
    ],
    ids=str,
)
def test_rules_on_rows_follow_the_oracle(algorithm: str, options: dict[str, Any]) -> None:
    assert max(step_errors(algorithm, SHAPES, random_gradients(SHAPES, 4), **options)) < 1e-13


@pytest.mark.parametrize("options", [{}, {"rank_fraction": 0.5}, {"scale": None, "cautious": True}], ids=str)
def test_orth_dion_follows_the_oracle(options: dict[str, Any]) -> None:
    assert max(step_errors("orth_dion", SHAPES, random_gradients(SHAPES), **options)) < 1e-11


@pytest.mark.parametrize("algorithm", ["dion2", "dion3"])
def test_ties_go_to_the_lowest_index(algorithm: str) -> None:
    """Rows that are permutations of one another: their sums are the same, in whatever order they are added."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(9, generator=generator, dtype=torch.float64)
    tied = torch.stack([row[torch.randperm(9, generator=generator)] for _ in range(7)])
    parameter = torch.nn.Parameter(torch.zeros_like(tied))
    optimizer = OPTIMIZERS[algorithm]([parameter], fraction=0.4, compile=False)
    parameter.grad = tied
    optimizer.step()
    assert parameter.detach().abs().sum(1).gt(0).tolist() == [True] * 3 + [False] * 4


@pytest.mark.parametrize("size", [2.0**-1030, 1e-30, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_are_exact_in_whatever_order(dtype: torch.dtype, size: float) -> None:
    """Also of subnormal numbers, and of rows beside others of another size altogether."""
    generator = torch.Generator().manual_seed(0)
    tail = torch.randn(4, 40, 300, generator=generator, dtype=torch.float64)
    stack = (tail * 2.0 ** torch.randint(-40, 40, (1, 40, 1), generator=generator) * size).to(dtype)
    owner = torch.zeros(300, dtype=torch.long)
    rows, columns = row_sums(stack), column_sums(stack.mT.contiguous(), owner, [300])
    for _ in range(5):
        shuffled = stack[..., torch.randperm(300, generator=generator)]
        assert torch.equal(rows, row_sums(shuffled))
        assert torch.equal(columns, column_sums(shuffled.mT, owner, [300]))
    torch.testing.assert_close(rows, stack.double().abs().sum(-1), rtol=1e-13, atol=2.0**-1050)
    torch.testing.assert_close(columns.squeeze(1), rows, rtol=1e-13, atol=2.0**-1050)


@pytest.mark.parametrize(("tall", "split"), [(False, None), (True, None), (False, "rows(24, 24)")])
def test_a_row_is_not_rounded_by_a_larger_one(tall: bool, split: str | None) -> None:
    """All rows but one are 1e30 times smaller; which of them are chosen still follows the sums in float64."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.rand(2, 24, 30, generator=generator) * 1e-10
    stack[:, 3] = 1e20
    weight = stack.mT[0] if tall else stack.reshape(48, 30) if split else stack[0]
    parameter = torch.nn.Parameter(torch.zeros_like(weight).contiguous())
    group: dict[str, Any] = {"params": [("w", parameter)], **({"split": split} if split else {})}
    optimizer = OPTIMIZERS["dion2"]([group], fraction=0.25, compile=False)
    parameter.grad = weight.contiguous()
    optimizer.step()
    for index, matrix in enumerate(stack if split else stack[:1]):
        own = parameter.detach()[24 * index : 24 * (index + 1)] if split else parameter.detach()
        changed = own.abs().sum(0 if tall else 1) > 0
        chosen = matrix.double().sum(1).topk(6).indices
        # The momentum decays where it is chosen, which the small directions cannot show in float32.
        momentum = optimizer.state[parameter]["momentum"]
        kept = momentum.mT if tall else momentum[24 * index : 24 * (index + 1)] if split else momentum
        assert torch.equal((kept != matrix).all(1).nonzero().flatten(), chosen.sort().values)
        assert bool(changed[3])


@pytest.mark.parametrize("algorithm", ["adamw", "lion"])
@pytest.mark.parametrize("options", [{}, {"betas": (0.8, 0.99)}, {"cautious": True}], ids=str)
def test_elementwise_rules_follow_the_oracle(algorithm: str, options: dict[str, Any]) -> None:
    shapes: list[tuple[int, ...]] = [(3,), (4, 2), (), (2, 3, 4)]
    assert max(step_errors(algorithm, shapes, random_gradients(shapes), **options)) < 1e-13


@pytest.mark.parametrize("algorithm", ["dion", "orth_dion"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_dion_leaves_out_what_a_deficient_momentum_lacks(rank: int, algorithm: str) -> None:
    shapes: list[tuple[int, ...]] = [(8, 6), (6, 8), (6, 6)]
    generator = torch.Generator().manual_seed(3)

    def deficient(shape: tuple[int, ...]) -> Tensor:
        left = torch.randint(-3, 4, (shape[0], rank), generator=generator)
        return (left @ torch.randint(-3, 4, (rank, shape[1]), generator=generator)).double()

    gradients = [[deficient(shape) for shape in shapes], *random_gradients(shapes, 2)]
    assert max(step_errors(algorithm, shapes, gradients)) < 1e-11


def test_dion_finds_a_dead_column_before_an_independent_one() -> None:
    """Columns e1, e1, e2: a bare QR spends e2 on the second column, and would lose the third."""
    from dion_dtensor.orthonormalize import orthonormal_basis

    stack = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    basis = orthonormal_basis(stack, torch.ones(1, 1, 3, dtype=torch.float64))
    expected = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    assert torch.equal(basis.abs(), expected)


@settings(max_examples=60, deadline=None)
@given(
    algorithm=st.sampled_from(["muon", "normuon", "dion", "dion2", "dion3"]),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 1000),
    exponent=st.integers(-6, 6),
)
def test_any_shape_and_size(algorithm: str, shape: tuple[int, int], seed: int, exponent: int) -> None:
    gradients = [[grad * 10.0**exponent for grad in step] for step in random_gradients([shape], 2, seed)]
    # A square Gaussian matrix may be nearly singular, and the last column of P is then worth that many digits less.
    bound = 1e-9 if algorithm == "dion" else 1e-12
    assert max(step_errors(algorithm, [shape], gradients)) < bound


def test_tables_agree_with_the_oracle() -> None:
    for name, coefficients in POLYNOMIALS.items():
        theirs = torch.tensor(dion_ref.POLYNOMIALS[name].coefficients, dtype=torch.float64)
        torch.testing.assert_close(
            torch.tensor(coefficients, dtype=torch.float64), theirs, rtol=1e-15, atol=0
        )
        assert norm_factor_of(name) == dion_ref.POLYNOMIALS[name].norm_factor
    assert set(POLYNOMIALS) == set(dion_ref.POLYNOMIALS)
    for name in SCALES:
        hyper = dion_ref.ALGORITHMS["muon"].Hyper(scale=name, lr=1.0, weight_decay=0.0)
        for shape in ((3, 7), (7, 3), (4, 4)):
            param, grad = torch.zeros(shape, dtype=torch.float64), torch.eye(*shape, dtype=torch.float64)
            unscaled, _ = dion_ref.ALGORITHMS["muon"].step(
                param,
                grad,
                dion_ref.ALGORITHMS["muon"].init(param, hyper),
                dion_ref.ALGORITHMS["muon"].Hyper(scale=None, lr=1.0, weight_decay=0.0),
            )
            scaled, _ = dion_ref.ALGORITHMS["muon"].step(
                param, grad, dion_ref.ALGORITHMS["muon"].init(param, hyper), hyper
            )
            torch.testing.assert_close(scaled, unscaled * scale_factor(name, shape), rtol=1e-14, atol=0)


def test_normal_values_are_those_of_the_oracle() -> None:
    ours = normal(5, 7, seed=3, name="blocks.0.weight", matrix=2)
    torch.testing.assert_close(
        ours, oracle_normal(5, 7, seed=3, name="blocks.0.weight", matrix=2), rtol=1e-14, atol=1e-15
    )
    assert torch.equal(ours[:3, :5], normal(3, 5, seed=3, name="blocks.0.weight", matrix=2))
    assert not torch.equal(ours, normal(5, 7, seed=4, name="blocks.0.weight", matrix=2))
    assert not torch.equal(ours, normal(5, 7, seed=3, name="blocks.1.weight", matrix=2))
