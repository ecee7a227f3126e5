"""What is trained: a character GPT, a vision transformer, a ResNet, or a student of a random teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from conformance.convergence.data import find_images, find_text, usual_images
from conformance.job.model import GPTShape, make_model

KINDS = ("gpt", "vit", "resnet", "teacher")
HELD_OUT_SEQUENCES = 256
HELD_OUT_IMAGES = 1000
HEADS_AND_INPUTS = ("head.weight", "heads.head.weight", "fc.weight", "conv1.weight", "conv_proj.weight")


@dataclass(frozen=True)
class Spec:
    """A workload by its numbers, so that a run can be stored under them.

    Attributes:
        kind: one of KINDS.
        width: of the model.
        layers: blocks, or convolution blocks a stage.
        length: characters of a sequence.
        heads: of the attention; 0 for one of 32 columns each.
        data: name of the text, folder of Fashion-MNIST or "digits"; empty for what is found, which a sweep names.
    """

    kind: str = "gpt"
    width: int = 64
    layers: int = 2
    length: int = 32
    heads: int = 0
    data: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"workload {self.kind!r} is unknown; choose from {', '.join(KINDS)}")

    @property
    def attention_heads(self) -> int:
        """How many heads the attention has."""
        return self.heads or max(1, self.width // 32)

    @property
    def unit(self) -> str:
        """Of the loss."""
        return "squared error" if self.kind == "teacher" else "nats"

    @property
    def title(self) -> str:
        """As reports print it."""
        names = {"gpt": "GPT", "vit": "vision transformer", "resnet": "ResNet", "teacher": "teacher-student"}
        return f"{names[self.kind]}, width {self.width}"


@dataclass(frozen=True, eq=False)
class Workload:
    """A task ready to be trained.

    Attributes:
        spec: its numbers.
        data: what it is trained on.
        model: a fresh model by seed: the same weights for the same seed.
        batch: `(seed, step, size)` to inputs and targets: the same for the same three numbers.
        held_out: inputs and targets that are never trained on.
        loss: mean loss of outputs against targets.
    """

    spec: Spec
    data: str
    model: Callable[[int], nn.Module]
    batch: Callable[[int, int, int], tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


def matrix_names(model: nn.Module) -> tuple[str, ...]:
    """The weights for the matrix rule: two dims or more, no embedding, no head, no first convolution."""
    embeddings = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    }
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2
        and name not in embeddings
        and name not in HEADS_AND_INPUTS
        and "pos_embedding" not in name
        and "class_token" not in name
    )


@functools.cache
def load(spec: Spec) -> Workload:
    """The workload of these numbers.

    Raises:
        FileNotFoundError: its data are not installed.
        ModuleNotFoundError: torchvision is needed and not installed.
    """
    return {"gpt": _gpt, "vit": _vision, "resnet": _vision, "teacher": _teacher}[spec.kind](spec)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over everything but the last dim, in float32."""
    return functional.cross_entropy(outputs.float().flatten(0, -2), targets.flatten())


def _gpt(spec: Spec) -> Workload:
    text = find_text(spec.data or None)
    split = text.symbols.numel() * 9 // 10
    train, rest = text.symbols[:split], text.symbols[split:]
    window = torch.arange(spec.length + 1)
    shape = GPTShape(text.vocabulary, spec.width, spec.layers, spec.attention_heads, spec.length)

    def cut(symbols: Tensor, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(symbols.numel() - spec.length, (size,), generator=generator)
        windows = symbols[starts[:, None] + window]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    return Workload(
        spec,
        text.name,
        lambda seed: make_model(shape, torch.float32, seed=seed),
        lambda seed, step, size: cut(train, _generator(seed, step), size),
        cut(rest, _generator(0, -1), HELD_OUT_SEQUENCES),
        cross_entropy,
    )


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)


def _vision(spec: Spec) -> Workload:
    images = find_images(spec.data or usual_images())
    side = images.train.shape[-1]
    make = _transformer if spec.kind == "vit" else _resnet

    def model(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make(spec, side)

    def batch(seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images.train), (size,), generator=_generator(seed, step))
        return _coloured(images.train[chosen]), images.train_labels[chosen]

    held_out = _coloured(images.test[:HELD_OUT_IMAGES]), images.test_labels[:HELD_OUT_IMAGES]
    return Workload(spec, images.name, model, batch, held_out, cross_entropy)


def _coloured(grey: Tensor) -> Tensor:
    """Three equal channels, as torchvision's models take them, centred."""
    return ((grey - 0.3) / 0.35)[:, None].expand(-1, 3, -1, -1)


def _transformer(spec: Spec, side: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    made = VisionTransformer(
        image_size=side,
        patch_size=side // 4,
        num_layers=spec.layers,
        num_heads=spec.attention_heads,
        hidden_dim=spec.width,
        mlp_dim=4 * spec.width,
        num_classes=10,
    )
    # torchvision starts the head at zero, where it says nothing to the body at the first step
    nn.init.normal_(made.heads.head.weight, std=spec.width**-0.5)
    transformer: nn.Module = made
    return transformer


def _resnet(spec: Spec, side: int) -> nn.Module:
    """The first two stages of torchvision's ResNet (64 and 128 channels): later ones would see single pixels."""
    from torchvision.models.resnet import BasicBlock, ResNet

    made: nn.Module = ResNet(BasicBlock, [spec.layers] * 4, num_classes=10)
    made.layer3, made.layer4 = nn.Identity(), nn.Identity()
    made.fc = nn.Linear(128, 10)
    if side < 16:
        made.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        made.maxpool = nn.Identity()
    return made


def _teacher(spec: Spec) -> Workload:
    """A two-layer student of a two-layer teacher; inputs whose variances fall by a power law."""
    width = spec.width
    generator = torch.Generator().manual_seed(7)
    first = torch.randn(width, width, generator=generator) / width**0.5
    second = torch.randn(width, width, generator=generator) / width**0.5
    deviations = torch.arange(1, width + 1).float() ** -0.5 * 2

    def draw(size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(size, width, generator=source) * deviations
        return inputs, torch.tanh(inputs @ first.mT) @ second.mT

    def model(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Linear(width, 2 * width),
                nn.Tanh(),
                nn.Linear(2 * width, 2 * width),
                nn.Tanh(),
                nn.Linear(2 * width, width),
            )

    return Workload(
        spec,
        "random teacher, input variances 4/k",
        model,
        lambda seed, step, size: draw(size, _generator(seed, step)),
        draw(2048, _generator(0, -1)),
        functional.mse_loss,
    )
