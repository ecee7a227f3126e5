"""The adapter and the loop over the vectors in docs/porting.md are run as they stand, on Muons of twenty lines."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from conformance.adapters import DTYPES, FEATURES, LEVELS, Capabilities, Spec
from conformance.port.convergence import AdapterPort
from conformance.port.execute import Outcome
from conformance.port.grading import grade
from conformance.port.mesh_cases import SHAPES, claimed_hypers, mesh_cases
from conformance.port.mesh_program import _spec
from conformance.vectors import Case, load

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "porting.md").read_text()
ADAPTER, LOOP = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PLAIN = """
import torch


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            mu, lr = group["momentum"], group["lr"]
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - mu)
                X = p.grad.lerp(buffer, mu)
                X = X / (X.norm() + 1e-7)
                for _ in range(5):
                    A = X @ X.mT
                    X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(X, alpha=lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)
"""
NUMPY = """
import sys

sys.modules["torch"] = None  # importing it fails

import numpy as np

BUFFER = {}


def orthonormalize(matrix, hyper):
    tall = matrix.shape[0] > matrix.shape[1]
    X = matrix.T if tall else matrix
    factor, norm, epsilon = hyper["norm_factor"], np.linalg.norm(X), hyper["epsilon"]
    X = X / (factor * max(norm, epsilon) if hyper["epsilon_rule"] == "clamp" else factor * norm + epsilon)
    for a, b, c in hyper["polynomial"]:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if tall else X


def step(weight, grad, state, hyper):
    if np.isnan(grad).any():
        raise FloatingPointError("the gradient has NaN")
    mu, lr = hyper["mu"], hyper["lr"]
    momentum = mu * state["momentum"] + (1 - mu) * grad
    X = orthonormalize(mu * momentum + (1 - mu) * grad, hyper)
    weight *= 1 - lr * hyper["weight_decay"]
    weight -= lr * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * X
    own = BUFFER.setdefault((weight.shape, weight.dtype), np.empty_like(weight))  # changed by the next step
    own[:] = weight
    return own[:], {"momentum": momentum}
"""


def said_by(folder: Path, *arguments: str) -> str:
    """What Python prints there, and its exit status."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, timeout=170
    )
    return f"{done.stdout}{done.stderr}exit status {done.returncode}"


def run_port(folder: Path, muon: str) -> str:
    assert len([line for line in ADAPTER.splitlines() if line.strip()]) <= 15
    package = folder / "my_port"
    package.mkdir()
    (package / "__init__.py").write_text(muon)
    (package / "adapter.py").write_text(ADAPTER)
    command = re.search(r"^conformance port my_port.adapter:adapter$", PAGE, re.MULTILINE)
    assert command
    return said_by(folder, "-m", "conformance.cli", *command[0].split()[1:])


def test_a_plain_muon_passes_with_the_pages_adapter(tmp_path: Path) -> None:
    said = run_port(tmp_path, PLAIN)
    assert re.search(r"pass: \d\d pass, 2 acceptable, \d+ not claimed", said), said
    assert said.endswith("exit status 0")


def test_a_plain_muon_with_a_wrong_scale_fails_and_is_told_why(tmp_path: Path) -> None:
    said = run_port(
        tmp_path, PLAIN.replace("max(1, p.shape[0] / p.shape[1]) ** 0.5", "0.2 * max(p.shape) ** 0.5")
    )
    assert said.endswith("exit status 1")
    assert "matches torch-match-rms within tolerance in all" in said, said


def test_the_verdicts_are_those_on_the_vectors_of_now() -> None:
    table = (ROOT / "docs" / "ports.md").read_text()
    vectors = load()
    assert f"with vectors {vectors.version}, {len(vectors)} cases." in table
    assert f"{len(vectors)} *vectors*" in " ".join((ROOT / "README.md").read_text().split())


def test_every_option_on_the_page_exists() -> None:
    helps = subprocess.run(
        [sys.executable, "-m", "conformance.cli", "port", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    plugin = (ROOT / "conformance" / "plugin.py").read_text()
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE)) - {
        "--pyargs",
        "--port",
        "--index-url",
        "--no-deps",
    }:
        assert option in (plugin if option.startswith("--port-") else helps), option


def run_loop(folder: Path, muon: str) -> str:
    (folder / "my_port.py").write_text(muon)
    (folder / "hold.py").write_text(LOOP)
    # Norms overflow, on purpose.
    return said_by(folder, "-W", "ignore::RuntimeWarning", "hold.py")


