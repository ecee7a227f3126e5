"""Ports to try the suite on: right, idle, and misbehaving in every way."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from conformance.adapters import Arrays, Capabilities, Spec, ours
from conformance.adapters.oracle import OracleAdapter
from conformance.mutants.gathering import Gathering, GatheringAdapter


class Idle(OracleAdapter):
    """Does nothing at all."""

    def step(self, params: Arrays, grads: Arrays, state: Any, hyper: Mapping[str, Any]) -> tuple[Arrays, Any]:
        return params, state

    def orthonormalize(self, matrix: Any, hyper: Any, compute_dtype: str) -> Any:
        return matrix


class Broken(OracleAdapter):
    """Right but for four cases."""

    def __init__(self, how: str) -> None:
        self.how = how

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), name=f"broken: {self.how}")

    def step(self, params: Arrays, grads: Arrays, state: Any, hyper: Mapping[str, Any]) -> tuple[Arrays, Any]:
        spec: Spec = state[0]
        good, state = super().step(params, grads, state, hyper)
        if spec.shape != (7, 1):
            return good, state
        weight = np.asarray(good[spec.name])
        if self.how == "raises":
            raise ArithmeticError("seven\nby one")
        if self.how == "hangs":
            time.sleep(3600)
        if self.how == "dies":
            os.abort()
        if self.how == "leaves":
            os._exit(5)
        bad: dict[str, Any] = {
            "wrong shape": {spec.name: weight.T},
            "nan": {spec.name: weight * np.nan},
            "wrong dtype": {spec.name: weight.astype(np.float16)},
            "wrong name": {"other": weight},
            "no array": {spec.name: "weight"},
        }
        return bad[self.how], state


class Mislabelled(OracleAdapter):
    """Claims torch's convention, and follows Moonlight's."""

    def capabilities(self) -> Capabilities:
        return replace(
            super().capabilities(), name="mislabelled", algorithms={"muon": ("torch",)}, levels=("L1", "L2")
        )

    def step(self, params: Arrays, grads: Arrays, state: Any, hyper: Mapping[str, Any]) -> tuple[Arrays, Any]:
        changed = {"momentum": "sum", "scale": "moonlight", "epsilon_rule": "add"}
        return super().step(params, grads, state, {**hyper, **changed})


class RaisesOnRanks(GatheringAdapter):
    """Raises on one rank of four, in the second step."""

    def build(self, params: Any, spec: Spec) -> Any:
        return _Raising(params, spec)


class IdleOnRanks(GatheringAdapter):
    """Its optimizer does nothing."""

    def build(self, params: Any, spec: Spec) -> Any:
        return _Idle(params, spec)


class _Idle(Gathering):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


class HangsOnRanks(GatheringAdapter):
    """One rank of four does not come to the collective."""

    def build(self, params: Any, spec: Spec) -> Any:
        return _Hanging(params, spec)


class _Counting(Gathering):
    taken = 0
    culprit = 2

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        import torch.distributed as dist

        self.taken += 1
        if dist.get_rank() == self.culprit and self.taken == 2:
            self.misbehave()
        super().step()

    def misbehave(self) -> None:
        raise NotImplementedError


class _Raising(_Counting):
    def misbehave(self) -> None:
        raise ArithmeticError("on rank two alone")


class _Hanging(_Counting):
    def misbehave(self) -> None:
        time.sleep(3600)


class DiesOnRanks(GatheringAdapter):
    """One rank of four is killed in its second step."""

    def build(self, params: Any, spec: Spec) -> Any:
        return _Dying(params, spec)


class _Dying(_Counting):
    def misbehave(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class HangsOnRankZero(GatheringAdapter):
    """The rank that writes the report is the one that hangs."""

    def build(self, params: Any, spec: Spec) -> Any:
        return _HangingFirst(params, spec)


class _HangingFirst(_Hanging):
    culprit = 0


class HangsBeforeOurStep:
    """`dion_dtensor`, and rank two of four does not come to its second step."""

    def __init__(self) -> None:
        self.capabilities, self.state_keys = ours.adapter.capabilities, ours.adapter.state_keys
        self.init, self.step = ours.adapter.init, ours.adapter.step

    def build(self, params: Any, spec: Spec) -> Any:
        import torch.distributed as dist

        optimizer = ours.build(params, spec)
        steps = iter(range(9))

        def before(*_: Any) -> None:
            if dist.get_world_size() == 4 and dist.get_rank() == 2 and next(steps) == 1:
                time.sleep(3600)

        optimizer.register_step_pre_hook(before)
        return optimizer


class HangsInOurBucket(HangsBeforeOurStep):
    """`dion_dtensor`, and rank two of four hangs in the first bucket's step, before its collectives."""

    def build(self, params: Any, spec: Spec) -> Any:
        import torch.distributed as dist

        optimizer = ours.build(params, spec)
        if dist.get_world_size() == 4 and dist.get_rank() == 2:
            optimizer.buckets[0]._plan = lambda *_: time.sleep(3600)
        return optimizer


class HalfSteps:
    """Ours, but each update is half of what it should be."""

    def capabilities(self) -> Capabilities:
        return Capabilities("half", {"muon": ("dion",), "dion2": ("torch",)}, ("L5",), ("float64",))

    def init(self, spec: Any, params: Arrays) -> Any:
        return ours.adapter.init(spec, params)

    def step(self, params: Arrays, grads: Arrays, state: Any, hyper: Mapping[str, Any]) -> tuple[Arrays, Any]:
        new, state = ours.adapter.step(params, grads, state, hyper)
        return {name: (value + params[name]) / 2 for name, value in new.items()}, state


class EndsWhenStepped(HalfSteps):
    """Leaves, dies or hangs at its first step."""

    def __init__(self, how: str) -> None:
        self.how = how

    def step(self, params: Arrays, grads: Arrays, state: Any, hyper: Mapping[str, Any]) -> tuple[Arrays, Any]:
        {"leaves": sys.exit, "dies": os._exit, "hangs": time.sleep}[self.how](
            3600 if self.how == "hangs" else 0
        )
        raise AssertionError


perfect = OracleAdapter()
idle = Idle()
mislabelled = Mislabelled()
raises = Broken("raises")
hangs = Broken("hangs")
dies = Broken("dies")
leaves = Broken("leaves")
wrong_shape = Broken("wrong shape")
nan = Broken("nan")
wrong_dtype = Broken("wrong dtype")
wrong_name = Broken("wrong name")
no_array = Broken("no array")
raises_on_ranks = RaisesOnRanks()
idle_on_ranks = IdleOnRanks()
hangs_on_ranks = HangsOnRanks()
hangs_on_rank_zero = HangsOnRankZero()
dies_on_ranks = DiesOnRanks()
hangs_before_our_step = HangsBeforeOurStep()
hangs_in_our_bucket = HangsInOurBucket()
half_steps = HalfSteps()
leaves_when_stepped = EndsWhenStepped("leaves")
dies_when_stepped = EndsWhenStepped("dies")
hangs_when_stepped = EndsWhenStepped("hangs")
no_adapter = object()


class BadClaims(OracleAdapter):
    def capabilities(self) -> Any:
        return {"muon": True}


class NoSuchDialect(OracleAdapter):
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), algorithms={"muon": ("kellerjordan",)})


bad_claims = BadClaims()
no_such_dialect = NoSuchDialect()
