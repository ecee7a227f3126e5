"""Every case of all levels: what a selection asks of a port, what a port claims, and patterns that match nothing."""

from __future__ import annotations

from dataclasses import replace

from conformance.adapters import DTYPES, LEVELS, Capabilities
from conformance.port.convergence import gate_ids, gate_jobs
from conformance.port.grading import Verdict
from conformance.port.mesh_cases import LARGEST, claimed_hypers, mesh_cases
from conformance.port.meshes import mesh_jobs
from conformance.port.runner import Selection, jobs
from conformance.port.selection import SelectionError, matches
from conformance.vectors import VectorSet

MESHES = ("L3", "L4")
GATE = "L5"


def listed(
    claims: Capabilities, vectors: VectorSet, selection: Selection, ranks: int
) -> list[tuple[str, str, Verdict | None]]:
    """Ids and dtypes of all selected cases, with the verdict where it is known without running it."""
    found = [(case.id, dtype, known) for case, dtype, known in jobs(claims, vectors, selection)]
    if set(MESHES) & set(selection.levels) & set(claims.levels):
        found += [(c.id, dtype, known) for c, dtype, known in mesh_jobs(claims, vectors, selection, ranks)]
    if GATE in selection.levels and GATE in claims.levels:
        found += gate_jobs(claims, vectors, selection)
    return found


def claimed_cases(claims: Capabilities, vectors: VectorSet) -> list[tuple[str, str]]:
    """Ids and dtypes of all levels that a port claims: to these the files of known failures may refer."""
    every = Selection(LEVELS)
    found = [(case.id, dtype) for case, dtype, known in jobs(claims, vectors, every) if known is None]
    found += [
        (case.id, dtype)
        for case in mesh_cases(claimed_hypers(claims, vectors), MESHES, ranks=LARGEST)
        for dtype in claims.dtypes
        if case.level in claims.levels and set(case.requires) <= set(claims.features)
    ]
    found += [(case, dtype) for case, dtype, known in gate_jobs(claims, vectors, every) if known is None]
    return found


def check_only(
    claims: Capabilities, vectors: VectorSet, selection: Selection, ranks: int, option: str = "--case"
) -> None:
    """Refuses a pattern that matches nothing of what was asked for.

    Raises:
        SelectionError: names the pattern and the levels, and whether it is the port that claims no such case.
    """
    for pattern in selection.only:
        if listed(claims, vectors, replace(selection, only=(pattern,)), ranks):
            continue
        every = _every(vectors, selection.levels)
        dtypes = f" in {', '.join(selection.dtypes)}" if selection.dtypes else ""
        where = f"of {', '.join(selection.levels)}{dtypes}"
        if any(matches(case, dtype, pattern) for case in every for dtype in selection.dtypes or DTYPES):
            on = f", on {ranks} ranks or fewer" if set(MESHES) & set(selection.levels) else ""
            raise SelectionError(
                f"{option} {pattern!r} matches no case {where} that {claims.name} claims{on}"
            )
        raise SelectionError(f"{option} {pattern!r} matches no case {where}; an id is like {every[0]}")


def _every(vectors: VectorSet, levels: tuple[str, ...]) -> list[str]:
    """Ids of all cases of these levels, whoever claims them."""
    kinds = dict.fromkeys((case.algorithm, case.dialect) for case in vectors if case.level == "L1")
    found = [case.id for case in vectors if case.level in levels]
    found += [case.id for case in mesh_cases({kind: {} for kind in kinds}, levels, ranks=LARGEST)]
    if GATE in levels:
        every = dict.fromkeys((case.algorithm for case in vectors), ("*",))
        found += gate_ids(Capabilities("every", every), vectors)
    return found
