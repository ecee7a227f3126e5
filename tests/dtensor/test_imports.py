"""State of torch.optim.Muon, torch.optim.AdamW and microsoft/dion, and which of it is refused.

microsoft/dion is no dependency: its state dicts are written here as it saves them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from dion_dtensor import Muon, import_state_dict, param_groups
from dion_dtensor.foreign import MICROSOFT
from dion_dtensor.optimizer import OrthonormalOptimizer
from tests.dtensor.programs import OPTIMIZERS
from tests.dtensor.small import Small, backward, make

TORCH_MUON: dict[str, Any] = {
    "momentum": "ema",
    "nesterov": True,
    "polynomial": "keller",
    "epsilon": 1e-7,
    "epsilon_rule": "clamp",
    "scale": "keller",
}
TORCH_ADAMW: dict[str, Any] = {"betas": (0.9, 0.999)}
MATRICES = ("up.weight", "down.weight")
Saved = dict[str, Any]


def theirs(model: nn.Module, named: bool = False, **options: Any) -> list[Any]:
    """torch.optim.Muon and AdamW as its documentation has them."""
    parts: list[list[Any]] = [[], []]
    for name, parameter in model.named_parameters():
        parts[name not in MATRICES].append((name, parameter) if named else parameter)
    return [
        torch.optim.Muon(parts[0], **{"lr": 0.02, "weight_decay": 0.1} | options),
        torch.optim.AdamW(parts[1], lr=3e-3, weight_decay=0.01),
    ]


def ours(model: nn.Module, named: bool = True, **options: Any) -> Muon:
    groups = param_groups(model)
    for group in groups:
        if group["algorithm"] == "adamw":
            group |= {"lr": 3e-3, "weight_decay": 0.01, **TORCH_ADAMW}
        if not named:
            group["params"] = [parameter for _, parameter in group["params"]]
    settings = {"lr": 0.02, "weight_decay": 0.1, "compile": False, **TORCH_MUON}
    return Muon(groups, **settings | options)


def run(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    schedules: list[Any],
    steps: range,
) -> list[Tensor]:
    losses = []
    for step in steps:
        model.zero_grad()
        losses.append(backward(model, step))
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    return losses


def decay(optimizer: torch.optim.Optimizer, done: int = 0) -> torch.optim.lr_scheduler.LambdaLR:
    """A schedule after so many steps."""
    if done:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step, last_epoch=done - 1)


def trained(named: bool = False, steps: int = 2, **options: Any) -> tuple[Small, list[Saved]]:
    model = Small(torch.float64)
    optimizers = theirs(model, named, **options)
    run(model, optimizers, [], range(steps))
    return model, [optimizer.state_dict() for optimizer in optimizers]


def states(optimizer: OrthonormalOptimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {name: dict(optimizer.state[parameter]) for name, parameter in model.named_parameters()}


def filled(optimizer: OrthonormalOptimizer, saved: list[Saved], model: nn.Module, **options: Any) -> None:
    """Load ``saved``, whose parameters by name hold what ``model``'s names say (see :func:`marked`)."""
    optimizer.load_state_dict(import_state_dict(optimizer, *saved, **options))
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert key == "step" or torch.equal(value, torch.full_like(value, mark(name))), (name, key)


def mark(name: str) -> float:
    return float(sum(map(ord, name)))


