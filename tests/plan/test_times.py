"""What a prediction of time on this machine is made of; no test asserts a time."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.distributed.tensor import Shard

from conformance.plan.counting import Launched, fake_mesh, launched
from conformance.plan.estimate import candidate, estimates
from conformance.plan.hardware import h100
from conformance.plan.models import Model, Weight
from conformance.plan.operators import Operator, Stopwatch
from dion_dtensor import Dion, Dion2, Dion3, Muon
from dion_dtensor.planning import Bucket, predict
from dion_dtensor.planning.predict import STEP
from dion_dtensor.sorting import runs_of

BUILD = {
    "muon": (Muon, {}, 1.0),
    "dion": (Dion, {"rank_fraction": 0.25}, 0.25),
    "dion2": (Dion2, {"fraction": 0.25}, 0.25),
    "dion3": (Dion3, {"fraction": 0.25}, 0.25),
}
OTHERWISE = {"dion2": -2 + 2 * 0.75, "dion3": -2 + 2 * 0.75}
"""Inductor counts once what a loop reads twice, and all rows of two tensors of which the chosen quarter is read."""
SHAPE, NUMBER = (128, 192), 4


@pytest.mark.parametrize("algorithm", BUILD)
def test_passes_are_those_that_inductor_counts(algorithm: str) -> None:
    from torch._inductor import config, metrics

    build, hyper, part = BUILD[algorithm]
    parameters = [torch.nn.Parameter(torch.randn(SHAPE)) for _ in range(NUMBER)]
    for parameter in parameters:
        parameter.grad = torch.randn(SHAPE)
    named = [(f"weights.{index}", parameter) for index, parameter in enumerate(parameters)]
    optimizer = build(named, lr=1e-3, compute_dtype=torch.bfloat16, compile=True, **hyper)
    torch._dynamo.reset()
    metrics.reset()
    torch._logging.set_logs(inductor_metrics=True)
    try:
        with config.patch(force_disable_caches=True):
            optimizer.step()
    finally:
        torch._logging.set_logs()
    if not metrics.nodes_num_elem:
        pytest.skip("this Inductor counts no bytes")
    # Of a kernel of the library alone; what it reads and writes is in its time.
    fused = sum(elements for node, elements in metrics.nodes_num_elem if "Extern" not in type(node).__name__)
    weight = NUMBER * SHAPE[0] * SHAPE[1]
    closed = predict(Bucket(SHAPE, NUMBER), algorithm, fraction=part).touched / (4 * weight)
    assert closed - STEP + OTHERWISE.get(algorithm, 0) == pytest.approx(fused / weight, rel=0.12)


def counted(algorithm: str) -> Launched:
    hyper = BUILD[algorithm][1]
    with fake_mesh((2,), ("fsdp",)) as mesh:
        return launched(mesh, (Shard(0),), SHAPE, NUMBER, algorithm, hyper)


def test_what_no_compiler_fuses_is_timed_by_itself() -> None:
    names = {
        algorithm: [str(one.function).split(".")[1] for one in counted(algorithm).operators]
        for algorithm in BUILD
    }
    assert names["muon"] == ["gram_iterations"]
    assert sorted(names["dion2"]) == ["gram_iterations", "sort", "sort"]
    assert "orthonormal_basis" in names["dion"]
    assert names["dion"].count("bmm") + names["dion"].count("baddbmm") + names["dion"].count("matmul") == 4


def test_an_operator_is_timed_once_a_kind() -> None:
    product = torch.ops.aten.mm.default
    calls = []

    def counting(*args: torch.Tensor) -> torch.Tensor:
        calls.append(args)
        assert all(one.device.type == "cpu" and one.isfinite().all() for one in args)
        return product(*args)

    wide, narrow = torch.empty(8, 4, device="meta"), torch.empty(4, 8, dtype=torch.float32, device="meta")
    watch = Stopwatch(seconds=0.0)
    first = Operator.of(counting, (wide.mT, narrow.mT), None)
    assert first.args[0] is not wide.mT
    assert first.args[0].stride() == (1, 4)
    seconds = watch.operator(first)
    assert seconds > 0
    made = len(calls)
    assert watch.operator(Operator.of(counting, (wide.mT, narrow.mT), None)) == seconds
    assert len(calls) == made
    watch.operator(
        Operator.of(counting, (wide.mT.contiguous(), narrow.mT), None)
    )  # other strides, another time
    assert len(calls) == 2 * made


def test_a_time_is_that_of_operators_passes_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "operator", lambda self, one: 2.0)
    monkeypatch.setattr(Stopwatch, "host", lambda self, name, count, buckets: 10.0 * buckets)
    model = Model("two", (Weight("a", (1024, 1024), 6), Weight("b", (64, 64), 6)), 0)
    hardware = h100((1,))
    (found,) = estimates(model, (1,), ("fsdp",), [candidate("muon")], hardware, stopwatch=Stopwatch())
    passes = found.cost.touched / hardware.memory_bandwidth
    # Two shapes of one operator each; four megabytes go two by two into eight, small ones together.
    assert found.time.compute == pytest.approx(2 * 2.0 + (3 + 1) * 10.0 + passes)
    (sharded,) = estimates(model, (2,), ("fsdp",), [candidate("muon")], h100((2,)), stopwatch=Stopwatch())
    assert sharded.time.compute == pytest.approx(2 * 2.0 + 2 * 10.0, rel=1e-3)


def test_the_work_of_the_host_is_measured_for_every_rule_and_number_of_buckets() -> None:
    watch = Stopwatch(seconds=0.0, compile=False)
    for algorithm in ("adamw", "muon", "normuon", "dion", "dion2", "dion3"):
        assert watch.host(algorithm, 4, 2) > 0
    assert watch.host("muon", 4, 1) != watch.host("muon", 4, 2)
    assert len(watch.known) == 7


@pytest.mark.parametrize(
    ("count", "size", "most", "runs"),
    [(12, 4, 8, 6), (12, 9, 8, 12), (12, 4, None, 1), (7, 2, 8, 2), (6, 1, 4, 2)],
)
def test_runs(count: int, size: int, most: int | None, runs: int) -> None:
    assert runs_of(count, size, most) == runs


FAULTS = """
import resource
import torch
from conformance.bench.timing import keep_freed_memory

keep_freed_memory()
def work():
    for _ in range(20):
        [torch.ones(2 << 20) for _ in range(4)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_what_is_freed_stays_with_the_process_that_is_timed() -> None:
    """Else these 640 MB make up to 163,000 page faults."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000
