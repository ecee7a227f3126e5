"""On a GPU: the oracle's step, no wait for the device, recorded graphs, memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dion_dtensor import Dion2, Dion3, Muon, param_groups
from dion_dtensor.captured import WARM_UP
from dion_dtensor.optimizer import OrthonormalOptimizer
from dion_dtensor.orthonormalize import orthonormal_basis
from tests.dtensor.programs import OPTIMIZERS
from tests.dtensor.small import RULES, make
from tests.dtensor.test_oracle import random_gradients, relative, step_errors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES: list[tuple[int, ...]] = [(33, 20), (33, 20), (20, 33), (33, 20), (9, 9), (1, 5)]
RECORDED = [rule for rule in RULES if rule not in ("dion", "orth_dion")]


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_follows_the_oracle(rule: str, compile: bool) -> None:
    errors = step_errors(rule, SHAPES, random_gradients(SHAPES), device="cuda", compile=compile)
    assert max(errors) < 1e-11


def _named(shapes: list[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (f"layers.{index}.weight", nn.Parameter(torch.randn(shape, generator=generator).cuda()))
        for index, shape in enumerate(shapes)
    ]


def _set_gradients(named: list[tuple[str, nn.Parameter]], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()


def _train(optimizer: OrthonormalOptimizer, named: list[tuple[str, nn.Parameter]], steps: int) -> None:
    for step in range(steps):
        _set_gradients(named, step)
        optimizer.step()


def _weights(named: list[tuple[str, nn.Parameter]]) -> list[Tensor]:
    return [parameter.detach().clone() for _, parameter in named]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """The host raises where it would wait for the device."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", RECORDED)
@pytest.mark.parametrize("capture", [False, True], ids=["launched", "recorded"])
@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["number", "tensor"])
def test_the_host_does_not_wait_for_the_device(
    no_waiting: None, rule: str, capture: bool, lr: float | Tensor
) -> None:
    named = _named()
    optimizer = make(rule, named, compile=True, validate=False, capture=capture, lr=lr)
    for step in range(WARM_UP + 3):
        _set_gradients(named, step)
        torch.cuda.synchronize()
        if step > WARM_UP:
            torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_products_of_float32_take_no_tf32(compile: bool) -> None:
    """A gradient of rank one leaves all columns of Dion's basis but one dead; in TF32 all of them would live."""
    u, v = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    for precision in ("highest", "high"):
        weight = nn.Parameter(torch.zeros(256, 256, device="cuda"))
        optimizer = make("dion", [("w", weight)], lr=1.0, weight_decay=0.0, scale=None, compile=compile)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        for _ in range(3):
            weight.grad = torch.outer(u, v)
            optimizer.step()
        torch.set_float32_matmul_precision(before)
        found.append(weight.detach())
    assert torch.equal(*found)
    assert float(found[0].norm()) < 3.01


def _graphs(optimizer: OrthonormalOptimizer) -> list[bool]:
    return [bucket.recorder is not None and bucket.recorder.recorded for bucket in optimizer.buckets]


@pytest.mark.parametrize("rule", RULES)
def test_a_recorded_step_is_the_launched_one(rule: str) -> None:
    """While hyperparameters change, gradients move, and one is missing for a step."""
    results = []
    for capture in (False, True):
        named = _named()
        optimizer = make(rule, named, compile=True, capture=capture)
        held = []
        for step in range(WARM_UP + 6):
            _set_gradients(named, step)
            held.append(named[0][1].grad)  # so that no gradient lies where one was before
            if step == WARM_UP + 3:
                named[1][1].grad = None
            (group,) = optimizer.param_groups
            group["lr"], group["weight_decay"] = 0.02 / (1 + step), 0.01 * (1 + step)
            if "mu" in group:
                group["mu"] = 0.9 + 0.01 * step
            optimizer.step()
        assert any(_graphs(optimizer)) == (capture and rule not in ("dion", "orth_dion", "adamw"))
        results.append(_weights(named))
    for launched, recorded in zip(*results, strict=True):
        assert torch.equal(launched, recorded)


def test_a_loaded_state_is_that_of_the_next_recorded_step() -> None:
    def run(capture: bool) -> list[Tensor]:
        named = _named()
        optimizer = make("normuon", named, compile=True, capture=capture)
        saved: dict[str, Any] = {}
        for step in range(WARM_UP + 5):
            if step == WARM_UP + 1:
                saved = copy.deepcopy(optimizer.state_dict())
            if step == WARM_UP + 3:
                optimizer.load_state_dict(saved)
            _set_gradients(named, step)
            optimizer.step()
        return _weights(named)

    for launched, recorded in zip(run(False), run(True), strict=True):
        assert torch.equal(launched, recorded)


