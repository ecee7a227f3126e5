"""Meshes, placements, shapes, splits and dtypes drawn by hypothesis: every layout steps as one device does."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conformance.rank_threads import on_threads
from tests.dtensor.checkpoint_programs import continued, torch_knows
from tests.dtensor.layouts import Layout
from tests.dtensor.programs import run_steps, run_steps_with
from tests.dtensor.ranks import Ranks
from tests.dtensor.references import EVERY, error, on_one_thread

COMPUTED = ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.bfloat16))
# By compute dtype. The last columns of P of a square Gaussian matrix are worth several digits less than the others.
LOW_RANK = {torch.float64: 1e-9, torch.float32: 5e-2, torch.bfloat16: 1e-1}
WHOLE = {torch.float64: 0.0, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Drawn:
    """Some parameters of one shape on one layout."""

    name: str
    where: Layout
    shape: tuple[int, ...]
    count: int
    split: str | None
    path: str
    dtype: torch.dtype
    compute_dtype: torch.dtype


@st.composite
def drawn_splits(draw: st.DrawFn, shape: tuple[int, int]) -> str | None:
    """Blocks of rows or of columns of any sizes, heads, or interleaved rows or columns."""
    kind = draw(
        st.sampled_from(["none", "rows", "columns", "heads", "interleaved_rows", "interleaved_columns"])
    )
    size = shape[1] if kind.endswith("columns") else shape[0]
    if kind == "none" or size < 2:
        return None
    divisors = [count for count in range(2, size + 1) if size % count == 0]
    if kind == "heads":
        return f"heads({draw(st.sampled_from(divisors))})"
    interleaved = kind.startswith("interleaved")
    groups = draw(st.sampled_from(divisors)) if interleaved else 1
    height = size // groups
    cuts = draw(st.lists(st.integers(1, height - 1), max_size=3, unique=True)) if height > 1 else []
    ends = [0, *sorted(cuts), height]
    sizes = ", ".join(str(end - start) for start, end in itertools.pairwise(ends))
    if interleaved:
        return f"{kind}(({sizes},), {groups}, {draw(st.booleans())})"
    return f"{kind}({sizes})"


FEW_RANKS = st.sampled_from([(2,), (3,), (4,), (2, 2), (2, 3), (4, 2), (2, 2, 2)])
# Of axes of any sizes, ones among them; each rank is a thread.
MORE_RANKS = (
    st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple).filter(lambda mesh: math.prod(mesh) <= 16)
)


@st.composite
def drawn_layouts(draw: st.DrawFn, mesh: tuple[int, ...], dims: int = 2) -> Layout:
    """Any placements on ``mesh`` of tensors of ``dims``."""
    codes = [draw(st.sampled_from(["R", *(f"S{dim}" for dim in range(dims))])) for _ in mesh]
    last = len(mesh) - 1
    if last and codes[last][0] == "S" and draw(st.booleans()):  # as FSDP2 shards what is tensor parallel
        codes[last - 1] = "T" + codes[last][1]
    return Layout(mesh, tuple(codes))


@st.composite
def drawn(draw: st.DrawFn, meshes: st.SearchStrategy[tuple[int, ...]] = FEW_RANKS) -> Drawn:
    """Any combination."""
    mesh = draw(meshes)
    experts = draw(st.sampled_from([0, 0, 0, 1, 2, 5]))
    kernel = () if experts else draw(st.sampled_from([(), (), (), (2,), (1, 3)]))
    where = draw(drawn_layouts(mesh, 3 if experts or kernel else 2))
    matrix = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    split = draw(drawn_splits(matrix))
    shape = (experts, *matrix) if experts else matrix
    if experts:
        split = "experts" if split is None else f"experts({split})"
    if kernel:  # whose columns are no outputs
        shape = (*matrix, *kernel)
        split = "flatten" if split is None or "columns" in split else f"flatten({split})"
    dtype, compute_dtype = draw(st.sampled_from(COMPUTED))
    name, count = draw(st.sampled_from(EVERY)), draw(st.integers(1, 5))
    path = draw(st.sampled_from(["auto", "low_rank", "assemble"]))
    return Drawn(name, where, shape, count, split, path, dtype, compute_dtype)


def check(ranks: Ranks | None, case: Drawn) -> None:
    """On processes, or on threads."""
    options = {
        "compile": False, "shapes": (case.shape,) * case.count, "split": case.split, "dtype": case.dtype,
        "compute_dtype": case.compute_dtype, "steps": 1,
    }  # fmt: skip
    low_rank = case.name in ("dion", "orth_dion")
    if low_rank:
        options["path"] = case.path
    expected = on_one_thread(run_steps, case.name, None, **options)
    bounds = LOW_RANK if low_rank else WHOLE
    if ranks is None:
        results = on_threads(partial(run_steps_with, case.name, case.where, options), case.where.world)
    else:
        results = ranks.run(case.where.world, run_steps_with, case.name, case.where, options)
    for result in results:
        for ours, theirs in zip(result["weight"], expected["weight"], strict=True):
            assert error(ours, theirs) <= bounds[case.compute_dtype]


SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)


@given(case=drawn())
@settings(SETTINGS, max_examples=60, derandomize=True)
def test_any_mesh_placements_shape_split_and_dtype(ranks: Ranks, case: Drawn) -> None:
    check(ranks, case)


@given(case=drawn())
@settings(SETTINGS, max_examples=20, derandomize=True)
def test_any_split_in_float64_has_the_bits_of_one_device(ranks: Ranks, case: Drawn) -> None:
    name = {"dion": "dion2", "orth_dion": "dion3"}.get(case.name, case.name)
    check(ranks, replace(case, name=name, dtype=torch.float64, compute_dtype=torch.float64))


@given(case=drawn(MORE_RANKS))
@settings(SETTINGS, max_examples=40, derandomize=True)
def test_any_mesh_of_more_ranks(case: Drawn) -> None:
    check(None, case)


def check_resuming(name: str, source: Layout, target: Layout, path: str) -> None:
    """Four steps with a checkpoint after two, saved on one mesh and loaded on another, are those of one device."""

    def words(where: Layout) -> str:
        return " ".join(("x".join(map(str, where.mesh)), *where.codes))

    def on(where: Layout, steps: range, load: bool) -> list[list[Tensor] | None]:
        return on_threads(partial(continued, name, words(where), steps, path, load), where.world)

    for where in (source, target):
        assume(all(on_threads(partial(torch_knows, words(where)), where.world)))
    on(source, range(2), load=False)
    straight = on_threads(partial(continued, name, "1 R", range(4)), 1)[0]
    for resumed in on(target, range(2, 4), load=True):
        assert resumed is not None
        assert straight is not None
        for ours, theirs in zip(resumed, straight, strict=True):
            assert error(ours, theirs) <= (1e-11 if name == "dion" else 0)


RESUMED = {"name": st.sampled_from(["muon", "normuon", "dion", "dion2", "dion3", "adamw"])} | {
    end: MORE_RANKS.flatmap(drawn_layouts) for end in ("source", "target")
}


@given(**RESUMED)
@settings(SETTINGS, max_examples=6, derandomize=True)
def test_training_goes_on_on_any_other_mesh(name: str, source: Layout, target: Layout) -> None:
    with TemporaryDirectory() as folder:
        check_resuming(name, source, target, folder)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # torch tries all placements of four axes, on each of 16 threads
@given(**RESUMED)
@settings(SETTINGS, max_examples=150)
def test_training_goes_on_on_any_other_mesh_at_length(name: str, source: Layout, target: Layout) -> None:
    with TemporaryDirectory() as folder:
        check_resuming(name, source, target, folder)


@pytest.mark.slow
@given(case=drawn(MORE_RANKS))
@settings(SETTINGS, max_examples=500)
def test_any_mesh_of_more_ranks_at_length(case: Drawn) -> None:
    check(None, case)


@pytest.mark.slow
@given(case=drawn())
@settings(SETTINGS, max_examples=300)
def test_any_mesh_placements_shape_split_and_dtype_at_length(ranks: Ranks, case: Drawn) -> None:
    check(ranks, case)
