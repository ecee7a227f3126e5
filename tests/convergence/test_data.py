"""Texts and images."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from conformance.convergence.data import find_images, find_text, largest_text
from conformance.convergence.workloads import Spec, load


def test_the_text_that_ships_is_always_there() -> None:
    text = find_text("new-testament")
    assert text.symbols.numel() == 974298
    assert text.symbols.max() + 1 == text.vocabulary < 100
    assert largest_text() in ("shakespeare", "king-james", "new-testament")


def test_an_unknown_text_is_named() -> None:
    with pytest.raises(ValueError, match="koran"):
        find_text("koran")


def test_a_file_of_ones_own_is_a_text(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("àb\nàc", encoding="utf-8")
    text = find_text(str(file))
    assert text.symbols.tolist() == [3, 1, 0, 3, 2]
    assert text.name == "own.txt"


def test_held_out_text_is_never_trained_on() -> None:
    workload = load(Spec(width=32, layers=1, length=16, data="new-testament"))
    text = find_text("new-testament").symbols
    split = text.numel() * 9 // 10
    inputs, targets = workload.held_out
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    rest = "".join(map(chr, text[split:].tolist()))
    assert all("".join(map(chr, line.tolist())) in rest for line in inputs[:20])
    train = "".join(map(chr, text[:split].tolist()))
    assert all("".join(map(chr, line.tolist())) in train for line in workload.batch(0, 0, 20)[0])


def test_fashion_mnist_is_read_from_its_files(tmp_path: Path) -> None:
    for kind, count in (("train", 5), ("t10k", 3)):
        pixels = bytes(16) + bytes(range(256)) * (count * 784 // 256 + 1)
        (tmp_path / f"{kind}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pixels[: 16 + count * 784]))
        (tmp_path / f"{kind}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes(range(count))))
    images = find_images(str(tmp_path))
    assert images.train.shape == (5, 28, 28)
    assert images.test_labels.tolist() == [0, 1, 2]
    assert images.train[0, 0, 10] == pytest.approx(10 / 255)


def test_digits_are_split_once() -> None:
    pytest.importorskip("sklearn")
    images = find_images("digits")
    assert images.train.shape[0] + images.test.shape[0] == 1797
    assert set(images.train_labels.tolist()) == set(range(10))
