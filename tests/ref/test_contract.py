"""What holds for every algorithm: purity, stacks, dtypes, refusals."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dion_ref import ALGORITHMS, FLOAT64, Convention, Precision

from .helpers import ALL, LOW_RANK, MATRIX, NEWTON_SCHULZ, SCALAR, gaussian, run, tensors_of

SINGLE = Precision(torch.float32, torch.float32)


def warmed(name, *shape, **hyper):
    """Something to step from: not a fresh state."""
    algorithm = ALGORITHMS[name]
    hyper = algorithm.Hyper(**hyper)
    W, state = run(name, gaussian(*shape), [gaussian(*shape, seed=1)], hyper)
    return algorithm, W, gaussian(*shape, seed=2), state, hyper


def test_the_registry():
    assert ALL == ("muon", "normuon", "dion", "orth_dion", "dion2", "dion3", "adamw", "lion")
    with pytest.raises(TypeError):
        ALGORITHMS["sgd"] = ALGORITHMS["muon"]


@pytest.mark.parametrize("name", ALL)
def test_hyper_and_state_are_frozen_and_have_defaults(name):
    algorithm, W, _, state, hyper = warmed(name, 4, 3)
    assert (hyper.lr, hyper.weight_decay, hyper.cautious) == (0.01, 0.01, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        hyper.lr = 1.0
    field = next(iter(vars(state)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(state, field, W)
    assert hash(hyper) == hash(algorithm.Hyper())


STATE_FIELDS = {
    "muon": ["momentum", "step"],
    "normuon": ["momentum", "variance", "step"],
    "dion": ["momentum", "Q"],
    "orth_dion": ["momentum", "Q"],
    "dion2": ["momentum"],
    "dion3": ["momentum", "variance"],
    "adamw": ["exp_avg", "exp_avg_sq", "step"],
    "lion": ["exp_avg"],
}


@pytest.mark.parametrize("name", ALL)
def test_state_fields(name):
    algorithm = ALGORITHMS[name]
    assert [field.name for field in dataclasses.fields(algorithm.State)] == STATE_FIELDS[name]
    state = algorithm.init(gaussian(5, 7), algorithm.Hyper())
    for field, value in tensors_of(state).items():
        assert bool(value.any()) == (field == "Q")


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("name", ALL)
def test_nothing_given_is_modified_or_shared(name, shape, cautious):
    algorithm, W, G, state, hyper = warmed(name, *shape, cautious=cautious)
    given_tensors = {"param": W, "grad": G, **tensors_of(state)}
    before = {key: value.clone() for key, value in given_tensors.items()}
    new, after = algorithm.step(W, G, state, hyper)
    again, _ = algorithm.step(W, G, state, hyper)
    assert torch.equal(new, again)
    for key, value in given_tensors.items():
        assert torch.equal(value, before[key]), key
    pointers = {value.untyped_storage().data_ptr() for value in given_tensors.values()}
    for key, value in {"param": new, **tensors_of(after)}.items():
        assert value.untyped_storage().data_ptr() not in pointers, key
    fresh = algorithm.init(W, hyper)
    assert all(value.untyped_storage().data_ptr() not in pointers for value in tensors_of(fresh).values())


@pytest.mark.parametrize("name", MATRIX)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_a_stack_is_its_matrices_bitwise(name, count, m, n):
    algorithm = ALGORITHMS[name]
    hyper = algorithm.Hyper()
    W, G = gaussian(count, m, n), gaussian(count, m, n, seed=1)
    state = algorithm.init(W, hyper, name="w")
    new, after = algorithm.step(W, G, state, hyper)
    for index in range(count):
        alone = algorithm.init(W[index], hyper, name="w", first_matrix=index)
        single, single_after = algorithm.step(W[index], G[index], alone, hyper)
        assert torch.equal(new[index], single)
        for key, value in tensors_of(single_after).items():
            assert torch.equal(getattr(after, key)[index], value)


@pytest.mark.parametrize("name", ALL)
def test_memory_layout_and_autograd_do_not_matter(name):
    algorithm, W, G, state, hyper = warmed(name, 5, 4)
    new, after = algorithm.step(W, G, state, hyper)
    strided, strided_after = algorithm.step(
        torch.nn.Parameter(W.mT.contiguous().mT), G.mT.contiguous().mT, state, hyper
    )
    assert not strided.requires_grad
    assert type(strided) is torch.Tensor
    assert torch.dist(strided, new) < 1e-15
    for key, value in tensors_of(after).items():
        assert torch.dist(getattr(strided_after, key), value) < 1e-13


@pytest.mark.parametrize("name", ALL)
def test_float32_stays_float32_and_near(name):
    algorithm = ALGORITHMS[name]
    hyper = algorithm.Hyper()
    W, G = gaussian(12, 8).float(), gaussian(12, 8, seed=1).float()
    new, state = run(name, W, [G], hyper, precision=SINGLE)
    assert new.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in tensors_of(state).values())
    exact, _ = run(name, W.double(), [G.double()], hyper)
    assert 0 < torch.dist(new.double(), exact) < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_every_rule_takes_several_steps_without_blowing_up(name):
    W, _ = run(
        name, gaussian(9, 6), [gaussian(9, 6, seed=seed) for seed in range(30)], ALGORITHMS[name].Hyper()
    )
    assert torch.isfinite(W).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ALL)
def test_non_finite_input_is_named(name, value):
    algorithm, W, G, state, hyper = warmed(name, 4, 3)
    bad = W.clone()
    bad[1, 1] = value
    with pytest.raises(ValueError, match="param must be finite"):
        algorithm.init(bad, hyper)
    with pytest.raises(ValueError, match="param must be finite"):
        algorithm.step(bad, G, state, hyper)
    with pytest.raises(ValueError, match="grad must be finite, got 1 "):
        algorithm.step(W, bad, state, hyper)
    for key, tensor in tensors_of(state).items():
        broken = tensor.clone()
        broken[0, 0] = value
        with pytest.raises(ValueError, match=f"state.{key} must be finite"):
            algorithm.step(W, G, dataclasses.replace(state, **{key: broken}), hyper)


@pytest.mark.parametrize("name", ALL)
def test_wrong_dtype_is_named(name):
    algorithm, W, G, state, hyper = warmed(name, 4, 3)
    with pytest.raises(TypeError, match=r"param must have dtype torch\.float64"):
        algorithm.init(W.float(), hyper)
    with pytest.raises(TypeError, match=r"param must have dtype torch\.float32"):
        algorithm.step(W, G, state, hyper, precision=SINGLE)
    with pytest.raises(TypeError, match="grad must have dtype"):
        algorithm.step(W, G.float(), state, hyper)
    with pytest.raises(TypeError, match=r"grad must be a torch\.Tensor, got list"):
        algorithm.step(W, G.tolist(), state, hyper)
    for key, tensor in tensors_of(state).items():
        with pytest.raises(TypeError, match=f"state.{key} must have dtype"):
            algorithm.step(W, G, dataclasses.replace(state, **{key: tensor.float()}), hyper)


@pytest.mark.parametrize("name", ALL)
def test_wrong_shape_is_named(name):
    algorithm, W, G, state, hyper = warmed(name, 4, 3)
    with pytest.raises(ValueError, match=r"grad must have shape \[4, 3\], got \[3, 4\]"):
        algorithm.step(W, G.mT, state, hyper)
    for key, tensor in tensors_of(state).items():
        with pytest.raises(ValueError, match=f"state.{key} must have shape"):
            algorithm.step(W, G, dataclasses.replace(state, **{key: tensor[:-1]}), hyper)


@pytest.mark.parametrize("shape", [(5,), (), (2, 2, 2, 2), (0, 3), (3, 0), (0, 3, 3)])
@pytest.mark.parametrize("name", MATRIX)
def test_not_a_matrix(name, shape):
    with pytest.raises(ValueError, match=r"param must be \[m, n\] or \[N, m, n\]"):
        ALGORITHMS[name].init(gaussian(*shape), ALGORITHMS[name].Hyper())


@pytest.mark.parametrize("name", ALL)
def test_state_or_hyper_of_another_algorithm(name):
    algorithm, W, G, state, hyper = warmed(name, 4, 3)
    for other in ALL:
        if other == name:
            continue
        foreign = ALGORITHMS[other]
        with pytest.raises(
            TypeError, match=f"hyper must be dion_ref.{name}.Hyper, got dion_ref.{other}.Hyper"
        ):
            algorithm.init(W, foreign.Hyper())
        with pytest.raises(TypeError, match=f"hyper must be dion_ref.{name}.Hyper"):
            algorithm.step(W, G, state, foreign.Hyper())
        with pytest.raises(
            TypeError, match=f"state must be dion_ref.{name}.State, got dion_ref.{other}.State"
        ):
            algorithm.step(W, G, foreign.init(W, foreign.Hyper()), hyper)
    with pytest.raises(TypeError, match="state must be"):
        algorithm.step(W, G, dict(vars(state)), hyper)


@pytest.mark.parametrize("name", ["muon", "normuon", "adamw"])
def test_step_counter_is_checked(name):
    algorithm, W, G, state, hyper = warmed(name, 4, 3)
    assert state.step == 1
    with pytest.raises(ValueError, match=r"state\.step must be >= 0"):
        algorithm.step(W, G, dataclasses.replace(state, step=-1), hyper)
    with pytest.raises(TypeError, match=r"state\.step must be an int"):
        algorithm.step(W, G, dataclasses.replace(state, step=1.0), hyper)


@pytest.mark.parametrize(
    ("name", "key"), [("normuon", "variance"), ("dion3", "variance"), ("adamw", "exp_avg_sq")]
)
def test_a_negative_second_moment_is_refused(name, key):
    algorithm, W, G, state, hyper = warmed(name, 4, 3)
    with pytest.raises(ValueError, match=f"state.{key} must be >= 0"):
        algorithm.step(W, G, dataclasses.replace(state, **{key: -getattr(state, key) - 1}), hyper)


def test_trap_12_a_tensor_subclass_is_refused_not_taken_for_its_shard():
    class Shard(torch.Tensor):
        """Stands for a DTensor, which holds a piece and says it is the whole."""

    for name in ALL:
        algorithm, W, G, state, hyper = warmed(name, 4, 3)
        for arguments in ((W.as_subclass(Shard), G), (W, G.as_subclass(Shard))):
            with pytest.raises(TypeError, match=r"plain dense tensor \(full_tensor\(\) of a DTensor\)"):
                algorithm.step(*arguments, state, hyper)


BAD_HYPER = [
    (ALL, {"lr": -1.0}, ValueError),
    (ALL, {"lr": float("nan")}, ValueError),
    (ALL, {"lr": float("inf")}, ValueError),
    (ALL, {"lr": "0.1"}, TypeError),
    (ALL, {"lr": True}, TypeError),
    (ALL, {"weight_decay": -0.1}, ValueError),
    (ALL, {"cautious": 1}, TypeError),
    (MATRIX, {"mu": 1.0}, ValueError),
    (MATRIX, {"mu": -0.1}, ValueError),
    (MATRIX, {"epsilon": 0.0}, ValueError),
    (MATRIX, {"scale": "spectral"}, ValueError),
    (MATRIX, {"weight_storage": "oi"}, ValueError),
    (NEWTON_SCHULZ, {"polynomial": "polar"}, ValueError),
    (NEWTON_SCHULZ, {"polynomial": ()}, ValueError),
    (NEWTON_SCHULZ, {"polynomial": ((1.0, 2.0),)}, TypeError),
    (NEWTON_SCHULZ, {"polynomial": ((1.0, 2.0, float("nan")),)}, ValueError),
    (NEWTON_SCHULZ, {"polynomial": ((1.0, 2.0, "3"),)}, TypeError),
    (NEWTON_SCHULZ, {"polynomial": 5}, TypeError),
    (NEWTON_SCHULZ, {"epsilon_rule": "max"}, ValueError),
    (NEWTON_SCHULZ, {"norm_factor": 0.0}, ValueError),
    (("muon", "normuon"), {"momentum": "mean"}, ValueError),
    (("muon", "normuon"), {"nesterov": None}, TypeError),
    (("muon", "normuon"), {"bias_correction": True}, ValueError),
    (("normuon", "dion3"), {"beta2": 1.0}, ValueError),
    (("normuon", "dion3"), {"variance_epsilon": 0.0}, ValueError),
    (LOW_RANK, {"rank_fraction": 0.0}, ValueError),
    (LOW_RANK, {"rank_fraction": 1.01}, ValueError),
    (LOW_RANK, {"rank_fraction": "half"}, TypeError),
    (LOW_RANK, {"rank_multiple": 0}, ValueError),
    (LOW_RANK, {"rank_multiple": 1.0}, TypeError),
    (("dion2", "dion3"), {"fraction": 0.0}, ValueError),
    (("dion2", "dion3"), {"fraction": 1.5}, ValueError),
    (("dion2", "dion3"), {"fraction": float("nan")}, ValueError),
    (SCALAR, {"betas": (0.9, 1.0)}, ValueError),
    (SCALAR, {"betas": (0.9,)}, TypeError),
    (SCALAR, {"betas": 0.9}, TypeError),
    (("adamw",), {"epsilon": -1e-8}, ValueError),
    (("lion",), {"mu": 0.9}, TypeError),
]


@pytest.mark.parametrize(
    ("name", "fields", "error"),
    [(name, fields, error) for names, fields, error in BAD_HYPER for name in names],
)
def test_bad_hyperparameters(name, fields, error):
    with pytest.raises(error, match=next(iter(fields))):
        ALGORITHMS[name].Hyper(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"momentum": "mean"},
        {"bias_correction": True},
        {"polynomial": "polar"},
        {"epsilon": 0.0},
        {"epsilon_rule": "max"},
        {"norm_factor": -1.0},
        {"scale": "spectral"},
        {"weight_storage": "oi"},
    ],
)
def test_bad_conventions(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Convention(**fields)


def test_precision():
    assert Precision(torch.float64, torch.float64) == FLOAT64
    for storage, compute in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.int32),
        ("float32", torch.float32),
    ):
        with pytest.raises(TypeError):
            Precision(storage, compute)


def test_imports_torch_and_the_standard_library_only():
    script = (
        "import sys, torch; before = set(sys.modules); import dion_ref; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(new - set(sys.stdlib_module_names) - {'torch', 'dion_ref'}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 3, 3)])
@pytest.mark.parametrize("name", ALL)
def test_trap_1_a_zero_gradient_from_a_fresh_state_only_decays(name, shape):
    algorithm = ALGORITHMS[name]
    variants = [{}]
    if name in NEWTON_SCHULZ:
        variants += [{"epsilon_rule": "clamp"}, {"polynomial": "exact"}]
    for fields in variants:
        hyper = algorithm.Hyper(lr=0.1, weight_decay=0.5, **fields)
        W = gaussian(*shape)
        state = algorithm.init(W, hyper)
        new, after = algorithm.step(W, torch.zeros_like(W), state, hyper)
        assert torch.equal(new, W * (1 - 0.1 * 0.5))
        for key, value in tensors_of(after).items():
            assert torch.isfinite(value).all(), key
            assert key == "Q" or not value.any(), key
