"""The choices in which implementations of Muon differ, and what each of them chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from dion_ref.hyper import (
    EPSILON_RULES,
    MOMENTA,
    SCALES,
    WEIGHT_STORAGES,
    checked_polynomial,
    flag,
    one_of,
    set_number,
)
from dion_ref.polynomials import Triple


@dataclass(frozen=True, kw_only=True)
class Convention:
    """One dialect of Muon; the fields mean what they mean in ``muon.Hyper``.

    Args:
        momentum: "sum" or "ema".
        nesterov: whether the gradient is mixed in once more.
        bias_correction: whether the EMA is divided by what its weights add up to.
        polynomial: a name, "exact", or literal ``(a, b, c)`` steps.
        epsilon: of the input's normalization.
        epsilon_rule: "add" or "clamp".
        norm_factor: None for the table's own.
        scale: see ``update.scale_factor``.
        weight_storage: "out_in" or "in_out".
        source: where these choices are written.
    """

    momentum: str = "sum"
    nesterov: bool = False
    bias_correction: bool = False
    polynomial: str | tuple[Triple, ...] = "polar_express"
    epsilon: float = 1e-8
    epsilon_rule: str = "add"
    norm_factor: float | None = None
    scale: str | None = "spectral_norm"
    weight_storage: str = "out_in"
    source: str = ""

    def __post_init__(self) -> None:
        one_of("momentum", self.momentum, MOMENTA)
        flag("nesterov", self.nesterov)
        flag("bias_correction", self.bias_correction)
        if self.bias_correction and self.momentum != "ema":
            raise ValueError('bias_correction needs momentum="ema": a sum has no weights that add up to 1')
        object.__setattr__(self, "polynomial", checked_polynomial(self.polynomial))
        set_number(self, "epsilon", low=0, open_low=True)
        one_of("epsilon_rule", self.epsilon_rule, EPSILON_RULES)
        if self.norm_factor is not None:
            set_number(self, "norm_factor", low=0, open_low=True)
        one_of("scale", self.scale, SCALES)
        one_of("weight_storage", self.weight_storage, WEIGHT_STORAGES)

    def hyper(self, algorithm: str, **overrides: Any) -> Any:
        """The Hyper of an algorithm in this convention.

        Args:
            algorithm: a key of ``ALGORITHMS``.
            overrides: fields of that Hyper, such as lr and mu.

        Returns:
            An instance of ``ALGORITHMS[algorithm].Hyper``.

        Raises:
            ValueError: an unknown algorithm, or one that can't express a choice in which this convention
                differs from the default one (Dion2 has no Nesterov, for instance).
            TypeError: an override that the Hyper doesn't have.
        """
        from dion_ref.registry import ALGORITHMS  # here, since the algorithms come after the conventions

        one_of("algorithm", algorithm, tuple(ALGORITHMS))
        Hyper = ALGORITHMS[algorithm].Hyper
        known = {field.name for field in fields(Hyper)}
        default = Convention()
        choices = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "source"}
        lost = [name for name in choices if name not in known and choices[name] != getattr(default, name)]
        if lost:
            raise ValueError(
                f"{algorithm} can't express {', '.join(f'{name}={choices[name]!r}' for name in lost)}"
            )
        return Hyper(**{name: value for name, value in choices.items() if name in known} | overrides)


PRESETS: Mapping[str, Convention] = MappingProxyType(
    {
        "dion": Convention(source="microsoft/dion, dion/muon.py and dion/polar_express.py"),
        "keller": Convention(
            momentum="ema",
            nesterov=True,
            polynomial="keller",
            epsilon=1e-7,
            scale="keller",
            source="KellerJordan/Muon, muon.py",
        ),
        "torch": Convention(
            momentum="ema",
            nesterov=True,
            polynomial="keller",
            epsilon=1e-7,
            epsilon_rule="clamp",
            scale="keller",
            source='torch.optim.Muon 2.14.1, adjust_lr_fn="original"; its code is EMA, its docstring says sum',
        ),
        "moonlight": Convention(
            nesterov=True,
            polynomial="keller",
            epsilon=1e-7,
            scale="moonlight",
            source="Moonlight, arXiv 2502.16982 and MoonshotAI/Moonlight",
        ),
        "nvidia": Convention(
            momentum="ema",
            polynomial="you",
            epsilon=1e-15,
            epsilon_rule="clamp",
            scale="nvidia",
            source='NVIDIA Emerging-Optimizers, scale mode "spectral"',
        ),
        "optax": Convention(
            momentum="ema",
            nesterov=True,
            bias_correction=True,
            polynomial="keller",
            scale="keller",
            weight_storage="in_out",
            source="optax.contrib.muon; weights are stored (in, out)",
        ),
    }
)
"""dion, keller, torch, moonlight, nvidia, optax: the conventions of public implementations."""
