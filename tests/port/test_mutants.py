"""The mutants: every one is caught at the level that should, and what is not a mutant is not caught."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from conformance.cli import app
from conformance.mutants.catalogue import mutants
from conformance.mutants.hunt import LOCAL, hunt
from conformance.mutants.mutant import ORACLE, PRODUCTION, Mutant, attribute
from conformance.vectors import load
from dion_dtensor import buckets

EVERY = mutants()
QUICK = (
    *("EMA for sum (Muon)", "Nesterov flipped", "epsilon clamped in place of added", "transposed scale"),
    *("decay by the scaled learning rate", "k rounded down", "ceiling in floats", "L2 for L1 norm"),
    *("variance updated on unselected rows", "wrong head boundary", "columns dead at float32's rounding"),
    *("last printed digit of a coefficient", "AdamW: steps are not counted", "no column is ever dead"),
    *("epsilon clamped in place of added, Gram form", "Gram matrix not updated within a segment"),
)


def test_there_are_enough_of_them_and_their_names_are_their_own() -> None:
    assert len(EVERY) >= 40
    assert len({(one.name, one.subject) for one in EVERY}) == len(EVERY)
    assert {one.level for one in EVERY} == {"L0", "L1", "L2", "L3", "L4"}
    assert {one.subject for one in EVERY} == {ORACLE, PRODUCTION, "a gathering port"}


def test_a_pattern_that_matches_nothing_gets_the_names() -> None:
    done = CliRunner().invoke(
        app, ["mutants", "--local", "--only", "Nesterov flipped", "--only", "Nestorov*"]
    )
    assert done.exit_code == 2
    said = done.stderr.splitlines()
    assert said[0] == "error: --only 'Nestorov*' matches no mutant; there are"
    assert said[1:] == list(dict.fromkeys(f"  {one.name}" for one in EVERY if one.level in LOCAL))


def test_a_sample_is_caught_where_it_should() -> None:
    chosen = [one for one in EVERY if one.name in QUICK and one.level in LOCAL]
    assert {one.name for one in chosen} == set(QUICK)
    survived = [one.mutant.name for one in hunt(load(), chosen) if not one.right]
    assert survived == []


def test_no_mistake_is_not_caught() -> None:
    from contextlib import nullcontext

    none = Mutant("nothing is wrong", ORACLE, "L1", ("dion2",), nullcontext)
    (catch,) = hunt(load(), [none])
    assert not catch.right
    assert catch.missed == ["L1", "L2"]


def test_what_raises_is_not_caught() -> None:
    """A mutant that takes other arguments than the code gives it would be caught by anything."""
    broken = Mutant(
        "too few arguments",
        PRODUCTION,
        "L1",
        ("muon",),
        lambda: attribute(buckets, "scale_factor", lambda _: len),
    )
    (catch,) = hunt(load(), [broken])
    assert not catch.right


def test_a_mutant_that_no_longer_fits_says_so() -> None:
    with (
        pytest.raises(LookupError, match="no longer fits the code"),
        attribute(Mutant, "no_such", lambda x: x),
    ):
        pass


def test_a_mutant_of_meshes_that_no_longer_fits_is_no_catch(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Mutant("gone", PRODUCTION, "L4", ("dion",), lambda: attribute(Mutant, "no_such", str), ("4-S0",))
    unknown = Mutant("unknown", "a gathering port", "L4", ("dion",), layouts=("4-S0",), kind="NoSuch")
    monkeypatch.setattr(
        "conformance.mutants.hunt.launch.run", lambda *_, **__: pytest.fail("ranks were started")
    )
    found = hunt(load(), [gone, unknown])
    assert not any(one.right or one.caught for one in found)
    assert "no longer fits the code" in found[0].unfit
    assert "NoSuch" in found[1].unfit
    monkeypatch.setattr("conformance.mutants.catalogue.mutants", lambda: [gone])
    done = CliRunner().invoke(app, ["mutants"])
    assert done.exit_code == 1
    assert "does not apply: gone" in done.output


@pytest.mark.slow
def test_every_mutant_is_caught() -> None:
    survived = [f"{one.mutant.name} ({one.mutant.subject})" for one in hunt(load()) if not one.right]
    assert survived == []
