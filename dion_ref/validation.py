"""Refuses bad input, and says what was given and what is needed."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from dion_ref.hyper import integer
from dion_ref.precision import Precision

SECOND_MOMENTS = ("variance", "exp_avg_sq")


def tensor(name: str, value: Any, precision: Precision, shape: tuple[int, ...] | None = None) -> None:
    """Check one tensor.

    Args:
        name: how messages call it.
        value: what was given.
        precision: ``value`` must have exactly ``precision.storage``.
        shape: the shape needed, or None for any.

    Raises:
        TypeError: ``precision`` is no Precision; not a plain dense tensor, or of another dtype.
        ValueError: another shape, or NaN or infinity in it.
    """
    if not isinstance(precision, Precision):
        raise TypeError(
            "precision must be a Precision, such as Precision(storage=torch.float32, compute=torch.float32), "
            f"got {precision!r}"
        )
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        raise TypeError(
            f"{name} must be a plain dense tensor (full_tensor() of a DTensor), got {type(value).__name__}"
        )
    if value.dtype != precision.storage:
        raise TypeError(f"{name} must have dtype {precision.storage} (precision.storage), got {value.dtype}")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(
            f"{name} must be finite, got {int((~torch.isfinite(value)).sum())} NaN or infinite values"
        )


def matrix(name: str, value: Any, precision: Precision) -> None:
    """Check a logical matrix ``[m, n]`` or a stack ``[N, m, n]`` of them, none of them empty.

    Raises:
        TypeError, ValueError: as ``tensor``, and ValueError for another number of dims or an empty one.
    """
    tensor(name, value, precision)
    if value.ndim not in (2, 3) or 0 in value.shape:
        raise ValueError(
            f"{name} must be [m, n] or [N, m, n] without empty dims (or be split into such), got {list(value.shape)}"
        )


def hyper_of(value: Any, needed: type) -> None:
    """Check that the hyperparameters belong to this algorithm.

    Raises:
        TypeError: another type.
    """
    if type(value) is not needed:
        raise TypeError(f"hyper must be {_full_name(needed)}, got {_full_name(type(value))}")


def step_input(
    param: Any,
    grad: Any,
    state: Any,
    hyper: Any,
    types: tuple[type, type],
    precision: Precision,
    *,
    matrices: bool,
) -> None:
    """Check what every ``step`` is given, but for the shapes of the state.

    Args:
        param, grad, state, hyper: as given to ``step``.
        types: the algorithm's Hyper and State.
        precision: as given to ``step``.
        matrices: True if the parameter must be ``[m, n]`` or ``[N, m, n]``.

    Raises:
        TypeError: a state or hyper of another algorithm; a tensor of another dtype.
        ValueError: shapes that don't fit, or NaN or infinity.
    """
    hyper_of(hyper, types[0])
    (matrix if matrices else tensor)("param", param, precision)
    tensor("grad", grad, precision, tuple(param.shape))
    if type(state) is not types[1]:
        raise TypeError(f"state must be {_full_name(types[1])}, got {_full_name(type(state))}")


def state_tensors(state: Any, precision: Precision, **shapes: tuple[int, ...]) -> None:
    """Check the state's tensors by field name, and its step if it has one.

    Raises:
        TypeError: a dtype, or a step that is no int.
        ValueError: a shape, NaN or infinity, a negative second moment or step.
    """
    for name, shape in shapes.items():
        value = getattr(state, name)
        tensor(f"state.{name}", value, precision, shape)
        if name in SECOND_MOMENTS and bool((value < 0).any()):
            raise ValueError(f"state.{name} must be >= 0, got {float(value.min())}")
    if any(field.name == "step" for field in fields(state)):
        integer("state.step", state.step, low=0)


def step_output(param: Tensor, state: Any, precision: Precision) -> None:
    """Check what a ``step`` is about to give back: finite input may overflow.

    Args:
        param, state: the new ones.
        precision: as given to ``step``.

    Raises:
        OverflowError: NaN or infinity in them.
    """
    for name, value in {"param": param, **{f"state.{key}": one for key, one in vars(state).items()}}.items():
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise OverflowError(
                f"the new {name} overflowed: {int((~torch.isfinite(value)).sum())} NaN or infinite values from "
                "finite input; take a smaller grad, lr or weight_decay, or a wider precision than "
                f"storage={precision.storage}, compute={precision.compute}"
            )


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