def test_the_pages_loop_passes_a_muon_in_numpy_without_torch(tmp_path: Path) -> None:
    said = run_loop(tmp_path, NUMPY)
    assert said.endswith("exit status 0"), said
    *others, count, _ = said.splitlines()
    found = re.fullmatch(r"(\d+) of (\d+) pass", count)
    assert found, said
    passed, every = map(int, found.groups())
    assert every - passed == len(others), said
    assert all(": acceptable: The norm overflowed" in one for one in others), said
    needed = {"state", "schedule:lr", "schedule:mu"}
    claimed = [
        one for one in load() if one.dialect == "keller" and one.algorithm in ("muon", "orthonormalize")
    ]
    assert every == 2 * sum(needed.issuperset(one.requires) for one in claimed)


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("mu * momentum + (1 - mu) * grad, hyper", "momentum, hyper", "fail: update is off by"),
        ('return own[:], {"momentum": momentum}', 'return own[:], {"momentum": grad}', "state/momentum is off"),
        ("np.isnan(grad).any()", "False", "acceptable"),
        ("if np.isnan(grad).any():", "grad = np.nan_to_num(grad)\n    if False:", "a NaN in the gradient was hidden"),
        ("np.isnan(grad).any()", "True", "error: the gradient has NaN"),
    ],
)  # fmt: skip
def test_the_pages_loop_sees_what_is_wrong(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    assert right in NUMPY
    found = run_loop(tmp_path, NUMPY.replace(right, wrong))
    assert said in found, found
    assert found.endswith(f"exit status {0 if said == 'acceptable' else 1}"), found


def results(case: Case, dtype: str) -> Iterator[dict[str, Any] | None]:
    """What ports may do with a case, right and wrong; None for a refusal."""
    allowed = case.tolerance[dtype]
    assert allowed is not None
    yield None
    for note, other in case.acceptable:
        assert note
        yield {**case.expected, "update": other}
    if case.result == "error":
        yield {"update": np.zeros((case.steps, *case.shape))}
        return
    yield dict(case.expected)
    yield {key: -value if key.startswith("state/Q") else value for key, value in case.expected.items()}
    yield {key: value[..., :-1] for key, value in case.expected.items()}  # another shape
    for name, value in case.expected.items():
        unit = allowed[name] or 0.1
        for factor in (1 + 0.9 * unit, 1 + 2 * unit, np.nan, -1):
            yield {**case.expected, name: value * factor}


def test_the_pages_loop_judges_as_the_suite_does(monkeypatch: pytest.MonkeyPatch) -> None:
    port = ModuleType("my_port")
    port.__dict__.update(orthonormalize=None, step=None)
    monkeypatch.setitem(sys.modules, "my_port", port)
    page: dict[str, Any] = {"__name__": "hold"}
    exec(LOOP, page)
    seen = set()
    for case in load():
        for dtype in ("float64", "float32", "bfloat16"):
            for result in results(case, dtype):

                def run(case: Case, dtype: str, result: dict[str, Any] | None = result) -> dict[str, Any]:
                    if result is None:
                        raise FloatingPointError("refused")
                    return result

                page["run"] = run
                if result is None:
                    outcome = Outcome(raised="refused", phase="step", refused=True)
                else:
                    states = {
                        key.removeprefix("state/"): value for key, value in result.items() if key != "update"
                    }
                    outcome = Outcome(update=result["update"], states=states)
                with np.errstate(invalid="ignore"):
                    own, wanted = page["verdict"](case, dtype), grade(case, dtype, outcome).status
                assert own.split(":")[0] == wanted, (case.id, dtype, own, wanted)
                seen.add(wanted)
    assert seen == {"pass", "fail", "error", "acceptable", "undecided"}


def test_the_page_has_every_key_of_the_vectors() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+(?: \(L0\))?) \| (.+) \|$", PAGE, re.MULTILINE)
    words = {
        name: set(re.findall(r"`(\w+)`", said))
        for names, said in rows
        for name in re.findall(r"`(\w+)`", names)
    }

    def keys(name: str) -> set[str]:
        return set().union(*(keys(one) if one in words else {one} for one in words[name]))

    of: dict[str, set[str]] = {}
    for case in load():
        of.setdefault(case.algorithm, set()).update(case.hyper)
        if (exact := case.hyper.get("polynomial")) == "exact":
            assert case.hyper["norm_factor"] is None
        assert ("polynomial_name" in case.hyper) == (exact not in (None, "exact"))
    assert {name: keys(name) for name in words} == of


