"""Level L5 of a port: the convergence gate, through the port's functional adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from conformance.adapters import Adapter, AdapterError, Capabilities, Spec
from conformance.adapters.torch_optimizer import array
from conformance.convergence.bands import SETTINGS
from conformance.convergence.drivers import MATRIX_ALGORITHMS, Driver, FunctionalDriver
from conformance.convergence.gate import Check, Gate
from conformance.convergence.steps_gate import RULES
from conformance.port.grading import ERROR, FAIL, PASS, SKIP, UNCLAIMED, Verdict
from conformance.port.runner import Selection
from conformance.port.selection import reason
from conformance.port.worker import LostError, Worker
from conformance.vectors import VectorSet

__all__ = ["AdapterPort", "gate_ids", "gate_jobs", "run_gate"]

LONGER = 30
"""A case trains for thousands of steps: so many times the seconds of a case of vectors may it take."""
DIALECT = "dion"
"""The convention that the gate's bands were measured under: the oracle's defaults."""


@dataclass(frozen=True)
class AdapterPort:
    """A port as the gate drives it: each parameter by the adapter's `init` and `step`.

    Attributes:
        adapter: the port's.
        name: of the port.
        hyper: by algorithm, every hyperparameter of the convention; the gate's own go on top.
        compute_dtype: "float64", "float32" or "bfloat16".
    """

    adapter: Adapter
    name: str
    hyper: Mapping[str, Mapping[str, Any]]
    compute_dtype: str

    @property
    def algorithms(self) -> tuple[str, ...]:
        """Those of the gate that the port claims under its convention."""
        return tuple(self.hyper)

    def driver(self, algorithm: str, parameters: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Driver:
        """See `conformance.convergence.drivers.Port`."""
        values = {**self.hyper[algorithm], **hyper}
        return FunctionalDriver(
            partial(self._init, algorithm), self._step, parameters, lambda lr: values | {"lr": lr}
        )

    def _init(self, algorithm: str, weight: Tensor, hyper: Mapping[str, Any], name: str) -> tuple[str, Any]:
        storage = str(weight.dtype).removeprefix("torch.")
        shape = tuple(weight.shape)
        spec = Spec(name, shape, storage, self.compute_dtype, algorithm, DIALECT, None, hyper, {}, {})
        return name, self.adapter.init(spec, {name: array(weight)})

    def _step(
        self, weight: Tensor, gradient: Tensor, state: tuple[str, Any], hyper: Mapping[str, Any]
    ) -> tuple[Tensor, tuple[str, Any]]:
        name, own = state
        new, own = self.adapter.step({name: array(weight)}, {name: array(gradient)}, own, hyper)
        return torch.as_tensor(new[name]).to(weight.dtype), (name, own)


def gate_ids(claims: Capabilities, vectors: VectorSet) -> list[str]:
    """Cases of L5, for the files of known failures: a rule and a part of the gate."""
    found = []
    for algorithm in _hypers(claims, vectors):
        if algorithm in MATRIX_ALGORITHMS:
            found.append(f"L5/{algorithm}/facts")
        found.append(f"L5/{algorithm}/regression")
        if algorithm in RULES and algorithm != "adamw":
            found.append(f"L5/{algorithm}/gpt")
    return found


def gate_jobs(
    claims: Capabilities, vectors: VectorSet, selection: Selection
) -> list[tuple[str, str, Verdict | None]]:
    """Every selected case and its dtype, with the verdict where it is known without running it.

    The widest dtype that is claimed and wanted is used; rules not claimed under the gate's convention are listed.
    """
    if "L5" not in selection.levels or "L5" not in claims.levels:
        return []
    wanted = [one for one in ("float64", "float32", "bfloat16") if one in claims.dtypes]
    dtype = next((one for one in wanted if not selection.dtypes or one in selection.dtypes), None)
    hypers = _hypers(claims, vectors)
    found: list[tuple[str, str, Verdict | None]] = []
    for algorithm in SETTINGS:
        if algorithm not in hypers and algorithm in claims.algorithms:
            case, why = f"L5/{algorithm}", f"dialect {DIALECT} of {algorithm}"
            blank = Verdict(case, "L5", algorithm, DIALECT, dtype or "-", UNCLAIMED, message=why)
            found.append((case, blank.dtype, blank))
    for case in gate_ids(claims, vectors):
        if dtype is None or not selection.wants(case, "L5", dtype):
            continue
        skipped = reason(selection.skip, case, dtype)
        known = None if skipped is None else _blank(case, dtype).with_status(SKIP, skipped)
        found.append((case, dtype, known))
    return found


def run_gate(
    adapter: str | Adapter,
    claims: Capabilities,
    vectors: VectorSet,
    selection: Selection,
    *,
    timeout: float = 60.0,
    device: str = "cpu",
    on_verdict: Callable[[Verdict], None] = lambda _: None,
) -> list[Verdict]:
    """A verdict for each rule and part.

    Args:
        adapter: the port's path, to run it in a process of its own, or the object, to run it in this one.
        claims: what it claims.
        vectors: where the convention's hyperparameters stand.
        selection: patterns, dtypes, skips and xfails.
        timeout: seconds a case of the other levels, when it has its own process; `LONGER` times that here.
        device: "cpu" or "cuda", likewise, for adapters that can be told.
        on_verdict: called with each.
    """
    verdicts: list[Verdict] = []
    worker: Worker | None = None
    asked: Callable[..., Verdict]
    if isinstance(adapter, str):
        worker = Worker(adapter, timeout, device)
        asked = partial(judge, worker)
    else:
        asked = partial(through, adapter)
    try:
        for case, dtype, known in gate_jobs(claims, vectors, selection):
            verdict = known
            if verdict is None:
                verdict = selection.judged(asked(*gate_case(case, dtype, claims, vectors)))
            verdicts.append(verdict)
            on_verdict(verdict)
    finally:
        if worker is not None:
            worker.close()
    return verdicts


GateCase = tuple[Verdict, str, Mapping[str, Any]]
"""What is not judged yet, the port's name, and the hyperparameters of the convention."""


