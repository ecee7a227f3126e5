"""What users expect of a ``torch.optim.Optimizer``'s step."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import adamw as adamw_of_torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from dion_dtensor import Dion, Muon, param_groups
from dion_dtensor.gradients import by_extremes, by_norms
from dion_dtensor.updates import update_of
from tests.dtensor.small import MATRIX_RULES, RULES, Small, backward, make, optimizer_of, train


@pytest.mark.parametrize("algorithm", RULES)
def test_training_reduces_the_loss(algorithm: str) -> None:
    model = Small()
    optimizer = optimizer_of(model, algorithm)
    before = backward(model)
    for _ in range(40):
        optimizer.zero_grad()
        loss = backward(model)
        optimizer.step()
    assert loss < 0.9 * before


CORRECTED = {"momentum": "ema", "nesterov": True, "bias_correction": True}


@pytest.mark.parametrize(
    ("algorithm", "options"), [*((name, {}) for name in MATRIX_RULES), ("muon", CORRECTED)], ids=str
)
def test_schedules_compile_once_and_agree_with_eager(algorithm: str, options: dict[str, Any]) -> None:
    results = []
    update_of.cache_clear()
    for compiled in (False, True):
        model = Small(torch.float64)
        optimizer = optimizer_of(model, algorithm, compile=compiled, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        torch._dynamo.utils.counters.clear()
        for step in range(50):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            schedule.step()
            for group in optimizer.param_groups:
                group["weight_decay"] *= 0.9
                for name in ("mu", "variance_epsilon"):
                    if name in group:
                        group[name] *= 0.99
            if step == 0:
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            if step == 3:  # before the trajectories part
                results.append([parameter.detach().clone() for parameter in model.parameters()])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        # AdamW takes a kernel of torch.
        assert graphs == (sum(bucket.rule.fused is None for bucket in optimizer.buckets) if compiled else 0)
        assert not torch._dynamo.utils.counters["graph_break"]
    for eager, compiled_weight in zip(*results, strict=True):
        torch.testing.assert_close(compiled_weight, eager, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("most", [None, 3 * 6 * 24 * 4], ids=["one bucket", "several"])
def test_graphs_do_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch, most: int | None) -> None:
    # Dynamo alone: how often it is asked is what counts.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    graphs = {}
    for layers in (2, 8):
        update_of.cache_clear()
        torch._dynamo.utils.counters.clear()
        model = nn.ModuleList(nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 24)]) for _ in range(layers))
        optimizer = Muon(param_groups(model), compile=True, max_bucket_bytes=most)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for _ in range(2):
            optimizer.step()
        graphs[layers] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    update_of.cache_clear()
    assert graphs == {2: 2, 8: 2}


def test_parameters_without_gradient_are_left_alone() -> None:
    """And the others step as if they were alone, also when their number changes from step to step."""
    model, other = Small(), Small()
    for one in (model, other):
        one.extra = nn.Linear(6, 12)
        nn.init.ones_(one.extra.weight)
        nn.init.ones_(one.extra.bias)
    ours, theirs = optimizer_of(model), optimizer_of(other)
    for step in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        backward(model, step)
        backward(other, step)
        other.extra.weight.grad = torch.zeros_like(other.extra.weight) if step == 1 else None
        ours.step()
        theirs.step()
    assert torch.equal(model.extra.weight, torch.ones(12, 6))
    assert torch.equal(ours.state[model.extra.weight]["momentum"], torch.zeros(12, 6))
    assert ours.state[model.extra.bias]["step"] == 0
    assert torch.equal(other.extra.weight, torch.full((12, 6), 1 - 0.02 * 0.01))
    assert torch.equal(model.up.weight, other.up.weight)


def test_bias_correction_counts_each_parameters_own_steps() -> None:
    """One that had no gradient at first steps as one that began later."""
    alone, late, early = (nn.Parameter(torch.eye(3, dtype=torch.float64)) for _ in range(3))
    ours = make("muon", [("late", late), ("early", early)], **CORRECTED)
    other = make("muon", [("alone", alone)], **CORRECTED)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        early.grad = torch.randn(3, 3, dtype=torch.float64, generator=generator)
        if step > 1:
            late.grad = torch.randn(3, 3, dtype=torch.float64, generator=generator)
            alone.grad = late.grad.clone()
            other.step()
        ours.step()
    assert torch.equal(late, alone)
    assert (ours.state[late]["step"], ours.state[early]["step"]) == (2, 4)


def test_bias_correction_begins_with_the_optimizer_or_never() -> None:
    weight = nn.Parameter(torch.eye(3))
    with pytest.raises(ValueError, match="bias_correction=True needs momentum='ema'"):
        make("muon", [("w", weight)], bias_correction=True)
    optimizer = make("muon", [("w", weight)], momentum="ema")
    optimizer.param_groups[0]["bias_correction"] = True
    weight.grad = torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="w: its group began without a count of its steps"):
        optimizer.step()
    assert torch.equal(weight, torch.eye(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gradient_is_named_and_nothing_is_written(bad: float) -> None:
    model = Small()
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    backward(model)
    model.down.weight.grad[2, 3] = bad
    weights = copy.deepcopy(model.state_dict())
    states = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(RuntimeError, match=r"down\.weight \(\[6, 12\] float32 on one device\).*NaN or inf"):
        optimizer.step()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    after = optimizer.state_dict()["state"]
    assert all(
        torch.equal(after[i][key], value) for i, state in states.items() for key, value in state.items()
    )


def test_rank_is_computed_in_exact_arithmetic() -> None:
    weight = nn.Parameter(torch.ones(100, 120))
    for fraction, rank in ((0.07, 7), (0.55, 55), (0.28, 28), (1.0, 100), (0.001, 1)):
        assert Dion([weight], rank_fraction=fraction).state[weight]["Q"].shape == (100, rank)


def test_add_param_group_closure_maximize_tensor_lr_and_hooks() -> None:
    first, second = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(3))
    optimizer = Muon([first], lr=torch.tensor(0.1), weight_decay=0.0, compile=False)
    optimizer.add_param_group({"params": [second], "maximize": True})
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> float:
        optimizer.zero_grad()
        loss = first.sum() + second.sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 6.0
    assert calls == ["before", "after"]
    assert first.sum() < 3.0 < second.sum()
    torch.testing.assert_close((first + second).detach(), 2 * torch.eye(3))


def test_muon_as_torch_has_it() -> None:
    """With the conventions of torch.optim.Muon, against torch.optim.Muon in bfloat16."""
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    optimizer = Muon(
        [ours],
        lr=0.1,
        weight_decay=0.1,
        nesterov=True,
        momentum="ema",
        polynomial="keller",
        epsilon=1e-7,
        epsilon_rule="clamp",
        scale="keller",
        compute_dtype=torch.bfloat16,
        compile=False,
    )
    peer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1)
    for step in range(3):
        gradient = torch.randn(24, 16, generator=torch.Generator().manual_seed(step + 1))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        peer.step()
    # bfloat16 has three digits, and the last iterations amplify its rounding: 4.6e-2 is known of Gaussian matrices.
    assert (ours - theirs).norm() / (ours - weight).norm() < 0.03


@pytest.mark.parametrize("compile", [False, True])
def test_adamw_is_that_of_torch(compile: bool) -> None:
    model, other = Small(torch.float64), Small(torch.float64)
    optimizer = optimizer_of(model, "adamw", weight_decay=0.1, compile=compile)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    peer = torch.optim.AdamW(other.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for ours, theirs in zip(train(model, optimizer, 3), train(other, peer, 3), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "alike"),
    [
        ({}, True),
        ({"maximize": True, "lr": torch.tensor(0.01), "betas": (torch.tensor(0.9), 0.99)}, True),
        ({"cautious": True}, False),
        ({"transposed": True}, False),
        ({"momentum_dtype": torch.float64}, False),
    ],
    ids=["plain", "tensors", "cautious", "transposed", "wider state"],
)
def test_adamw_by_the_kernel_of_torch(
    options: dict[str, Any], alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is taken where it fits, and computes what the rule says; a parameter without gradient waits."""
    used = []

    def spied(*args: Any, **others: Any) -> None:
        used.append(1)
        adamw_of_torch.adamw(*args, **others)

    monkeypatch.setattr("dion_dtensor.rules.adamw.adamw", spied)
    options = dict(options)
    transposed, betas = options.pop("transposed", False), options.pop("betas", (0.9, 0.95))
    results = []
    for compile in (False, True):
        # The rule is not compiled where the kernel does not fit: this is about the choice alone.
        monkeypatch.setattr("torch.compile", lambda function, **_: function)
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator)
            return values.mT.contiguous().mT if transposed else values

        weights = [nn.Parameter(draw(3, 4)), nn.Parameter(draw(5, 2)), nn.Parameter(draw(0, 2))]
        group = {
            "params": [(f"w{i}", w) for i, w in enumerate(weights)],
            "algorithm": "adamw",
            "betas": betas,
        }
        optimizer = Muon([group], **{"lr": 0.01, "weight_decay": 0.1, "compile": compile} | options)
        for step in range(3):
            weights[0].grad = draw(3, 4)
            weights[1].grad = draw(5, 2) if step != 1 else None
            weights[2].grad = draw(0, 2)
            optimizer.step()
        results.append([w.detach().clone() for w in weights] + [*_states(optimizer)])
    assert bool(used) is alike
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def _states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("exponent", [-25, 25])
@pytest.mark.parametrize("algorithm", MATRIX_RULES)
def test_sizes_that_float32_cannot_square(algorithm: str, exponent: int) -> None:
    """The update does not change with the size of the gradient, epsilon aside."""
    updates = []
    for size in (1.0, 10.0**exponent):
        weight = nn.Parameter(torch.zeros(4, 3))
        optimizer = make(algorithm, [("w", weight)], epsilon=1e-37)
        weight.grad = size * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        updates.append(weight.detach())
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("finite", [by_extremes, by_norms])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_whatever_is_not_finite_is_found(
    finite: Callable[[list[torch.Tensor]], list[bool]], dtype: torch.dtype
) -> None:
    fine = torch.randn(33, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    spoiled = [fine.clone() for _ in range(3)]
    for one, value in zip(spoiled, (torch.nan, torch.inf, -torch.inf), strict=True):
        one[-1, 3] = value
    largest = torch.full((4, 4), torch.finfo(dtype).max, dtype=dtype)
    assert finite([fine, fine.mT, fine[:, ::2], fine[:0], fine[0, 0], largest]) == [True] * 6
    assert finite([*spoiled, spoiled[0].mT, spoiled[1][:, 1::2], spoiled[2][-1, 3]]) == [False] * 6


def test_huge_finite_gradients_are_no_fault() -> None:
    weight = nn.Parameter(torch.zeros(100, 100))
    weight.grad = torch.full((100, 100), 1e36)
    Muon([weight], compile=False).step()
    assert weight.any()


def test_tensor_lr_decays_as_a_float_does() -> None:
    results = []
    for lr in (3e-4, torch.tensor([3e-4], dtype=torch.float64), torch.tensor(3e-4, dtype=torch.float64)):
        weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        weight.grad = torch.zeros_like(weight)
        Muon([weight], lr=lr, weight_decay=1e-5, compile=False).step()
        results.append(weight.detach())
    assert all(torch.equal(one, results[0]) for one in results)
    assert results[0][0, 0] == 1 - 3e-9


def test_a_parameter_that_changed_under_the_optimizer_is_named() -> None:
    model = Small()
    optimizer = optimizer_of(model)
    backward(model)
    model.up.weight.data = model.up.weight.data.double()
    model.up.weight.grad = None
    with pytest.raises(RuntimeError, match=r"up\.weight .*: the parameter now is \[12, 6\] float64"):
        optimizer.step()


def test_a_parameter_that_moved_to_another_mesh_is_named() -> None:
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        first, second = (
            nn.Parameter(DTensor.from_local(torch.ones(2, 4), DeviceMesh("cpu", ranks), [Shard(0)]))
            for ranks in ([0, 1], [0, 2])
        )
        optimizer = Muon([("w", first)], compile=False)
        torch.utils.swap_tensors(first, second)
        first.grad = torch.ones_like(first)
        with pytest.raises(RuntimeError, match=r"w .*: the parameter now is .* of the ranks \[0, 2\]; make"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def test_parameters_that_a_wrapper_replaced_are_named() -> None:
    optimizer = Muon([nn.Parameter(torch.eye(2)), nn.Parameter(torch.eye(3))], compile=False)
    saved = optimizer.state_dict()
    optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.eye(3))
    expected = (
        r"parameter 1 of group 0 \(muon\), now \[3, 3\] float32 on one device, is not the one .*sharded"
    )
    with pytest.raises(RuntimeError, match=expected):
        optimizer.step()
    with pytest.raises(RuntimeError, match=expected):
        optimizer.load_state_dict(saved)


def test_a_step_within_compiled_code_is_that_of_without() -> None:
    results = []
    for compiled in (False, True):
        model = Small()
        optimizer = optimizer_of(model, compile=True)
        step = torch.compile(lambda own=optimizer: own.step()) if compiled else optimizer.step
        for seed in range(2):
            optimizer.zero_grad()
            backward(model, seed)
            step()
        results.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
