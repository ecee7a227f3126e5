from __future__ import annotations

import math

import pytest
import torch

from dion_ref import ALGORITHMS, PRESETS, Convention, Precision
from dion_ref.update import scale_factor

from .helpers import gaussian, on_singular_values, relative, run

KELLER = (3.4445, -4.7750, 2.0315)
YOU = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MU, LR, WD = 0.9, 0.03, 0.1
SHAPES = [(12, 7), (7, 12), (9, 9)]


def directions_sum(grads):
    M = torch.zeros_like(grads[0])
    for G in grads:
        M = MU * M + G
        yield M, G


def directions_ema(grads):
    M = torch.zeros_like(grads[0])
    for G in grads:
        M = MU * M + (1 - MU) * G
        yield M, G


def dialect(preset: str, grads, m: int, n: int):
    """Each preset written out: (orthonormalizer's input, divisor, coefficients, scale) at each step."""
    for t, (M, G) in enumerate(
        (directions_sum if preset in ("dion", "moonlight") else directions_ema)(grads), 1
    ):
        size = lambda X: float(torch.sqrt((X * X).sum()))  # noqa: E731
        if preset == "dion":
            yield M, 1.02 * size(M) + 1e-8, POLAR_EXPRESS, math.sqrt(m / n)
        elif preset == "keller":
            X = MU * M + (1 - MU) * G
            yield X, size(X) + 1e-7, (KELLER,) * 5, math.sqrt(max(1, m / n))
        elif preset == "torch":
            X = MU * M + (1 - MU) * G
            yield X, max(size(X), 1e-7), (KELLER,) * 5, math.sqrt(max(1, m / n))
        elif preset == "moonlight":
            X = MU * M + G
            yield X, size(X) + 1e-7, (KELLER,) * 5, 0.2 * math.sqrt(max(m, n))
        elif preset == "nvidia":
            yield M, max(size(M), 1e-15), YOU, math.sqrt(max(m, n))
        elif preset == "optax":
            X = MU * M / (1 - MU ** (t + 1)) + (1 - MU) * G / (1 - MU**t)
            yield X, size(X) + 1e-8, (KELLER,) * 5, math.sqrt(max(1, n / m))


@pytest.mark.parametrize("size", [1.0, 1e-9])  # the small one shows where epsilon stands
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_against_their_formulas(preset, shape, size):
    W = gaussian(*shape)
    grads = [size * gaussian(*shape, seed=seed) for seed in (1, 2, 3)]
    hyper = PRESETS[preset].hyper("muon", lr=LR, mu=MU, weight_decay=WD)
    wanted = W
    for X, divisor, coefficients, scale in dialect(preset, grads, *shape):
        wanted = wanted * (1 - LR * WD) - LR * scale * on_singular_values(X, coefficients, divisor)
    got, state = run("muon", W, grads, hyper)
    assert relative(got - W, wanted - W) < 1e-12
    assert state.step == 3


def test_presets_are_all_different_and_sourced():
    assert list(PRESETS) == ["dion", "keller", "torch", "moonlight", "nvidia", "optax"]
    grads = [1e-7 * gaussian(8, 6, seed=seed) for seed in (1, 2)]
    weights = [run("muon", gaussian(8, 6), grads, p.hyper("muon"))[0] for p in PRESETS.values()]
    for i in range(len(weights)):
        for j in range(i):
            assert relative(weights[i], weights[j]) > 1e-5
    assert all(len(p.source) > 10 for p in PRESETS.values())


