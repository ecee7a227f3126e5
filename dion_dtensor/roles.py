"""What modules say of their parameters: which are embeddings, heads, convolutions, or stored as ``[in, out]``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

from dion_dtensor.state import WRAPPER_PREFIXES, without_wrappers

__all__ = [
    "BY_HEADS",
    "CONVOLUTIONS",
    "CONVOLUTIONS_IN_BY_OUT",
    "CUT_AS_ASKED",
    "EMPTY",
    "EXPECTED",
    "EXPERTS_IN_BY_OUT",
    "INTERLEAVED",
    "IN_BY_OUT",
    "IN_GROUPS",
    "NO_STACK",
    "may_hold_several",
    "plain_names",
    "roles",
    "rows_of_experts",
]

# Of modules whose last Linear is a head.
HEADS = ("head", "lm_head", "classification_head", "embed_out", "qa_outputs")
TOP_HEADS = ("output", "classifier", "heads", "fc", "score")
# Of a Linear at the top of a model.
TOP_LAYERS = (
    "decoder",
    "generator",
    "logits",
    "output_layer",
    "output_projection",
    "readout",
    "to_logits",
    "unembed",
)
# Of a Linear that is a head itself.
LAYERS = re.compile(
    r"(^|_)(head|classifier)$|^(cls_score|bbox_pred|class_embed|class_predictor|seq_relationship)$"
)
# Of a Sequential that ends in a head, or of a convolution that is one; but not of the last but one of EfficientNets.
ENDS_A_MODEL = re.compile(r"(?<!conv)(^|_)(head|classifier)$")
# A model as an attribute of another module: of a LightningModule, of a wrapper.
HELD = ("model", "net", "network", "module", "base_model")
# Of what PEFT trains beside its adapters: the name of an adapter follows.
TRAINED_BESIDE = re.compile(r"modules_to_save\.[^.]+\.")
# Parameters that a module holds itself: a table of positions, a class token, learned queries.
TABLE = re.compile(
    r"(^|_)(pos|position|positional|token|tokens|embed|embedding|embeddings|latent|latents|pointer|prompt|prompts"
    r"|table|register|registers|codebook)(_|$)"
)
# Of a weight that often holds several matrices.
FUSED = re.compile(
    r"(^|[._])(in_proj_weight|c_attn|w?qkv|qkv_proj|query_key_value|gate_up(_proj)?|fc1_gate|weight_[ih]h)(\.|_|$)",
    re.I,
)
# Of one that is alone in a module called so, as torchtitan's qkv_linear.wq.
ALONE = re.compile(r"\.(w?[qkv](_proj)?|query|key|value)\.weight$")
# Biases of experts (also with their dims behind, as in torchtitan) and of attention, scales of norms by head, decay
# rates of state-space models, frequencies, learned queries; but not what is called a weight all the same.
NO_MATRIX = re.compile(
    r"^(?![wW]_)(.*_)?((bias|biases)(_\w+)?|scale|scales|gain|alpha|beta|gamma|log|freqs|queries)$(?<!weight)(?<!proj)"
)
# Attributes of a module that say how many experts its weights are of.
EXPERT_COUNTS = ("num_experts", "moe_num_experts", "num_local_experts", "n_experts")
HEAD, HEAD_BY_SHAPE = "output head", "output head, by its shape"
CONVOLUTION, GROUPED = "convolution", "convolution in groups"
TRANSPOSED, TRANSPOSED_GROUPED = "transposed convolution", "transposed convolution in groups"
CONVOLUTIONS = (CONVOLUTION, GROUPED, TRANSPOSED, TRANSPOSED_GROUPED)
CONVOLUTIONS_IN_BY_OUT, IN_GROUPS = (TRANSPOSED, TRANSPOSED_GROUPED), (GROUPED, TRANSPOSED_GROUPED)
DEPTHWISE = "depthwise convolution, a vector for each channel"
BY_HEADS = "3-D, a matrix whose columns are those of heads"
IN_BY_OUT, EXPERTS_IN_BY_OUT = "stored as [in, out]", "experts stored as [in, out]"
INTERLEAVED = "experts stored as [in, out], gate and up interleaved"
NO_STACK, BY_NAME = "no stack of matrices", "no matrix, by its name"
MAGNITUDES, EMPTY, VECTOR = "magnitudes of a weight norm", "empty", "no matrix, by its shape"
CUT_AS_ASKED = (
    *CONVOLUTIONS,
    DEPTHWISE,
    BY_HEADS,
    BY_NAME,
    IN_BY_OUT,
    EXPERTS_IN_BY_OUT,
    INTERLEAVED,
)
EXPECTED = (
    DEPTHWISE,
    "embedding",
    HEAD,
    HEAD_BY_SHAPE,
    "excluded",
    NO_STACK,
    BY_NAME,
    VECTOR,
    MAGNITUDES,
    EMPTY,
)


def roles(model: nn.Module) -> dict[int, str]:
    """What a parameter is, by its id, where its module says so; embeddings last, since a tied head is one."""
    found: dict[int, str] = {}
    modules = dict(model.named_modules())
    names = without_wrappers([f"{name}." if name else "" for name in modules])
    given = [layer for module in modules.values() if (layer := _output_layer(module)) is not None]
    for name, module in zip(names, modules.values(), strict=True):
        *above, last = TRAINED_BESIDE.sub("", name).removesuffix(".").split(".")
        on_top = last in TOP_HEADS and all(part in HELD for part in above)
        if isinstance(module, nn.modules.conv._ConvNd):
            whole, grouped = (TRANSPOSED, TRANSPOSED_GROUPED) if module.transposed else (CONVOLUTION, GROUPED)
            kind = grouped if module.groups > 1 else whole
            alone = 1 < module.groups == module.in_channels == module.out_channels
            for weight in _weights(module):
                found.setdefault(id(weight), DEPTHWISE if alone else kind)  # unless a head ends with it
        if _is_conv1d(module):
            found.update({id(weight): IN_BY_OUT for weight in _weights(module)})
        elif isinstance(module, nn.Linear):
            at_top = last in TOP_LAYERS and all(part in HELD for part in above)
            if LAYERS.search(last) or last in HEADS or on_top or at_top:
                found.update({id(weight): HEAD for weight in _weights(module)})
        elif _is_pointwise(module):
            if ENDS_A_MODEL.search(last):
                found.update({id(weight): HEAD for weight in _weights(module)})
        elif _has_a_head(last, module, on_top, bool(given)) and (layer := _last_layer(module)) is not None:
            found.update({id(weight): HEAD for weight in _weights(layer)})
    for layer in given:
        found.update({id(weight): HEAD for weight in _weights(layer)})
    if HEAD not in found.values():
        found.update({id(weight): HEAD_BY_SHAPE for weight in _to_vocabulary(modules.values())})
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if (own := _own(module, name, parameter)) is not None:
                found[id(parameter)] = own
            elif parameter.ndim == 3 and _by_heads(*parameter.shape):
                found.setdefault(id(parameter), BY_HEADS)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):  # a parametrization holds the weight of some
            found.update({id(parameter): "embedding" for parameter in module.parameters()})
        elif _is_embedding(module):
            found.update({id(parameter): "embedding" for parameter in module.parameters(recurse=False)})
    return found


def _to_vocabulary(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The weight of the one Linear that has an output for each row of the largest embedding, and takes such rows."""
    every = list(modules)
    tables = [
        child
        for module in every
        for name, child in module.named_children()
        if isinstance(child, nn.Embedding)
        and child.num_embeddings > child.embedding_dim
        and not re.search("pos", name)
    ]
    if not tables:
        return []
    largest = max(tables, key=lambda table: table.num_embeddings)
    shape = (largest.num_embeddings, largest.embedding_dim)
    layers = [
        module
        for module in every
        if isinstance(module, nn.Linear) and (module.out_features, module.in_features) == shape
    ]
    return _weights(layers[0]) if len(layers) == 1 else []


