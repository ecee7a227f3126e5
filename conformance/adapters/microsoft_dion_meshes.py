"""microsoft/dion on meshes, but for its Dion: that draws its first Q from DTensor's generator, which has no CPU."""

from __future__ import annotations

from dataclasses import replace

from conformance.adapters.microsoft_dion import CAPABILITIES, STATE, build
from conformance.adapters.torch_optimizer import TorchOptimizerAdapter

adapter = TorchOptimizerAdapter(
    replace(
        CAPABILITIES,
        algorithms=dict.fromkeys(("muon", "normuon", "dion2", "dion3"), ("dion",)),
        levels=("L3", "L4"),
    ),
    build,
    state=STATE,
)
