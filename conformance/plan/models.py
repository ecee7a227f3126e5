"""What a model's optimizer has to step: matrices by shape, and the elements that follow the scalar rule."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conformance.named import named_function

__all__ = ["PRESETS", "Model", "Weight", "from_config", "from_hugging_face", "from_module", "model_of"]

ROW_PARALLEL = ("o_proj", "down_proj", "c_proj", "out_proj", "wo", "w2", "fc2", "dense_4h_to_h")
"""Last parts of the names of weights that tensor parallelism shards along their columns."""


LLAMA_LIKE = ("llama", "mistral", "mixtral", "qwen2", "qwen3")
"""Values of ``model_type`` that :func:`from_config` describes."""


@dataclass(frozen=True)
class Weight:
    """Matrices of one shape that lie alike.

    Attributes:
        name: of the first.
        shape: rows (outputs) and columns (inputs).
        count: of matrices.
        row_parallel: whether tensor parallelism shards the columns, not the rows.
    """

    name: str
    shape: tuple[int, int]
    count: int
    row_parallel: bool = False


@dataclass(frozen=True)
class Model:
    """A model by its weights.

    Attributes:
        name: for reports.
        weights: that follow the matrix rule.
        scalars: elements of embeddings, head, norms and biases, which follow AdamW.
    """

    name: str
    weights: tuple[Weight, ...]
    scalars: int

    @property
    def size(self) -> int:
        """Parameters in all."""
        return self.scalars + sum(w.count * w.shape[0] * w.shape[1] for w in self.weights)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The recipe of microsoft/dion: 12 layers of width 768.
    "gpt-160m": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "intermediate_size": 3072,
        "vocab_size": 50304,
        "gated": False,
    },
    # Llama 3, arXiv 2407.21783, table 3.
    "llama3-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    "llama3-70b": {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 128256,
    },
    "llama3-405b": {
        "hidden_size": 16384,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "intermediate_size": 53248,
        "vocab_size": 128256,
    },
    # Mixtral of experts, arXiv 2401.04088, table 1.
    "mixtral-8x7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "num_local_experts": 8,
    },
}
"""Fields as in a Hugging Face config."""


def model_of(text: str) -> Model:
    """A preset's name, a Hugging Face ``config.json``, or ``package.module:function`` that builds an ``nn.Module``.

    Raises:
        ValueError: none of these, or a config that lacks a field.
    """
    if text in PRESETS:
        return from_config(text, PRESETS[text])
    if text.endswith(".json"):
        try:
            config = json.loads(Path(text).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"model {text!r} cannot be read: {error}") from error
        return from_hugging_face(config) if "model_type" in config else from_config(Path(text).stem, config)
    if ":" in text:
        build = named_function("model", text)
        with torch.device("meta"):
            return from_module(text, build())
    raise ValueError(
        f"model {text!r} is no preset ({', '.join(PRESETS)}), no .json file and no module:function"
    )


def from_hugging_face(config: Mapping[str, Any]) -> Model:
    """The model that transformers builds from ``config`` on the meta device.

    Raises:
        ValueError: an architecture that transformers does not know; or it is not installed, and the architecture is
            none of :data:`LLAMA_LIKE`.
    """
    kind = str(config["model_type"])
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        if kind in LLAMA_LIKE:
            return from_config(kind, config)
        raise ValueError(
            f"model_type={kind!r} is not of the Llama family ({', '.join(LLAMA_LIKE)}): install transformers"
        ) from None
    fields = {key: value for key, value in config.items() if key != "model_type"}
    try:
        made = AutoConfig.for_model(kind, **fields)
        build: Callable[..., nn.Module] = AutoModelForCausalLM.from_config
        with torch.device("meta"):
            module = build(made)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"transformers cannot build model_type={kind!r}: {error}") from error
    return from_module(kind, module)


def from_config(name: str, config: Mapping[str, Any]) -> Model:
    """A decoder of the Llama family: q, k, v, o, and a gated MLP (an ungated one with ``gated`` false), or experts.

    Raises:
        ValueError: a field is missing.
    """
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if missing := [field for field in needed if not config.get(field)]:
        raise ValueError(f"the config of {name} lacks {', '.join(missing)}")
    d, layers, heads, _, vocabulary = (int(config[field]) for field in needed)
    hidden = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    head = int(config.get("head_dim") or d // heads)
    key = head * int(config.get("num_key_value_heads") or heads)
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 1)
    gates = 2 if config.get("gated", True) else 1
    weights = [
        Weight("q_proj", (heads * head, d), layers),
        Weight("k_proj", (key, d), 2 * layers),
        Weight("o_proj", (d, heads * head), layers, row_parallel=True),
        Weight("up_proj", (hidden, d), gates * layers * experts),
        Weight("down_proj", (d, hidden), layers * experts, row_parallel=True),
    ]
    router = layers * experts * d if experts > 1 else 0
    tables = 1 if config.get("tie_word_embeddings") else 2
    return Model(name, tuple(weights), tables * vocabulary * d + (2 * layers + 1) * d + router)


def from_module(name: str, module: nn.Module) -> Model:
    """Sorted as ``dion_dtensor.param_groups`` sorts; row-parallel weights by the last part of their names.

    Raises:
        ValueError: no matrix.
    """
    from dion_dtensor import param_groups

    found: Counter[tuple[tuple[int, int], bool]] = Counter()
    names: dict[tuple[tuple[int, int], bool], str] = {}
    scalars = 0
    for group in param_groups(module, algorithm="muon"):
        for full, parameter in group["params"]:
            if group["algorithm"] != "muon":
                scalars += parameter.numel()
                continue
            # A convolution is flattened; of a stack of experts each is a matrix of its own.
            experts = parameter.shape[0] if parameter.ndim == 3 else 1
            rows = parameter.shape[parameter.ndim - 2] if parameter.ndim == 3 else parameter.shape[0]
            shape = (rows, parameter.numel() // (rows * experts))
            key = (shape, full.removesuffix(".weight").rpartition(".")[2] in ROW_PARALLEL)
            found[key] += experts
            names.setdefault(key, full)
    if not found:
        raise ValueError(f"model {name!r} has no matrix for an orthonormal rule")
    weights = [Weight(names[key], key[0], count, key[1]) for key, count in found.items()]
    return Model(name, tuple(weights), scalars)
