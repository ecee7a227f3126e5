"""Orthonormal optimizers, DTensor-native: the same update on every mesh, compiled.

groups = param_groups(model, algorithm="muon", lr=0.02, scalar="adamw", scalar_lr=3e-4)
optimizer = Muon(groups, mu=0.95)
print(audit(optimizer))
"""

from dion_dtensor.groups import audit, param_groups
from dion_dtensor.imports import import_state_dict
from dion_dtensor.optimizers import Dion, Dion2, Dion3, Muon, NorDion2, NorMuon

__all__ = [
    "Dion",
    "Dion2",
    "Dion3",
    "Muon",
    "NorDion2",
    "NorMuon",
    "audit",
    "import_state_dict",
    "param_groups",
]
