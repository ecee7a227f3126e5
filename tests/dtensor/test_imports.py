"""State of torch.optim.Muon, torch.optim.AdamW and microsoft/dion, and which of it is refused.

microsoft/dion is no dependency: its state dicts are written here as it saves them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from dion_dtensor import Muon, import_state_dict
from tests.dtensor.import_helpers import (
    MATRICES,
    TORCH_MUON,
    Saved,
    decay,
    filled,
    float64_newton_schulz,
    marked,
    ours,
    run,
    states,
    theirs,
    trained,
)
from tests.dtensor.small import Small, backward


@pytest.mark.parametrize(
    ("exactly", "tolerance"), [(True, 1e-11), (False, 0.05)], ids=["float64", "as it is, in bfloat16"]
)
@pytest.mark.parametrize("named", [False, True])
def test_a_run_of_torch_muon_and_adamw_goes_on_as_theirs(
    named: bool, exactly: bool, tolerance: float
) -> None:
    """Five of their steps, then three of both, the learning rates decaying all along."""
    model = Small(torch.float64)
    optimizers = theirs(model, named)
    schedules = [decay(optimizer) for optimizer in optimizers]
    with float64_newton_schulz() if exactly else nullcontext():
        run(model, optimizers, schedules, range(5))
        other = copy.deepcopy(model)
        optimizer = ours(other, named)
        schedule = decay(optimizer, 5)
        optimizer.load_state_dict(import_state_dict(optimizer, *(one.state_dict() for one in optimizers)))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [one.param_groups[0]["lr"] for one in optimizers], rel=1e-14
        )
        for step in range(5, 8):
            before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            if not exactly:
                other.load_state_dict(model.state_dict())  # else bfloat16 reaches AdamW through the gradients
            run(model, optimizers, schedules, range(step, step + 1))
            run(other, [optimizer], [schedule], range(step, step + 1))
            for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
                bound = tolerance if name in MATRICES or exactly else 1e-12
                assert torch.dist(a, b) <= bound * torch.dist(a, before[name]), name
    own = states(optimizer, other)
    for name, parameter in model.named_parameters():
        saved = optimizers[name not in MATRICES].state[parameter]
        for key, value in own[name].items():
            torch.testing.assert_close(
                value, saved["momentum_buffer" if key == "momentum" else key], rtol=1e-9, atol=1e-12
            )


def test_each_parameters_count_of_steps_is_its_own() -> None:
    model = Small()
    optimizers = theirs(model)
    run(model, optimizers, [], range(2))
    model.zero_grad()
    backward(model)
    model.norm.bias.grad = None
    optimizers[1].step()
    optimizer = ours(model)
    optimizer.load_state_dict(import_state_dict(optimizer, *(one.state_dict() for one in optimizers)))
    assert optimizer.state[model.norm.bias]["step"] == 2
    assert optimizer.state[model.norm.weight]["step"] == 3


def test_names_find_parameters_in_any_order_of_dicts_groups_and_wrappers() -> None:
    model = Small()
    saved = marked(model, theirs(model, named=True))
    filled(ours(model), saved[::-1], model)
    for group in saved[0]["param_groups"]:
        group["params"].reverse()
        group["param_names"].reverse()
    filled(ours(model), saved, model)
    for one in saved:
        one["param_groups"][0]["param_names"] = [
            f"module._orig_mod.{name}" for name in one["param_groups"][0]["param_names"]
        ]
    filled(ours(model), saved, model)
    # Ignored: torch types what it compiles as a function.
    filled(ours(torch.compile(model)), saved, model)  # type: ignore[arg-type]


def test_names_are_found_where_distributed_checkpoint_puts_them() -> None:
    model = Small()
    optimizers = theirs(model)
    marked(model, optimizers)
    saved: list[Any] = [get_optimizer_state_dict(model, optimizer) for optimizer in optimizers]
    assert saved[0]["param_groups"][0]["params"] == list(MATRICES)
    filled(ours(model), saved, model)


def test_by_order_where_names_are_missing_on_either_side_or_in_one_dict() -> None:
    model = Small()
    for named, own_named in ((False, True), (True, False), (False, False)):
        filled(ours(model, own_named), marked(model, theirs(model, named)), model)
    mixed = [
        marked(model, theirs(model, named=True))[0],
        marked(model, theirs(model, named=False))[1],
    ]
    filled(ours(model), mixed, model)
    filled(ours(model), mixed[::-1], model)


def test_two_dicts_of_one_algorithm_the_named_one_first() -> None:
    _, weights = square("ab")
    saved = []
    for name, weight in weights.items():
        weight.grad = torch.eye(3)
        other: Any = torch.optim.Muon([("module.b", weight)] if name == "b" else [weight])
        other.step()
        other.state[weight]["momentum_buffer"].fill_(ord(name))
        saved.append(other.state_dict())
    for names in (("a", "b"), ("module.a", "module.b"), ("_orig_mod.a", "_orig_mod.b")):
        optimizer = Muon(list(zip(names, weights.values(), strict=True)), compile=False, **TORCH_MUON)
        for order in (saved, saved[::-1]):
            optimizer.load_state_dict(import_state_dict(optimizer, *order))
            for name, weight in weights.items():
                assert (optimizer.state[weight]["momentum"] == ord(name)).all()


def test_state_of_parameters_that_never_had_a_gradient_stays() -> None:
    model = Small()
    optimizers = theirs(model)
    backward(model)
    model.up.weight.grad = model.norm.bias.grad = None
    for one in optimizers:
        one.step()
    optimizer = ours(model)
    for parameter in (model.up.weight, model.norm.bias):
        for value in optimizer.state[parameter].values():
            value.fill_(7.0)
    optimizer.load_state_dict(import_state_dict(optimizer, *(one.state_dict() for one in optimizers)))
    for parameter in (model.up.weight, model.norm.bias):
        assert all((value == 7.0).all() for value in optimizer.state[parameter].values())
    assert not any((optimizer.state[model.down.weight]["momentum"] == 7.0).flatten())


def test_what_nothing_is_saved_of_is_refused_or_left_as_it_is() -> None:
    model, (muon, adamw) = trained()
    rest = r"embedding\.weight \[11, 6\], up\.bias \[12\], norm\.weight \[12\], norm\.bias \[12\], lm_head\.weight"
    with pytest.raises(ValueError, match=rf"nothing is saved of {rest}.*partial=True"):
        import_state_dict(ours(model), muon)
    with pytest.raises(
        ValueError, match=r"nothing is saved of up\.weight \[12, 6\], down\.weight \[6, 12\]; give"
    ):
        import_state_dict(ours(model), adamw)
    optimizer = ours(model)
    optimizer.load_state_dict(import_state_dict(optimizer, muon, partial=True))
    taken = states(optimizer, model)
    assert torch.equal(taken["up.weight"]["momentum"], muon["state"][0]["momentum_buffer"])
    assert all(not value.any() for name in taken for value in taken[name].values() if name not in MATRICES)
    for value in optimizer.state[model.norm.bias].values():
        value.fill_(7.0)
    optimizer.load_state_dict(import_state_dict(optimizer, muon, partial=True))
    assert all((value == 7.0).all() for value in optimizer.state[model.norm.bias].values())
    named = trained(named=True)[1]
    for key in ("params", "param_names"):
        del named[1]["param_groups"][0][key][1]
    with pytest.raises(ValueError, match=r"nothing is saved of up\.bias \[12\];"):
        import_state_dict(ours(model), *named)
    optimizer = ours(model)
    optimizer.load_state_dict(import_state_dict(optimizer, *named, partial=True))
    assert optimizer.state[model.up.bias]["step"] == 0
    assert optimizer.state[model.norm.bias]["step"] == 2


def test_a_saved_dict_of_a_bare_matrix_model() -> None:
    weight = nn.Parameter(torch.ones(6, 4))
    other: Any = torch.optim.Muon([weight])  # torch does not type its step
    weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    other.step()
    optimizer = Muon([weight], compile=False, **TORCH_MUON)
    optimizer.load_state_dict(import_state_dict(optimizer, other.state_dict()))
    assert torch.equal(optimizer.state[weight]["momentum"], other.state[weight]["momentum_buffer"])


def rename(saved: list[Saved]) -> None:
    saved[0]["param_groups"][0]["param_names"][0] = "gone.weight"


def name_twice(saved: list[Saved]) -> None:
    saved[1]["param_groups"][0]["param_names"][0] = "up.weight"


def transpose(saved: list[Saved]) -> None:
    saved[0]["state"][0]["momentum_buffer"] = torch.zeros(6, 12)


def swap(saved: list[Saved]) -> None:
    transpose(saved)
    saved[0]["state"][1]["momentum_buffer"] = torch.zeros(12, 6)


def drop(saved: list[Saved]) -> None:
    saved[0]["param_groups"][0]["params"].pop()


def lose_a_key(saved: list[Saved]) -> None:
    del saved[1]["state"][3]["exp_avg_sq"]


def turn_to(**changes: Any) -> Callable[[list[Saved]], None]:
    return lambda saved: saved[1]["param_groups"][0].update(changes)


def of_sgd(saved: list[Saved]) -> None:
    weight = nn.Parameter(torch.ones(12, 6))
    weight.grad = torch.ones(12, 6)
    other = torch.optim.SGD([weight], momentum=0.9)
    other.step()
    saved[0] = other.state_dict()


def of_ours(saved: list[Saved]) -> None:
    saved[:] = [ours(Small()).state_dict()]


@pytest.mark.parametrize(
    ("named", "change", "message"),
    [
        (
            True,
            rename,
            r"gone\.weight \[12, 6\] is saved \(of 'muon'\), and no parameter here has that name; correct",
        ),
        (True, name_twice, r"up\.weight \[12, 6\] is saved twice, of 'muon' and of 'adamw'"),
        (True, transpose, r"up\.weight \[12, 6\] is up\.weight \[6, 12\] in the saved state"),
        (
            False,
            swap,
            r"number 0 of 'muon' is up\.weight \[12, 6\] here and parameter 0 of state dict 0 \[6, 12\] in the saved "
            r"state; .*'param_names'",
        ),
        (
            False,
            drop,
            r"of 'muon' to be matched by order: 1 saved \(parameter 0 of state dict 0 \[12, 6\]\), 2 here \(up\.weight "
            r"\[12, 6\], down\.weight \[6, 12\]\); .*'param_names'",
        ),
        (False, lose_a_key, r"parameter 3 of state dict 1 \(adamw\): the saved state lacks \['exp_avg_sq'\]"),
        (False, turn_to(amsgrad=True), r"group 1 of the saved ones \(in state dict 1\) has amsgrad=True"),
        (False, turn_to(decoupled_weight_decay=False), r"group 1 .*torch\.optim\.Adam's"),
        (
            False,
            of_sgd,
            r"group 0 .*neither torch\.optim\.Muon, torch\.optim\.AdamW nor microsoft/dion saved it",
        ),
        (False, of_ours, r"group 0 .*neither torch\.optim\.Muon"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_impossible_mappings_are_refused(
    named: bool, change: Callable[[list[Saved]], None], message: str
) -> None:
    model, saved = trained(named)
    saved = copy.deepcopy(saved)
    change(saved)
    for lax in (False, True):
        with pytest.raises(ValueError, match=message):
            import_state_dict(ours(model), *saved, partial=lax, check_settings=not lax)


def test_adamw_saved_before_it_was_told_from_adam() -> None:
    model, saved = trained()
    del saved[1]["param_groups"][0]["decoupled_weight_decay"]
    assert import_state_dict(ours(model), *saved)


def test_a_matrix_of_another_algorithm_here_is_refused() -> None:
    """They orthonormalize the head, which is AdamW's here."""
    for named in (False, True):
        model = Small()
        parts: list[list[Any]] = [[], []]
        for name, parameter in model.named_parameters():
            parts[name not in (*MATRICES, "lm_head.weight")].append((name, parameter) if named else parameter)
        optimizers = [torch.optim.Muon(parts[0]), torch.optim.AdamW(parts[1])]
        run(model, optimizers, [], range(1))
        message = (
            r"lm_head\.weight \[11, 6\]: algorithm is 'adamw' here and 'muon' in the saved state; give it to a group"
            if named
            else r"of 'muon' to be matched by order: 3 saved \(.*\[11, 6\]\), 2 here \(up\.weight .*exclude"
        )
        with pytest.raises(ValueError, match=message):
            import_state_dict(ours(model), *(one.state_dict() for one in optimizers))