def marked(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[Saved]:
    """State dicts in which each tensor is filled with a number that belongs to its parameter's name."""
    run(model, optimizers, [], range(1))
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                if key != "step":
                    value.fill_(mark(name))
    return [optimizer.state_dict() for optimizer in optimizers]


def float64_newton_schulz() -> AbstractContextManager[Any]:
    """torch's Muon casts to bfloat16 by a method, and divides what that gives in place."""
    return mock.patch.object(Tensor, "bfloat16", Tensor.clone)


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


@pytest.mark.parametrize(
    ("own", "saved", "message"),
    [
        ({"mu": 0.9}, {}, r"mu=0\.95 \(here 0\.9\)"),
        ({}, {"momentum": 0.9}, r"mu=0\.9 \(here 0\.95\)"),
        ({"nesterov": False}, {}, r"nesterov=True \(here False\)"),
        ({}, {"nesterov": False}, r"nesterov=False \(here True\)"),
        ({"polynomial": "you"}, {}, r"polynomial='keller' \(here 'you'\)"),
        ({"polynomial": "polar_express"}, {}, r"polynomial='keller' \(here 'polar_express'\)"),
        ({}, {"ns_steps": 3}, r"polynomial=\(\(3\.4445, -4\.775, 2\.0315\), .*\) \(here 'keller'\)"),
        ({}, {"ns_coefficients": (2.0, -1.5, 0.5)}, r"polynomial=\(\(2\.0, -1\.5, 0\.5\), "),
        ({"norm_factor": 1.02}, {}, r"norm_factor=1\.0 \(here 1\.02\)"),
        ({"epsilon": 1e-8}, {}, r"epsilon=1e-07 \(here 1e-08\)"),
        ({}, {"eps": 1e-5}, r"epsilon=1e-05 \(here 1e-07\)"),
        ({"epsilon_rule": "add"}, {}, r"epsilon_rule='clamp' \(here 'add'\)"),
        ({"scale": "spectral_norm"}, {}, r"scale='keller' \(here 'spectral_norm'\)"),
        ({"scale": None}, {"adjust_lr_fn": "original"}, r"scale='keller' \(here None\)"),
        ({}, {"adjust_lr_fn": "match_rms_adamw"}, r"scale='moonlight' \(here 'keller'\)"),
        ({}, {"adjust_lr_fn": "spectral_unclamped"}, r"scale='spectral_norm' \(here 'keller'\)"),
        ({"weight_storage": "in_out"}, {}, r"weight_storage='out_in' \(here 'in_out'\)"),
        ({"cautious": True}, {}, r"cautious=False \(here True\)"),
        ({"maximize": True}, {}, r"maximize=False \(here True\)"),
    ],
    ids=str,
)
def test_other_settings_than_torch_muons_are_refused_unless_told(
    own: dict[str, Any], saved: dict[str, Any], message: str
) -> None:
    model, dicts = trained(**saved)
    optimizer = ours(model, **own)
    matrices = r"'muon', up\.weight \[12, 6\], down\.weight \[6, 12\]: "
    with pytest.raises(ValueError, match=rf"check_settings=False [^:]*:\n(.*\n)*  {matrices}{message}"):
        import_state_dict(optimizer, *dicts)
    optimizer.load_state_dict(import_state_dict(optimizer, *dicts, check_settings=False))
    assert torch.equal(optimizer.state[model.up.weight]["momentum"], dicts[0]["state"][0]["momentum_buffer"])


def test_settings_that_mean_the_same_are_not_told_apart() -> None:
    triples = [[3.4445, -4.775, 2.0315]] * 5
    model, saved = trained()
    assert import_state_dict(ours(model, polynomial=triples, norm_factor=1.0), *saved)
    model, saved = trained(adjust_lr_fn="match_rms_adamw", ns_steps=3)
    assert import_state_dict(ours(model, scale="rms_norm", polynomial=triples[:3]), *saved)
    saved[0]["param_groups"][0]["ns_coefficients"] = triples[0]  # a list, from a file
    assert import_state_dict(ours(model, scale="moonlight", polynomial=triples[:3]), *saved)


def test_a_split_here_of_what_they_step_whole_is_refused() -> None:
    model, saved = trained(named=True)
    groups = param_groups(model, split={r"up\.weight": (6, 6)})
    groups[-1] |= TORCH_ADAMW
    optimizer = Muon(groups, compile=False, **TORCH_MUON)
    with pytest.raises(
        ValueError, match=r"'muon', up\.weight \[12, 6\]: split=None \(here 'rows\(6, 6\)'\)$"
    ):
        import_state_dict(optimizer, *saved)


def test_adamws_settings_are_compared() -> None:
    model, saved = trained()
    for key, value, message in (
        ("betas", (0.9, 0.95), r"betas=\(0\.9, 0\.999\) \(here \(0\.9, 0\.95\)\)"),
        ("epsilon", 1e-6, r"epsilon=1e-08 \(here 1e-06\)"),
        ("cautious", True, r"cautious=False \(here True\)"),
        ("maximize", True, r"maximize=False \(here True\)"),
    ):
        optimizer = ours(model)
        optimizer.param_groups[-1][key] = value
        with pytest.raises(ValueError, match=rf"'adamw', embedding\.weight \[11, 6\], .*: {message}"):
            import_state_dict(optimizer, *saved)
        assert import_state_dict(optimizer, *saved, check_settings=False)
    saved[1]["param_groups"][0]["maximize"] = True
    with pytest.raises(ValueError, match=r"maximize=True \(here False\)"):
        import_state_dict(ours(model), *saved)


def test_all_differences_are_told_at_once_and_the_way_out_is_one() -> None:
    model, saved = trained()
    with pytest.raises(ValueError) as told:
        import_state_dict(Muon(param_groups(model), compile=False), *saved)
    text = str(told.value)
    for key, value in {**TORCH_MUON, **TORCH_ADAMW}.items():
        assert f"{key}={value!r} (here " in text
    assert "check_settings" not in text  # of no use for a momentum of another kind
    assert import_state_dict(ours(model), *saved)


def test_a_momentum_of_another_kind_is_refused_in_any_case() -> None:
    model, saved = trained()
    for options, message in (
        ({"momentum": "sum"}, r"momentum='ema' \(here 'sum'\)"),
        ({"bias_correction": True}, r"bias_correction=False \(here True\)"),
    ):
        for check_settings in (True, False):
            with pytest.raises(ValueError, match=message):
                import_state_dict(ours(model, **options), *saved, check_settings=check_settings)


def test_lr_and_weight_decay_stay_those_of_here() -> None:
    model, saved = trained(lr=1.0, weight_decay=0.5)
    optimizer = ours(model)
    optimizer.load_state_dict(import_state_dict(optimizer, *saved))
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.02, 0.1), (3e-3, 0.01)]


