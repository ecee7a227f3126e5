"""What a prediction of time on this machine is made of; no test asserts a time."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Shard

from conformance.bench.contenders import Case
from conformance.bench.planned import planned
from conformance.job.training import OPTIMIZER_OF
from conformance.plan.counting import Launched, fake_mesh, launched
from conformance.plan.estimate import candidate, estimates
from conformance.plan.hardware import h100
from conformance.plan.models import Model, Weight
from conformance.plan.operators import Operator, Stopwatch
from dion_dtensor import Dion, Dion2, Dion3, Muon, NorMuon
from dion_dtensor.orthonormalize import gram
from dion_dtensor.planning import Bucket, predict
from dion_dtensor.planning.buckets import FEW_WEIGHTS
from dion_dtensor.planning.predict import around
from dion_dtensor.sorting import runs_of

BUILD: dict[str, tuple[Any, str]] = {
    "muon": (Muon, ""),
    "normuon": (NorMuon, ""),
    "dion": (Dion, "rank_fraction"),
    "dion2": (Dion2, "fraction"),
    "dion3": (Dion3, "fraction"),
}
SHAPE, NUMBER = (128, 192), 4


def hyper_of(algorithm: str, part: float = 0.25) -> dict[str, float]:
    name = BUILD[algorithm][1]
    return {name: part} if name else {}


@pytest.mark.parametrize(
    ("algorithm", "part", "dtype"),
    [
        ("muon", 1.0, "bfloat16"),
        ("normuon", 1.0, "float32, many"),
        ("dion", 0.25, "bfloat16"),
        ("dion2", 0.25, "float32"),
        ("dion2", 0.25, "bfloat16, many"),
        ("dion3", 0.25, "bfloat16"),
        pytest.param("muon", 1.0, "bfloat16, many", marks=pytest.mark.slow),
        pytest.param("normuon", 1.0, "float32", marks=pytest.mark.slow),
        pytest.param("dion2", 1.0, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_passes_are_those_that_inductor_counts(algorithm: str, part: float, dtype: str) -> None:
    """But for those outside of the compiled update, which are counted by hand."""
    from torch._inductor import config, metrics

    build, hyper = BUILD[algorithm][0], hyper_of(algorithm, part)
    dtype, _, many = dtype.partition(", ")
    compute_dtype, number = getattr(torch, dtype), FEW_WEIGHTS + 2 if many else NUMBER
    parameters = [torch.nn.Parameter(torch.randn(SHAPE)) for _ in range(number)]
    for parameter in parameters:
        parameter.grad = torch.randn(SHAPE)
    named = [(f"weights.{index}", parameter) for index, parameter in enumerate(parameters)]
    optimizer = build(named, lr=1e-3, compute_dtype=compute_dtype, compile=True, **hyper)
    torch._dynamo.reset()
    metrics.reset()
    torch._logging.set_logs(inductor_metrics=True)
    try:
        with config.patch(force_disable_caches=True):
            optimizer.step()
    finally:
        torch._logging.set_logs()
    if not metrics.nodes_num_elem:
        # It counts them for a log of this name alone, which other versions may not have; this one does.
        assert torch.__version__ < "2.14"
        pytest.skip("this Inductor counts no bytes")
    # Of a kernel of the library alone; what it reads and writes is in its time.
    fused = sum(elements for node, elements in metrics.nodes_num_elem if "Extern" not in type(node).__name__)
    weight = number * SHAPE[0] * SHAPE[1]
    bucket = Bucket(SHAPE, number, compute_dtype=compute_dtype, device="cpu")
    closed = predict(bucket, algorithm, fraction=part).touched / (4 * weight) - around(bucket)
    if algorithm in ("dion2", "dion3"):
        # Inductor counts all rows of two tensors of which the chosen ones are read.
        closed += 2 * (1 - part)
    assert closed == pytest.approx(fused / weight, rel=0.12)


@pytest.mark.parametrize(
    ("device", "count", "passes"),
    [("cuda", 8, 8), ("cuda", 1, 6), ("cpu", 1, 1), ("cpu", FEW_WEIGHTS, 3), ("cpu", FEW_WEIGHTS + 1, 6)],
)
def test_passes_around_an_update(device: str, count: int, passes: int) -> None:
    assert around(Bucket(SHAPE, count, device=device)) == passes


def counted(algorithm: str) -> Launched:
    with fake_mesh((2,), ("fsdp",)) as mesh:
        return launched(mesh, (Shard(0),), SHAPE, NUMBER, algorithm, hyper_of(algorithm))


def test_what_no_compiler_fuses_is_timed_by_itself() -> None:
    names = {
        algorithm: [str(one.function).split(".")[1] for one in counted(algorithm).operators]
        for algorithm in BUILD
    }
    assert names["muon"] == ["gram_iterations"]
    assert sorted(names["dion2"]) == ["gram_iterations", "sort", "sort"]
    assert "orthonormal_basis" in names["dion"]
    assert names["dion"].count("bmm") + names["dion"].count("baddbmm") + names["dion"].count("matmul") == 4


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_what_is_timed_is_what_this_cpu_launches(
    compute_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symmetric products are taken by other blocks here than on a GPU."""
    seen = []

    def iterations(stack: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append((tuple(stack.shape), stack.dtype, args))
        return gram.iterate(stack, *args)

    monkeypatch.setattr(gram, "gram_iterations", iterations)
    parameters = [torch.nn.Parameter(torch.randn(520, 600)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.randn(520, 600)
    Muon(parameters, compute_dtype=compute_dtype, compile=False).step()
    monkeypatch.undo()
    with fake_mesh((1,), ("fsdp",)) as mesh:
        options: dict[str, Any] = {"compute_dtype": compute_dtype, "kind": "cpu"}
        (planned,) = launched(mesh, (Shard(0),), (520, 600), 2, "muon", **options).operators
    stack, *args = planned.args
    assert [(tuple(stack.shape), stack.dtype, tuple(args))] == seen
    assert planned.flops > 0


def test_what_would_take_too_long_is_priced_by_its_rate() -> None:
    def refused(*_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it was run")

    small, large = torch.empty(8, 8, device="meta"), torch.empty(8, 8, device="meta", dtype=torch.bfloat16)
    watch = Stopwatch({"float32": 1e9, "bfloat16": 1e9}, frozenset({"bfloat16"}), longest=2.0)
    assert watch.operator(Operator.of(refused, (small, small), None, 3e9)) == 3.0
    assert watch.operator(Operator.of(refused, (large, large), None, 1e9)) == 1.0  # its rate was stated
    assert len(watch.priced) == 2
    with pytest.raises(AssertionError, match="it was run"):
        watch.operator(Operator.of(refused, (small, small), None, 1e9))


def test_an_operator_is_timed_once_a_kind() -> None:
    product = torch.ops.aten.mm.default
    calls = []

    def counting(*args: torch.Tensor) -> torch.Tensor:
        calls.append(args)
        assert all(one.device.type == "cpu" and one.isfinite().all() for one in args)
        return product(*args)

    wide, narrow = torch.empty(8, 4, device="meta"), torch.empty(4, 8, dtype=torch.float32, device="meta")
    watch = Stopwatch({}, seconds=0.0)
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


def test_what_is_timed_finds_other_things_in_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(Stopwatch, "evict", lambda self: order.append("evict"))
    one = torch.empty(8, 4, device="meta")
    Stopwatch({}, seconds=0.0).operator(Operator.of(lambda _: order.append("run"), (one,), None))
    assert order == ["run"] * 3 + ["evict", "run"] * 3


def test_what_is_short_is_timed_for_a_short_while() -> None:
    calls: list[Any] = []
    one = torch.empty(8, 4, device="meta")
    Stopwatch({}).operator(Operator.of(calls.append, (one,), None))
    assert 6 <= len(calls) < 2000  # to fill the caches takes time as well


def test_a_time_is_that_of_operators_passes_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "operator", lambda self, one: 2.0)
    monkeypatch.setattr(Stopwatch, "host", lambda self, name, count, buckets: 100.0 * count + 10.0 * buckets)
    model = Model("two", (Weight("a", (1024, 1024), 5), Weight("b", (64, 64), 6)), 0)
    hardware, watch = h100((1,)), Stopwatch({})
    rules = [candidate(text) for text in ("muon", "dion:1/4", "adamw")]
    muon, dion, adamw = estimates(model, (1,), ("fsdp",), rules, hardware, stopwatch=watch)
    # Five of four megabytes go one by one, since two by two buckets would differ in length; small ones together.
    assert [one.host for one in (muon, dion, adamw)] == [1100 + 60, 1100 + 60, 1100 + 10]
    operators = {"muon": 1, "dion": 5}
    for one in (muon, dion):
        passes = one.cost.touched / hardware.memory_bandwidth
        launches = operators[one.candidate.algorithm] * (5 + 1)
        assert one.time.compute == pytest.approx(one.host + 2.0 * launches + passes)
    assert adamw.time.compute == pytest.approx(adamw.host, rel=1e-3)
    (sharded,) = estimates(model, (2,), ("fsdp",), rules[:1], h100((2,)), stopwatch=watch)
    assert sharded.host == 1100 + 20
    assert sharded.time.compute == pytest.approx(sharded.host + 2 * 2.0, rel=1e-3)


def test_the_work_of_the_host_is_measured_for_every_rule_and_number_of_buckets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    class Counted(Muon):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(len(self.buckets))

    watch = Stopwatch({}, seconds=0.0, compile=False)
    for algorithm in ("adamw", "muon", "normuon", "dion", "dion2", "dion3"):
        assert watch.host(algorithm, 4, 2) > 0
    monkeypatch.setitem(OPTIMIZER_OF, "muon", Counted)
    watch.host("muon", 4, 1)
    watch.host("muon", 4, 4)
    assert made == [1, 4]
    assert len(watch.known) == 8


def test_the_bench_plans_its_cases() -> None:
    watch = Stopwatch({"float32": 1e9}, seconds=0.0, compile=False)
    for algorithm in ("muon", "dion2", "adamw"):
        assert planned(Case(algorithm, 2, (32, 24)), h100((1,)), watch) > 0


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


# Elsewhere nothing is claimed: what gives freed memory back is glibc.
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_what_is_freed_stays_with_the_process_that_is_timed() -> None:
    """Else these 640 MB make up to 163,000 page faults."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000
