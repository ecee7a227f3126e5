"""What `conformance plan --hardware here` says about a case, to be held against what was measured."""

from __future__ import annotations

from conformance.bench.contenders import Case
from conformance.plan.estimate import Candidate, estimates
from conformance.plan.models import Model, Weight
from conformance.plan.operators import Stopwatch
from dion_dtensor.planning import Hardware

__all__ = ["planned"]


def planned(case: Case, hardware: Hardware, stopwatch: Stopwatch) -> float:
    """Seconds of a step of ours.

    Args:
        case: on the CPU, of a rule that plans know.
        hardware: of this machine.
        stopwatch: with the threads of ``case``.

    Raises:
        RuntimeError: a process group exists already.
    """
    model = Model(str(case), (Weight("weights", case.shape, case.count),), 0)
    rule = Candidate(case.algorithm, case.part)
    (found,) = estimates(
        model, (1,), ("fsdp",), [rule], hardware, compute_dtype=case.dtype, stopwatch=stopwatch
    )
    return found.time.serial
