"""What users expect of a ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dion_dtensor import Dion, Muon, audit, param_groups
from dion_dtensor.updates import update_of


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6, dtype=dtype)
        self.up = nn.Linear(6, 12, dtype=dtype)
        self.norm = nn.LayerNorm(12, dtype=dtype)
        self.down = nn.Linear(12, 6, bias=False, dtype=dtype)
        self.lm_head = nn.Linear(6, 11, bias=False, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.down(self.norm(self.up(self.embedding(tokens)).relu())))


def backward(model: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (4, 9), generator=generator)
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[Tensor]:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def optimizer_of(model: nn.Module, algorithm: str = "muon", **options: Any) -> Muon | Dion:
    groups = param_groups(model, algorithm=algorithm, lr=0.02)
    kind = Dion if algorithm == "dion" else Muon
    return kind(groups, **{"compile": False} | options)


def test_groups_claim_each_parameter_once_and_say_why() -> None:
    model = Small()
    rows = {row.name: row for row in audit(optimizer_of(model)).rows}
    assert set(rows) == {name for name, _ in model.named_parameters()}
    assert {name for name, row in rows.items() if row.rule == "muon"} == {"up.weight", "down.weight"}
    assert rows["embedding.weight"].why == "embedding"
    assert rows["lm_head.weight"].why == "output head"
    assert rows["up.bias"].why == "1-D"
    assert rows["up.weight"].scale == pytest.approx((2**0.5,))
    assert "12x6" in str(audit(optimizer_of(model)))


def test_tied_head_follows_the_embedding() -> None:
    model = Small()
    model.lm_head.weight = model.embedding.weight
    groups = param_groups(model)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(set(names))
    assert "embedding.weight" in [name for name, _ in groups[1]["params"]]


def test_exclude_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'attention' matches no parameter"):
        param_groups(Small(), exclude=["attention"])
    excluded = param_groups(Small(), exclude=[r"^up\."])
    assert [name for name, _ in excluded[0]["params"]] == ["down.weight"]


def test_scalar_rule_must_take_any_shape() -> None:
    with pytest.raises(ValueError, match="scalar='dion'"):
        param_groups(Small(), scalar="dion")


@pytest.mark.parametrize("algorithm", ["muon", "dion", "adamw", "lion"])
def test_training_reduces_the_loss(algorithm: str) -> None:
    model = Small()
    optimizer = optimizer_of(model, algorithm)
    before = backward(model)
    for _ in range(20):
        optimizer.zero_grad()
        loss = backward(model)
        optimizer.step()
    assert loss < 0.9 * before


@pytest.mark.parametrize("algorithm", ["muon", "dion"])
def test_schedules_compile_once_and_agree_with_eager(algorithm: str) -> None:
    results = []
    update_of.cache_clear()
    for compiled in (False, True):
        model = Small(torch.float64)
        optimizer = optimizer_of(model, algorithm, compile=compiled)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        torch._dynamo.utils.counters.clear()
        for step in range(4):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            schedule.step()
            for group in optimizer.param_groups:
                group["weight_decay"] *= 0.9
                if "mu" in group:
                    group["mu"] *= 0.99
            if step == 0:
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        assert graphs == (len(optimizer.buckets) if compiled else 0)
        assert not torch._dynamo.utils.counters["graph_break"]
        results.append([parameter.detach() for parameter in model.parameters()])
    for eager, compiled_weight in zip(*results, strict=True):
        torch.testing.assert_close(compiled_weight, eager, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("algorithm", ["muon", "dion", "lion"])
def test_resume_is_bitwise(algorithm: str, tmp_path: Any) -> None:
    model = Small()
    optimizer = optimizer_of(model, algorithm)
    train(model, optimizer, 2)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    expected = train(model, optimizer, 2, first=2)
    saved = torch.load(tmp_path / "checkpoint")
    other = Small()
    resumed = optimizer_of(other, algorithm)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert all(torch.equal(a, b) for a, b in zip(train(other, resumed, 2, first=2), expected, strict=True))


def test_load_copies_into_place_and_keeps_the_wider_dtype() -> None:
    model = Small(torch.bfloat16)
    optimizer = optimizer_of(model, momentum_dtype=torch.float32)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    before = optimizer.state[model.up.weight]["momentum"].clone()
    optimizer.state[model.up.weight]["momentum"].zero_()
    optimizer.load_state_dict(saved)
    momentum = optimizer.state[model.up.weight]["momentum"]
    assert momentum.dtype == torch.float32
    assert torch.equal(momentum, before)
    train(model, optimizer, 1)
    assert not torch.equal(momentum, before)  # the loaded tensor is the one that steps


def test_state_of_another_algorithm_is_refused() -> None:
    model = Small()
    with pytest.raises(ValueError, match=r"up\.weight .*follow 'dion'; the loaded group follows 'muon'"):
        optimizer_of(model, "dion").load_state_dict(optimizer_of(model, "muon").state_dict())
    half = optimizer_of(model, "dion", rank_fraction=0.5)
    saved = optimizer_of(model, "dion").state_dict()
    before = copy.deepcopy(half.state_dict())
    with pytest.raises(ValueError, match=r"up\.weight .*'Q' has shape \[6, 3\].*\[6, 6\]"):
        half.load_state_dict(saved)
    assert torch.equal(half.state_dict()["state"][0]["Q"], before["state"][0]["Q"])


def test_state_exists_from_construction_on() -> None:
    model = Small()
    for parameter in model.parameters():
        assert optimizer_of(model, "dion").state[parameter]
    assert set(optimizer_of(model, "dion").state[model.up.weight]) == {"momentum", "Q"}


def test_parameters_without_gradient_are_left_alone() -> None:
    """And the others step as if they were alone, also when their number changes from step to step."""
    model, other = Small(), Small()
    for one in (model, other):
        one.extra = nn.Linear(6, 12)
        nn.init.ones_(one.extra.weight)
        nn.init.ones_(one.extra.bias)
    ours, theirs = optimizer_of(model), optimizer_of(other)
    for step in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        backward(model, step)
        backward(other, step)
        other.extra.weight.grad = torch.zeros_like(other.extra.weight) if step == 1 else None
        ours.step()
        theirs.step()
    assert torch.equal(model.extra.weight, torch.ones(12, 6))
    assert torch.equal(ours.state[model.extra.weight]["momentum"], torch.zeros(12, 6))
    assert ours.state[model.extra.bias]["step"] == 0
    assert torch.equal(other.extra.weight, torch.full((12, 6), 1 - 0.02 * 0.01))
    assert torch.equal(model.up.weight, other.up.weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gradient_is_named_and_nothing_is_written(bad: float) -> None:
    model = Small()
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    backward(model)
    model.down.weight.grad[2, 3] = bad
    weights = copy.deepcopy(model.state_dict())
    states = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(RuntimeError, match=r"down\.weight \(\[6, 12\] float32 on one device\).*NaN or inf"):
        optimizer.step()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    after = optimizer.state_dict()["state"]
    assert all(
        torch.equal(after[i][key], value) for i, state in states.items() for key, value in state.items()
    )


def test_matrix_rule_refuses_a_vector_by_name() -> None:
    model = Small()
    with pytest.raises(ValueError, match=r"up\.bias \(\[12\] float32 on one device\): muon takes matrices"):
        Muon(list(model.named_parameters()))


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (Muon, {"lr": -1.0}, "lr"),
        (Muon, {"mu": 1.0}, "mu"),
        (Muon, {"momentum": "mean"}, "momentum"),
        (Muon, {"polynomial": "express"}, "polynomial"),
        (Muon, {"scale": "spectral"}, "scale"),
        (Muon, {"epsilon": 0.0}, "epsilon"),
        (Muon, {"polynomial": ((1.0, 2.0),)}, "polynomial"),
        (Muon, {"compute_dtype": torch.float16}, "compute_dtype"),
        (Muon, {"momentum_dtype": torch.float16}, "momentum_dtype"),
        (Muon, {"lr": torch.ones(2)}, "lr"),
        (Muon, {"weight_decay": float("nan")}, "weight_decay"),
        (Dion, {"rank_fraction": 0.0}, "rank_fraction"),
        (Dion, {"rank_fraction": 1.5}, "rank_fraction"),
        (Dion, {"rank_multiple": 0}, "rank_multiple"),
    ],
)
def test_bad_hyperparameters_are_named(kind: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kind([nn.Parameter(torch.ones(3, 2))], **options)


def test_rank_is_computed_in_exact_arithmetic() -> None:
    weight = nn.Parameter(torch.ones(100, 120))
    for fraction, rank in ((0.07, 7), (0.55, 55), (0.28, 28), (1.0, 100), (0.001, 1)):
        assert Dion([weight], rank_fraction=fraction).state[weight]["Q"].shape == (100, rank)


def test_add_param_group_closure_maximize_tensor_lr_and_hooks() -> None:
    first, second = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(3))
    optimizer = Muon([first], lr=torch.tensor(0.1), weight_decay=0.0, compile=False)
    optimizer.add_param_group({"params": [second], "maximize": True})
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> float:
        optimizer.zero_grad()
        loss = first.sum() + second.sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 6.0
    assert calls == ["before", "after"]
    assert first.sum() < 3.0 < second.sum()
    torch.testing.assert_close((first + second).detach(), 2 * torch.eye(3))


def test_muon_as_torch_has_it() -> None:
    """With the conventions of torch.optim.Muon, against torch.optim.Muon in bfloat16."""
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    optimizer = Muon(
        [ours],
        lr=0.1,
        weight_decay=0.1,
        nesterov=True,
        momentum="ema",
        polynomial="keller",
        epsilon=1e-7,
        epsilon_rule="clamp",
        scale="keller",
        compute_dtype=torch.bfloat16,
        compile=False,
    )
    peer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1)
    for step in range(3):
        gradient = torch.randn(24, 16, generator=torch.Generator().manual_seed(step + 1))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        peer.step()
    # bfloat16 has three digits, and the last iterations amplify its rounding: 4.6e-2 is known of Gaussian matrices.
    assert (ours - theirs).norm() / (ours - weight).norm() < 0.03


def test_adamw_is_that_of_torch() -> None:
    model, other = Small(torch.float64), Small(torch.float64)
    optimizer = optimizer_of(model, "adamw", weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    peer = torch.optim.AdamW(other.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for ours, theirs in zip(train(model, optimizer, 3), train(other, peer, 3), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_hyperparameters_of_another_rule_are_refused() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    for key in ("rank_fraction", "eps", "nestrov", "seed", "compute_dtype", "betas"):
        with pytest.raises(ValueError, match=rf"\['{key}'\] are no hyperparameters of 'muon'"):
            Muon([{"params": [weight], key: 0.5}])
    with pytest.raises(ValueError, match="'scale'"):
        Muon([{"params": [weight], "algorithm": "adamw", "scale": "keller"}])


def test_groups_of_another_matrix_rule_are_refused() -> None:
    with pytest.raises(ValueError, match="no group follows 'dion'"):
        Dion(param_groups(Small()), rank_fraction=0.25)


@pytest.mark.parametrize("algorithm", ["muon", "dion"])
def test_copies_and_pickles_step_alike_and_apart(algorithm: str) -> None:
    model = Small()
    optimizer = optimizer_of(model, algorithm)
    train(model, optimizer, 1)
    other, copied = copy.deepcopy((model, optimizer))
    third, unpickled = pickle.loads(pickle.dumps((model, optimizer)))
    expected = train(model, optimizer, 2, first=1)
    for twin, its_optimizer in ((other, copied), (third, unpickled)):
        assert all(
            torch.equal(a, b) for a, b in zip(train(twin, its_optimizer, 2, first=1), expected, strict=True)
        )


def test_state_put_in_by_the_user_is_the_state_that_steps() -> None:
    weight = nn.Parameter(torch.eye(3))
    optimizer = Muon([("w", weight)], compile=False)
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    optimizer.state[weight]["momentum"] = torch.zeros(3, 3)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["momentum"], torch.ones(3, 3))
    saved = optimizer.state_dict()
    saved["state"][0]["momentum"] = torch.full((3, 3), 2.0)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[weight]["momentum"], torch.full((3, 3), 2.0))
    optimizer.state[weight] = {"momentum": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"w \(\[3, 3\] float32 on one device\): state 'momentum' has shape"):
        optimizer.step()


def test_load_is_all_or_nothing_and_keeps_the_users_hooks() -> None:
    weights = [nn.Parameter(torch.full((2, 2), float(i))) for i in range(3)]
    one = Muon([{"params": weights[:1]}, {"params": weights[1:]}], compile=False)
    two = Muon([{"params": weights[:2]}, {"params": weights[2:]}], compile=False)
    for weight in weights:
        one.state[weight]["momentum"].fill_(5.0)
    with pytest.raises(ValueError, match="parameter group"):
        two.load_state_dict(one.state_dict())
    assert not any(two.state[weight]["momentum"].any() for weight in weights)
    seen = []
    one.register_load_state_dict_pre_hook(lambda _, given: seen.append(len(given["state"])))
    one.register_load_state_dict_post_hook(
        lambda own: seen.append(float(own.state[weights[0]]["momentum"][0, 0]))
    )
    one.load_state_dict(one.state_dict())
    assert seen == [3, 5.0]
    with pytest.raises(ValueError, match="follow 'muon'; the loaded group follows None"):
        one.load_state_dict(torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}]).state_dict())


@pytest.mark.parametrize("algorithm", ["muon", "dion", "adamw", "lion"])
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32, torch.float64, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_pair_of_dtypes(algorithm: str, state_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.eye(4, 3, dtype=dtype))
    group = {"params": [("w", weight)], "algorithm": algorithm}
    optimizer = (Dion if algorithm == "dion" else Muon)([group], momentum_dtype=state_dtype, compile=False)
    weight.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.detach().clone()
    optimizer.step()
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)
    for key, value in optimizer.state[weight].items():
        assert key == "step" or value.dtype == (state_dtype or dtype)


def test_parameters_of_several_dtypes_in_one_group() -> None:
    weights = [
        nn.Parameter(torch.eye(3, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ]
    optimizer = Muon(weights, compile=False)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all((weight != torch.eye(3, dtype=weight.dtype)).any() for weight in weights)


@pytest.mark.parametrize("exponent", [-25, 25])
@pytest.mark.parametrize("algorithm", ["muon", "dion"])
def test_sizes_that_float32_cannot_square(algorithm: str, exponent: int) -> None:
    """The update does not change with the size of the gradient, epsilon aside."""
    updates = []
    for size in (1.0, 10.0**exponent):
        weight = nn.Parameter(torch.zeros(4, 3))
        group = {"params": [("w", weight)], "algorithm": algorithm, "epsilon": 1e-37}
        optimizer = (Dion if algorithm == "dion" else Muon)([group], compile=False)
        weight.grad = size * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        updates.append(weight.detach())
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-4, atol=1e-6)


def test_huge_finite_gradients_are_no_fault() -> None:
    weight = nn.Parameter(torch.zeros(100, 100))
    weight.grad = torch.full((100, 100), 1e36)
    Muon([weight], compile=False).step()
    assert weight.any()


def test_tensor_lr_decays_as_a_float_does() -> None:
    results = []
    for lr in (3e-4, torch.tensor([3e-4], dtype=torch.float64), torch.tensor(3e-4, dtype=torch.float64)):
        weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        weight.grad = torch.zeros_like(weight)
        Muon([weight], lr=lr, weight_decay=1e-5, compile=False).step()
        results.append(weight.detach())
    assert all(torch.equal(one, results[0]) for one in results)
    assert results[0][0, 0] == 1 - 3e-9


def test_names_that_differ_by_a_wrapper_only_are_refused() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    class Outer(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.module = Inner()
            self._orig_mod = Inner()

    with pytest.raises(ValueError, match="same name"):
        param_groups(Outer())
    del (outer := Outer())._orig_mod
    assert [name for name, _ in param_groups(outer)[0]["params"]] == ["weight", "module.weight"]