def _own(module: nn.Module, name: str, parameter: Tensor) -> str | None:
    """What a parameter that ``module`` holds itself is, by its name and shape."""
    if name in ("weight_g", "original0") and parameter.numel() == max(parameter.shape, default=1):
        return MAGNITUDES
    if TABLE.search(name):
        return "embedding"
    skip = name == "D" and hasattr(module, "A_log")  # of a state-space model
    if parameter.ndim > 1 and (skip or NO_MATRIX.search(name)):
        return BY_NAME
    if parameter.ndim == 2 and 1 in parameter.shape and "weight" not in name and "original" not in name:
        return VECTOR
    if parameter.ndim == 3 and 1 not in parameter.shape and _experts_in_by_out(module):
        interleaved = "gate_up" in name and getattr(module, "is_concatenated", True) is False
        return INTERLEAVED if interleaved else EXPERTS_IN_BY_OUT
    return None


def may_hold_several(name: str) -> bool:
    """Whether a weight's name speaks of several matrices."""
    return FUSED.search(name) is not None and ALONE.search(name) is None


def rows_of_experts(model: nn.Module) -> set[int]:
    """The ids of weights ``[E k, n]`` that a module of E experts holds itself, as of DBRX and megablocks."""
    found = set()
    for module in model.modules():
        counts = [getattr(module, name, None) for name in EXPERT_COUNTS]
        for count in counts:
            if isinstance(count, int) and count > 1:
                for parameter in module.parameters(recurse=False):
                    rows, *columns = parameter.shape if parameter.ndim == 2 else (0,)
                    if rows > count and rows % count == 0 and columns != [count]:  # which is a router
                        found.add(id(parameter))
    return found


