"""Training that is saved by ``torch.distributed.checkpoint`` on one mesh and goes on, on another."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from conformance.process_groups import shared_group
from dion_dtensor import param_groups
from tests.dtensor.layouts import build_mesh, lay_out, layout
from tests.dtensor.programs import OPTIMIZERS, OWN
from tests.dtensor.split_programs import whole

# From, to; "plain": tensors without a mesh, the same on every rank.
RESHARDINGS: Mapping[str, tuple[str, str]] = {
    "2x2 to 4": ("2x2 T0 S0", "4 S0"),
    "8 to plain": ("8 S0", "plain"),
    "TP to FSDP": ("4 S1", "4 S0"),
    "plain to 2x2": ("plain", "2x2 S0 S1"),
}


class Weights(nn.Module):
    """Parameters alone: two plain matrices, a fused one, experts, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        shapes = {"up": (13, 10), "down": (6, 9), "qkv": (19, 10), "experts": (5, 6, 8), "bias": (7,)}
        for name, shape in shapes.items():
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(drawn))

    def laid(self, where: str) -> Weights:
        """The same, sharded; a vector is sharded where rows are."""
        if where != "plain":
            mesh = build_mesh(layout(where))
            for name, parameter in list(self.named_parameters()):
                codes = layout(where).codes
                own = tuple("R" if parameter.ndim < 2 and code[1:] == "1" else code for code in codes)
                laid = lay_out(parameter.detach(), type(layout(where))(layout(where).mesh, own), mesh)
                setattr(self, name, nn.Parameter(laid))
        return self


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    groups = param_groups(model, algorithm=name, split={"qkv": (9, 5, 5)}, lr=0.05)
    own = {"rank_fraction": 0.5} if name == "dion" else OWN.get(name, {})
    made: torch.optim.Optimizer = OPTIMIZERS[name](groups, compile=False, **own)
    return made


