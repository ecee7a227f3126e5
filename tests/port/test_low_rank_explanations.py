"""What a port of Dion or Orth-Dion does otherwise with its factors is named, on Dions of some thirty lines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.adapters import Capabilities, Spec
from conformance.adapters.torch_optimizer import TorchOptimizerAdapter
from conformance.port.low_rank_choices import CHOICES, COMMON
from conformance.port.runner import Selection, run_vectors
from conformance.vectors import load


def basis(A: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Columns made orthonormal one after another, twice for the rounding; what is new and no longer than the limit is
    dead."""
    done, kept = torch.zeros_like(A), torch.zeros(A.shape[1], dtype=torch.bool)
    for j in range(A.shape[1]):
        new = A[:, j]
        for _ in range(2):
            new = new - done @ (done.mT @ new)
        if new.norm() > limit[j]:
            done[:, j], kept[j] = new / new.norm(), True
    return done, kept


class Dion(torch.optim.Optimizer):
    """microsoft/dion's, with one thing done otherwise."""

    def __init__(self, params: Any, how: str, orthonormal: bool, **hyper: Any) -> None:
        super().__init__(params, hyper)
        self.how, self.orthonormal = how, orthonormal

    # torch types a second way to call it, with a closure, which no test takes.
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, group)

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        how, lr, mu, epsilon = self.how, group["lr"], group["mu"], 1e-8
        M, Q = self.state[p]["momentum"], self.state[p]["Q"]
        M.add_(p.grad)
        B = M.mT if p.shape[0] < p.shape[1] else M
        unit = 64 * torch.finfo(B.dtype).eps
        if how == "no rule for dead columns":
            P, kept = torch.linalg.qr(B @ Q)[0], torch.ones(Q.shape[1], dtype=torch.bool)
        else:
            P, kept = basis(B @ Q, unit * B.norm() * Q.norm(dim=0))
        R = B.mT @ P
        if how == "Q not normalized":
            new = R
        elif how == "Q normalized by rows":
            new = R / (R.norm(dim=1, keepdim=True) + epsilon)
        elif how == "Q normalized by its Frobenius norm":
            new = R / (R.norm() + epsilon)
        elif how == "Q normalized with epsilon inside the root":
            new = R / (R.square().sum(0) + epsilon).sqrt()
        elif self.orthonormal and how != "Q normalized by columns, not orthonormalized":
            new, independent = basis(R, (unit * R.norm()).expand(len(kept)))
            P, kept = torch.where(independent, P, 0), independent
        else:
            new = R / (R.norm(dim=0) + epsilon)
        if how != "no rule for dead columns":
            new = torch.where(kept, new, Q / (Q.norm(dim=0) + epsilon))
        factor = {
            "error feedback with mu in place of 1 - mu": mu,
            "no error feedback": 0.0,
            "error feedback of all of P R^T": 1.0,
        }.get(how, 1 - mu)
        U, taken = P @ new.mT, P @ (new if how == "Q in place of R in the error feedback" else R).mT
        U, taken = (U.mT, taken.mT) if B is not M else (U, taken)
        M.sub_(factor * taken)
        if how != "Q never updated":
            Q.copy_(new)
        scale = (p.shape[0] / p.shape[1]) ** 0.5
        scale = scale**2 if how == "its scale without the square root" else scale
        decay = group["weight_decay"] * (1.0 if how == "decay without the learning rate" else lr)
        p.mul_(1 - decay).sub_(lr * scale * U)


def explanations(algorithm: str, how: str, dtype: str) -> list[str]:
    def build(params: Any, spec: Spec) -> torch.optim.Optimizer:
        hyper = {name: spec.hyper[name] for name in ("lr", "weight_decay", "mu")}
        return Dion([p for _, p in params], how, algorithm == "orth_dion", **hyper)

    claims = Capabilities(
        "port",
        {algorithm: ("dion",)},
        dtypes=(dtype,),
        features=("state", "schedule:lr", "schedule:mu"),
    )
    state = {"momentum": "momentum", "Q": "Q"}
    adapter = TorchOptimizerAdapter(claims, build, state=state, hyper={"mu": "mu"})
    run = run_vectors(adapter, claims, load(), Selection(("L1", "L2"), (), ()))
    return [str(fit) for fit in run.fits]


MISTAKES = [
    *(("dion", how) for how in (*COMMON, *CHOICES["dion"])),
    *(("orth_dion", how) for how in (*COMMON, *CHOICES["orth_dion"])),
    ("dion", "no rule for dead columns"),
    ("dion", "its scale without the square root"),
    ("dion", "decay without the learning rate"),
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("algorithm", "how"), MISTAKES)
def test_a_mistake_in_the_factors_is_named(algorithm: str, how: str, dtype: str) -> None:
    first, *_ = explanations(algorithm, how, dtype)
    assert first.startswith(f"matches dion with {how} "), first
    assert " within tolerance in " in first


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("algorithm", ["dion", "orth_dion"])
def test_a_right_port_gets_no_explanation(algorithm: str, dtype: str) -> None:
    assert explanations(algorithm, "", dtype) == []
