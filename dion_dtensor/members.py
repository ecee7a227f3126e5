"""A parameter in a stack of logical matrices: which of them this rank holds, and how its shard is laid in the stack."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from dion_dtensor.assembly import local_of, scattered
from dion_dtensor.layout import StorageLayout, move_shard, owners, shard_dim
from dion_dtensor.matrices import Experts, Flatten, Heads, Piece, Split, by_rows
from dion_dtensor.philox import normal
from dion_dtensor.rules import Rule, StateSpec

__all__ = ["Form", "Member", "StateForm", "form_of", "initial_entries", "scale_entries", "state_forms"]


@dataclass(frozen=True)
class Form:
    """How a parameter takes part in a stack.

    Attributes:
        kind: "matrix", a shard of one logical matrix; "units", shards of several experts or heads; "whole", a shard of
            the parameter, cut by ``split`` once it is assembled, because shard boundaries may cut its logical matrices.
        entry: layout of one entry of the stack: a logical matrix, an expert, or the whole parameter.
        count: entries on each rank.
        numbers: which of the parameter's experts or heads this rank's entries are; fewer than ``count`` where other
            ranks hold more.
        pieces: the logical matrices by shape.
        split: how the parameter is cut; of one that is flat, how the matrix is.
        flat: whether a convolution takes part as the matrix that it is flattened to.
    """

    kind: str
    entry: StorageLayout
    count: int
    numbers: tuple[int, ...]
    pieces: tuple[Piece, ...]
    split: Split | None = None
    flat: bool = False

    @property
    def cut(self) -> Split | None:
        """How an entry is cut into logical matrices once it is assembled; None if it is one."""
        if isinstance(self.split, Experts):
            return self.split.inner
        return self.split if self.kind == "whole" else None

    @property
    def entry_pieces(self) -> tuple[Piece, ...]:
        """The logical matrices of one entry."""
        if self.cut is not None:
            return self.cut.pieces(self.entry.shape)
        m, n = self.entry.shape
        return (Piece(1, m, n, 0),)

    @property
    def across(self) -> bool:
        """Whether the rows of the logical matrices are columns of the parameter."""
        return self.cut is not None and by_rows(self.cut)[0]

    @property
    def travels(self) -> bool:
        """Whether ranks hold parts of one entry."""
        return any(self.entry.axes_sharding(dim) for dim in range(len(self.entry.shape)))


def form_of(layout: StorageLayout, split: Split | None) -> Form:
    """The form of a parameter of ``layout``.

    Raises:
        ValueError: ``split`` does not fit the shape.
    """
    if split is None:
        m, n = layout.shape
        return Form("matrix", layout, 1, (0,), (Piece(1, m, n, 0),))
    pieces = split.pieces(layout.shape)
    beyond = any(layout.axes_sharding(dim) for dim in range(1, len(layout.shape)))
    if isinstance(split, Flatten) and not beyond:
        return replace(form_of(replace(layout, shape=split.matrix(layout.shape)), split.inner), flat=True)
    if isinstance(split, Experts | Heads):
        held = _units(layout, pieces[0].count if isinstance(split, Heads) else layout.shape[0])
        if held is not None:
            matrix = layout.shape[1:] if isinstance(split, Experts) else (pieces[0].m, pieces[0].n)
            return Form(
                "units",
                _one_unit(layout, matrix),
                max(map(len, held.values())),
                held[_here(layout)],
                pieces,
                split,
            )
    return Form("whole", layout, 1, (), pieces, split)


def _here(layout: StorageLayout) -> tuple[int, ...]:
    """This rank's coordinates on the axes that shard dim 0."""
    if layout.mesh is None:
        return ()
    here = layout.mesh.get_coordinate()
    assert here is not None
    return tuple(here[axis] for axis in layout.axes_sharding(0))


