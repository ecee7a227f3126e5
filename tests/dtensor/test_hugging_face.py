"""Parameters of Hugging Face's models, sorted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dion_dtensor import Muon, audit, param_groups

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "bos_token_id": 0, "eos_token_id": 0}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    # model: its config, sizes, and what becomes of parameters that are easily mistaken
    "GPT2LMHeadModel": (
        "GPT2Config",
        GPT2,
        {
            "transformer.wpe.weight": "embedding",
            "transformer.h.0.attn.c_attn.weight": "1 of 192x64",
            "transformer.h.1.mlp.c_proj.weight": "1 of 64x256",
        },
    ),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED, {"lm_head.weight": "output head"}),
    "MixtralForCausalLM": (
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4},
        {"model.layers.0.mlp.experts.gate_up_proj": "4 of 192x64"},
    ),
    "GptOssForCausalLM": (
        "GptOssConfig",
        {**GROUPED, "num_local_experts": 4, "head_dim": 16},
        {
            "model.layers.0.mlp.experts.down_proj_bias": "no matrix, by its name",
            "model.layers.0.mlp.experts.down_proj": "4 of 64x96",
            "model.layers.1.mlp.experts.gate_up_proj": "4 of 192x64",
        },
    ),
    "Llama4ForCausalLM": (
        "Llama4TextConfig",
        {**GROUPED, "num_local_experts": 4, "intermediate_size_mlp": 96, "head_dim": 16},
        {
            "model.layers.0.feed_forward.experts.down_proj": "4 of 64x96",
            "model.layers.0.feed_forward.experts.gate_up_proj": "4 of 192x64",
        },
    ),
    "DbrxForCausalLM": (
        "DbrxConfig",
        {
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 4,
            "vocab_size": 100,
            "attn_config": {"rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "hidden_size": 64},
        },
        {
            "transformer.blocks.0.ffn.experts.mlp.w1": "matrix; of several? see split",
            "transformer.blocks.0.ffn.router.layer.weight": "matrix",
        },
    ),
    "BertForSequenceClassification": ("BertConfig", SIZES, {"classifier.weight": "output head"}),
    "BertForQuestionAnswering": (
        "BertConfig",
        SIZES,
        {"qa_outputs.weight": "output head", "bert.encoder.layer.0.output.dense.weight": "matrix"},
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 100},
        {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "embedding"},
    ),
    "ViTForImageClassification": (
        "ViTConfig",
        {**SIZES, "image_size": 32, "patch_size": 8},
        {"vit.embeddings.cls_token": "embedding", "vit.embeddings.position_embeddings": "embedding"},
    ),
    "MambaForCausalLM": (
        "MambaConfig",
        SIZES,
        {
            "backbone.layers.0.mixer.A_log": "no matrix, by its name",
            "backbone.layers.0.mixer.conv1d.weight": "depthwise convolution, a vector for each channel",
        },
    ),
    "ZambaForCausalLM": (
        "ZambaConfig",
        {**SIZES, "num_hidden_layers": 10, "mamba_dt_rank": 4, "n_mamba_heads": 2},
        {
            "model.layers.0.mamba.D": "no matrix, by its name",
            "model.layers.0.mamba.x_proj_weight": "2 of 36x64",
        },
    ),
    "XLNetLMHeadModel": (
        "XLNetConfig",
        {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "vocab_size": 100},
        {
            "transformer.layer.0.rel_attn.q": "1 of 64x64",
            "transformer.layer.0.rel_attn.r_w_bias": "no matrix, by its name",
        },
    ),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models_are_claimed_whole(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config, sizes, expected = HUGGING_FACE[name]
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config)(**sizes))
    optimizer = Muon(param_groups(model), compile=False)
    rows = {row.name: row for row in audit(optimizer, strict=True).rows}
    assert sorted(rows) == sorted(parameter for parameter, _ in model.named_parameters())
    for parameter, what in expected.items():
        assert what in (rows[parameter].matrices, rows[parameter].why), parameter
    # What is left to AdamW is a small part of a layer.
    assert all(
        row.rule == "muon" for row in rows.values() if row.name.endswith(("proj.weight", "dense.weight"))
    )
