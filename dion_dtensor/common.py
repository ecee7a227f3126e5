"""What every optimizer takes by keyword."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["DECAY", "Common"]

DECAY = {"weight_decay": 0.01, "cautious": False, "maximize": False}
"""Of the param groups of any rule."""


class Common(TypedDict, total=False):
    """What every optimizer takes by keyword.

    Attributes:
        weight_decay: decoupled, by the base ``lr``, before the update; default 0.01.
        cautious: decay only where the update shrinks the weight; default False.
        maximize: ascend; default False.
        compute_dtype: dtype of the orthonormalization; None (default) for bfloat16 on CUDA and float32 elsewhere.
            float64 parameters are computed in float64 throughout.
        momentum_dtype: dtype of the state; None (default) for the parameter's, float32 for float16.
        compile: run each bucket's update under ``torch.compile(fullgraph=True)``; default True.
        capture: on CUDA, launch each bucket's update as one CUDA graph, recorded at the third step; default False.  It
            changes no result: gradients may move, hyperparameters may change, parameters may be without gradient as
            ever.  It needs ``compile=True``.  Not recorded is what reads values of the device on the way (Dion, and
            Dion2 and Dion3 where chosen rows travel), and AdamW where it is torch's one fused kernel anyway.  The
            graphs keep the memory of one bucket's step.  Those that hold collectives keep their process group from
            being destroyed: call ``optimizer.release_graphs()`` before that.  All ranks record, or none;
            with ``validate=False``, what moves a weight in memory must do so on all ranks at once.
        validate: before each step, let all ranks agree that every gradient is present, finite and laid out like its
            parameter; default True.
        atomic: undo a step that fails in the middle, so that weights and state are as before it; default False: what
            was stepped before stays stepped.  A rank that fails alone must end, as an exception makes it; the others
            undo their step when a collective tells them, or times out.  It takes as many bytes again as the shards of
            weights and state, a copy of these a step, and one small collective.
        replicate_mesh: a mesh (or process group) that the parameters do not know, over whose ranks they are
            replicated: that of DistributedDataParallel, or the axis beside FSDP2's.  The work is split among them.
        averaged: whether gradients arrive averaged over ``replicate_mesh``; default True.  Otherwise the step averages
            them; Dion keeps a momentum a rank instead and averages P and R alone, see :class:`~dion_dtensor.Dion`.
        max_bucket_bytes: parameters whose shards take more are stepped in several turns; a turn needs about four times
            as many bytes for a while, on a GPU six times (and Dion, for its bases, 640 MiB or what one matrix takes).
            None (default) for no limit, but 8 MiB for unsharded matrices on a CPU, where that is fastest.
    """

    weight_decay: float
    cautious: bool
    maximize: bool
    compute_dtype: torch.dtype | None
    momentum_dtype: torch.dtype | None
    compile: bool
    capture: bool
    validate: bool
    atomic: bool
    replicate_mesh: DeviceMesh | ProcessGroup | None
    averaged: bool
    max_bucket_bytes: int | None
