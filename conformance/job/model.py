"""A small byte-level GPT with a fused QKV and separate MLP weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class GPTShape:
    """Sizes of the model. Defaults: 0.86M parameters."""

    vocabulary: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4
    length: int = 64


class Attention(nn.Module):
    """Causal attention. Rows of `qkv` are ordered `[heads, 3, head width]`: a row block holds whole heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, length, width]` to the same; works on the heads that this rank's `qkv` yields."""
        fused = self.qkv(x).unflatten(-1, (-1, 3, self.head_width))
        q, k, v = (part.transpose(1, 2) for part in fused.unbind(-2))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(-2))
        return out


class MLP(nn.Module):
    """Two linear maps with GELU between: width to 4 width and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, length, width]` to the same."""
        out: Tensor = self.down(functional.gelu(self.up(x)))
        return out


class Block(nn.Module):
    """Pre-normalized attention and MLP, each added to the stream."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.attention = Attention(shape.width, shape.heads)
        self.mlp_norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.mlp = MLP(shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, length, width]` to the same."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class GPT(nn.Module):
    """Embedding, position embedding, blocks, norm, head; nothing tied, no biases."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Bytes `[batch, length]` (int64) to logits `[batch, length, vocabulary]`."""
        places = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.embedding(inputs) + self.position(places)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def make_model(shape: GPTShape, dtype: torch.dtype, *, seed: int = 0) -> GPT:
    """The model with the same initial weights on every rank and, up to rounding, in every dtype."""
    model = GPT(shape).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            deviation = 0.02 if "embedding" in name or "position" in name else parameter.shape[1] ** -0.5
            if name.endswith(("proj.weight", "down.weight")):
                deviation /= (2 * shape.layers) ** 0.5  # keeps the stream's size independent of depth
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * deviation
            )
    return model.to(dtype)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, 0-d, in float32 or the wider dtype of `logits`."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide.flatten(0, 1), targets.flatten())


def is_matrix(name: str) -> bool:
    """True for the weights that the matrix algorithm takes: those inside the blocks with two dims."""
    return name.startswith("blocks.") and not name.split(".")[-2].endswith("norm")
