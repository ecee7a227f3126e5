"""What a training loop may have set that would change the arithmetic of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

__all__ = ["own_arithmetic"]


@contextmanager
def own_arithmetic(device_types: Iterable[str]) -> Iterator[None]:
    """Products in the dtype that the optimizer was asked for, whatever autocast and TF32 do to those of the model.

    And tensors of the ordinary kind, also in inference mode.

    Args:
        device_types: of what is multiplied.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # what is made within, steps outside of it could not write into
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for device_type in sorted(device_types):
            if torch.amp.is_autocast_available(device_type):
                # The dtype and the cache as ever, since Dynamo guards on them too.
                stack.enter_context(torch.autocast(device_type, torch.bfloat16, False, cache_enabled=True))
        stack.enter_context(_whole_float32())
        yield


@contextmanager
def _whole_float32() -> Iterator[None]:
    """float32 products with all 24 bits of their factors, as on a fresh start of torch.

    Of fewer (TF32; bfloat16 on CPUs) the rounding exceeds what tells Dion's dead columns from others: each of them
    would be made as long as those that carry the gradient.
    """
    backends: Any = torch.backends  # of which torch types one alone
    places = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    if all(one in ("none", "ieee") for one in before):
        yield
        return
    try:
        older: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer switches have been used, which torch refuses to mix with the older one
        older = None
    if older is None:
        for place in places:
            place.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for place, value in zip(places, before, strict=True):
            # As that of all backends says, if that was where the value came from.
            place.fp32_precision = "none"
            if place.fp32_precision != value:
                place.fp32_precision = value
