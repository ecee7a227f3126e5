"""Which parameter follows which rule, and why; and the audit of what an optimizer does with each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dion_dtensor.matrices import (
    ROW_BLOCKS,
    Columns,
    Experts,
    Flatten,
    Heads,
    InterleavedColumns,
    InterleavedRows,
    Rows,
    Split,
)
from dion_dtensor.optimizer import OrthonormalOptimizer
from dion_dtensor.roles import (
    BY_HEADS,
    CONVOLUTIONS,
    CONVOLUTIONS_IN_BY_OUT,
    CUT_AS_ASKED,
    DEPTHWISE,
    EMPTY,
    EXPECTED,
    EXPERTS_IN_BY_OUT,
    IN_BY_OUT,
    IN_GROUPS,
    INTERLEAVED,
    NO_STACK,
    may_hold_several,
    plain_names,
    roles,
    rows_of_experts,
)
from dion_dtensor.rules import RULES
from dion_dtensor.split_text import parse_split
from dion_dtensor.state import without_wrappers

__all__ = ["Audit", "AuditRow", "audit", "param_groups"]


def param_groups(
    model: nn.Module,
    algorithm: str = "muon",
    scalar: str = "adamw",
    lr: float | Tensor | None = None,
    scalar_lr: float | Tensor | None = 3e-4,
    exclude: str | Sequence[str] = (),
    split: Mapping[str, Split | str | Sequence[int]] | None = None,
    heads: Mapping[str, int] | None = None,
    missing_ok: bool = False,
) -> list[dict[str, Any]]:
    """Sort a model's parameters: matrices to ``algorithm``, everything else to ``scalar``.

    Each parameter by the first of these that fits it; :func:`audit` prints which did:

    - What ``exclude`` matches goes to ``scalar``.
    - Embeddings and whatever is tied to one go to ``scalar``.  So do parameters that a module holds itself and whose
      names speak of positions, tokens, embeddings, latents, pointers, prompts, tables, registers or codebooks, and
      those of two dims or more that are called biases, scales, gains, alpha, beta, gamma, frequencies, queries or
      ``*_log`` (not ``W_...``, ``..._weight`` or ``..._proj``), or ``D`` beside an ``A_log``.
    - Output heads go to ``scalar``: what a model's own ``get_output_embeddings()`` gives (Hugging Face); a Linear whose
      name ends in "head" or "classifier" or is one of a few others ("qa_outputs", "cls_score", ...); the last Linear
      of a module called "head", "lm_head", "classification_head", "embed_out" or "qa_outputs", or "output",
      "classifier", "heads", "fc" or "score" at the top of the model (also as ``model``, ``net``, ``network`` or
      ``module`` of another); a Linear there called "decoder", "generator", "logits", "output_layer",
      "output_projection", "readout", "to_logits" or "unembed"; where none is found, the one Linear that takes the rows
      of the largest embedding and has an output for each of them.  Also the last layer of an ``nn.Sequential`` whose
      name ends in "head" or "classifier", if it is a Linear or a convolution of kernel size one (and no
      normalization follows), and such a convolution whose own name does (not "conv_head").
    - A convolution's weight is one matrix (``split="flatten"``; a transposed one's with ``weight_storage="in_out"``,
      since its rows are inputs), also if it has groups: ``heads=`` makes a matrix of each.  A depthwise one's is a
      vector for each channel and goes to ``scalar``.
    - The weight of a Hugging Face ``Conv1D`` is the transpose of what is stored (``split="columns(out)"``), and so are
      experts stored as ``[E, in, out]`` (gpt-oss, Llama 4), told by a ``gate_up_proj`` beside a ``down_proj``, or by an
      attribute ``is_transposed`` of their module.
    - A 3-D weight ``[h * k, h, k]`` is one matrix whose columns are those of heads (XLNet); any other is a stack of
      experts (``split="experts"``), unless one of its dims is one, as of class tokens.  One of four dims or more is
      flattened as a convolution's.
    - 0-D, 1-D and empty parameters go to ``scalar``, the magnitudes of weight norms, and 2-D parameters with a dim of
      one that are no layer's weight.

    ``split`` and ``heads`` cut what they match of the matrices, convolutions (depthwise ones too) and stacks.  Works on
    plain, FSDP2- and TP-wrapped models, on Hugging Face's, torchvision's, timm's and torchtitan's.

    Args:
        model: its trainable parameters are each claimed exactly once.
        algorithm: "muon", "normuon", "dion", "dion2" or "dion3"; "adamw" or "lion" put everything on that rule.
        scalar: "adamw" or "lion".
        lr: of the matrices; None for the optimizer's.
        scalar_lr: of the rest; None for the optimizer's.
        exclude: regular expressions, searched in the fully qualified names, in all of them where a parameter is tied.
        split: by regular expression, how a weight is cut into logical matrices: sizes of its blocks of rows
            ``(q, k, v)``, or a split or its text (see :mod:`dion_dtensor.split_text`); rows are those of the logical
            matrix, also of a ``Conv1D`` and of a convolution (a transposed one's are its inputs, of which heads, its
            groups, alone are cut); of a stack of experts, those of each.
        heads: by regular expression, into how many equal blocks of rows a weight is cut: heads, a convolution's groups,
            or 2 for a fused gate and up of equal sizes, one below the other.
        missing_ok: let pass patterns that match no parameter, or no matrix, as of one configuration for all stages of
            a pipeline.

    Returns:
        Groups of ``(name, parameter)`` pairs with ``algorithm``, ``lr``, ``split`` and ``reasons`` (by name).

    Raises:
        TypeError: no model; a split or a number of heads that is none.
        ValueError: an unknown rule, a model wrapped by FullyShardedDataParallel (FSDP1), weights that FSDP2 holds
            unsharded for the moment or that have no shape yet, a pattern that matches no parameter or two that match
            one, a split that does not fit or of what is no matrix, or two parameters whose names differ by wrappers
            only.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups sorts the parameters of an nn.Module by its modules; it was given a {type(model).__name__}"
        )
    for argument, name in (("algorithm", algorithm), ("scalar", scalar)):
        if name not in RULES:
            fitting = sorted(rule for rule in RULES if argument == "algorithm" or RULES[rule].elementwise)
            raise ValueError(f"{argument}={name!r} is unknown; choose from {fitting}")
    if not RULES[scalar].elementwise:
        raise ValueError(f"scalar={scalar!r} takes matrices only; choose 'adamw' or 'lion'")
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    _refuse_fsdp1(model)
    _refuse_unsharded(model)
    _refuse_lazy(model)
    every = plain_names(model)
    splits = {pattern: parse_split(how) for pattern, how in (split or {}).items()}
    if twice := sorted(set(split or ()) & set(heads or ())):
        raise ValueError(f"pattern {twice[0]!r} is in split and in heads; a parameter is split in one way")
    splits |= {pattern: _heads(pattern, count) for pattern, count in (heads or {}).items()}
    left_over: dict[str, list[str]] = {}
    aliases = _aliases(model)
    for argument, patterns in (("exclude", exclude), ("split", split or {}), ("heads", heads or {})):
        for pattern in patterns:
            if not missing_ok and not any(_matches(pattern, names) for names in aliases.values()):
                raise ValueError(f"{argument} pattern {pattern!r} matches no parameter of the model")
    of_modules, of_experts = roles(model), rows_of_experts(model)
    groups: dict[tuple[str, str | None, bool], dict[str, Any]] = {}
    for name, parameter in every.items():
        if not parameter.requires_grad:
            continue
        names = aliases[id(parameter)]
        matching = [pattern for pattern in splits if _matches(pattern, names)]
        if len(matching) > 1:
            raise ValueError(f"{name} is matched by {matching}; a parameter is split in one way")
        why = "excluded" if any(_matches(pattern, names) for pattern in exclude) else None
        why = why or of_modules.get(id(parameter)) or (f"{parameter.ndim}-D" if parameter.ndim < 2 else None)
        cut: str | None = None
        storage = {"weight_storage": "in_out"} if why in CONVOLUTIONS_IN_BY_OUT else {}
        if matching and why in (None, *CUT_AS_ASKED):
            cut = str(_as_stored(splits[matching[0]], name, parameter, why))
            why = f"{why or f'{parameter.ndim}-D'}, {cut}"
        elif why in (IN_BY_OUT, EXPERTS_IN_BY_OUT, INTERLEAVED):
            cut = str(_as_stored(Rows(parameter.shape[-1]), name, parameter, why))
        elif why is None and 0 in parameter.shape:
            why = EMPTY
        elif why is None and parameter.ndim > 2 and 1 in parameter.shape[:1] + parameter.shape[-2:]:
            why = NO_STACK
        elif why in (*CONVOLUTIONS, BY_HEADS) or (why is None and parameter.ndim > 3):
            cut = str(Flatten())
        elif why is None and parameter.ndim == 3:
            cut, why = str(Experts()), "3-D, a stack of matrices"
        if matching:
            left_over.setdefault(matching[0], []).append("" if cut else f"{name} ({why})")
        to_matrices = why is None or cut is not None or RULES[algorithm].elementwise
        rule, rate = (algorithm, lr) if to_matrices else (scalar, scalar_lr)
        if RULES[rule].elementwise:
            cut, storage = None, {}
        key = (rule if to_matrices else "rest", cut, bool(storage))
        if key not in groups:
            groups[key] = {"params": [], "algorithm": rule, "split": cut, "reasons": {}, **storage}
            if rate is not None:
                groups[key]["lr"] = (
                    rate.clone() if isinstance(rate, Tensor) else rate
                )  # a schedule writes into it
        groups[key]["params"].append((name, parameter))
        several = why in IN_GROUPS or id(parameter) in of_experts or may_hold_several(name)
        may_be_several = several and not RULES[rule].elementwise and not matching
        groups[key]["reasons"][name] = (why or "matrix") + (
            "; of several? see split" if may_be_several else ""
        )
    for pattern, given in left_over.items():
        if not missing_ok and all(given):
            raise ValueError(f"pattern {pattern!r} is to cut matrices, but matches only {', '.join(given)}")
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0] == "rest", key[1] or "", key[2]))]