def square(*groups: str) -> tuple[list[dict[str, Any]], dict[str, nn.Parameter]]:
    """Groups of named matrices of one shape."""
    weights = {name: nn.Parameter(torch.eye(3)) for name in sorted("".join(groups))}
    return [{"params": [(name, weights[name]) for name in names]} for names in groups], weights


def test_an_order_that_does_not_tell_is_refused() -> None:
    groups, weights = square("ac", "b")
    optimizer = Muon(groups, compile=False, **TORCH_MUON)
    for weight in weights.values():
        weight.grad = torch.eye(3)

    def saved(*orders: str, named: bool = False) -> Saved:
        made = [{"params": [(n, weights[n]) if named else weights[n] for n in names]} for names in orders]
        other: Any = torch.optim.Muon(made)
        other.step()
        for name in weights:
            other.state[weights[name]]["momentum_buffer"].fill_(ord(name))
        made_of: Saved = other.state_dict()
        return made_of

    for orders in (("abc",), ("a", "cb"), ("a", "c", "b")):
        with pytest.raises(
            ValueError, match=r"a \[3, 3\], c \[3, 3\], b \[3, 3\] are of one shape .*'param_names'"
        ):
            import_state_dict(optimizer, saved(*orders))
    for one in (saved("ac", "b"), saved("abc", named=True)):
        optimizer.load_state_dict(import_state_dict(optimizer, one))
        for name, weight in weights.items():
            assert (optimizer.state[weight]["momentum"] == ord(name)).all()
    told = saved("abc")
    told["param_groups"][0]["param_names"] = ["a", "b", "c"]  # as the message says
    optimizer.load_state_dict(import_state_dict(optimizer, told))
    assert (optimizer.state[weights["b"]]["momentum"] == ord("b")).all()


def test_groups_cut_otherwise_are_taken_where_shapes_tell() -> None:
    sizes = {"a": (2, 3), "b": (3, 4), "c": (4, 5)}
    weights = {name: nn.Parameter(torch.ones(size)) for name, size in sizes.items()}
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    other: Any = torch.optim.Muon([{"params": [weights["a"]]}, {"params": [weights["b"], weights["c"]]}])
    other.step()
    optimizer = Muon(list(weights.items()), compile=False, **TORCH_MUON)
    optimizer.load_state_dict(import_state_dict(optimizer, other.state_dict()))
    for weight in weights.values():
        assert torch.equal(optimizer.state[weight]["momentum"], other.state[weight]["momentum_buffer"])