@pytest.mark.parametrize("algorithm", ["muon", "normuon", "dion", "dion2", "dion3", "adamw", "lion"])
def test_state_as_microsoft_dion_saves_it_goes_on_here(algorithm: str) -> None:
    """Their keys and their place of the step count."""
    weight = nn.Parameter(torch.ones(6, 4))
    optimizer = make(algorithm, [("w", weight)])
    weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    own = copy.deepcopy(optimizer.state[weight])
    keys = MICROSOFT[algorithm]
    group = {"params": [0], "algorithm": "nordion2" if algorithm == "dion3" else algorithm, "step": 1}
    saved: Saved = {"state": {0: {keys[key]: own[key] for key in keys}}, "param_groups": [group]}
    fresh = make(algorithm, [("w", nn.Parameter(torch.ones(6, 4)))])
    fresh.load_state_dict(import_state_dict(fresh, saved))
    (loaded,) = fresh.state.values()
    assert set(loaded) == set(own)
    assert all(torch.equal(loaded[key], own[key]) for key in own)
    other = "lion" if algorithm == "muon" else "muon"
    with pytest.raises(
        ValueError, match=rf"of '{algorithm}' to be matched by order: 1 saved \(.*\), 0 here \(none\)"
    ):
        import_state_dict(make(other, [("w", weight)]), saved)
    if algorithm == "adamw":
        saved["state"][0]["step_dev"] = torch.tensor(5.0)  # a graph that goes on alone counts there
        fresh.load_state_dict(import_state_dict(fresh, saved))
        assert next(iter(fresh.state.values()))["step"] == 5


# Their defaults, which each of their groups holds, of whatever algorithm.
MICROSOFT_GROUP: dict[str, Any] = {
    "lr": 0.01,
    "mu": 0.95,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.01,
    "cautious_wd": False,
    "step": 1,
    "epsilon": 1e-8,
    "nesterov": False,
    "flatten": False,
    "adjust_lr": "spectral_norm",
}
SELECTING = {"fraction": 0.25, "selection_scope": "local"}