def _heads(pattern: str, count: int) -> Heads:
    try:
        return Heads(count)
    except ValueError as error:
        message = f"heads={{{pattern!r}: {count!r}}} must be a number of blocks; sizes are given by split="
        raise TypeError(message) from error


def _as_stored(split: Split | None, name: str, parameter: Tensor, why: str | None) -> Split | None:
    """A split of logical rows, for a weight whose logical rows may be columns and which may hold several experts.

    Raises:
        ValueError: it does not fit, or would mix a gate and an up that are interleaved.
    """
    across = why in (IN_BY_OUT, EXPERTS_IN_BY_OUT, INTERLEAVED)
    of_experts = parameter.ndim == 3 and (why is None or across)
    if of_experts and isinstance(split, Experts):
        split = split.inner or Rows(parameter.shape[-1 if across else 1])
    where = f"{name} {list(parameter.shape)}"
    if why == INTERLEAVED and (
        isinstance(split, Heads) or (isinstance(split, Rows) and len(split.sizes) > 1)
    ):
        raise ValueError(
            f"{where}: its gate and up are interleaved, and split={str(split)!r} would cut blocks that mix them; give "
            f"split={{...: 'interleaved_rows((1, 1), {parameter.shape[-1] // 2})'}}"
        )
    try:
        if why in CONVOLUTIONS_IN_BY_OUT and not isinstance(split, Heads | Flatten):
            raise ValueError(
                "rows of a transposed convolution are its inputs; only its groups are cut, by heads="
            )
        if (why in (*CONVOLUTIONS, DEPTHWISE) or parameter.ndim > 3) and isinstance(split, ROW_BLOCKS):
            split = Flatten(split)
        if across and isinstance(split, Heads):
            (piece,) = split.pieces(parameter.mT.shape[-2:])
            split = Columns(*[piece.m] * piece.count)
        elif across and isinstance(split, Rows):
            split = Columns(*split.sizes)
        elif across and isinstance(split, InterleavedRows):
            split = InterleavedColumns(split.sizes, split.groups, split.stacked)
        if of_experts and isinstance(split, ROW_BLOCKS):
            alone = split == Rows(parameter.shape[1])
            split = Experts() if alone else Experts(split)
        if split is not None:
            split.pieces(parameter.shape)
    except ValueError as error:
        stored = ", stored as [in, out]; blocks are given by their rows, as outputs" if across else ""
        raise ValueError(f"{where}{stored}: {error}") from error
    return split


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its id: of tied ones ``plain_names`` has the first only."""
    named = list(model.named_parameters(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, (_, parameter) in zip(without_wrappers([name for name, _ in named]), named, strict=True):
        aliases.setdefault(id(parameter), []).append(name)
    return aliases


def _refuse_fsdp1(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                f"{name or 'the model'} is wrapped by FullyShardedDataParallel (FSDP1), whose parameters are flat "
                "pieces of no shape; shard it by torch.distributed.fsdp.fully_shard (FSDP2)"
            )


def _refuse_unsharded(model: nn.Module) -> None:
    for name, module in model.named_modules():
        # Torch does not tell it elsewhere; a version with other names is not refused.
        ask = getattr(module, "_get_fsdp_state", None)
        state = ask() if callable(ask) else None
        held = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        if any(getattr(one, "is_unsharded", False) is True for one in held):
            raise ValueError(
                f"{name or 'the model'} holds whole weights for the moment, as FSDP2 leaves them after a forward pass "
                "without a backward one, and the optimizer would step those in place of the shards; call its reshard()"
            )


def _refuse_lazy(model: nn.Module) -> None:
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(f"{lazy[0]} has no shape yet (a lazy module); run a batch through the model first")


def _matches(pattern: str, names: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


@dataclass(frozen=True)
class AuditRow:
    """One parameter.

    Attributes:
        name: fully qualified.
        rule: the algorithm.
        matrices: how many logical matrices of which shape are orthonormalized, "-" for none.
        scale: the factors on lr, by shape.
        way: how a matrix comes to be whole: "local", "assembled", ...; "-" for none.
        layout: shape, dtype, mesh and placements.
        why: the reason for the rule.
        choice: the way and why it was taken, with the predicted cost of the others; "" where there is none.
    """

    name: str
    rule: str
    matrices: str
    scale: tuple[float, ...]
    way: str
    layout: str
    why: str
    choice: str = ""


@dataclass(frozen=True)
class Audit:
    """The rows of :func:`audit`; ``str`` gives a table."""

    rows: tuple[AuditRow, ...]

    def __str__(self) -> str:
        head = ("parameter", "rule", "orthonormalized", "lr factor", "way", "layout", "why")
        cells = [head] + [
            (
                row.name,
                row.rule,
                row.matrices,
                ", ".join(f"{scale:.4g}" for scale in row.scale),
                row.way,
                row.layout,
                row.why,
            )
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        choices = dict.fromkeys((row.rule, row.matrices, row.choice) for row in self.rows if row.choice)
        notes = [f"{rule}, {matrices}: {choice}" for rule, matrices, choice in choices]
        if notes:
            notes = ["", "Predicted for an H100 on InfiniBand, a step of all matrices alike:", *notes]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *notes])


def audit(optimizer: OrthonormalOptimizer, strict: bool = False) -> Audit:
    """What ``optimizer`` does with each parameter, in the order of its groups.

    Args:
        optimizer: any of this package.
        strict: raise if a parameter of two or more dims is not orthonormalized, for another reason than those of
            :func:`param_groups`: an embedding, an output head, a depthwise convolution, no matrix by its name or shape,
            empty, or excluded.

    Returns:
        One row a parameter; print it for a table.

    Raises:
        ValueError: with ``strict``, naming the parameters.
        RuntimeError: a group holds parameters that were not there when the optimizer was made.
        TypeError: an optimizer of another package.
    """
    if not hasattr(optimizer, "buckets"):
        raise TypeError(f"audit takes an optimizer of this package, not a {type(optimizer).__name__}")
    order = [member.parameter for member in optimizer.members()]
    rows = {}
    for bucket in optimizer.buckets:
        for member in bucket.members:
            why = member.why or "asked for by its group"
            pieces = member.form.pieces if member.form else ()
            row = AuditRow(
                name=member.name,
                rule=bucket.rule.name,
                matrices=", ".join(f"{p.count} of {p.m}x{p.n}" for p in pieces) or "-",
                scale=bucket.scales(),
                way=bucket.way(),
                layout=member.layout.describe(),
                why=why,
                choice=bucket.choice.why if bucket.choice else "",
            )
            rows[id(member.parameter)] = row
    found = Audit(tuple(rows[id(p)] for p in order))
    if strict:
        left = [
            f"{row.name} ({row.layout}): {row.rule}, {row.why}"
            for row, parameter in zip(found.rows, order, strict=True)
            if row.matrices == "-" and parameter.ndim >= 2 and row.why not in EXPECTED
        ]
        if left:
            raise ValueError("matrices that are not orthonormalized:\n  " + "\n  ".join(left))
    return found
