"""The planner against the engine, against the published formulas, and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from typer.testing import CliRunner

from conformance.cli import app
from conformance.plan.counting import fake_mesh, launched
from conformance.plan.estimate import candidate, estimates
from conformance.plan.hardware import h100
from conformance.plan.models import (
    PRESETS,
    Model,
    Weight,
    from_config,
    from_hugging_face,
    from_module,
    model_of,
)
from dion_dtensor import Dion, audit
from dion_dtensor.layout import inner_first
from dion_dtensor.planning import Bucket, Cost, choose, duration, predict, usual_hardware, ways

SHAPE, NUMBER = (1024, 4096), 48
MESHES: dict[str, tuple[tuple[int, ...], tuple[Placement, ...], tuple[int | None, ...]]] = {
    "fsdp": ((4,), (Shard(0),), (0,)),
    "columns": ((4,), (Shard(1),), (1,)),
    "fsdp x tp": ((2, 4), (Shard(0), Shard(1)), (0, 1)),
    "nested": ((2, 4), (_StridedShard(0, split_factor=4), Shard(0)), (0, 0)),
    "hsdp": ((2, 4), (Replicate(), Shard(0)), (None, 0)),
    "4096 ranks": ((8, 64, 8), (Replicate(), Shard(0), Shard(1)), (None, 0, 1)),
}
# Torch gathers such a shard by a way of its own, so this is for what is exchanged.
CUT_BY_ANOTHER = {"cut": ((8, 2, 4), (_StridedShard(1, split_factor=2), Shard(1), Shard(1)), (1, 1, 1))}
HYPER: dict[str, dict[str, Any]] = {
    "muon": {},
    "normuon": {},
    "dion": {"rank_fraction": 0.25},
    "dion2": {"fraction": 0.25},
    "dion3": {"fraction": 0.25},
}


def bucket_on(mesh: str, shape: tuple[int, int] = SHAPE, number: int = NUMBER) -> Bucket:
    sizes, placements, shards = (MESHES | CUT_BY_ANOTHER)[mesh]
    return Bucket(shape, number, sizes, shards, order=inner_first(sizes, placements))


def counted(
    mesh: str, algorithm: str, way: str, shape: tuple[int, int] = SHAPE, number: int = NUMBER
) -> Cost:
    hyper = dict(HYPER[algorithm])
    if algorithm == "dion":
        hyper |= {"path": "assemble" if way == "assemble" else "low_rank"}
        hyper |= {"orthonormalize": "rcqr" if way == "rcqr" else "qr"}
    elif algorithm != "normuon":
        hyper["path"] = way
    sizes, placements, _ = (MESHES | CUT_BY_ANOTHER)[mesh]
    with fake_mesh(sizes, ("a", "b", "c")[: len(sizes)]) as made:
        return launched(made, placements, shape, number, algorithm, hyper).cost


@pytest.mark.parametrize("algorithm", HYPER)
@pytest.mark.parametrize(
    ("mesh", "number"),
    [
        *((mesh, NUMBER) for mesh in MESHES),
        ("nested", 2),
        ("fsdp x tp", 3),
        ("4096 ranks", 2),
        ("4096 ranks", 16),
        ("4096 ranks", 100),
    ],
)
def test_closed_forms_are_what_is_counted(mesh: str, algorithm: str, number: int) -> None:
    """On each axis; where there are few matrices, some axes gather what others exchange."""
    for shape in (SHAPE, SHAPE[::-1]):
        bucket = bucket_on(mesh, shape, number)
        for way in ways(bucket, algorithm):
            found, closed = (
                counted(mesh, algorithm, way, shape, number),
                predict(bucket, algorithm, way, _part(algorithm)),
            )
            for axis in range(len(bucket.sizes)):
                assert closed.bytes(axis) == pytest.approx(found.bytes(axis), rel=0.1), (way, shape, axis)
            assert sum(closed.flops.values()) == pytest.approx(sum(found.flops.values()), rel=0.1), (
                way,
                shape,
            )


def test_a_strided_shard_that_another_one_cuts_is_undone_after_it() -> None:
    bucket = bucket_on("cut")
    assert bucket.order == (2, 0, 1)
    sent = predict(bucket, "muon", "assemble").transfers
    assert [(one.axis, one.bytes) for one in sent] == [
        (one.axis, pytest.approx(one.bytes, rel=0.01)) for one in counted("cut", "muon", "assemble").transfers
    ]
    assert [one.axis for one in sent] == [2, 0, 1, 1, 0, 2]


@pytest.mark.parametrize("algorithm", HYPER)
@pytest.mark.parametrize(("number", "most"), [(2, 1), (16, 1), (64, 1), (100, 1), (513, 2)])
def test_ranks_share_matrices_that_are_fewer_than_they_are(algorithm: str, number: int, most: int) -> None:
    """On 64 x 8 ranks none multiplies more than its share; below 32 matrices each once did the work of all."""
    sizes, placements = (64, 8), (Shard(0), Shard(1))
    hyper = HYPER[algorithm] | ({"path": "assemble"} if algorithm == "dion" else {})
    with fake_mesh(sizes, ("a", "b")) as mesh:
        cost = launched(mesh, placements, SHAPE, number, algorithm, hyper).cost
        alone = launched(mesh, placements, SHAPE, 1, algorithm, hyper).cost
    assert cost.flops == {dtype: most * flops for dtype, flops in alone.flops.items()}


def _part(algorithm: str) -> float:
    return 1.0 if algorithm in ("muon", "normuon") else 0.25


@pytest.mark.parametrize("mesh", ["fsdp", "columns", "fsdp x tp", "nested"])
def test_muon_sends_its_shard_twice(mesh: str) -> None:
    """Each rank sends mn/FS numbers of bfloat16 a matrix, twice: see microsoft/dion, README; here by axis."""
    sizes = MESHES[mesh][0]
    ranks = torch.tensor(sizes).prod().item()
    shard = NUMBER * SHAPE[0] * SHAPE[1] / ranks * 2
    formula = 2 * sum(shard * (size - 1) / size for size in sizes)
    assert counted(mesh, "muon", "assemble").bytes() <= 1.1 * formula


@pytest.mark.parametrize("mesh", MESHES)
def test_chosen_rows_send_their_fraction(mesh: str) -> None:
    """Whichever dim is sharded."""
    for algorithm in ("dion2", "dion3"):
        way = ways(bucket_on(mesh), algorithm)[0]
        assert (
            counted(mesh, algorithm, way).bytes() <= 1.25 * 0.25 * counted(mesh, "muon", "assemble").bytes()
        )


def test_the_cheaper_way_is_taken() -> None:
    long = Bucket((16384, 16384), 126, (16, 64, 8), (None, 0, 0))
    short = Bucket((4096, 4096), 8, (2,), (0,))
    found = {}
    for name, bucket in (("long", long), ("short", short)):
        hardware = usual_hardware(len(bucket.sizes))
        choice = choose(bucket, "dion", hardware, fraction=1 / 64, among=("low_rank", "assemble"))
        times = {
            way: duration(predict(bucket, "dion", way, 1 / 64), hardware).serial
            for way in ("low_rank", "assemble")
        }
        assert choice.way == min(times, key=lambda way: times[way])
        assert all(way in choice.why for way in times)
        found[name] = choice.way
    assert found == {"long": "assemble", "short": "low_rank"}


def test_replicas_may_average_low_rank_factors_in_place_of_gradients() -> None:
    """By (m + n) r numbers of each matrix, summed over the replicas, where a gradient has m n."""
    with fake_mesh((8,), ("dp",)) as mesh:
        place, hyper = (Replicate(),), {"rank_fraction": 1 / 16, "path": "low_rank"}
        cost = launched(mesh, place, SHAPE, NUMBER, "dion", hyper, pending=(0,)).cost
        with pytest.raises(ValueError, match="muon steps averaged gradients alone"):
            launched(mesh, place, SHAPE, NUMBER, "muon", pending=(0,))
    ring, (m, n) = 2 * 7 / 8, SHAPE
    assert cost.bytes() == pytest.approx(ring * 4 * NUMBER * (m + n) * m / 16, rel=0.01)
    weight = Weight("w", SHAPE, NUMBER)
    chosen = [candidate(text) for text in ("adamw", "dion:1/16", "dion:1/16:unaveraged")]
    model = Model("m", (weight,), 1000)
    with_, without = (
        estimates(model, (8,), ("dp",), chosen, h100((8,), 0.6), gradients=gradients)
        for gradients in (True, False)
    )
    averages = [a.cost.bytes() - b.cost.bytes() for a, b in zip(with_, without, strict=True)]
    scalars = ring * 4 * 1000
    assert averages == pytest.approx([scalars + ring * 4 * NUMBER * m * n] * 2 + [scalars])


def test_the_audit_says_what_was_taken_and_why() -> None:
    with fake_mesh((4,), ("fsdp",)) as mesh:
        local = torch.empty(1024, 4096, device="meta")
        weight = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))
        rows = {
            path: audit(Dion([("w", weight)], path=path, compile=False)).rows[0]
            for path in ("auto", "low_rank")
        }
    assert "MB sent" in rows["auto"].choice
    assert "assemble" in rows["auto"].choice
    assert rows["low_rank"].way == "P assembled"
    assert "not asked for" in rows["low_rank"].choice


def test_presets_have_the_published_sizes() -> None:
    published = {"llama3-8b": 8.03e9, "llama3-70b": 70.6e9, "llama3-405b": 406e9, "mixtral-8x7b": 46.7e9}
    for name, size in published.items():
        assert from_config(name, PRESETS[name]).size == pytest.approx(size, rel=0.01)


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "intermediate_size": 96,
}
CONFIGS: list[dict[str, Any]] = [
    {"model_type": "llama", "num_key_value_heads": 2},
    {"model_type": "gpt_neox"},  # ungated, fused QKV
    {"model_type": "mixtral", "num_local_experts": 4, "num_key_value_heads": 2},
    # Attention of low rank, shared experts, and a first layer without.
    {"model_type": "deepseek_v3", "n_routed_experts": 8, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
     "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
     "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
def test_a_config_of_hugging_face_is_the_model_it_builds(config: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fields = SMALL | config
    made = transformers.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(made)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(fields))
    assert model_of(str(file)).size == sum(parameter.numel() for parameter in module.parameters())


def test_without_transformers_another_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert from_hugging_face(SMALL | CONFIGS[0]).size > 0
    with pytest.raises(ValueError, match="install transformers"):
        from_hugging_face(SMALL | CONFIGS[-1])


def test_a_module_on_the_meta_device() -> None:
    with torch.device("meta"):
        block = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 8), nn.LayerNorm(8))
        made = from_module("block", nn.ModuleDict({"one": block, "out_proj": nn.Linear(8, 8)}))
    assert {(w.shape, w.count, w.row_parallel) for w in made.weights} == {
        ((24, 8), 1, False),
        ((8, 24), 1, False),
        ((8, 8), 1, True),
    }
    assert made.scalars == 24 + 8 + 16 + 8
    assert model_of("torch.nn:Transformer").size > 40e6


def test_the_command(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "hidden_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "intermediate_size": 128,
                "vocab_size": 100,
            }
        )
    )
    numbers, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = [
        "plan",
        "--model",
        str(config),
        "--mesh",
        "2x4",
        "--json",
        str(numbers),
        "--picture",
        str(picture),
    ]
    result = CliRunner().invoke(
        app, [*arguments, *("--optimizer", "adamw"), *("--optimizer", "muon"), *("--optimizer", "dion:1/4")]
    )
    assert result.exit_code == 0, result.output
    assert "in turn: one after the other; overlapped: at once" in " ".join(result.output.split())
    rows = json.loads(numbers.read_text())["optimizers"]
    assert [row["optimizer"] for row in rows] == ["AdamW", "Muon", "Dion 1/4"]
    assert rows[0]["bytes"] == {"fsdp": {}, "tp": {}}
    assert set(rows[1]["bytes"]["tp"]) <= {"all_to_all", "all_gather"}
    assert picture.stat().st_size > 10_000
    here = ["--mesh", "1", "--hardware", "here", "--optimizer", "muon", "--model", str(config)]
    assert CliRunner().invoke(app, ["plan", *here, "--json", str(numbers)]).exit_code == 0
    measured = json.loads(numbers.read_text())
    assert measured["hardware"]["source"].startswith("measured: ")
    assert measured["optimizers"][0]["bytes"] == {"fsdp": {}}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "nothing"],
        ["--model", "no.module:here"],
        ["--model", "absent.json"],
        ["--mesh", "0x4"],
        ["--mesh", "2x2x2x2"],
        ["--mesh", "2x4", "--axes", "fsdp"],
        ["--optimizer", "sgd"],
        ["--hardware", "abacus"],
        ["--optimizer", "dion:2"],
        ["--optimizer", "dion:x"],
        ["--optimizer", "dion2:1/4:unaveraged"],
        ["--optimizer", "dion:1/4:late"],
        ["--mesh", "2x4", "--bandwidth", "1e9"],
    ],
)
def test_bad_input_is_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_model_of_a_module_in_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lying_here.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Linear(32, 16)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    arguments = ["plan", "--model", "lying_here:build", "--mesh", "2", "--optimizer", "muon"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "lying_here:build" in result.output
