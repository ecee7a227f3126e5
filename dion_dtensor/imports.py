"""State of other implementations, taken over where the mathematics is the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dion_dtensor.foreign import Parameter, read
from dion_dtensor.optimizer import OrthonormalOptimizer
from dion_dtensor.orthonormalize import resolve_polynomial
from dion_dtensor.state import without_wrappers

__all__ = ["import_state_dict"]

# What the saved state means depends on these, on other settings only what becomes of it.
OF_STATE = {"momentum", "bias_correction"}

NAMES = (
    "make both optimizers of (name, parameter) pairs, or put a list 'param_names' into each saved group, in the order "
    "of its 'params'"
)


def import_state_dict(
    optimizer: OrthonormalOptimizer,
    state_dict: Mapping[str, Any],
    *others: Mapping[str, Any],
    partial: bool = False,
    check_settings: bool = True,
) -> dict[str, Any]:
    """State dicts of torch.optim.Muon, torch.optim.AdamW or microsoft/dion, as ``optimizer.load_state_dict`` takes it.

    A model whose matrices torch.optim.Muon steps and whose rest torch.optim.AdamW steps has two; give both.

    A saved parameter is found by its name where both optimizers were made of named parameters (wrappers' prefixes do
    not count), whatever the order.  Otherwise it is found by order, each algorithm by itself: the k-th parameter that
    is saved of "muon", counted through all groups of all given dicts, is the k-th here of those that follow "muon" and
    were not found by name, counted through the groups.  There must be as many of both, of the same shapes in turn, and
    parameters of one shape must be in corresponding groups, since otherwise their order would be a guess.

    ``lr``, ``weight_decay`` and all else in the groups stay those of ``optimizer``.  These two may differ from the
    saved ones; what else decides on later updates must mean the same (``mu``, ``nesterov``, ``polynomial``,
    ``epsilon``, ``scale``, ``betas``, ``fraction``, ``split``, ...).  torch.optim.Muon with its defaults is
    ``Muon(..., momentum="ema", nesterov=True, polynomial="keller", epsilon=1e-7, epsilon_rule="clamp",
    scale="keller")``; torch.optim.AdamW is a group with ``betas=(0.9, 0.999)``.  Not compared: microsoft/dion's
    polynomial, which it does not save ("polar_express", or "you" with ``use_polar_express=False``), and its
    ``selection_scope``, whose meaning depends on the mesh.

    Where ranks hold momenta of their own, all of them must call it together, as with ``optimizer.state_dict``.

    Args:
        optimizer: of this package.
        state_dict: what the other one's ``state_dict()`` gave, or of it torch.distributed.checkpoint's
            ``get_optimizer_state_dict``.
        others: those of further optimizers of the same model.
        partial: leave the state of parameters of which nothing is saved as it is, that is fresh in a fresh optimizer;
            False (default) to refuse.  Everything saved must find its place all the same, and of an algorithm that
            goes by order all or nothing is saved.
        check_settings: True (default) to refuse other settings than the saved ones; False to take the state and go on
            by those of ``optimizer``.  A momentum of another kind ("sum", "ema") is refused in any case.

    Returns:
        A state dict of ``optimizer``, in which a saved parameter that never had a gradient keeps the state of here.

    Raises:
        ValueError: another algorithm or other settings, a parameter of which nothing is saved or that is not here,
            another shape, an order that does not tell, ``amsgrad=True``, a weight decay that is not decoupled
            (torch.optim.Adam), or a group that none of the three saved.  The message names the parameters or the
            group, and the way out.
        RuntimeError: a group holds parameters that were not there when ``optimizer`` was made.
    """
    ours = _ours(optimizer)
    pairs = _pairs(ours, read((state_dict, *others)))
    left = [one for one in ours if one not in pairs]
    if left and not partial:
        raise ValueError(
            f"nothing is saved of {_listed(left)}; give the state dict of the optimizer that stepped them too, or "
            "partial=True to leave their state as it is"
        )
    _compare_settings(pairs, check_settings)
    result = optimizer.state_dict()
    for position, here in enumerate(ours):
        own, saved = result["state"][position], pairs[here].state if here in pairs else {}
        for key in own if saved else ():
            if saved[key].shape != own[key].shape:
                raise ValueError(
                    f"{here}: its {key!r} has shape {list(own[key].shape)} here and {list(saved[key].shape)} in the "
                    "saved state"
                )
        result["state"][position] = {key: saved[key] for key in own} if saved else own
    return result


def _ours(optimizer: OrthonormalOptimizer) -> list[Parameter]:
    groups = [(place, group) for place, group in enumerate(optimizer.param_groups) for _ in group["params"]]
    found = list(zip(optimizer.members(), groups, strict=True))
    named = [member.name for member, (_, group) in found if group.get("param_names")]
    plain = dict(zip(named, without_wrappers(named), strict=True))
    return [
        Parameter(
            label=member.name,
            name=plain.get(member.name),
            algorithm=group["algorithm"],
            shape=tuple(member.parameter.shape),
            place=place,
            settings=group,
        )
        for member, (place, group) in found
    ]


def _pairs(ours: Sequence[Parameter], saved: Sequence[Parameter]) -> dict[Parameter, Parameter]:
    """The saved one of each parameter of ours, where there is one."""
    named = {one.name: one for one in ours if one.name is not None}
    counted = Counter(one.name for one in ours)
    pairs: dict[Parameter, Parameter] = {}
    ordered: dict[str, list[Parameter]] = {}
    for there in saved:
        if not named or there.name is None:
            ordered.setdefault(there.algorithm, []).append(there)
            continue
        here = named.get(there.name)
        if here is None:
            raise ValueError(
                f"{there} is saved (of {there.algorithm!r}), and no parameter here has that name; correct the saved "
                "'param_names', or delete them from all groups to go by order"
            )
        if counted[there.name] > 1:
            raise ValueError(
                f"{there} is saved, and {counted[there.name]} parameters here have that name; import the state of each "
                "model into an optimizer of its own, or put a prefix before the names here and in the saved groups"
            )
        if here in pairs:
            raise ValueError(
                f"{here} is saved twice, of {pairs[here].algorithm!r} and of {there.algorithm!r}; give the state dict "
                "alone of the optimizer that steps it"
            )
        if here.algorithm != there.algorithm:
            raise ValueError(
                f"{here}: algorithm is {here.algorithm!r} here and {there.algorithm!r} in the saved state; give it to "
                f"a group with algorithm={there.algorithm!r}"
            )
        if there.shape not in (None, here.shape):
            raise ValueError(f"{here} is {there} in the saved state; is it of another model?")
        pairs[here] = there
    for algorithm, theirs in ordered.items():
        free = [one for one in ours if one.algorithm == algorithm and one not in pairs]
        pairs |= _by_order(algorithm, free, theirs)
    return pairs


def _by_order(
    algorithm: str, ours: Sequence[Parameter], saved: Sequence[Parameter]
) -> dict[Parameter, Parameter]:
    if len(ours) != len(saved):
        raise ValueError(
            f"parameters of {algorithm!r} to be matched by order: {len(saved)} saved ({_listed(saved)}), "
            f"{len(ours)} here ({_listed(ours)}); let {algorithm!r} step the same ones here (exclude= of param_groups, "
            f"or groups of your own), or {NAMES}"
        )
    places: dict[tuple[int, ...] | None, set[tuple[int, int]]] = {}
    for position, (here, there) in enumerate(zip(ours, saved, strict=True)):
        if there.shape not in (None, here.shape):
            raise ValueError(
                f"number {position} of {algorithm!r} is {here} here and {there} in the saved state; give the "
                f"parameters in the saved order, or {NAMES}"
            )
        places.setdefault(here.shape, set()).add((here.place, there.place))
    for shape, met in places.items():
        if not len(met) == len({here for here, _ in met}) == len({there for _, there in met}):
            alike = [one for one in ours if one.shape == shape]
            raise ValueError(
                f"{_listed(alike)} are of one shape and spread over other groups of {algorithm!r} than in the saved "
                f"state, so that their order does not tell which is which; {NAMES}"
            )
    return dict(zip(ours, saved, strict=True))


def _compare_settings(pairs: Mapping[Parameter, Parameter], everything: bool) -> None:
    """Refuse other settings, all of them in one message."""
    different: dict[tuple[str, ...], list[Parameter]] = {}
    keys: set[str] = set()
    for here, there in pairs.items():
        found = [
            key
            for key, value in there.settings.items()
            if key in here.settings
            and (everything or key in OF_STATE)
            and (key, here.settings[key]) != ("norm_factor", None)  # None goes with the polynomial
            and _plain(key, here.settings[key]) != _plain(key, value)
        ]
        if found:
            keys.update(found)
            texts = (f"{key}={there.settings[key]!r} (here {here.settings[key]!r})" for key in found)
            different.setdefault((here.algorithm, *texts), []).append(here)
    if different:
        choice = "" if keys & OF_STATE else ", or check_settings=False to go on by those of here"
        lines = [
            f"\n  {name!r}, {_listed(of)}: {', '.join(texts)}" for (name, *texts), of in different.items()
        ]
        raise ValueError(
            "the saved state is of other settings; give these to the optimizer (those of its AdamW or Lion to their "
            f"param group){choice}:{''.join(lines)}"
        )


def _plain(key: str, value: Any) -> object:
    """A setting so that what means the same is equal."""
    if key == "polynomial":
        return resolve_polynomial(value)
    if key == "betas":
        return tuple(float(beta) for beta in value)
    if key == "scale" and value == "rms_norm":
        return "moonlight"
    return value if value is None or isinstance(value, str | bool) else float(value)


def _listed(parameters: Sequence[Parameter], most: int = 12) -> str:
    more = f" and {len(parameters) - most} more" if len(parameters) > most else ""
    return (", ".join(map(str, parameters[:most])) or "none") + more
