"""Which parameter follows which rule, and why; and the audit of what an optimizer does with each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dion_dtensor.optimizer import OrthonormalOptimizer
from dion_dtensor.rules import RULES

__all__ = ["Audit", "AuditRow", "audit", "param_groups"]

# Wrappers that put a prefix into a parameter's name without changing the model.
WRAPPER_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def param_groups(
    model: nn.Module,
    algorithm: str = "muon",
    scalar: str = "adamw",
    lr: float | Tensor | None = None,
    scalar_lr: float | Tensor | None = 3e-4,
    exclude: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Sort a model's parameters: matrices to ``algorithm``, everything else to ``scalar``.

    To ``scalar`` go embeddings and whatever is tied to one, the output head (a Linear called "head" or "lm_head", or
    "output", "classifier" or "fc" at the top of the model), 0-D and 1-D parameters, parameters of more than two dims,
    and whatever ``exclude`` matches.  Works on plain, FSDP2- and TP-wrapped models.

    Args:
        model: its trainable parameters are each claimed exactly once.
        algorithm: "muon" or "dion"; "adamw" or "lion" put everything on that rule.
        scalar: "adamw" or "lion".
        lr: of the matrices; None for the optimizer's.
        scalar_lr: of the rest; None for the optimizer's.
        exclude: regular expressions, searched in the fully qualified names.

    Returns:
        Groups of ``(name, parameter)`` pairs with ``algorithm``, ``lr`` and ``reasons`` (by name).

    Raises:
        ValueError: an unknown rule, an ``exclude`` pattern that matches no parameter, or two parameters whose names
            differ by wrappers only.
    """
    for argument, name in (("algorithm", algorithm), ("scalar", scalar)):
        if name not in RULES:
            raise ValueError(f"{argument}={name!r} is unknown; choose from {sorted(RULES)}")
    if not RULES[scalar].elementwise:
        raise ValueError(f"scalar={scalar!r} takes matrices only; choose an elementwise rule")
    every = _plain_names(model)
    for pattern in exclude:
        if not any(re.search(pattern, name) for name in every):
            raise ValueError(f"exclude pattern {pattern!r} matches no parameter of the model")
    named = [(name, parameter) for name, parameter in every.items() if parameter.requires_grad]
    embeddings = {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    heads = _heads(model)
    matrices: dict[str, tuple[Tensor, str]] = {}
    rest: dict[str, tuple[Tensor, str]] = {}
    for name, parameter in named:
        reason = None
        if any(re.search(pattern, name) for pattern in exclude):
            reason = "excluded"
        elif id(parameter) in embeddings:
            reason = "embedding"
        elif id(parameter) in heads:
            reason = "output head"
        elif parameter.ndim != 2:
            reason = f"{parameter.ndim}-D"
        if reason is None or RULES[algorithm].elementwise:
            matrices[name] = (parameter, reason or "matrix")
        else:
            rest[name] = (parameter, reason)
    groups = []
    for rule, rate, chosen in ((algorithm, lr, matrices), (scalar, scalar_lr, rest)):
        if chosen:
            group: dict[str, Any] = {
                "params": [(name, parameter) for name, (parameter, _) in chosen.items()],
                "algorithm": rule,
                "reasons": {name: reason for name, (_, reason) in chosen.items()},
            }
            if rate is not None:
                group["lr"] = rate
            groups.append(group)
    return groups


def _plain_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that they have without wrappers."""
    named = list(model.named_parameters())
    for prefix in WRAPPER_PREFIXES:
        named = [(name.replace(prefix, ""), parameter) for name, parameter in named]
    if all(name.startswith("module.") for name, _ in named):  # DistributedDataParallel
        named = [(name.removeprefix("module."), parameter) for name, parameter in named]
    plain = dict(named)
    if len(plain) != len(named):
        raise ValueError(f"without {WRAPPER_PREFIXES} two parameters of the model have the same name")
    return plain


def _heads(model: nn.Module) -> set[int]:
    """The weights of output heads: Linear modules named so."""
    found = set()
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Linear) and (
            last in ("head", "lm_head") or name in ("output", "classifier", "fc")
        ):
            found.add(id(module.weight))
    return found


@dataclass(frozen=True)
class AuditRow:
    """One parameter: ``rule``, the ``matrices`` that are orthonormalized, the factor on lr, the layout, and why."""

    name: str
    rule: str
    matrices: str
    scale: float
    layout: str
    why: str


@dataclass(frozen=True)
class Audit:
    """The rows of :func:`audit`; ``str`` gives a table."""

    rows: tuple[AuditRow, ...]

    def __str__(self) -> str:
        head = ("parameter", "rule", "orthonormalized", "lr factor", "layout", "why")
        cells = [head] + [
            (row.name, row.rule, row.matrices, f"{row.scale:.4g}", row.layout, row.why) for row in self.rows
        ]
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def audit(optimizer: OrthonormalOptimizer) -> Audit:
    """What ``optimizer`` does with each parameter, in the order of its groups.

    Args:
        optimizer: a :class:`~dion_dtensor.Muon` or :class:`~dion_dtensor.Dion`.

    Returns:
        One row a parameter; print it for a table.
    """
    rows = {}
    for bucket in optimizer.buckets:
        for member in bucket.members:
            rule, shape = bucket.rule, member.layout.shape
            whole = "-" if rule.elementwise else "1 of " + "x".join(map(str, shape))
            why = bucket.group.get("reasons", {}).get(member.name, "asked for by its group")
            row = AuditRow(member.name, rule.name, whole, bucket.scale, member.layout.describe(), why)
            rows[id(member.parameter)] = row
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    return Audit(tuple(rows[key] for key in order))
