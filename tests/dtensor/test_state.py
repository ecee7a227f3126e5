"""State: saved, loaded, copied, put in by the user."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from dion_dtensor import Muon
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
    with pytest.raises(ValueError, match=r"up\.weight .*follow 'dion'; the loaded group follows 'muon'"):
        optimizer_of(model, "dion").load_state_dict(optimizer_of(model, "muon").state_dict())
    half = optimizer_of(model, "dion", rank_fraction=0.5)
    saved = optimizer_of(model, "dion").state_dict()
    before = copy.deepcopy(half.state_dict())
    with pytest.raises(ValueError, match=r"up\.weight .*'Q' has shape \[6, 3\].*\[6, 6\]"):
        half.load_state_dict(saved)
    assert torch.equal(half.state_dict()["state"][0]["Q"], before["state"][0]["Q"])


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
    with pytest.raises(ValueError, match="follow 'muon'; the loaded group follows None"):
        one.load_state_dict(torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}]).state_dict())


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