def test_every_case_is_laid_out_as_the_page_says() -> None:
    for case in load():
        derived, states, wanted = {"matrices", "scale_factor"}, {"momentum"}, {"matrix"}
        if case.algorithm in ("adamw", "lion", "orthonormalize"):
            derived, states = set(), {"exp_avg"}
        states |= {"adamw": {"exp_avg_sq"}}.get(case.algorithm, set())
        derived |= {"dion": {"rank"}, "orth_dion": {"rank"}, "dion2": {"count"}, "dion3": {"count"}}.get(
            case.algorithm, set()
        )
        assert set(case.derived) == derived
        pieces = len(case.derived.get("matrices", [0]))
        assert all(len(values) == pieces for values in case.derived.values())
        cut = {"dion": "Q", "orth_dion": "Q", "normuon": "variance", "dion3": "variance"}.get(case.algorithm)
        if cut is not None:
            states |= {cut} if case.split is None else {f"{cut}/{piece}" for piece in range(pieces)}
        if case.level != "L0":
            wanted = {"weight", "grads", *(f"state/{key}" for key in states)}
            wanted |= {"state/step"} if case.algorithm in ("muon", "normuon", "adamw") else set()
        assert set(case.inputs) == wanted
        gone = {"matrix", "weight", "grads", "state/step"}
        valid = case.result == "valid"
        assert set(case.expected) == ((wanted - gone) | {"update"} if valid else set())
        for tolerance in case.tolerance.values():
            assert tolerance is not None
            assert set(tolerance) == set(case.expected)
        assert valid or all(np.isnan(other).all() for _, other in case.acceptable)
        for key, value in {**case.inputs, **case.expected}.items():
            assert value.dtype == np.float64
            assert not value.flags.writeable
            _, _, name = key.partition("/")
            base, _, piece = name.partition("/")
            if base in ("Q", "variance"):
                m, n = case.derived["matrices"][int(piece or 0)]
                kind = (case.split or {}).get("kind")
                stack = {"Heads": (case.split or {}).get("count"), "Experts": case.shape[0]}.get(kind or "")
                one = (m, 1) if base == "variance" else (min(m, n), case.derived["rank"][int(piece or 0)])
                assert value.shape == (one if stack is None else (stack, *one))
            else:
                many = (case.steps,) if key in ("grads", "update") else ()
                assert value.shape == (() if base == "step" else (*many, *case.shape))
    splits = {str(case.split) for case in load() if case.split}
    for said in re.findall(r"`(\{\"kind\".*?\})`", PAGE):
        assert str(ast.literal_eval(said)) in splits
    assert {ast.literal_eval(one)["kind"] for one in splits} == {
        ast.literal_eval(said)["kind"] for said in re.findall(r"`(\{\"kind\".*?\})`", PAGE)
    }


def test_specs_from_l3_on_are_as_bare_as_the_page_says() -> None:
    vectors = load()
    claims = Capabilities("any", {"muon": ("*",)}, LEVELS, DTYPES, FEATURES)
    for case in mesh_cases(claimed_hypers(claims, vectors), LEVELS):
        spec = _spec(case, "float32")
        assert (spec.shape, spec.split, spec.derived, spec.state) == ((), None, {}, {})
        assert 3 in Counter(SHAPES[index] for index in case.shapes).values()
    specs: list[Spec] = []

    class Adapter:
        def init(self, spec: Spec, params: Any) -> None:
            specs.append(spec)

    hyper = vectors["L1/muon/dion/13x10-warm"].hyper
    # It has no step, which is never called.
    port = AdapterPort(Adapter(), "any", {"muon": hyper}, "float32")  # type: ignore[arg-type]
    port.driver("muon", {"one": torch.ones(3, 2), "other": torch.ones(3, 2)}, {})
    assert [(one.name, one.shape) for one in specs] == [("one", (3, 2)), ("other", (3, 2))]
    assert [(one.split, one.derived, one.state, one.hyper["lr"]) for one in specs] == [(None, {}, {}, 0)] * 2


def test_torch_calls_an_optimizer_with_the_keywords_that_the_page_names() -> None:
    assert "torch calls `step(closure=None)` and `load_state_dict(state_dict=...)`" in PAGE
    said = []

    class Plain(torch.optim.SGD):
        def step(self, **keywords: Any) -> Any:
            said.append(keywords)
            return super().step(**keywords)

        def load_state_dict(self, **keywords: Any) -> None:
            said.append(dict.fromkeys(keywords))
            super().load_state_dict(**keywords)

    model = torch.nn.Linear(2, 2)
    optimizer = Plain(model.parameters(), lr=0.1, momentum=0.9)
    set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
    assert {"closure": None} in said
    assert {"state_dict": None} in said
    assert len([one for one in said if one not in ({"closure": None}, {"state_dict": None})]) == 0


def test_what_is_installed_is_not_a_name_that_anyone_may_register() -> None:
    workflow = yaml.safe_load((ROOT / "ci" / "examples" / "github-port.yml").read_text())
    lines = [
        one["run"] for one in workflow["jobs"]["conformance"]["steps"] if "pip install" in one.get("run", "")
    ]
    assert lines
    installs = re.findall(r"pip install .*", PAGE + "\n".join(lines))
    requirements = re.findall(r"dion-conformance\S*(?: @ \S+)?", " ".join(installs))
    assert len(requirements) == 2
    for requirement in requirements:
        assert requirement.startswith("dion-conformance[conformance] @ git+https://<repository>")
