"""A port that is right on every mesh by brute force, and what becomes of it with one mistake.

Every rank assembles the whole of each weight, gradient and state, asks the oracle for the step, and keeps its part.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from conformance.adapters import Capabilities, Spec
from conformance.adapters.oracle import make_hyper
from conformance.adapters.torch_optimizer import Named
from conformance.certify.mutants import replaced
from conformance.port.mesh_cases import MESH_FEATURES
from dion_ref import ALGORITHMS, linalg, normuon, update

WHOLE = ("momentum", "exp_avg", "exp_avg_sq")
"""States that lie as the weight does; all others are replicated."""


class Gathering(torch.optim.Optimizer):
    """Right on every mesh. Mutants override one method."""

    def __init__(self, params: Named, spec: Spec) -> None:
        self.names = {parameter: name for name, parameter in params}
        self.rule, self.hyper = ALGORITHMS[spec.algorithm], make_hyper(spec.algorithm, spec.hyper)
        super().__init__([parameter for _, parameter in params], {"lr": self.hyper.lr})
        for parameter, name in self.names.items():
            weight = self.whole(parameter.detach())
            first = self.first(weight, self.own_name(name))
            for one in fields(first):
                value = getattr(first, one.name)
                tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
                self.state[parameter][one.name] = self.laid(one.name, tensor, parameter)

    def first(self, weight: Tensor, name: str) -> Any:
        """The oracle's state before the first step."""
        return self.rule.init(weight, self.hyper, name=name)

    def own_name(self, name: str) -> str:
        """The name that keys the first Q."""
        return name

    def whole(self, tensor: Tensor) -> Tensor:
        """The whole of a weight, gradient or state, on every rank."""
        return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()

    def laid(self, key: str, value: Tensor, parameter: Tensor) -> Tensor:
        """This rank's part of a whole value, laid out like the parameter, or replicated."""
        if not isinstance(parameter, DTensor) or key == "step":
            return value.clone()
        placements = (
            parameter.placements if key in (*WHOLE, "weight") else [Replicate()] * parameter.device_mesh.ndim
        )
        everywhere = DTensor.from_local(value.clone(), parameter.device_mesh, run_check=False)
        return everywhere.redistribute(placements=placements)

    def compute(self, weight: Tensor, grad: Tensor, state: Any, parameter: DTensor) -> tuple[Tensor, Any]:
        """The step on whole tensors."""
        with self.wrong(parameter):
            result: tuple[Tensor, Any] = self.rule.step(weight, grad, state, self.hyper)
        return result

    def wrong(self, parameter: DTensor) -> AbstractContextManager[Any]:
        """The context of the step; mutants change the oracle here."""
        return nullcontext()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every parameter."""
        for parameter in self.names:
            own = self.state[parameter]
            values = {key: self.whole(value) for key, value in own.items()}
            if "step" in values:
                values["step"] = int(values["step"])  # type: ignore[assignment]
            assert parameter.grad is not None
            weight, state = self.compute(
                self.whole(parameter),
                self.whole(parameter.grad),
                self.rule.State(**values),
                parameter,  # type: ignore[arg-type]
            )
            local(parameter).copy_(local(self.laid("weight", weight, parameter)))
            for key in own:
                value = getattr(state, key)
                tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
                local(own[key]).copy_(local(self.laid(key, tensor, parameter)))


def local(tensor: Tensor) -> Tensor:
    """The local shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unreduced(tensor: Tensor) -> Tensor:
    """What each rank has of a pending reduction, taken for the reduced."""
    if not isinstance(tensor, DTensor):
        return tensor
    taken = [Replicate() if isinstance(one, Partial) else one for one in tensor.placements]
    return DTensor.from_local(
        tensor.to_local(),
        tensor.device_mesh,
        taken,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


class _LocalPiece(Gathering):
    """A piece taken for the whole: each rank steps its own shard."""

    def first(self, weight: Tensor, name: str) -> Any:
        return super().first(weight, name) if weight.numel() else self.rule.State(weight.clone(), 0)

    def compute(self, weight: Tensor, grad: Tensor, state: Any, parameter: DTensor) -> tuple[Tensor, Any]:
        return super().compute(weight, grad, state, parameter) if weight.numel() else (weight, state)

    def whole(self, tensor: Tensor) -> Tensor:
        return local(tensor).clone()

    def laid(self, key: str, value: Tensor, parameter: Tensor) -> Tensor:
        assert isinstance(parameter, DTensor)
        if key == "step":
            return value.clone()
        stride = torch.empty(parameter.shape, device="meta").stride()
        return DTensor.from_local(
            value.contiguous(), parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
            stride=stride,
        )  # fmt: skip


class _LastAxisOnly(_LocalPiece):
    """The last axis is gathered, the first is not: a `_StridedShard` that `is_shard()` denies, or a forgotten axis."""

    def whole(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.clone()
        everywhere = DTensor.from_local(tensor.full_tensor(), tensor.device_mesh, run_check=False)
        return everywhere.redistribute(placements=[tensor.placements[0], Replicate()]).to_local().clone()

    def laid(self, key: str, value: Tensor, parameter: Tensor) -> Tensor:
        assert isinstance(parameter, DTensor)
        if key == "step":
            return value.clone()
        index = torch.arange(parameter.numel()).view(parameter.shape)
        everywhere = DTensor.from_local(index, parameter.device_mesh, run_check=False)
        piece = (
            everywhere.redistribute(placements=[parameter.placements[0], Replicate()]).to_local().flatten()
        )
        own = everywhere.redistribute(placements=parameter.placements).to_local()
        order = piece.argsort()
        places = order[torch.searchsorted(piece[order], own.flatten())]
        return super().laid(key, value.flatten()[places].view(own.shape), parameter)


class _DroppedShard(Gathering):
    """The last rank's rows of the gradient never arrive."""

    def compute(self, weight: Tensor, grad: Tensor, state: Any, parameter: DTensor) -> tuple[Tensor, Any]:
        grad[-(-grad.shape[0] // 4) * 3 :] = 0
        return super().compute(weight, grad, state, parameter)


class _LeakedPadding(Gathering):
    """Shards are padded to one size, and the padding is taken for rows."""

    def compute(self, weight: Tensor, grad: Tensor, state: Any, parameter: DTensor) -> tuple[Tensor, Any]:
        rows, padding = weight.shape[0], -weight.shape[0] % parameter.device_mesh.size()

        def padded(x: Tensor) -> Tensor:
            return torch.cat((x, x.new_zeros(padding, x.shape[1])))

        weight, state = super().compute(
            padded(weight), padded(grad), replace(state, momentum=padded(state.momentum)), parameter
        )
        return weight[:rows].contiguous(), replace(state, momentum=state.momentum[:rows].contiguous())


class _ShardScale(Gathering):
    """The factor on the learning rate by the shard's shape."""

    def wrong(self, parameter: DTensor) -> AbstractContextManager[Any]:
        scale, parts = update.scale_factor, parameter.device_mesh.size()
        return replaced(scale, lambda kind, m, n, storage="out_in": scale(kind, -(-m // parts), n, storage))


class _LocalSelection(Gathering):
    """The top slices of each shard in place of those of the matrix."""

    def wrong(self, parameter: DTensor) -> AbstractContextManager[Any]:
        top, parts = linalg.top_slices, parameter.device_mesh.size()

        def local_top(M: Tensor, count: int, dim: int) -> Tensor:
            pieces = torch.chunk(torch.arange(M.shape[dim]), parts)
            share = -(-count // len(pieces))
            chosen = [piece[top(M.index_select(dim, piece), min(share, len(piece)), dim)] for piece in pieces]
            return torch.cat(chosen).sort().values

        return replaced(top, local_top)


class _CountByShard(Gathering):
    """k rounded up in each shard, then added."""

    def wrong(self, parameter: DTensor) -> AbstractContextManager[Any]:
        parts, exact = parameter.device_mesh.size(), update.exact_ceil
        return replaced(
            exact,
            lambda share, size, multiple=1: min(size, parts * exact(share, -(-size // parts), multiple)),
        )


class _ShardRescale(Gathering):
    """Norms before and after the rows' normalization by shard."""

    def wrong(self, parameter: DTensor) -> AbstractContextManager[Any]:
        whole, parts = normuon.normalize_rows, parameter.device_mesh.size()

        def by_shard(U: Tensor, v: Tensor, beta2: float, epsilon: float) -> tuple[Tensor, Tensor]:
            pieces = zip(torch.chunk(U, parts), torch.chunk(v, parts), strict=True)
            results = [whole(u, w, beta2, epsilon) for u, w in pieces]
            return torch.cat([u for u, _ in results]), torch.cat([w for _, w in results])

        return replaced(whole, by_shard)


class _ShardVariance(Gathering):
    """A row's variance over the columns of the first shard alone."""

    def wrong(self, parameter: DTensor) -> AbstractContextManager[Any]:
        whole, parts = normuon.normalize_rows, parameter.device_mesh.size()

        def of_first(U: Tensor, v: Tensor, beta2: float, epsilon: float) -> tuple[Tensor, Tensor]:
            first = torch.chunk(U, parts, dim=1)[0].square().mean(1, keepdim=True)
            v = beta2 * v + (1 - beta2) * first
            rows = U / (v.sqrt() + epsilon)
            return rows * (linalg.norm(U) / linalg.norm(rows).clamp(min=epsilon)), v

        return replaced(whole, of_first)


class _ZeroTestByShard(Gathering):
    """A rank whose own rows of the momentum are zero takes the matrix for zero, and keeps its old Q."""

    def compute(self, weight: Tensor, grad: Tensor, state: Any, parameter: DTensor) -> tuple[Tensor, Any]:
        assert parameter.grad is not None
        mine = local(parameter.grad)
        new_weight, new = super().compute(weight, grad, state, parameter)
        if mine.numel() and not bool(mine.any()):
            new = replace(new, Q=linalg.normalize_columns(state.Q, self.hyper.epsilon))
        return new_weight, new


class _RandomByRank(Gathering):
    """Every rank draws Q from a stream of its own."""

    def first(self, weight: Tensor, name: str) -> Any:
        """The oracle's state before the first step."""
        return self.rule.init(weight, self.hyper, name=name)

    def own_name(self, name: str) -> str:
        return f"{name}:{dist.get_rank()}"


class _BiasedReplicas(Gathering):
    """Replicas of the gradient are not averaged: each rank of the first axis goes on with its own share."""

    def compute(self, weight: Tensor, grad: Tensor, state: Any, parameter: DTensor) -> tuple[Tensor, Any]:
        coordinate = parameter.device_mesh.get_coordinate()
        assert coordinate is not None
        return super().compute(weight, grad * (1 + coordinate[0]), state, parameter)


class _LocalGradient(Gathering):
    """A gradient that is still to be averaged is taken for the average."""

    def whole(self, tensor: Tensor) -> Tensor:
        return super().whole(unreduced(tensor))


class _LostOnLoad(Gathering):
    """A key of the state is not restored."""

    key = "momentum"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        kept = {p: local(own[self.key]).clone() for p, own in self.state.items()}
        super().load_state_dict(state_dict)
        for parameter, value in kept.items():
            local(self.state[parameter][self.key]).copy_(value)


class _StaleQ(_LostOnLoad):
    """Q starts anew after a resume."""

    key = "Q"


class _LostStep(_LostOnLoad):
    """The count of steps starts anew after a resume."""

    key = "step"


class _LostMoment(_LostOnLoad):
    """The second moment starts anew after a resume."""

    key = "exp_avg_sq"


class _LocalCheckpoint(Gathering):
    """Shards are saved as plain tensors of one name, so one rank's shard stands for all."""

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        saved["state"] = {
            index: {key: local(value).clone() for key, value in own.items()}
            for index, own in saved["state"].items()
        }
        return saved


class _MissingKeys(Gathering):
    """One rank saves no state for the first parameter, as if it had seen no gradient."""

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        if dist.get_rank() == 1:
            saved["state"] = {index: own for index, own in saved["state"].items() if index != 0}
        return saved


_WRONG = (
    *(_LocalPiece, _LastAxisOnly, _DroppedShard, _LeakedPadding, _ShardScale, _LocalSelection, _CountByShard),
    *(_ShardRescale, _ShardVariance, _ZeroTestByShard, _RandomByRank, _BiasedReplicas, _LocalGradient),
    *(_LostOnLoad, _StaleQ, _LostStep, _LostMoment, _LocalCheckpoint, _MissingKeys),
)
KINDS: Mapping[str, type[Gathering]] = {
    "Gathering": Gathering,
    **{kind.__name__.removeprefix("_"): kind for kind in _WRONG},
}
"""The right one and the wrong ones by name."""


@dataclass(frozen=True)
class GatheringAdapter:
    """The gathering port, or a mutant of it, for L3 and L4.

    Attributes:
        kind: a key of KINDS.
    """

    kind: str = "Gathering"
    state_keys: Mapping[str, str] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        keys = ("momentum", "Q", "variance", "exp_avg", "exp_avg_sq", "step")
        object.__setattr__(self, "state_keys", {key: key for key in keys})

    def capabilities(self) -> Capabilities:
        """All algorithms, in float64, on meshes."""
        every = dict.fromkeys(ALGORITHMS, ("dion",))
        return Capabilities("gathering", every, ("L3", "L4"), ("float64",), MESH_FEATURES)

    def build(self, params: Named, spec: Spec) -> torch.optim.Optimizer:
        """The optimizer."""
        return KINDS[self.kind](params, spec)

    def init(self, spec: Spec, params: Any) -> Any:
        """Not for one device: the oracle is."""
        raise NotImplementedError("the gathering port is for meshes")

    step = init


adapter = GatheringAdapter()