def gate_case(case: str, dtype: str, claims: Capabilities, vectors: VectorSet) -> GateCase:
    """A case of L5, ready to be judged."""
    blank = _blank(case, dtype)
    return blank, claims.name, _hypers(claims, vectors)[blank.algorithm]


def judge(worker: Worker, blank: Verdict, name: str, hyper: Mapping[str, Any]) -> Verdict:
    """The verdict of an adapter in its own process; one that hangs or dies is an error."""
    try:
        verdict: Verdict = worker.ask(through, blank, name, hyper, seconds=LONGER * worker.timeout)
    except (AdapterError, LostError) as error:
        return blank.with_status(ERROR, str(error))
    return verdict


def through(adapter: Adapter, blank: Verdict, name: str, hyper: Mapping[str, Any]) -> Verdict:
    """The verdict of an adapter in this process."""
    port = AdapterPort(adapter, name, {blank.algorithm: hyper}, blank.dtype)
    return _verdict(blank, port)


def _blank(case: str, dtype: str) -> Verdict:
    return Verdict(case, "L5", case.split("/")[1], DIALECT, dtype, PASS)


def _verdict(blank: Verdict, port: AdapterPort) -> Verdict:
    storage = torch.float64 if blank.dtype == "float64" else torch.float32
    compute = torch.bfloat16 if blank.dtype == "bfloat16" else storage
    part = blank.case.split("/")[2]
    try:
        result = Gate((part,), dtype=storage, compute_dtype=compute).run(port)
    except Exception as error:
        return blank.with_status(FAIL, f"raised {type(error).__name__}: {error}")
    errors = {check.what: (check.value, check.high) for check in result.checks}
    verdict = replace(blank, errors=errors, seconds=result.seconds)
    failures: list[Check] = result.failures
    if failures or not result.checks:
        return verdict.with_status(
            FAIL, "; ".join(check.why() for check in failures) or "nothing was checked"
        )
    return verdict


def _hypers(claims: Capabilities, vectors: VectorSet) -> dict[str, Mapping[str, Any]]:
    """By algorithm of the gate, the hyperparameters of the convention, where the port claims it."""
    found: dict[str, Mapping[str, Any]] = {}
    for algorithm in SETTINGS:
        dialects = claims.algorithms.get(algorithm, ())
        if DIALECT in dialects or "*" in dialects:
            cases = (one for one in vectors if one.algorithm == algorithm and one.level == "L1")
            first = next(
                (one for one in cases if one.dialect == DIALECT and "cautious" not in one.flags), None
            )
            if first is not None:
                found[algorithm] = first.hyper
    return found