@pytest.mark.parametrize(
    ("algorithm", "own", "saved", "message"),
    [
        ("muon", {}, {}, None),
        ("muon", {"momentum": "ema"}, {}, r"momentum='sum' \(here 'ema'\)"),
        ("muon", {"mu": 0.9}, {}, r"mu=0\.95 \(here 0\.9\)"),
        ("muon", {}, {"nesterov": True}, r"nesterov=True \(here False\)"),
        ("muon", {}, {"epsilon": 1e-7}, r"epsilon=1e-07 \(here 1e-08\)"),
        ("muon", {"epsilon_rule": "clamp"}, {}, r"epsilon_rule='add' \(here 'clamp'\)"),
        ("muon", {}, {"adjust_lr": "rms_norm"}, r"scale='moonlight' \(here 'spectral_norm'\)"),
        ("muon", {"scale": "rms_norm"}, {"adjust_lr": "rms_norm"}, None),
        ("muon", {}, {"adjust_lr": None}, r"scale=None \(here 'spectral_norm'\)"),
        ("muon", {}, {"cautious_wd": True}, r"cautious=True \(here False\)"),
        ("muon", {"weight_storage": "in_out"}, {}, r"weight_storage='out_in' \(here 'in_out'\)"),
        ("muon", {}, {"num_heads": 2}, r"split='heads\(2\)' \(here None\)"),
        ("muon", {}, {"num_heads": 1}, None),
        ("muon", {}, {"split_sizes": (4, 2)}, r"split='rows\(4, 2\)' \(here None\)"),
        ("muon", {"split": "rows(4, 2)"}, {"split_sizes": [4, 2]}, None),
        ("muon", {"split": "heads(2)"}, {}, r"split=None \(here 'heads\(2\)'\)"),
        ("muon", {"polynomial": "you"}, {}, None),  # not saved
        ("normuon", {}, {"muon_beta2": 0.95}, None),
        ("normuon", {}, {"muon_beta2": 0.9}, r"beta2=0\.9 \(here 0\.95\)"),
        ("normuon", {"variance_epsilon": 1e-6}, {}, r"variance_epsilon=1e-08 \(here 1e-06\)"),
        ("normuon", {"momentum": "ema"}, {}, r"momentum='sum' \(here 'ema'\)"),
        ("dion", {}, {}, None),
        ("dion", {"scale": "keller"}, {}, r"scale='spectral_norm' \(here 'keller'\)"),
        (
            "dion",
            {"right_factor": "orthonormalize"},
            {},
            r"right_factor='normalize' \(here 'orthonormalize'\)",
        ),
        ("dion", {}, {"mu": 0.9}, r"mu=0\.9 \(here 0\.95\)"),
        ("dion", {}, {"epsilon": 1e-7}, r"epsilon=1e-07 \(here 1e-08\)"),
        ("dion2", {}, {"ef_decay": 0.95, **SELECTING}, None),
        ("dion2", {}, {"ef_decay": 0.9, **SELECTING}, r"mu=0\.9 \(here 0\.95\)"),
        ("dion2", {"fraction": 0.5}, {"ef_decay": 0.95, **SELECTING}, r"fraction=0\.25 \(here 0\.5\)"),
        ("dion3", {}, {"muon_beta2": 0.95, **SELECTING}, None),
        ("dion3", {}, {"muon_beta2": 0.9, **SELECTING}, r"beta2=0\.9 \(here 0\.95\)"),
        ("adamw", {}, {}, None),
        ("adamw", {}, {"beta2": 0.999}, r"betas=\(0\.9, 0\.999\) \(here \(0\.9, 0\.95\)\)"),
        ("adamw", {}, {"epsilon": 1e-7}, r"epsilon=1e-07 \(here 1e-08\)"),
        ("lion", {}, {}, None),
        ("lion", {}, {"beta1": 0.95}, r"betas=\(0\.95, 0\.95\) \(here \(0\.9, 0\.95\)\)"),
    ],
    ids=str,
)
def test_settings_of_microsoft_dion_are_compared(
    algorithm: str, own: dict[str, Any], saved: dict[str, Any], message: str | None
) -> None:
    weight = nn.Parameter(torch.ones(6, 4))
    groups = [{"params": [("w", weight)], "algorithm": algorithm, **own}]
    optimizer = OPTIMIZERS[algorithm](groups, compile=False)
    group = {
        **MICROSOFT_GROUP,
        "params": [0],
        "algorithm": "nordion2" if algorithm == "dion3" else algorithm,
        **saved,
    }
    if "ef_decay" in saved or algorithm == "dion":
        group = {key: value for key, value in group.items() if key not in ("nesterov", "cautious_wd")}
    if "ef_decay" in saved:
        del group["mu"]
    state = {theirs: optimizer.state[weight][ours] for ours, theirs in MICROSOFT[algorithm].items()}
    given = {"state": {0: state}, "param_groups": [group]}
    if message is None:
        assert import_state_dict(optimizer, given)
        return
    with pytest.raises(ValueError, match=rf"'{algorithm}', w \[6, 4\]: {message}$"):
        import_state_dict(optimizer, given)


def test_stacks_and_convolutions_of_microsoft_dion() -> None:
    for shape, flatten, split in (((2, 3, 4), False, "experts"), ((4, 3, 2, 2), True, "flatten")):
        weight = nn.Parameter(torch.ones(shape))
        optimizer = Muon([{"params": [("w", weight)], "split": split}], compile=False)
        group = {**MICROSOFT_GROUP, "params": [0], "algorithm": "muon", "flatten": flatten}
        saved = {"state": {0: {"momentum": torch.full(shape, 3.0)}}, "param_groups": [group]}
        optimizer.load_state_dict(import_state_dict(optimizer, saved))
        assert (optimizer.state[weight]["momentum"] == 3.0).all()
        group["flatten"] = not flatten
        if len(shape) == 3:
            with pytest.raises(ValueError, match=r"split='flatten' \(here 'experts'\)"):
                import_state_dict(optimizer, saved)


def test_a_q_of_another_rank_is_refused() -> None:
    weight = nn.Parameter(torch.ones(6, 4))
    optimizer = make("dion", [("w", weight)])
    group = {"params": [0], "algorithm": "dion", "step": 1}
    saved = {"state": {0: {"momentum": torch.ones(6, 4), "Q": torch.ones(4, 2)}}, "param_groups": [group]}
    with pytest.raises(
        ValueError, match=r"w \[6, 4\]: its 'Q' has shape \[4, 4\] here and \[4, 2\] in the saved"
    ):
        import_state_dict(optimizer, saved, check_settings=False)
