"""Who is measured: ours, the peers that can be imported, and the bare matrix products of a step."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from conformance.bench.products import bare_products
from conformance.named import named_function

__all__ = ["ALGORITHMS", "BARE", "OURS", "Build", "Case", "available", "builder_of", "stepper"]

OURS = "dion_dtensor"
UNCHECKED = "dion_dtensor(validate=False)"
RECORDED = "dion_dtensor(capture)"
DION = "microsoft/dion"
DION_TRITON = "microsoft/dion(use_triton)"
DION_RECORDED = "microsoft/dion(use_triton, CUDA graph)"
TORCH_MUON = "torch.optim.Muon"
TORCH_ADAMW = "torch.optim.AdamW(fused)"
BARE = "bare products"

FRACTIONS = {"dion": 0.25, "dion2": 0.25, "dion3": 0.25}


Build = Callable[[Sequence[Tensor], "Case"], Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """What one row of the table measures.

    Attributes:
        algorithm: one of :data:`ALGORITHMS`.
        count: of matrices.
        shape: m and n of each.
        fraction: rank fraction of Dion, fraction of Dion2 and Dion3; None for the algorithm's own.
        compute_dtype: "float32" or "bfloat16", of the orthonormalization; parameters are float32.
        device: "cpu" or "cuda".
        threads: of the CPU.
    """

    algorithm: str
    count: int
    shape: tuple[int, int]
    fraction: float | None = None
    compute_dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2

    @property
    def part(self) -> float:
        """The fraction, 1 where an algorithm has none."""
        return self.fraction or FRACTIONS.get(self.algorithm, 1.0)

    @property
    def dtype(self) -> torch.dtype:
        """Of the orthonormalization."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.compute_dtype]

    def __str__(self) -> str:
        part = f" {self.part:g}" if self.algorithm in FRACTIONS else ""
        m, n = self.shape
        return f"{self.algorithm}{part}, {self.count} x {m}x{n}, {self.compute_dtype}"


def available(case: Case, further: Sequence[str] = ()) -> tuple[str, ...]:
    """The contenders that can run ``case`` here, ours first, the bare products last.

    Args:
        case: what is stepped.
        further: ``module:function`` of contenders that are not known here, see :func:`builder_of`.
    """
    names, graphs = [OURS], case.device == "cuda" and case.algorithm not in ("dion", "adamw")
    if graphs:
        names.append(RECORDED)
    if case.algorithm in DION_CLASSES and importlib.util.find_spec("dion") is not None:
        # The kernels that its others use as well; to tune them takes it minutes for each shape.
        tuned = graphs and case.dtype == torch.bfloat16 and case.algorithm == "muon"
        names += [DION, *((DION_TRITON, DION_RECORDED) if tuned else ())]
    if case.algorithm == "muon_torch" and hasattr(torch.optim, "Muon"):
        names.append(TORCH_MUON)
    if case.algorithm == "adamw":
        names.extend((UNCHECKED, TORCH_ADAMW))
    return (*names, *further, *([BARE] if case.algorithm != "adamw" else []))


