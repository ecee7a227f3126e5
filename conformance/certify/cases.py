"""A case: something the oracle computes, and what it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from conformance.certify.output import Output
from conformance.certify.precise import from_tensor


@dataclass(frozen=True)
class Grade:
    """One output of one step: its error in units of eps times condition number; inf if the oracle raised."""

    output: str
    units: float


class Case(Protocol):
    """What the runner needs."""

    id: str
    group: str

    def grades(self, *, first_step_only: bool = False) -> Iterator[Grade]:
        """Run the oracle and compare; the mutants look at first steps only."""
        ...


def compare(outputs: Sequence[Output], actual: Mapping[str, Tensor], label: str) -> Iterator[Grade]:
    """Grade every output against the tensor of its name."""
    for output in outputs:
        yield Grade(f"{label}{output.name}", output.units(actual[output.name]))


@dataclass(eq=False)
class PrimitiveCase:
    """One call of a function of the oracle.

    Args:
        id: unique.
        group: the row of the table.
        expected: the outputs at 50 digits; evaluated once.
        actual: the oracle's tensors, by the names of the outputs.
    """

    id: str
    group: str
    expected: Callable[[], list[Output]]
    actual: Callable[[], dict[str, Tensor]]
    _known: list[Output] | None = field(default=None, repr=False)

    def grades(self, *, first_step_only: bool = False) -> Iterator[Grade]:
        """Compare all outputs."""
        if self._known is None:
            self._known = self.expected()
        yield from compare(self._known, self.actual(), "")


def whole(values: Sequence[int], name: str) -> Output:
    """An output of whole numbers, where a difference of 1 is 1/eps units."""
    return Output(name, from_tensor(torch.tensor([float(v) for v in values], dtype=torch.float64)), 1)