def _units(layout: StorageLayout, count: int) -> dict[tuple[int, ...], tuple[int, ...]] | None:
    """Which of ``count`` equal parts of dim 0 each rank holds; None if a shard boundary cuts one."""
    axes = layout.axes_sharding(0)
    sizes = tuple(layout.mesh.size(axis) for axis in axes) if layout.mesh is not None else ()
    rows = layout.shape[0] // count
    units = {}
    for place, held in owners(layout.shape[0], sizes, tuple(layout.placements[a] for a in axes)).items():
        starts = held[::rows]
        if any(start % rows for start in starts):
            return None
        if held != [index for start in starts for index in range(start, start + rows)]:
            return None
        units[place] = tuple(start // rows for start in starts)
    return units


def _one_unit(layout: StorageLayout, matrix: tuple[int, ...]) -> StorageLayout:
    """The layout of one expert or head; the axes that shard dim 0 hold different ones."""
    apart = layout.axes_sharding(0)
    drop = len(layout.shape) - 2  # an expert has a dim less than the parameter
    placements = tuple(
        Replicate() if dim == 0 else p if dim is None else move_shard(p, dim - drop)
        for p, dim in ((p, shard_dim(p)) for p in layout.placements)
    )
    return replace(layout, shape=matrix, placements=placements, apart=apart)


@dataclass(frozen=True)
class StateForm:
    """One state tensor of a member: as an entry of the bucket's stack, and as the user sees it.

    Attributes:
        spec: of the rule.
        entry: layout of one entry of the stack.
        shown: layout of the user's tensor.
        pieces: indices of the pieces that it belongs to.
    """

    spec: StateSpec
    entry: StorageLayout
    shown: StorageLayout
    pieces: tuple[int, ...]


def state_forms(
    layout: StorageLayout, form: Form, rule: Rule, group: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, StateForm]:
    """The state tensors of a parameter, by key: one for all of its logical matrices where that is possible.

    ``momentum`` has the parameter's shape and ``variance`` its rows, whatever the split; ``Q`` has a leading dim if
    there are several logical matrices of one shape, and is ``Q.0``, ``Q.1``, ... if they have several shapes.
    """
    found = {}
    for index, piece in enumerate(form.pieces):
        for key, spec in rule.states((piece.m, piece.n), group).items():
            if spec.dims is None:
                shown = replace(layout, dtype=dtype)
                found[key] = StateForm(spec, replace(form.entry, dtype=dtype), shown, ())
            elif spec.dims == ("row", None):
                found[key] = _row_state(layout, form, spec, dtype)
            else:
                name = key if len(form.pieces) == 1 else f"{key}.{index}"
                found[name] = _factor_state(layout, form, spec, dtype, index)
    return found


def _row_state(layout: StorageLayout, form: Form, spec: StateSpec, dtype: torch.dtype) -> StateForm:
    names = ("column", "row") if form.across else ("row", "column")
    rows = form.entry.shape[names.index("row")]
    entry = form.entry.derived(("row", None), (rows, 1), dtype, names if form.across else None)
    if form.kind == "whole":
        return StateForm(spec, entry, entry, ())
    if isinstance(form.split, Experts):
        shown = layout.derived(("unit", "row", None), (layout.shape[0], rows, 1), dtype, ("unit", *names))
    else:
        shown = layout.derived(("row", None), (layout.shape[0], 1), dtype)
    return StateForm(spec, entry, shown, ())


def _factor_state(
    layout: StorageLayout, form: Form, spec: StateSpec, dtype: torch.dtype, index: int
) -> StateForm:
    assert spec.dims is not None
    assert spec.sizes is not None
    if form.cut is not None:
        count = form.entry_pieces[index].count
        sizes = (count, *spec.sizes) if count > 1 else spec.sizes
        whole = tuple(Replicate() for _ in form.entry.placements)
        entry = replace(form.entry, shape=sizes, dtype=dtype, placements=whole)
        if form.kind == "whole":
            return StateForm(spec, entry, entry, (index,))
        sizes, dims = (layout.shape[0], *sizes), ("unit", *[None] * len(sizes))
        return StateForm(spec, entry, layout.derived(dims, sizes, dtype, ("unit", "row", "column")), (index,))
    entry = form.entry.derived(spec.dims, spec.sizes, dtype)
    if form.kind != "units":
        return StateForm(spec, entry, entry, (index,))
    sizes = (form.pieces[index].count, *spec.sizes)
    names = ("unit", "row", "column") if isinstance(form.split, Experts) else ("unit", "column")
    return StateForm(spec, entry, layout.derived(("unit", *spec.dims), sizes, dtype, names), (index,))


def scale_entries(form: Form, scales: Sequence[float], device: torch.device) -> Tensor:
    """The factor of each row of a logical matrix that this rank holds, in float64, where ``scales`` are the pieces'."""
    assert form.cut is not None
    pieces = form.entry_pieces
    columns = [
        torch.full((piece.count, piece.m, 1), scale, dtype=torch.float64, device="cpu")
        for piece, scale in zip(pieces, scales, strict=True)
    ]
    rows = form.cut.merge(columns, (sum(piece.count * piece.m for piece in pieces), 1))[0]
    values = rows.mT.contiguous() if form.across else rows
    beyond = [None] * (len(form.entry.shape) - 2)  # a convolution's that is assembled
    values = values.view(*values.shape, *[1 for _ in beyond])
    dims = (None, "column") if form.across else ("row", None, *beyond)
    return scattered(values.to(device), form.entry.derived(dims, tuple(values.shape), values.dtype))


@dataclass(eq=False)
class Member:
    """A parameter in a bucket.

    Attributes:
        name: fully qualified.
        parameter: a tensor or a DTensor.
        layout: of the parameter, and of the axes over which it is replicated unknown to itself.
        form: its part in a stack; None under an elementwise rule.
        views: its state by key, as the user sees it.
        why: the reason for its rule, of :func:`~dion_dtensor.param_groups`; "" if there is none.
    """

    name: str
    parameter: Tensor
    layout: StorageLayout
    form: Form | None = None
    views: dict[str, Tensor] = field(default_factory=dict)
    why: str = ""

    @property
    def local(self) -> Tensor:
        """The parameter's own shard."""
        return local_of(self.parameter).detach()

    def fold(self, local: Tensor) -> Tensor:
        """A shard of the parameter's shape, as entries ``[count, ...]`` of the stack; a view where it can be one."""
        form = self.form
        assert form is not None
        if form.flat:
            local = local.reshape(local.shape[0], form.entry.shape[1])
        if form.kind in ("matrix", "whole"):
            return local.unsqueeze(0)
        rows = local.shape[1] if local.ndim == 3 else form.entry.shape[0]
        entries = local.reshape(len(form.numbers), rows, local.shape[-1])
        missing = form.count - len(entries)
        return torch.cat((entries, entries.new_zeros(missing, *entries.shape[1:]))) if missing else entries

    def unfold(self, entries: Tensor, dims: Sequence[str | None] | None = None) -> Tensor:
        """Entries ``[count, ...]`` of the stack as a local tensor, a view of a contiguous stack.

        Args:
            entries: this member's.
            dims: of the state, as in its spec; None for the shape of the parameter.
        """
        assert self.form is not None
        own = entries[: len(self.form.numbers)] if self.form.kind == "units" else entries[0]
        if dims is None:
            return own.reshape(self.local.shape)
        if self.form.kind == "units" and "rank" not in dims:
            if self.form.flat:
                return own.reshape(self.local.shape[0], 1)
            shape = self.local.mT.shape if self.form.across else self.local.shape
            return own.reshape(*shape[:-1], 1)
        return own

    def shown(self, layout: StorageLayout, local: Tensor) -> Tensor:
        """State as the user sees it: a DTensor beside a DTensor, on the mesh that the parameter knows."""
        if not isinstance(self.parameter, DTensor):
            return local
        hidden = len(layout.placements) - self.parameter.device_mesh.ndim
        own = replace(layout, mesh=self.parameter.device_mesh, placements=layout.placements[hidden:])
        # Made of a tensor of its own: torch takes a DTensor with the offset of a view for a storage to save or to copy.
        state = own.wrap(torch.empty_like(local))
        assert isinstance(state, DTensor)
        state._local_tensor = local
        return state


def initial_entries(member: Member, state: StateForm, seed: int) -> Tensor:
    """Standard normal values ``[count, ...]`` by (seed, name, logical matrix, row, column)."""
    form, spec, entry = member.form, state.spec, state.entry
    assert form is not None
    assert spec.sizes is not None
    (index,) = state.pieces
    piece, each = form.pieces[index], form.entry_pieces[index].count
    height, width = spec.sizes
    by_rows, by_columns = (
        tuple(p if shard_dim(p) == dim else Replicate() for p in entry.placements) for dim in (0, 1)
    )

    @functools.cache
    def rows() -> Tensor:  # that lie here: no others are drawn
        numbers = torch.arange(height, device="cpu").unsqueeze(1)
        return scattered(numbers, replace(entry, shape=(height, 1), placements=by_rows)).squeeze(1).cpu()

    def matrix(number: int) -> Tensor:
        if entry.device.type == "meta":
            empty = torch.empty(height, width, dtype=entry.dtype, device="meta")
            return scattered(empty, replace(entry, shape=(height, width)))
        values = normal(rows(), width, seed=seed, name=member.name, matrix=number)
        here = replace(entry, shape=(len(values), width), placements=by_columns)
        return scattered(values.to(entry.device, entry.dtype), here)

    def draw(unit: int) -> Tensor:
        drawn = [
            matrix(number) for number in range(piece.first + unit * each, piece.first + (unit + 1) * each)
        ]
        return torch.stack(drawn) if each > 1 else drawn[0]

    units = form.numbers if form.kind == "units" else (0,)
    drawn = [draw(unit) for unit in units]
    missing = form.count - len(drawn)
    return torch.stack(drawn + ([torch.zeros_like(draw(0))] * missing if missing else []))
