"""What import-linter cannot see: which files may use collectives, and that importing needs torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PRODUCTION = Path(__file__).parent.parent / "dion_dtensor"
VOCABULARY = {
    "torch.distributed.device_mesh",
    "torch.distributed.tensor",
    "torch.distributed.tensor.placement_types",
}


# The one collective that DTensor has no redistribution for, and a type.
EXCEPTIONS = {
    "exchange.py": {"Work", "all_to_all_single"},
    "common.py": {"ProcessGroup"},
    "optimizer.py": {"ProcessGroup"},
}


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {alias.name for alias in node.names}
            if node.module != "torch.distributed" or not names <= EXCEPTIONS.get(path.name, set()):
                found.add(node.module)
    return found


@pytest.mark.parametrize(
    "path", sorted(PRODUCTION.rglob("*.py")), ids=lambda path: str(path.relative_to(PRODUCTION))
)
def test_only_layouts_are_imported_from_torch_distributed(path: Path) -> None:
    distributed = {name for name in imported_modules(path) if name.startswith("torch.distributed")}
    if path.parent.name in ("rules", "orthonormalize"):
        assert not distributed
    assert distributed <= VOCABULARY


@pytest.mark.parametrize(
    "path", sorted(PRODUCTION.rglob("*.py")), ids=lambda path: str(path.relative_to(PRODUCTION))
)
def test_only_assembly_and_state_redistribute(path: Path) -> None:
    calls = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    if path.name not in ("assembly.py", "whole_matrices.py", "state.py"):
        assert not calls & {"redistribute", "full_tensor"}


@pytest.mark.parametrize(
    "path", sorted(PRODUCTION.rglob("*.py")), ids=lambda path: str(path.relative_to(PRODUCTION))
)
def test_nothing_reaches_torch_distributed_by_attribute(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr == "distributed":
            raise AssertionError(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert "distributed" not in [alias.name for alias in node.names]


@pytest.mark.parametrize("package", ["dion_ref", "dion_dtensor"])
def test_imports_need_torch_alone(package: str) -> None:
    # What torch itself needs (sympy and so mpmath, jinja2) cannot be blocked.
    blocked = ["numpy", "rich", "typer", "matplotlib", "safetensors", "hypothesis", "pytest"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import {package}; "
        "assert 'conformance' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
