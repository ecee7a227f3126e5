"""What a bucket reads anew at every step, and in which dtype and place it keeps its state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dion_dtensor import Dion2, Muon, audit, routes, updates
from dion_dtensor.buckets import Bucket
from dion_dtensor.checks import check_member
from dion_dtensor.layout import StorageLayout
from dion_dtensor.members import Member
from dion_dtensor.optimizer import OrthonormalOptimizer
from dion_dtensor.planning.buckets import FEW_WEIGHTS
from dion_dtensor.rules import RULES
from tests.dtensor.small import make


def stepped(
    optimizer: OrthonormalOptimizer, parameter: torch.nn.Parameter, seed: int, steps: int = 1
) -> torch.Tensor:
    """The change of the weight."""
    generator = torch.Generator().manual_seed(seed)
    before = parameter.detach().clone()
    for _ in range(steps):
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()
    return parameter.detach() - before


def made(
    rule: type[OrthonormalOptimizer] = Muon, **options: Any
) -> tuple[OrthonormalOptimizer, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.ones(6, 12, dtype=torch.float64))
    chosen = {"lr": 0.1, "weight_decay": 0.0, "compile": False} | options
    return rule([{"params": [("w", parameter)]}], **chosen), parameter


def test_the_scale_is_that_of_the_group_now() -> None:
    (one, parameter), (other, expected) = made(scale="spectral_norm"), made(scale="moonlight")
    one.param_groups[0]["scale"] = "moonlight"
    assert torch.equal(stepped(one, parameter, 1), stepped(other, expected, 1))


def test_the_scale_of_a_transposed_weight_has_rows_and_columns_exchanged() -> None:
    (one, parameter), (other, expected) = made(weight_storage="in_out"), made(scale=None)
    changes = [stepped(one, parameter, 1), stepped(other, expected, 1)]
    torch.testing.assert_close(changes[0], changes[1] * (12 / 6) ** 0.5, rtol=1e-13, atol=1e-15)
    with pytest.raises(ValueError, match="weight_storage='out' must be"):
        made(weight_storage="out")


def test_a_loaded_scale_is_that_of_the_next_step() -> None:
    (saver, saved), (loader, loaded) = made(scale="moonlight"), made(scale="spectral_norm")
    stepped(saver, saved, 1)
    loader.load_state_dict(saver.state_dict())
    assert audit(loader).rows[0].scale == audit(saver).rows[0].scale
    torch.testing.assert_close(stepped(loader, loaded, 2), stepped(saver, saved, 2), rtol=1e-12, atol=1e-15)


def test_a_scale_by_row_follows_the_group_as_well() -> None:
    """Pieces of several shapes have a factor a row."""
    split = {"split": "rows(2, 4)"}
    results = []
    for scale in ("spectral_norm", "moonlight"):
        parameter = torch.nn.Parameter(torch.ones(6, 12, dtype=torch.float64))
        group = {"params": [("w", parameter)], **split}
        optimizer = Muon([group], lr=0.1, weight_decay=0.0, compile=False, scale=scale)
        optimizer.param_groups[0]["scale"] = "moonlight"
        results.append(stepped(optimizer, parameter, 1))
    assert torch.equal(*results)


def test_float16_keeps_its_momentum_in_float32() -> None:
    parameter = torch.nn.Parameter(torch.ones(6, 12, dtype=torch.float16))
    optimizer = Muon([("w", parameter)], lr=1e-3, compile=False)
    for _ in range(40):  # the sum goes to 20 times the gradient, beyond 65,504
        parameter.grad = torch.full_like(parameter, 4000.0)
        optimizer.step()
    assert optimizer.state[parameter]["momentum"].dtype == torch.float32
    assert bool(parameter.isfinite().all())


@pytest.mark.parametrize("in_place", [True, False])
def test_states_are_written_within_the_graph_or_after_it(
    in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it where Inductor may write them too early."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(updates, "IN_PLACE", in_place)
    results = []
    for compiled in (True, False):
        updates.update_of.cache_clear()
        optimizer, parameter = made(Dion2, compile=compiled, fraction=0.5)
        results.append((stepped(optimizer, parameter, 1, 3), optimizer.state[parameter]["momentum"]))
    updates.update_of.cache_clear()
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("number", [2, FEW_WEIGHTS, FEW_WEIGHTS + 1])
@pytest.mark.parametrize("cautious", [False, True], ids=["decay", "cautious"])
@pytest.mark.parametrize("build", [Muon, Dion2])
def test_weights_are_changed_alike_within_the_compiled_update_and_after_it(
    number: int, cautious: bool, build: type[Muon], in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tall matrix is stepped transposed; one without a gradient stays as it is."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(updates, "IN_PLACE", in_place)
    changed: list[int] = []
    apply = Bucket._apply

    def counting(bucket: Bucket, members: list[Any], *rest: Any) -> None:
        changed.append(len(members))
        apply(bucket, members, *rest)

    monkeypatch.setattr(Bucket, "_apply", counting)
    results = []
    for compiled in (True, False):
        updates.update_of.cache_clear()
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(12, 6, generator=generator, dtype=torch.float64) for _ in range(number + 1)]
        parameters = [nn.Parameter(weight) for weight in weights]
        options = {"lr": 0.1, "weight_decay": 0.5, "cautious": cautious, "compile": compiled}
        optimizer = build(parameters, **options)
        for parameter in parameters[1:]:
            parameter.grad = torch.randn(12, 6, generator=generator, dtype=torch.float64)
        for _ in range(2):
            optimizer.step()
        results.append([parameter.detach() for parameter in parameters])
    updates.update_of.cache_clear()
    after = [number] * 2
    assert changed == (after if cautious or number > FEW_WEIGHTS or not in_place else []) + after
    for compiled_weight, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled_weight, eager, rtol=1e-12, atol=1e-15)


def compiled_and_eager(
    weights: Callable[[], list[torch.Tensor]], gradients: Callable[[list[nn.Parameter]], list[torch.Tensor]]
) -> None:
    results = []
    for compiled in (True, False):
        updates.update_of.cache_clear()
        parameters = [nn.Parameter(weight) for weight in weights()]
        optimizer = Muon(parameters, lr=0.1, weight_decay=0.5, compile=compiled, max_bucket_bytes=4 * 8 * 64)
        for parameter, gradient in zip(parameters, gradients(parameters), strict=True):
            parameter.grad = gradient
        versions = [parameter._version for parameter in parameters]
        optimizer.step()
        assert all(one._version > before for one, before in zip(parameters, versions, strict=True))
        results.append([parameter.detach().clone() for parameter in parameters])
    updates.update_of.cache_clear()
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-15)


def drawn(number: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(number)]


@pytest.mark.parametrize("case", ["apart", "its own gradient", "one flat buffer"])
def test_weights_that_share_memory_are_changed_as_without_a_graph(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))

    def weights() -> list[torch.Tensor]:
        some = drawn(number)
        return list(torch.stack(some).unbind()) if "flat" in case else some

    number = 1 if "own" in case else 4  # the gradients of several are joined first
    compiled_and_eager(weights, lambda some: [one.detach() for one in some] if "own" in case else drawn())


def test_weights_of_many_strides_need_no_graph_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    def weights() -> list[torch.Tensor]:
        """Ten buckets of four, each with others of its weights stored transposed."""
        some = drawn(40)
        return [w.t().contiguous().t() if (i // 4 + 1) >> (i % 4) & 1 else w for i, w in enumerate(some)]

    compiled_and_eager(weights, lambda _: drawn(40))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("cautious", [False, True], ids=["decay", "cautious"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ["muon", "dion", "lion"])
def test_a_step_of_narrow_weights_is_that_of_wide_ones_rounded_once(
    rule: str, dtype: torch.dtype, cautious: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 a weight times 1 - 1e-4 is itself, so a decay that was rounded by itself would do nothing."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    updates.update_of.cache_clear()
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(12, 9, generator=generator).to(dtype) for _ in range(2))
    results = []
    for storage in (dtype, torch.float32):
        parameter = nn.Parameter(weight.to(storage, copy=True))
        parameter.grad = grad.to(storage)
        options = {"lr": 0.01, "weight_decay": 0.1, "momentum_dtype": torch.float32, "cautious": cautious}
        make(rule, [("weight", parameter)], **options, compile=compiled).step()
        results.append(parameter.detach().to(dtype))
    updates.update_of.cache_clear()
    allowed = 0.03 if compiled else 0  # where wide ones are changed by a fused multiply-add; no decay: 0.1
    assert (results[0] != results[1]).double().mean() <= allowed


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("rule", ["muon", "adamw"])
def test_a_decay_in_a_tensor_is_not_rounded_away(rule: str, compile: bool) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    weight.grad = torch.zeros_like(weight)
    before = weight.detach().clone()
    make(rule, [("w", weight)], lr=3e-4, weight_decay=torch.tensor(1e-4), compile=compile).step()
    torch.testing.assert_close(before - weight.detach(), 3e-8 * before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("split", [None, "rows(4, 2, 2)"])
def test_changes_are_of_the_weights_dtype(monkeypatch: pytest.MonkeyPatch, split: str | None) -> None:
    seen, really = [], Bucket._apply

    def noted(self: Bucket, members: Any, changes: list[torch.Tensor], decay: torch.Tensor) -> None:
        seen.extend(change.dtype for change in changes)
        really(self, members, changes, decay)

    monkeypatch.setattr(Bucket, "_apply", noted)
    weights = [torch.nn.Parameter(torch.ones(8, 4)) for _ in range(FEW_WEIGHTS + 1)]
    for compile in (False, True):
        optimizer = Muon([{"params": weights, "split": split}], compile=compile)
        for weight in weights:
            weight.grad = torch.ones(8, 4)
        optimizer.step()
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("rule", ["muon", "dion", "dion2", "adamw"])
def test_another_default_device_changes_nothing(rule: str) -> None:
    weights = [torch.nn.Parameter(torch.ones(6, 4)) for _ in range(2)]
    for weight, other in zip(weights, ("cpu", "meta"), strict=True):
        with torch.device(other):
            optimizer = make(rule, [("w", weight)])
            weight.grad = torch.arange(24.0, device="cpu").view(6, 4)
            optimizer.step()
    assert torch.equal(*weights)


def test_steps_in_inference_mode_and_outside_follow_each_other() -> None:
    weights = [torch.nn.Parameter(torch.ones(6, 4)) for _ in range(2)]
    for weight, inference in zip(weights, (False, True), strict=True):
        optimizer = Muon([weight], compile=False)
        for step in range(3):
            weight.grad = torch.arange(24.0).view(6, 4) + step
            with torch.inference_mode(inference and step < 2):
                optimizer.step()
    assert torch.equal(*weights)


def test_plans_and_routes_are_those_of_the_process_groups_that_there_are() -> None:
    plans = []
    for axes in ((2,), (1, 2)):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        try:
            mesh = init_device_mesh("cpu", axes, mesh_dim_names=("a", "b")[: len(axes)])["ab"[len(axes) - 1]]
            way = routes.ROUTES[routes.route(mesh, (Shard(1),), 6, (0,))]
            assert way.mesh.get_group(way.axes[0]) is mesh.get_group(0)
            weight = torch.nn.Parameter(DTensor.from_local(torch.ones(3, 4), mesh, [Shard(0)]))
            (bucket,) = make("muon", [("w", weight)]).buckets
            plans.append(bucket._plan(bucket.members))
            assert plans[-1].groups == (mesh.get_group(0).group_name,)
        finally:
            torch.distributed.destroy_process_group()
    assert plans[0] != plans[1]


def test_a_weight_that_lies_elsewhere_than_its_mesh_is_refused() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("meta", (2,))
        layout = StorageLayout((6, 4), torch.float32, torch.device("cpu"), mesh, (Shard(0),))
        member = Member("up.weight", torch.ones(3, 4), layout)
        with pytest.raises(
            ValueError, match=r"up\.weight .*on the cpu, its mesh is of meta .*offload_policy"
        ):
            check_member(member, RULES["muon"], None)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("count", "fit", "lengths"),
    [(5, 2, [1] * 5), (6, 4, [3, 3]), (7, 3, [2, 2, 3]), (4, 9, [4]), (2, 0, [1, 1])],
)
def test_buckets_are_bounded_by_their_bytes(count: int, fit: int, lengths: list[int]) -> None:
    """And of one length where at most twice as many make that possible: a length is a graph."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 4, generator=generator) for _ in range(count)]
    results = []
    for most in (None, fit * 8 * 4 * 4 + 1):
        parameters = [nn.Parameter(weight.clone()) for weight in weights]
        optimizer = Muon(parameters, compile=False, max_bucket_bytes=most)
        assert [len(bucket.members) for bucket in optimizer.buckets] == ([count] if most is None else lengths)
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.grad = weight.clone()
        optimizer.step()
        results.append(parameters)
    for whole, turns in zip(*results, strict=True):
        torch.testing.assert_close(turns, whole)
