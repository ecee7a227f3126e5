"""Levels, patterns, and files of known failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.adapters import Capabilities, find
from conformance.port.grading import SKIP, XFAIL, XPASS
from conformance.port.listing import claimed_cases
from conformance.port.runner import Run, Selection, run_vectors
from conformance.port.selection import SelectionError, check_known, levels_of, matches, read_known
from conformance.vectors import load


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("L0-L4", ("L0", "L1", "L2", "L3", "L4")),
        ("L1", ("L1",)),
        ("L4,L0-L1", ("L0", "L1", "L4")),
        ("L2 - L3", ("L2", "L3")),
    ],
)
def test_levels(text: str, levels: tuple[str, ...]) -> None:
    assert levels_of(text) == levels


@pytest.mark.parametrize("text", ["", "L9", "1", "L1-", "L0-L9", "all"])
def test_no_levels(text: str) -> None:
    if text == "L1-":
        assert levels_of(text) == ("L1",)
        return
    with pytest.raises(SelectionError, match="is no level; give one of L0"):
        levels_of(text)


def test_patterns_are_ids_or_globs_with_or_without_a_dtype() -> None:
    case = "L1/muon/keller/13x10-warm"
    assert matches(case, "float32", case)
    assert matches(case, "float32", "L1/*/keller/*")
    assert matches(case, "float32", "*@float32")
    assert not matches(case, "float64", "*@float32")
    assert not matches(case, "float32", "13x10-warm")


def test_a_reason_is_mandatory(tmp_path: Path) -> None:
    path = tmp_path / "known"
    path.write_text("# comment\n\nL1/*  # because\nL2/*\n")
    with pytest.raises(SelectionError, match=r"known:4: 'L2/\*' has no reason"):
        read_known(path)
    path.write_text("L1/*  # because\n")
    assert [(one.pattern, one.reason) for one in read_known(path)] == [("L1/*", "because")]
    with pytest.raises(SelectionError, match="cannot be read"):
        read_known(tmp_path / "missing")


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "known"
    path.write_text("L1/muon/*  # fine\nL1/moun/*  # a typing mistake\n")
    with pytest.raises(SelectionError, match=r"known:2: 'L1/moun/\*' matches no case"):
        check_known(read_known(path), lambda: [(case, "float32") for case in load().cases])


def test_what_the_port_does_not_claim_matches_nothing() -> None:
    claims = Capabilities("port", {"muon": ("keller",)}, ("L1", "L3"), ("float32",), ("state",))
    found = claimed_cases(claims, load())
    assert {dtype for _, dtype in found} == {"float32"}
    assert {case[:2] for case, _ in found} == {"L1", "L3"}
    assert {case.split("/")[2] for case, _ in found} == {"keller"}
    assert not any("qkv" in case or "S0S1" in case for case, _ in found)


def run(name: str, tmp_path: Path, *, skip: str = "", xfail: str = "") -> Run:
    (tmp_path / "skip").write_text(skip)
    (tmp_path / "xfail").write_text(xfail)
    adapter = find(f"tests.port.ports:{name}")
    selection = Selection(
        ("L1",), ("float64",), ("L1/muon/dion/7x1-warm", "L1/muon/dion/8x8-warm"),
        read_known(tmp_path / "skip"), read_known(tmp_path / "xfail"),
    )  # fmt: skip
    return run_vectors(adapter, adapter.capabilities(), load(), selection)


def test_an_expected_failure_is_no_failure_and_an_unexpected_pass_is_one(tmp_path: Path) -> None:
    broken = run("nan", tmp_path, xfail="*7x1*  # known")
    assert broken.passed
    assert [one.status for one in broken.verdicts if "7x1" in one.case] == [XFAIL]
    assert "known (" in broken.verdicts[0].message
    perfect = run("perfect", tmp_path, xfail="*7x1*  # known")
    assert not perfect.passed
    assert [one.status for one in perfect.verdicts if "7x1" in one.case] == [XPASS]


def test_what_is_skipped_is_not_run(tmp_path: Path) -> None:
    found = run("nan", tmp_path, skip="*7x1*  # slow")
    assert [(one.status, one.message) for one in found.verdicts if "7x1" in one.case] == [(SKIP, "slow")]
    assert found.passed


def test_nothing_but_skips_is_no_pass(tmp_path: Path) -> None:
    assert not run("perfect", tmp_path, skip="*  # all").passed
