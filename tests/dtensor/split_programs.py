"""Steps of parameters that are cut into logical matrices, on a layout or on one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from conformance.process_groups import whole
from tests.dtensor.layouts import Layout, build_mesh, lay_out
from tests.dtensor.programs import OPTIMIZERS, OWN

# Sizes that shard boundaries of two, three and four ranks cut in the middle of a block.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "rows(9, 5, 5)": (19, 10),
    "columns(9, 5, 5)": (10, 19),
    "heads(4)": (12, 10),
    "interleaved_rows((3, 1, 1), 3)": (15, 6),
    "interleaved_rows((3, 2, 1), 2, True)": (12, 7),
    # Higher than wide, where Dion2 chooses columns; the first and the last have both kinds.
    "rows(13, 3, 4)": (20, 6),
    "heads(2)": (14, 4),
    "rows(3, 2)": (5, 2),
    "columns(8, 3)": (5, 11),
    "experts": (5, 6, 8),
    "experts(rows(5, 3))": (5, 8, 6),
    "experts(heads(2))": (5, 8, 3),
    "experts(columns(7))": (5, 6, 7),
    "experts(interleaved_columns((1, 1), 4))": (3, 6, 8),
    "flatten": (7, 3, 2, 3),
    "flatten(heads(4))": (12, 2, 2, 2),
    "flatten(rows(5, 3))": (8, 3, 3),
    "flatten(interleaved_rows((9, 2, 2), 2))": (26, 3, 2, 2),
}


def tensors(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def split_steps(
    name: str, split: str, layout: Layout | None, options: dict[str, Any], steps: int = 2
) -> dict[str, list[Tensor]] | None:
    """Two parameters of one split: full weights and state after ``steps``."""
    mesh: DeviceMesh | None = None if layout is None else build_mesh(layout)
    if mesh is not None and mesh.get_coordinate() is None:
        return None
    shape = SHAPES[split]
    drawn = tensors(shape, 2 * (steps + 1))

    def laid(tensor: Tensor) -> Tensor:
        return tensor.clone() if mesh is None or layout is None else lay_out(tensor, layout, mesh)

    parameters = [torch.nn.Parameter(laid(weight)) for weight in drawn[:2]]
    named = list(zip(("first", "second"), parameters, strict=True))
    group = {"params": named, "algorithm": "dion" if name == "orth_dion" else name, "split": split}
    own = {"rank_fraction": 0.5, "path": "low_rank"} if "dion" in name and name[-1] == "n" else {}
    optimizer = OPTIMIZERS[name]([group], lr=0.05, weight_decay=0.1, **(OWN.get(name, {}) | own | options))
    for step in range(steps):
        for index, parameter in enumerate(parameters):
            parameter.grad = laid(drawn[2 * (step + 1) + index])
        optimizer.step()
    result = {"weight": [whole(parameter) for parameter in parameters]}
    for key in optimizer.state[parameters[0]]:
        result[key] = [whole(optimizer.state[parameter][key]) for parameter in parameters]
    return result
