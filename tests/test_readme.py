"""The README's Python runs as it stands, and it names only commands that exist."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dion_ref import ALGORITHMS, FLOAT64

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run_one_after_the_other() -> None:
    cut = "print(sorted(str(group['split']) for group in cut))"
    samples = "\n".join([*BLOCKS[:2], cut, *BLOCKS[2:]])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", samples], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    for said in ("orthonormalized", "['None', 'heads(4)', 'rows(128, 64, 64)']", "relative error"):
        assert said in result.stdout


@pytest.mark.parametrize("command", sorted(set(re.findall(r"ci/[a-z]+", README))))
def test_commands_exist(command: str) -> None:
    assert os.access(ROOT / command, os.X_OK)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_of_pages_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / "docs" / page).read_text())
    for link in links:
        assert link.startswith("https://") or (ROOT / "docs" / link).exists()


@pytest.mark.parametrize("page", ["docs/adding_a_rule.md", "docs/results.md", "docs/specification.md"])
def test_the_sample_of_a_page_runs(page: str) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("member", ["init", "step"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_specification_has_the_oracle_s_signatures(name: str, member: str) -> None:
    signature = inspect.signature(getattr(ALGORITHMS[name], member))
    bare = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
    shown = str(inspect.Signature(bare)).replace("'", '"').replace(repr(FLOAT64), "FLOAT64")
    assert f"`{member}{shown}`" in (ROOT / "docs/specification.md").read_text()
