"""Param groups that a user changes after the optimizer was made."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from dion_dtensor import Dion, Muon, audit
from dion_dtensor.optimizer import OrthonormalOptimizer
from tests.dtensor.small import Small, optimizer_of, train


def exchanged(optimizer: OrthonormalOptimizer, model: nn.Module) -> None:
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(name) for name in group["param_names"]]


def test_parameters_that_all_were_exchanged_before_the_first_step_are_followed() -> None:
    model, other = Small(), Small()
    optimizer = optimizer_of(model)
    exchanged(optimizer, other)
    assert {row.name for row in audit(optimizer).rows} == {name for name, _ in other.named_parameters()}
    expected = train(model, optimizer_of(model), 3)
    assert all(torch.equal(*pair) for pair in zip(train(other, optimizer, 3), expected, strict=True))
    assert set(optimizer.state) == set(other.parameters())


def test_what_was_loaded_goes_along_with_exchanged_parameters() -> None:
    model, other = Small(), Small()
    optimizer = optimizer_of(model, "dion")
    train(model, optimizer, 2)
    followed = optimizer_of(model, "dion")
    followed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    exchanged(followed, other)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    expected = train(model, optimizer, 2, first=2)
    assert all(torch.equal(*pair) for pair in zip(train(other, followed, 2, first=2), expected, strict=True))


@pytest.mark.parametrize("order", ["groups", "parameters"])
def test_the_state_of_exchanged_parameters_goes_by_name(order: str) -> None:
    source = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(4, 3, generator=source) for name in ("one", "two")}

    def made(algorithm: str = "dion") -> OrthonormalOptimizer:
        groups = [
            {"params": [(name, nn.Parameter(drawn[name].clone()))], "algorithm": algorithm} for name in drawn
        ]
        if order == "parameters":
            groups = [{"params": [pair for group in groups for pair in group["params"]]}]
        return Dion(groups, compile=False)

    def step(optimizer: OrthonormalOptimizer) -> dict[str, torch.Tensor]:
        named = {
            name: p
            for group in optimizer.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        }
        for name, p in named.items():
            p.grad = drawn[name] ** 2
        optimizer.step()
        return {name: p.detach() for name, p in named.items()}

    trained = made()
    after = step(trained)
    optimizer = made()
    optimizer.load_state_dict(copy.deepcopy(trained.state_dict()))
    optimizer.param_groups.reverse()
    for group in optimizer.param_groups:
        group["param_names"] = group["param_names"][::-1]
        group["params"] = [nn.Parameter(after[name].clone()) for name in group["param_names"]]
    found, expected = step(optimizer), step(trained)
    assert all(torch.equal(found[name], expected[name]) for name in drawn)


def test_a_group_may_be_added_between_the_exchange_and_the_first_step() -> None:
    first = [[nn.Parameter(torch.ones(4, 3))] for _ in range(2)]
    optimizer = Muon([{"params": one} for one in first], compile=False)
    loaded = torch.full((4, 3), 2.0)
    optimizer.state[first[0][0]]["momentum"] = loaded
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, copied):
        for group in one.param_groups:
            group["params"] = [nn.Parameter(torch.ones(4, 3))]
        one.add_param_group({"params": [nn.Parameter(torch.ones(2, 3))]})
        assert [len(bucket.members) for bucket in one.buckets] == [1, 1, 1]
        names = [member.name for bucket in one.buckets for member in bucket.members]
        assert names == [f"group {index} parameter 0" for index in range(3)]
        assert torch.equal(one.state[one.param_groups[0]["params"][0]]["momentum"], loaded)
        one.step()


def test_parameters_without_data_are_exchanged_for_some_with() -> None:
    weights = [nn.Parameter(torch.ones(4, 3, device=one)) for one in ("meta", "cpu")]
    optimizer = Muon([{"params": [one]} for one in weights], compile=False)
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(torch.ones(4, 3, device="meta"))]
    with pytest.raises(RuntimeError, match="is not the one"):
        optimizer.members()
    optimizer.state[weights[1]]["momentum"].fill_(3.0)
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(torch.ones(4, 3))]
    optimizer.members()
    momenta = [optimizer.state[group["params"][0]]["momentum"] for group in optimizer.param_groups]
    assert [float(momentum.mean()) for momentum in momenta] == [0.0, 3.0]


def test_hyperparameters_that_change_with_the_exchange_are_refused_as_ever() -> None:
    model, other = Small(), Small()
    optimizer = optimizer_of(model, "dion")
    exchanged(optimizer, other)
    optimizer.param_groups[0]["rank_fraction"] = 0.25
    with pytest.raises(RuntimeError, match=r"its state was made with .*make the optimizer anew"):
        train(other, optimizer, 1)


def test_one_head_is_the_whole_matrix() -> None:
    optimizer = Dion([{"params": [nn.Parameter(torch.ones(4, 3))], "split": "heads(1)"}], compile=False)
    assert optimizer.param_groups[0]["split"] is None


@pytest.mark.parametrize("what", ["after a step", "some alone", "of another shape", "fewer", "another rule"])
def test_other_exchanges_are_refused(what: str) -> None:
    model, other = Small(), Small()
    optimizer = optimizer_of(model)
    if what == "after a step":
        train(model, optimizer, 1)
    exchanged(optimizer, other)
    if what == "some alone":
        optimizer.param_groups[0]["params"][0] = model.up.weight
    elif what == "of another shape":
        optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3, 5))
    elif what == "another rule":
        optimizer.param_groups[0]["algorithm"] = "normuon"
    elif what == "fewer":
        optimizer.param_groups[0]["params"].pop()
    with pytest.raises(RuntimeError, match="is not the one that the optimizer was made with"):
        optimizer.step()


def test_an_exchange_that_is_refused_leaves_the_optimizer_as_it_was() -> None:
    model = Small()
    optimizer = optimizer_of(model)
    own = [list(group["params"]) for group in optimizer.param_groups]
    exchanged(optimizer, Small(torch.complex64))
    with pytest.raises(ValueError, match=r"up\.weight.*complex64"):
        optimizer.step()
    followed = Small()
    exchanged(optimizer, followed)
    optimizer.members()
    for group, params in zip(optimizer.param_groups, own, strict=True):
        group["params"] = params
    other = Small()
    expected = train(other, optimizer_of(other), 2)
    assert all(torch.equal(*pair) for pair in zip(train(model, optimizer, 2), expected, strict=True))


@pytest.mark.parametrize("what", ["group", "parameter"])
def test_what_is_taken_out_of_the_groups_is_stepped_no_more(what: str) -> None:
    model = Small()
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    if what == "group":
        gone = optimizer.param_groups.pop()["params"]
    else:
        gone = [model.up.weight]
        kept = [p for p in optimizer.param_groups[0]["params"] if p is not model.up.weight]
        optimizer.param_groups[0]["params"] = kept
    for parameter in gone:
        del optimizer.state[parameter]
    before = [parameter.detach().clone() for parameter in gone]
    others = model.down.weight.detach().clone()
    train(model, optimizer, 1)
    assert all(torch.equal(old, new) for old, new in zip(before, gone, strict=True))
    assert not torch.equal(others, model.down.weight)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for other, copied in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        assert [g["param_names"] for g in copied.param_groups] == [
            [name for name, one in other.named_parameters() for p in group["params"] if one is p]
            for group in copied.param_groups
        ]
        stepped = train(other, copied, 2)
    assert all(torch.equal(*pair) for pair in zip(stepped, train(model, optimizer, 2), strict=True))


def test_a_frozen_parameter_without_state_can_be_copied() -> None:
    model = Small()
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    model.up.weight.requires_grad_(False)
    model.up.weight.grad = None
    del optimizer.state[model.up.weight]
    optimizer.step()
    other, copied = copy.deepcopy((model, optimizer))
    optimizer.zero_grad()
    after = train(other, copied, 1)
    assert all(torch.equal(*pair) for pair in zip(after, train(model, optimizer, 1), strict=True))


def test_replaced_groups_are_followed() -> None:
    model = Small()
    optimizer = optimizer_of(model)
    optimizer.param_groups = [dict(group, lr=0.0) for group in optimizer.param_groups]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert all(torch.equal(*pair) for pair in zip(before, train(model, optimizer, 1), strict=True))
    first = optimizer.param_groups[0]
    apart = [dict(first, params=[parameter]) for parameter in first["params"]]
    optimizer.param_groups = [*apart, *optimizer.param_groups[1:]]
    train(model, optimizer, 1)  # each of these matrices is of a shape of its own
    twins = [nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    together = Muon(twins, compile=False)
    together.param_groups = [dict(together.param_groups[0], params=[twin]) for twin in twins]
    with pytest.raises(
        RuntimeError, match=r"parameter 1 .*stepped together with others .*make the optimizer anew"
    ):
        together.step()


@pytest.mark.parametrize(
    ("algorithm", "change", "message"),
    [
        ("muon", {"lr": "1e-3"}, "lr='1e-3' must be a number"),
        ("muon", {"lr": float("nan")}, "lr=nan must be finite and not negative"),
        ("muon", {"lr": float("inf")}, "lr=inf must be finite"),
        (
            "muon",
            {"lr": torch.tensor([0.1, 0.2])},
            r"lr must be a number or a tensor of one element, .*\[2\]",
        ),
        ("muon", {"weight_decay": float("inf")}, "weight_decay=inf must be finite"),
        ("muon", {"weight_decay": torch.ones(2)}, "weight_decay must be a number or a tensor of one"),
        ("muon", {"mu": 1.5}, "mu=1.5"),
        ("muon", {"split": "heads(2)"}, r"up\.weight .*split=None, and the group now has 'heads\(2\)'"),
        ("adamw", {"weight_decay": None}, "weight_decay=None must be a number"),
        ("adamw", {"betas": torch.tensor([0.9, 0.95])}, "betas=.* must be two numbers"),
        ("lion", {"betas": (0.9, 1.0)}, "betas=.* must be two numbers"),
        ("dion2", {"fraction": torch.tensor(0.25)}, "fraction=tensor.* must be a number in"),
        ("dion", {"rank_multiple": 2.9}, "rank_multiple=2.9 must be a whole number"),
        ("dion", {"rank_fraction": 0.25}, "its state was made with .*make the optimizer anew"),
    ],
)
def test_hyperparameters_that_a_schedule_spoils_change_nothing(
    algorithm: str, change: dict[str, Any], message: str
) -> None:
    model = Small()
    optimizer = optimizer_of(model, algorithm)
    train(model, optimizer, 1)
    optimizer.param_groups[0].update(change)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises((ValueError, RuntimeError), match=message):
        train(model, optimizer, 1)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_a_rank_fraction_of_the_same_rank_is_taken() -> None:
    model = Small()
    optimizer = optimizer_of(model, "dion", rank_fraction=0.5)
    optimizer.param_groups[0]["rank_fraction"] = 0.49  # three of six as well
    train(model, optimizer, 1)