def _step(model: Weights, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in model.parameters():
        gradient = torch.randn(tuple(parameter.shape), generator=generator, dtype=torch.float64)
        if isinstance(parameter, DTensor):
            everywhere = DTensor.from_local(gradient, parameter.device_mesh, run_check=False)
            gradient = everywhere.redistribute(placements=parameter.placements)
        parameter.grad = gradient
    optimizer.step()


def resumed(name: str, resharding: str, path: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights after four steps on one device, and with a checkpoint after two, from one mesh to another."""
    source, target = RESHARDINGS[resharding]
    continued(name, source, range(2), path, load=False)
    straight = continued(name, "plain", range(4))
    assert straight is not None
    return straight, continued(name, target, range(2, 4), path, load=True) or straight


def continued(name: str, where: str, steps: range, path: str = "", load: bool = False) -> list[Tensor] | None:
    """The weights after ``steps``; saved to ``path``, or loaded from it before; None on ranks outside the mesh."""
    world = 8 if where == "plain" else layout(where).world
    group = shared_group(world)
    if where != "plain":
        build_mesh(layout(where))
    weights = None
    if torch.distributed.get_rank() < world:
        model = Weights().laid(where)
        optimizer = _optimizer(name, model)
        if load:
            saved = _saved(model, optimizer)
            checkpoint.load(saved, checkpoint_id=path, process_group=group)
            model.load_state_dict(saved["model"])
            set_optimizer_state_dict(model, optimizer, saved["optimizer"])
        for step in steps:
            _step(model, optimizer, step)
        if path and not load:
            checkpoint.save(_saved(model, optimizer), checkpoint_id=path, process_group=group)
        weights = [whole(parameter) for parameter in model.parameters()]
    torch.distributed.barrier()
    return weights


def torch_knows(where: str) -> bool:
    """Whether torch.distributed.checkpoint takes the shards of this rank for what they are.

    Where a strided shard leaves a rank without rows it does not (torch 2.14.1: 9 rows on 4x2), whoever saves.
    """
    shared_group(
        layout(where).world
    )  # as `continued` does: torch finds a mesh again by the names of its groups
    build_mesh(layout(where))
    for parameter in Weights().laid(where).parameters():
        assert isinstance(parameter, DTensor)
        own = parameter.to_local().shape
        shape, _ = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if tuple(shape) != tuple(own):
            return False
    return True


def _saved(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def whole_state_of_rank_zero(name: str) -> list[bool]:
    """Whether training goes on alike from a whole state that rank 0 alone holds, as one file of it is read."""
    model = Weights().laid("8 S0")
    optimizer = _optimizer(name, model)
    for step in range(2):
        _step(model, optimizer, step)
    saved = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=saved)
    states = get_optimizer_state_dict(model, optimizer, options=saved)
    if torch.distributed.get_rank():
        weights, states = {}, {}
    again = Weights().laid("8 S0")
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    other = _optimizer(name, again)
    loaded = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(again, weights, options=loaded)
    set_optimizer_state_dict(again, other, states, options=loaded)
    for step in range(2, 4):
        _step(model, optimizer, step)
        _step(again, other, step)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    return [torch.equal(whole(one), whole(two)) for one, two in pairs]


def saved_while_training(path: str) -> bool:
    """Whether an asynchronous checkpoint holds what was there as it was asked for, though steps go on meanwhile."""
    model = Weights().laid("8 S0")
    optimizer = _optimizer("muon", model)
    for step in range(2):
        _step(model, optimizer, step)
    pending = checkpoint.async_save(
        _saved(model, optimizer), checkpoint_id=path, process_group=shared_group(8)
    )
    for step in range(2, 6):
        _step(model, optimizer, step)
    pending.result()  # type: ignore[union-attr]  # two futures come of an asynchronous stager alone
    again = Weights().laid("8 S0")
    other = _optimizer("muon", again)
    saved = _saved(again, other)
    checkpoint.load(saved, checkpoint_id=path)
    again.load_state_dict(saved["model"])
    set_optimizer_state_dict(again, other, saved["optimizer"])
    for step in range(2, 6):
        _step(again, other, step)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    same = [torch.equal(whole(one), whole(two)) for one, two in pairs]
    return all(same)


def sharded_after_the_optimizer(name: str, load: bool) -> bool | None:
    """Whether an optimizer follows parameters that are exchanged for shards before its first step.

    The way of Accelerate: tensors of one element first, so that the whole weights can be freed, then the shards.

    Args:
        name: of the algorithm.
        load: a state of two steps before the exchange.
    """
    if build_mesh(layout("2x2 T0 S0")).get_coordinate() is None:
        return None
    model, other = Weights(), Weights().laid("2x2 T0 S0")
    optimizer, expected = _optimizer(name, model), _optimizer(name, other)
    if load:
        trained = Weights()
        before = _optimizer(name, trained)
        for step in range(2):
            _step(trained, before, step)
        for one in (optimizer, expected):
            one.load_state_dict(copy.deepcopy(before.state_dict()))
    names = [list(group["param_names"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"][:] = [torch.empty(1, dtype=p.dtype) for p in group["params"]]
    model.laid("2x2 T0 S0")
    for group, own in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [model.get_parameter(one) for one in own]
    state = optimizer.state_dict()["state"]
    sharded = all(isinstance(one["momentum"], DTensor) for one in state.values() if "momentum" in one)
    for step in range(3):
        _step(model, optimizer, step)
        _step(other, expected, step)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    same = [torch.equal(whole(one), whole(two)) for one, two in pairs]
    return sharded and all(same)


def copies_of_state() -> dict[str, bool] | None:
    """Of DTensors that are parts of one stack: whether each way to copy the state gives the same values."""
    if build_mesh(layout("4 S0")).get_coordinate() is None:
        return None
    model = Weights().laid("4 S0")
    model.register_parameter("twin", nn.Parameter(model.up.detach().clone()))
    optimizer = _optimizer("muon", model)
    _step(model, optimizer, 0)
    expected = [whole(optimizer.state[p]["momentum"]) for p in (model.up, model.twin)]
    kept = optimizer.state_dict()
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    buffer.seek(0)
    made = {
        "deepcopy": copy.deepcopy(kept),
        "torch.save": torch.load(buffer, weights_only=False),
        "pickle": pickle.loads(pickle.dumps(optimizer)).state_dict(),
    }
    found = {}
    names = [name for group in kept["param_groups"] for name in group["param_names"]]
    for how, state in made.items():
        ours = [whole(state["state"][names.index(name)]["momentum"]) for name in ("up", "twin")]
        found[how] = all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))
    return found


def state_of_another_mesh() -> str | None:
    """What is said of a state whose DTensors lie on a mesh of another order of ranks."""
    turned = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("one", "other"))
    if build_mesh(layout("2x2 S0 S1")).get_coordinate() is None:
        return None
    model = Weights().laid("2x2 S0 S1")
    optimizer = _optimizer("muon", model)
    _step(model, optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    momentum = saved["state"][0]["momentum"]
    saved["state"][0]["momentum"] = DTensor.from_local(
        momentum.to_local(),
        turned,
        momentum.placements,
        run_check=False,
        shape=momentum.shape,
        stride=momentum.stride(),
    )
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        return str(error)
    return "no error"