def _by_heads(width: int, heads: int, size: int) -> bool:
    """Whether a weight is ``[width, heads, width of a head]``, as of XLNet."""
    return width == heads * size and min(heads, size) > 1


def plain_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that they have without wrappers."""
    named = dict(model.named_parameters())
    plain = dict(zip(without_wrappers(list(named)), named.values(), strict=True))
    if len(plain) != len(named):
        raise ValueError(f"without {WRAPPER_PREFIXES} two parameters of the model have the same name")
    return plain


def _weights(module: nn.Module) -> list[Tensor]:
    """The parameters of the shape of a module's weight: itself, or what a weight or spectral norm makes it of."""
    lists = getattr(module, "parametrizations", {})
    own = lists["weight"].named_parameters() if "weight" in lists else module.named_parameters(recurse=False)
    return [
        one for name, one in own if name in ("weight", "weight_v", "weight_orig", "original", "original1")
    ]


def _output_layer(module: nn.Module) -> nn.Module | None:
    """The layer that makes a Hugging Face model's output, by its own word."""
    ask = getattr(module, "get_output_embeddings", None)
    try:
        layer = ask() if callable(ask) else None
    except (AttributeError, NotImplementedError):
        return None
    return layer if isinstance(layer, nn.Module) else None


def _has_a_head(name: str, module: nn.Module, on_top: bool, given: bool) -> bool:
    """Whether a module of several layers ends in an output head.

    Where a model names its output itself, other modules called so may be hidden (poolers, transforms).
    """
    if isinstance(module, nn.Sequential):
        return on_top or name in HEADS or ENDS_A_MODEL.search(name) is not None
    return on_top or (name in HEADS and not given)


def _last_layer(module: nn.Module) -> nn.Module | None:
    """The last Linear of a module; of a Sequential also its last convolution, if no layer follows."""
    every = [layer for layer in module.modules() if next(layer.parameters(recurse=False), None) is not None]
    if isinstance(module, nn.Sequential) and every and _is_pointwise(every[-1]):
        return every[-1]
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return layers[-1] if layers else None


def _is_pointwise(module: nn.Module) -> bool:
    """Whether it is a convolution that is a Linear at each place."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    return set(module.kernel_size) == {1} and module.groups == 1 and not module.transposed


def _is_embedding(module: nn.Module) -> bool:
    """Whether it is one by the name of its class, as of a quantized model."""
    named = any(kind.__name__.endswith("Embedding") for kind in type(module).__mro__)
    return named and isinstance(getattr(module, "weight", None), Tensor)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's, of GPT-2."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)  # fully_shard makes a subclass


def _experts_in_by_out(module: nn.Module) -> bool:
    """Whether a module's gate-up beside its down projection shows experts ``[E, in, out]``, or it says so itself."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if isinstance(up, Tensor) and isinstance(down, Tensor) and up.ndim == down.ndim == 3:
        return up.shape[1] == down.shape[2] and up.shape[2] == 2 * down.shape[1]
    return getattr(module, "is_transposed", False) is True  # as Hugging Face's say