def test_a_bad_gradient_changes_nothing_though_the_step_is_recorded() -> None:
    named = _named()
    optimizer = make("muon", named, compile=True, capture=True)
    _train(optimizer, named, WARM_UP + 2)
    before = _weights(named)
    assert named[2][1].grad is not None
    named[2][1].grad[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"layers\.2\.weight .* has NaN or inf"):
        optimizer.step()
    assert all(map(torch.equal, before, _weights(named)))


def test_a_moved_weight_is_recorded_anew() -> None:
    named = _named()
    optimizer = make("muon", named, compile=True, capture=True)
    _train(optimizer, named, WARM_UP + 2)
    named[0][1].data = named[0][1].data.clone()
    before = named[0][1].detach().clone()
    for step in range(WARM_UP + 2):
        _set_gradients(named, step)
        optimizer.step()
        assert not torch.equal(before, named[0][1])
        before = named[0][1].detach().clone()
    assert any(_graphs(optimizer))


def test_graphs_can_be_released() -> None:
    named = _named()
    optimizer = make("muon", named, compile=True, capture=True)
    _train(optimizer, named, WARM_UP + 1)
    assert any(_graphs(optimizer))
    optimizer.release_graphs()
    assert not any(_graphs(optimizer))
    _train(optimizer, named, WARM_UP + 2)
    assert any(_graphs(optimizer))


def test_a_step_within_a_graph_of_the_caller_is_refused() -> None:
    named = _named()
    optimizer = make("muon", named)
    _set_gradients(named, 0)
    before = _weights(named)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capture=True"), torch.cuda.graph(graph):
        optimizer.step()
    torch.cuda.synchronize()
    assert all(map(torch.equal, before, _weights(named)))


@pytest.mark.parametrize("kind", [Muon, Dion2, Dion3])
def test_a_bucket_is_bounded_in_memory(kind: Any) -> None:
    """About six times ``max_bucket_bytes``, as its documentation says, however many matrices there are."""
    named = _named([(512, 512)] * 24)
    limit = 4 * 512 * 512 * 4
    optimizer = kind(named, max_bucket_bytes=limit, compute_dtype=torch.float32)
    for step in range(3):
        _set_gradients(named, step)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < 6.5 * limit


def test_the_basis_by_cholesky_is_that_of_the_cpu() -> None:
    stack = torch.randn(5, 60, 12, generator=torch.Generator().manual_seed(0))
    stack[1] = 0
    stack[2, :, 7] = stack[2, :, 3] * 2 - stack[2, :, 1]
    stack[3, :, 4] = 0
    stack[4] *= torch.logspace(0, -5, 12)
    sizes = torch.linalg.vector_norm(stack, dim=1, keepdim=True)
    expected = orthonormal_basis(stack.double(), sizes.double() * 1e8)  # dead by the roundings of float32
    found = orthonormal_basis(stack.cuda(), sizes.cuda()).cpu()
    assert relative(found.double(), expected) < 1e-5
    alive = torch.diag_embed((expected.norm(dim=1) > 0.5).float())
    assert float((found.mT @ found - alive).abs().max()) < 1e-6


@pytest.mark.parametrize("capture", [False, True], ids=["launched", "recorded"])
def test_the_decay_of_narrow_weights_is_not_rounded_away(capture: bool) -> None:
    results = []
    for storage in (torch.bfloat16, torch.float32):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(40, 30, generator=generator).bfloat16().to("cuda", storage)
        parameter = nn.Parameter(weight.clone())
        options = {"lr": 1e-2, "weight_decay": 0.1, "momentum_dtype": torch.float32, "capture": capture}
        optimizer = make("lion", [("weight", parameter)], compile=True, **options)
        for _ in range(WARM_UP + 2):
            parameter.data.copy_(weight)
            parameter.grad = torch.randn(40, 30, generator=generator).bfloat16().to("cuda", storage)
            optimizer.step()
        results.append(parameter.detach().bfloat16())
    assert torch.equal(*results)


def test_a_model_trains_in_bfloat16() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).cuda()
    optimizer = OPTIMIZERS["muon"](param_groups(model, algorithm="muon", lr=0.02), capture=True)
    inputs = torch.randn(256, 32, device="cuda")
    losses = []
    for _ in range(30):
        loss = (model(inputs) - inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
