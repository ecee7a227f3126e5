"""State: saved, loaded, copied, put in by the user."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from dion_dtensor import Dion, Muon
from tests.dtensor.small import MATRIX_RULES, RULES, Small, make, optimizer_of, train


@pytest.mark.parametrize("algorithm", RULES)
def test_resume_is_bitwise(algorithm: str, tmp_path: Any) -> None:
    model = Small()
    optimizer = optimizer_of(model, algorithm)
    train(model, optimizer, 2)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    expected = train(model, optimizer, 2, first=2)
    saved = torch.load(tmp_path / "checkpoint")
    other = Small()
    resumed = optimizer_of(other, algorithm)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert all(torch.equal(a, b) for a, b in zip(train(other, resumed, 2, first=2), expected, strict=True))


def test_load_copies_into_place_and_keeps_the_wider_dtype() -> None:
    model = Small(torch.bfloat16)
    optimizer = optimizer_of(model, momentum_dtype=torch.float32)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    before = optimizer.state[model.up.weight]["momentum"].clone()
    optimizer.state[model.up.weight]["momentum"].zero_()
    optimizer.load_state_dict(saved)
    momentum = optimizer.state[model.up.weight]["momentum"]
    assert momentum.dtype == torch.float32
    assert torch.equal(momentum, before)
    train(model, optimizer, 1)
    assert not torch.equal(momentum, before)  # the loaded tensor is the one that steps


def test_state_of_another_algorithm_is_refused() -> None:
    model = Small()
    with pytest.raises(
        ValueError, match=r"up\.weight .*follows 'dion' here; in the loaded group it follows 'muon'"
    ):
        optimizer_of(model, "dion").load_state_dict(optimizer_of(model, "muon").state_dict())
    half = optimizer_of(model, "dion", rank_fraction=0.5)
    saved = optimizer_of(model, "dion").state_dict()
    before = copy.deepcopy(half.state_dict())
    with pytest.raises(ValueError, match=r"up\.weight .*'Q' has shape \[6, 3\].*\[6, 6\]"):
        half.load_state_dict(saved)
    assert torch.equal(half.state_dict()["state"][0]["Q"], before["state"][0]["Q"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", -1.0, "lr=-1.0 must be finite and not negative"),
        (
            "algorithm",
            "lion",
            r"embedding\.weight .*follows 'adamw' here; in the loaded group it follows 'lion'",
        ),
        ("split", "heads(2)", r"embedding\.weight .*is split as None here; .* is split as 'heads\(2\)'"),
    ],
)
def test_what_a_loaded_group_has_wrong_is_said_of_its_own_parameter(
    key: str, value: Any, message: str
) -> None:
    model = Small()
    optimizer = optimizer_of(model)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1][key] = value
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)


def test_state_exists_from_construction_on() -> None:
    model = Small()
    for parameter in model.parameters():
        assert optimizer_of(model, "dion").state[parameter]
    assert set(optimizer_of(model, "dion").state[model.up.weight]) == {"momentum", "Q"}


@pytest.mark.parametrize("algorithm", MATRIX_RULES)
def test_copies_and_pickles_step_alike_and_apart(algorithm: str) -> None:
    model = Small()
    optimizer = optimizer_of(model, algorithm)
    train(model, optimizer, 1)
    other, copied = copy.deepcopy((model, optimizer))
    third, unpickled = pickle.loads(pickle.dumps((model, optimizer)))
    expected = train(model, optimizer, 2, first=1)
    for twin, its_optimizer in ((other, copied), (third, unpickled)):
        assert all(
            torch.equal(a, b) for a, b in zip(train(twin, its_optimizer, 2, first=1), expected, strict=True)
        )


def test_a_copy_knows_that_its_momentum_is_still_to_be_averaged() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        weight = nn.Parameter(torch.randn(8, 6))
        mesh = init_device_mesh("cpu", (2,))
        optimizer = Dion([weight], compile=False, replicate_mesh=mesh, averaged=False, rank_fraction=0.5)
        weight.grad = torch.randn(8, 6)
        optimizer.step()
        assert optimizer.buckets[0].pending == (0,)
        assert copy.deepcopy(optimizer).buckets[0].pending == (0,)
    finally:
        torch.distributed.destroy_process_group()


def test_state_put_in_by_the_user_is_the_state_that_steps() -> None:
    weight = nn.Parameter(torch.eye(3))
    optimizer = Muon([("w", weight)], compile=False)
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    optimizer.state[weight]["momentum"] = torch.zeros(3, 3)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["momentum"], torch.ones(3, 3))
    saved = optimizer.state_dict()
    saved["state"][0]["momentum"] = torch.full((3, 3), 2.0)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[weight]["momentum"], torch.full((3, 3), 2.0))
    optimizer.state[weight] = {"momentum": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"w \(\[3, 3\] float32 on one device\): state 'momentum' has shape"):
        optimizer.step()


def test_load_is_all_or_nothing_and_keeps_the_users_hooks() -> None:
    weights = [nn.Parameter(torch.full((2, 2), float(i))) for i in range(3)]
    one = Muon([{"params": weights[:1]}, {"params": weights[1:]}], compile=False)
    two = Muon([{"params": weights[:2]}, {"params": weights[2:]}], compile=False)
    for weight in weights:
        one.state[weight]["momentum"].fill_(5.0)
    with pytest.raises(ValueError, match="parameter group"):
        two.load_state_dict(one.state_dict())
    assert not any(two.state[weight]["momentum"].any() for weight in weights)
    seen = []
    one.register_load_state_dict_pre_hook(lambda _, given: seen.append(len(given["state"])))
    one.register_load_state_dict_post_hook(
        lambda own: seen.append(float(own.state[weights[0]]["momentum"][0, 0]))
    )
    one.load_state_dict(one.state_dict())
    assert seen == [3, 5.0]
    with pytest.raises(ValueError, match="follows 'muon' here; in the loaded group it follows None"):
        one.load_state_dict(torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}]).state_dict())


def test_a_users_own_keys_survive_saving_and_loading() -> None:
    weight = nn.Parameter(torch.eye(2))
    optimizer, fresh = Muon([("w", weight)], compile=False), Muon([("w", weight)], compile=False)
    optimizer.param_groups[0]["lr_mult"] = 0.5
    for one in (optimizer, fresh):
        one.load_state_dict(optimizer.state_dict())
        assert one.param_groups[0]["lr_mult"] == 0.5
    plain = Muon([("w", weight)], compile=False).state_dict()
    optimizer.load_state_dict(plain)
    assert optimizer.param_groups[0]["lr_mult"] == 0.5


def two(*names: str) -> tuple[nn.Module, Muon]:
    """A model of matrices of one size, and an optimizer that has them in this order."""
    model = nn.ParameterDict({name.rsplit(".", 1)[-1]: nn.Parameter(torch.eye(2)) for name in sorted(names)})
    optimizer = Muon([(name, model[name.rsplit(".", 1)[-1]]) for name in names], compile=False)
    for name, parameter in model.items():
        optimizer.state[parameter]["momentum"].fill_(ord(name))
    return model, optimizer


def test_parameters_in_another_order_are_refused() -> None:
    saved = two("a", "b")[1].state_dict()
    model, optimizer = two("b", "a")
    before = optimizer.state[model["a"]]["momentum"].clone()
    with pytest.raises(ValueError, match="parameter 0 of group 0 is b here and a in the saved state"):
        optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[model["a"]]["momentum"], before)
    for prefix in ("_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module."):
        _, wrapped = two(f"{prefix}a", f"{prefix}b")
        wrapped.load_state_dict(saved)
        assert wrapped.param_groups[0]["param_names"] == [f"{prefix}a", f"{prefix}b"]
    del saved["param_groups"][0]["param_names"]
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[model["b"]]["momentum"], torch.full((2, 2), float(ord("a"))))


@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_finds_parameters_in_another_order(flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = get_optimizer_state_dict(*two("a", "b"), options=options)
    model, optimizer = two("b", "a")
    for parameter in model.values():
        optimizer.state[parameter]["momentum"].zero_()
    set_optimizer_state_dict(model, optimizer, saved, options=options)
    for name, parameter in model.items():
        assert optimizer.state[parameter]["momentum"][0, 0] == ord(name)
    assert optimizer.param_groups[0]["param_names"] == ["b", "a"]


@pytest.mark.parametrize("algorithm", RULES)
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32, torch.float64, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_pair_of_dtypes(algorithm: str, state_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.eye(4, 3, dtype=dtype))
    optimizer = make(algorithm, [("w", weight)], momentum_dtype=state_dtype)
    weight.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.detach().clone()
    optimizer.step()
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)
    for key, value in optimizer.state[weight].items():
        assert key == "step" or value.dtype == (state_dtype or dtype)


def test_parameters_of_several_dtypes_in_one_group() -> None:
    weights = [
        nn.Parameter(torch.eye(3, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ]
    optimizer = Muon(weights, compile=False)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all((weight != torch.eye(3, dtype=weight.dtype)).any() for weight in weights)


def test_a_frozen_parameter_needs_no_state_and_keeps_its_own() -> None:
    """torch.distributed.checkpoint saves none of it."""
    model = Small()
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 1)
    (gone,) = (
        i
        for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])
        if p is model.up.weight
    )
    del saved["state"][gone]
    with pytest.raises(ValueError, match=r"up\.weight .*the saved state has nothing of it; was it frozen"):
        optimizer.load_state_dict(saved)
    model.up.weight.requires_grad_(False)
    own = optimizer.state[model.up.weight]["momentum"].clone()
    other = optimizer.state[model.down.weight]["momentum"].clone()
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[model.up.weight]["momentum"], own)
    assert not torch.equal(optimizer.state[model.down.weight]["momentum"], other)
    train(model, optimizer, 1)


def test_a_refused_load_leaves_the_groups_of_frozen_parameters_as_they_were() -> None:
    weight = nn.Parameter(torch.eye(6, 4))
    optimizer = make("dion", [("w", weight)], rank_fraction=0.5)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {}
    saved["param_groups"][0]["rank_fraction"] = 1.0
    weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="its state was made with"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rank_fraction"] == 0.5
    optimizer.step()