PRESET_FIELDS = {  # momentum, nesterov, bias_correction, polynomial, epsilon, rule, norm_factor, scale, storage
    "dion": ("sum", False, False, "polar_express", 1e-8, "add", None, "spectral_norm", "out_in"),
    "keller": ("ema", True, False, "keller", 1e-7, "add", None, "keller", "out_in"),
    "torch": ("ema", True, False, "keller", 1e-7, "clamp", None, "keller", "out_in"),
    "moonlight": ("sum", True, False, "keller", 1e-7, "add", None, "moonlight", "out_in"),
    "nvidia": ("ema", False, False, "you", 1e-15, "clamp", None, "nvidia", "out_in"),
    "optax": ("ema", True, True, "keller", 1e-8, "add", None, "keller", "in_out"),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_fields(preset):
    fields = vars(PRESETS[preset]).copy()
    del fields["source"]
    assert tuple(fields.values()) == PRESET_FIELDS[preset]


CHANGES = {
    "momentum": "ema",
    "nesterov": True,
    "polynomial": "you",
    "epsilon": 1e-3,
    "epsilon_rule": "clamp",
    "norm_factor": 1.1,
    "scale": "keller",
    "weight_storage": "in_out",
}


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_of_a_convention_reaches_the_step(field):
    W, grads = gaussian(6, 9), [1e-2 * gaussian(6, 9, seed=seed) for seed in (1, 2)]
    base, _ = run("muon", W, grads, Convention(epsilon=1e-4).hyper("muon"))
    changed, _ = run(
        "muon", W, grads, Convention(**({"epsilon": 1e-4} | {field: CHANGES[field]})).hyper("muon")
    )
    assert relative(changed - W, base - W) > 1e-6


def test_bias_correction_reaches_the_step():
    W, grads = gaussian(6, 9), [1e-2 * gaussian(6, 9, seed=seed) for seed in (1, 2)]
    for nesterov in (False, True):
        ema = {"momentum": "ema", "nesterov": nesterov, "epsilon": 1e-4}
        base, _ = run("muon", W, grads, Convention(**ema).hyper("muon"))
        changed, _ = run("muon", W, grads, Convention(**ema, bias_correction=True).hyper("muon"))
        assert relative(changed - W, base - W) > 1e-4


def test_bias_correction_without_nesterov():
    hyper = ALGORITHMS["muon"].Hyper(
        momentum="ema", bias_correction=True, mu=MU, polynomial=((1.0, 0.0, 0.0),)
    )
    W, grads = torch.zeros(3, 3, dtype=torch.float64), [gaussian(3, 3, seed=1), gaussian(3, 3, seed=2)]
    first, state = ALGORITHMS["muon"].step(W, grads[0], ALGORITHMS["muon"].init(W, hyper), hyper)
    second, _ = ALGORITHMS["muon"].step(W, grads[1], state, hyper)
    M2 = (MU * (1 - MU) * grads[0] + (1 - MU) * grads[1]) / (1 - MU**2)
    assert relative(first, -0.01 * grads[0] / (torch.linalg.matrix_norm(grads[0]) + 1e-8)) < 1e-14
    assert relative(second, -0.01 * M2 / (torch.linalg.matrix_norm(M2) + 1e-8)) < 1e-14


def test_sum_and_ema_agree_in_direction_at_a_fixed_momentum():
    W, grads = gaussian(8, 5), [gaussian(8, 5, seed=seed) for seed in range(1, 5)]
    hypers = [
        ALGORITHMS["muon"].Hyper(momentum=momentum, polynomial="exact", weight_decay=0.0)
        for momentum in ("sum", "ema")
    ]
    a, b = (run("muon", W, grads, hyper)[0] - W for hyper in hypers)
    assert relative(a, b) < 1e-12


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_torch_optim_muon(shape, nesterov, adjust, monkeypatch):
    # torch iterates in bfloat16; without that cast its mathematics runs in float64
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    scale = {"original": "keller", "match_rms_adamw": "moonlight", "spectral_unclamped": "spectral_norm"}[
        adjust
    ]
    hyper = PRESETS["torch"].hyper("muon", lr=LR, mu=MU, weight_decay=WD, nesterov=nesterov, scale=scale)
    W, grads = gaussian(*shape), [gaussian(*shape, seed=seed) for seed in range(1, 6)]
    parameter = torch.nn.Parameter(W.clone())
    try:
        theirs = torch.optim.Muon(
            [parameter], lr=LR, momentum=MU, weight_decay=WD, nesterov=nesterov, adjust_lr_fn=adjust
        )
    except ValueError:
        pytest.skip(f"this torch knows no adjust_lr_fn={adjust!r}")
    for grad in grads:
        parameter.grad = grad.clone()
        theirs.step()
    ours, state = run("muon", W, grads, hyper)
    assert relative(ours - W, parameter.detach() - W) < 1e-13
    assert relative(state.momentum, theirs.state[parameter]["momentum_buffer"]) < 1e-15


def test_exact_is_the_polar_factor():
    W, G = gaussian(9, 5), gaussian(9, 5, seed=1)
    hyper = ALGORITHMS["muon"].Hyper(polynomial="exact", scale=None, lr=1.0, weight_decay=0.0)
    U = W - run("muon", W, [G], hyper)[0]
    eigenvalues, V = torch.linalg.eigh(G.mT @ G)
    wanted = G @ V @ torch.diag(eigenvalues.rsqrt()) @ V.mT
    assert relative(U, wanted) < 1e-12


def test_literal_polynomial_equals_its_name():
    W, G = gaussian(6, 4), gaussian(6, 4, seed=1)
    Hyper = ALGORITHMS["muon"].Hyper
    named, _ = run("muon", W, [G], Hyper(polynomial="polar_express"))
    literal, _ = run(
        "muon", W, [G], Hyper(polynomial=[list(step) for step in POLAR_EXPRESS], norm_factor=1.02)
    )
    assert torch.equal(named, literal)


@pytest.mark.parametrize(
    ("scale", "shape", "storage", "factor"),
    [
        ("keller", (1024, 4096), "out_in", 1.0),
        ("keller", (4096, 1024), "out_in", 2.0),
        ("keller", (4096, 1024), "in_out", 1.0),
        ("moonlight", (1024, 4096), "out_in", 12.8),
        ("rms_norm", (1024, 4096), "in_out", 12.8),
        ("nvidia", (1024, 4096), "out_in", 64.0),
        ("spectral_norm", (1024, 4096), "out_in", 0.5),
        ("spectral_norm", (1024, 4096), "in_out", 2.0),
        (None, (1024, 4096), "out_in", 1.0),
    ],
)
def test_scales(scale, shape, storage, factor):
    assert scale_factor(scale, *shape, storage) == pytest.approx(factor, rel=1e-15)


def test_precision_shows_what_a_dtype_can_give():
    W, G = gaussian(32, 48), gaussian(32, 48, seed=1)
    hyper = ALGORITHMS["muon"].Hyper(lr=1.0, weight_decay=0.0)
    exact = W - run("muon", W, [G], hyper)[0]

    def error(compute: torch.dtype) -> float:
        single = run("muon", W.float(), [G.float()], hyper, precision=Precision(torch.float32, compute))[0]
        assert single.dtype == torch.float32
        return relative(W - single.double(), exact)

    assert 1e-8 < error(torch.float32) < 1e-4
    assert 1e-3 < error(torch.bfloat16) < 0.2


def test_convention_refuses_what_an_algorithm_cannot_express():
    with pytest.raises(ValueError, match=r"dion2 can't express .*nesterov=True"):
        PRESETS["moonlight"].hyper("dion2")
    with pytest.raises(ValueError, match="adamw can't express"):
        PRESETS["keller"].hyper("adamw")
    with pytest.raises(ValueError, match="algorithm must be one of"):
        PRESETS["keller"].hyper("sgd")
    with pytest.raises(TypeError):
        PRESETS["dion"].hyper("muon", rank=3)


def test_the_dion_preset_is_every_default():
    for name, algorithm in ALGORITHMS.items():
        assert PRESETS["dion"].hyper(name) == algorithm.Hyper()
