"""What users keep in ``optimizer.state``, take out of groups and out of the state, and copy from groups."""

from __future__ import annotations

import copy
import io
import pickle
from collections import defaultdict

import pytest
import torch
from torch import nn

from dion_dtensor import Muon, audit, param_groups
from tests.dtensor.small import Small, backward, optimizer_of, train


def test_what_users_keep_beside_the_state_is_saved_copied_and_loaded() -> None:
    model = Small()
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    for parameter in model.parameters():
        optimizer.state[parameter]["slow"] = parameter.detach().clone()
    optimizer.state["global"] = {"k": 5}  # type: ignore[index]
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    other = Small()
    loaded = optimizer_of(other)
    loaded.load_state_dict(torch.load(saved))
    copied = copy.deepcopy(optimizer)
    pickled = pickle.loads(pickle.dumps(optimizer))
    for one in (loaded, copied, pickled):
        assert one.state["global"] == {"k": 5}  # type: ignore[index]
        parameters = [parameter for group in one.param_groups for parameter in group["params"]]
        expected = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for mine, theirs in zip(parameters, expected, strict=True):
            assert one.state[mine].keys() == optimizer.state[theirs].keys()
            assert torch.equal(one.state[mine]["slow"], optimizer.state[theirs]["slow"])
    other.load_state_dict(model.state_dict())
    assert all(
        torch.equal(*pair)
        for pair in zip(train(other, loaded, 2, first=1), train(model, optimizer, 2, first=1), strict=True)
    )


def test_what_users_keep_goes_along_with_exchanged_parameters() -> None:
    model, other = Small(), Small()
    optimizer = optimizer_of(model)
    optimizer.state[model.up.weight]["slow"] = torch.ones(3)
    for group in optimizer.param_groups:
        group["params"] = [other.get_parameter(name) for name in group["param_names"]]
    optimizer.state_dict()
    assert torch.equal(optimizer.state[other.up.weight]["slow"], torch.ones(3))


def test_a_state_that_lacks_a_key_is_still_refused() -> None:
    model = Small()
    optimizer = optimizer_of(model, "normuon")
    saved = optimizer.state_dict()
    index = optimizer.param_groups[0]["params"].index(model.up.weight)
    saved["state"][index] = {"momentum": saved["state"][index]["momentum"], "slow": torch.ones(1)}
    with pytest.raises(ValueError, match=r"up\.weight .*was it saved by another algorithm\?"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("kind", ["cleared", "replaced"])
def test_a_state_that_was_taken_out_is_missed_by_name(kind: str) -> None:
    model = Small()
    optimizer = optimizer_of(model)
    backward(model)
    if kind == "cleared":
        optimizer.state.clear()
    else:
        optimizer.state = defaultdict(dict)
    with pytest.raises(
        ValueError, match=r"\(\[.*its state is no longer in optimizer.state; to start afresh zero"
    ):
        optimizer.step()


def test_a_parameter_that_was_taken_out_is_not_saved() -> None:
    model = Small()
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    group = optimizer.param_groups[0]
    index = [parameter is model.down.weight for parameter in group["params"]].index(True)
    kept = optimizer.state[model.down.weight]["momentum"]
    group["params"].pop(index)
    saved = copy.deepcopy(optimizer.state_dict())
    assert [name for one in saved["param_groups"] for name in one["param_names"]] == [
        name for name, _ in model.named_parameters() if name in ("up.weight",)
    ] + [name for name, _ in model.named_parameters() if name not in ("up.weight", "down.weight")]
    assert len(saved["state"]) == len(list(model.parameters())) - 1
    assert optimizer.state[model.down.weight]["momentum"] is kept  # it may come back
    groups = param_groups(model, lr=0.02)
    for one in groups:
        one["params"] = [pair for pair in one["params"] if pair[1] is not model.down.weight]
    fresh = Muon(groups, compile=False)
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.state[model.up.weight]["momentum"], optimizer.state[model.up.weight]["momentum"])
    group["params"].append(model.down.weight)
    backward(model)
    optimizer.step()
    assert group["param_names"] == ["up.weight", "down.weight"]


def test_a_group_that_is_a_copy_of_another_does_not_take_its_names() -> None:
    weights = [nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
    optimizer = Muon([("a", weights[0])], compile=False)
    with pytest.raises(ValueError, match="all optimizer param groups should be with/without names"):
        optimizer.add_param_group({**optimizer.param_groups[0], "params": [weights[1]]})
    optimizer.add_param_group({**optimizer.param_groups[0], "params": [("b", weights[1]), ("c", weights[2])]})
    assert [row.name for row in audit(optimizer).rows] == ["a", "b", "c"]


def test_parameters_that_were_replaced_are_not_passed_over_in_silence() -> None:
    with torch.device("meta"):
        model = Small()
    optimizer = optimizer_of(model)
    model.to_empty(device="cpu")
    backward(model)
    with pytest.raises(RuntimeError, match=r"up\.weight .* has neither data nor gradient"):
        optimizer.step()
    model = Small()
    optimizer = optimizer_of(model)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    backward(model)
    with pytest.warns(UserWarning, match="no parameter of the optimizer has a gradient at its first step"):
        optimizer.step()
