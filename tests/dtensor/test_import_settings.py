"""Settings under which a state was saved by others, compared with those here.

microsoft/dion is no dependency: its state dicts are written here as it saves them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from dion_dtensor import Muon, import_state_dict, param_groups
from dion_dtensor.foreign import MICROSOFT
from tests.dtensor.import_helpers import (
    TORCH_ADAMW,
    TORCH_MUON,
    Saved,
    ours,
    trained,
)
from tests.dtensor.programs import OPTIMIZERS
from tests.dtensor.small import make


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
    if saved.get("adjust_lr_fn") == "spectral_unclamped" and TorchVersion(torch.__version__) < "2.14":
        pytest.skip(
            "this torch.optim.Muon has no such scale"
        )  # it raises when it is made, so saves no such state
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