def stepper(name: str, case: Case) -> Callable[[], object]:
    """A function that takes one step of ``case``, on its own parameters and gradients.

    Raises:
        ValueError: an unknown contender.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> Tensor:
        return (torch.randn(case.shape, generator=generator) * scale).to(case.device)

    if name == BARE:
        return bare_products(case.algorithm, case.count, case.shape, case.part, case.dtype, case.device)
    build = builder_of(name)
    parameters = [torch.nn.Parameter(draw(0.02)) for _ in range(case.count)]
    for parameter in parameters:
        parameter.grad = draw(1.0)
    return build(parameters, case)


def builder_of(name: str) -> Build:
    """The function that makes a contender's step from parameters and a case.

    Args:
        name: of a contender; or ``module:function`` of one that is not known here.  That is called with pairs of name
            and parameter, whose gradients are there, and the :class:`Case`, and returns an optimizer.

    Raises:
        ValueError: no such contender, module or function.
    """
    if ":" not in name:
        if name not in BUILDERS:
            raise ValueError(
                f"contender {name!r} is unknown; choose from {sorted(BUILDERS)}, or give module:function"
            )
        return BUILDERS[name]
    made = named_function("contender", name)

    def build(parameters: Sequence[Tensor], case: Case) -> Callable[[], object]:
        step: Callable[[], object] = made(_with_names(parameters), case).step
        return step

    return build


def _with_names(parameters: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"layers.{index}.weight", parameter) for index, parameter in enumerate(parameters)]


def _ours(
    parameters: Sequence[Tensor], case: Case, validate: bool = True, capture: bool = False
) -> Callable[[], object]:
    import dion_dtensor

    build: Any = ALGORITHMS[case.algorithm]
    named = _with_names(parameters)
    if case.algorithm in FRACTIONS:
        build = partial(build, **{"rank_fraction" if case.algorithm == "dion" else "fraction": case.part})
    if case.algorithm == "adamw":
        group = {"params": named, "algorithm": "adamw", "betas": (0.9, 0.95), "weight_decay": 0.01}
        optimizer = dion_dtensor.Muon([group], lr=1e-3, validate=validate)
    else:
        common = {"weight_decay": 0.01, "compute_dtype": case.dtype, "validate": validate, "capture": capture}
        optimizer = build(named, lr=1e-3, **common)
    step: Callable[[], object] = optimizer.step
    return step


def _microsoft_dion(
    parameters: Sequence[Tensor], case: Case, triton: bool = False, recorded: bool = False
) -> Callable[[], object]:
    dion: Any = importlib.import_module("dion")
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
    if isinstance(parameters[0], DTensor):
        axis = "outer_shard_mesh" if case.algorithm == "dion" else "distributed_mesh"
        options[axis] = parameters[0].device_mesh
    if case.algorithm == "dion":
        options["rank_fraction"] = case.part
    elif case.algorithm in FRACTIONS:
        options["fraction"] = case.part
    if case.algorithm != "dion" and case.dtype == torch.float32:
        options["newton_schulz_func"] = _polynomial_in_float32()
    if triton:
        options["use_triton"] = True
    optimizer = getattr(dion, DION_CLASSES[case.algorithm])(parameters, **options)
    if recorded:
        optimizer = importlib.import_module("dion.cuda_graph").CudaGraphOptimizer(optimizer, warmup_steps=2)
    step: Callable[[], object] = optimizer.step
    return step


def _polynomial_in_float32() -> Callable[..., Tensor]:
    """The peer's default polynomial at float32, compiled as the peer compiles its own, which is bfloat16 alone."""
    from dion_ref import POLYNOMIALS

    coefficients = POLYNOMIALS["polar_express"].coefficients

    @torch.compile(fullgraph=True, dynamic=False)
    def polynomial(stack: Tensor, epsilon: float = 1e-8) -> Tensor:
        tall = stack.shape[-2] > stack.shape[-1]
        X = stack.float().mT if tall else stack.float()
        X = X / (1.02 * X.norm(dim=(-2, -1), keepdim=True) + epsilon)
        for a, b, c in coefficients:
            gram = X @ X.mT
            X = a * X + (b * gram + c * (gram @ gram)) @ X
        result: Tensor = X.mT if tall else X
        return result

    made: Callable[..., Tensor] = polynomial
    return made


def _torch_muon(parameters: Sequence[Tensor], case: Case) -> Callable[[], object]:
    optimizer = torch.optim.Muon(parameters, lr=1e-3, weight_decay=0.01)
    whole: Callable[[], object] = optimizer.step
    if case.dtype == torch.bfloat16:
        return whole

    def step() -> None:
        # It rounds to bfloat16 by this method and nowhere else.
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
            whole()

    return step


def _torch_adamw(parameters: Sequence[Tensor], case: Case) -> Callable[[], object]:
    step: Callable[[], object] = torch.optim.AdamW(
        parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    ).step
    return step


def _named(name: str, **options: Any) -> Callable[..., torch.optim.Optimizer]:
    def build(*args: Any, **others: Any) -> torch.optim.Optimizer:
        import dion_dtensor

        optimizer: torch.optim.Optimizer = getattr(dion_dtensor, name)(*args, **options, **others)
        return optimizer

    return build


ALGORITHMS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "muon": _named("Muon"),
    "muon_torch": _named(
        "Muon",
        polynomial="keller",
        momentum="ema",
        nesterov=True,
        epsilon=1e-7,
        epsilon_rule="clamp",
        scale="keller",
    ),
    "normuon": _named("NorMuon"),
    "dion": _named("Dion"),
    "dion2": _named("Dion2"),
    "dion3": _named("Dion3"),
    "adamw": _named("Muon"),
}
"""How ours is built, by the name of the algorithm; ``muon_torch`` is Muon by torch.optim.Muon's conventions."""
DION_CLASSES = {"muon": "Muon", "normuon": "NorMuon", "dion": "Dion", "dion2": "Dion2", "dion3": "NorDion2"}
BUILDERS: dict[str, Build] = {
    OURS: _ours,
    UNCHECKED: partial(_ours, validate=False),
    RECORDED: partial(_ours, capture=True),
    DION: _microsoft_dion,
    DION_TRITON: partial(_microsoft_dion, triton=True),
    DION_RECORDED: partial(_microsoft_dion, triton=True, recorded=True),
    TORCH_MUON: _torch_muon,
    TORCH_ADAMW: _torch_adamw,
}
