"""What is said of models and options that would be taken otherwise than they are meant."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from dion_dtensor import Muon, audit, import_state_dict, param_groups
from tests.dtensor.small import Small, backward


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_one_pattern_cannot_split_and_cut_heads() -> None:
    with pytest.raises(ValueError, match="pattern 'up' is in split and in heads"):
        param_groups(Small(), split={"up": (6, 6)}, heads={"up": 2})


def test_patterns_that_are_iterated_once_exclude_all_the_same() -> None:
    excluded = (pattern for pattern in ("up", "down"))
    groups = param_groups(Small(), exclude=excluded)  # type: ignore[arg-type]
    assert {group["algorithm"] for group in groups} == {"adamw"}


@pytest.mark.parametrize("first", [0, 1])
def test_models_with_the_same_names_keep_their_own_reasons(first: int) -> None:
    class One(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

    models = [One(nn.Embedding(5, 4)), One(nn.Linear(4, 5, bias=False))]
    groups = [group for model in (models[first], models[1 - first]) for group in param_groups(model, lr=0.02)]
    optimizer = Muon(groups, compile=False)
    rows = {row.rule: row.why for row in audit(optimizer).rows}
    assert rows == {"adamw": "embedding", "muon": "matrix"}


def test_strict_is_not_deceived_by_another_model_of_the_same_names() -> None:
    left, other = nn.Linear(4, 5, bias=False), nn.Linear(4, 5, bias=False)
    groups = [{"params": [("weight", left.weight)], "algorithm": "adamw"}]
    optimizer = Muon([*groups, *param_groups(other, exclude="weight")], compile=False)
    with pytest.raises(ValueError, match=r"matrices that are not orthonormalized:\n  weight .*asked for"):
        audit(optimizer, strict=True)


def test_the_state_of_one_of_two_models_of_the_same_names_is_refused() -> None:
    models = [nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)]
    theirs = torch.optim.Muon(models[0].named_parameters())
    models[0].weight.grad = torch.ones(4, 4)
    theirs.step()  # type: ignore[no-untyped-call]
    groups = [{"params": list(model.named_parameters())} for model in models]
    ours = Muon(groups, compile=False)
    with pytest.raises(ValueError, match=r"weight .* is saved, and 2 parameters here have that name"):
        import_state_dict(ours, theirs.state_dict(), partial=True, check_settings=False)


def test_weights_that_fsdp2_holds_whole_for_the_moment_are_refused(one_rank: None) -> None:
    model = Small()
    fully_shard(model.up)
    fully_shard(model)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    assert all(isinstance(pair[1], DTensor) for group in param_groups(model) for pair in group["params"])
    with torch.no_grad():
        model(tokens)
    with pytest.raises(ValueError, match=r"the model holds whole weights .* call its reshard\(\)"):
        param_groups(model)
    model.reshard()  # type: ignore[operator]
    optimizer = Muon(param_groups(model), compile=False)
    backward(model)
    optimizer.step()


def test_lazy_modules_are_refused_until_they_have_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet \(a lazy module\)"):
        param_groups(model)
    model(torch.ones(2, 3))
    assert param_groups(model)[0]["algorithm"] == "muon"


def test_heads_that_peft_trains_beside_its_adapters_are_heads() -> None:
    """Their names there: base_model.model.classifier.modules_to_save.default.weight."""

    class Inner(nn.ModuleDict):
        def get_output_embeddings(self) -> nn.Module:
            return self["lm_head"]  # the wrapper, which has no weight of its own

    def beside() -> nn.Module:
        return nn.ModuleDict({"modules_to_save": nn.ModuleDict({"default": nn.Linear(8, 3)})})

    for kind, name in ((nn.ModuleDict, "score"), (Inner, "lm_head")):
        inner = kind({"body": nn.Linear(8, 8), name: beside()})
        groups = param_groups(nn.ModuleDict({"base_model": nn.ModuleDict({"model": inner})}))
        reasons = {key: why for group in groups for key, why in group["reasons"].items()}
        assert reasons[f"base_model.model.{name}.modules_to_save.default.weight"] == "output head"
        assert reasons["base_model.model.body.weight"] == "matrix"


def test_an_axis_that_a_parameter_lies_on_is_no_replicate_mesh(one_rank: None) -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    weight = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, (Replicate(), Shard(0))))
    with pytest.raises(ValueError, match=r"weight \[4, 4\]: replicate_mesh .* has the axis 'dp', which"):
        Muon([("weight", weight)], replicate_mesh=mesh["dp"], compile=False)


def test_another_device_is_named_where_all_else_is_the_same() -> None:
    layer = nn.Linear(4, 4, bias=False)
    optimizer = Muon(layer.named_parameters(), compile=False)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.to("meta")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    layer.weight.grad = torch.ones(4, 4, device="meta")
    with pytest.raises(RuntimeError, match=r"the parameter now is \[4, 4\] float32 .*on meta, not cpu; make"):
        optimizer.step()
