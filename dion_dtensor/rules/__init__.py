"""The algorithms, one file each.

A rule is global mathematics on tensors: it runs unchanged on plain tensors and on DTensors of any layout, and knows
no mesh, no rank and no collective.
"""

from dion_dtensor.rules.adamw import ADAMW
from dion_dtensor.rules.dion import DION
from dion_dtensor.rules.dion2 import DION2
from dion_dtensor.rules.dion3 import DION3
from dion_dtensor.rules.lion import LION
from dion_dtensor.rules.muon import MUON
from dion_dtensor.rules.normuon import NORMUON
from dion_dtensor.rules.rule import Rule, StateSpec

__all__ = ["RULES", "Rule", "StateSpec"]

RULES: dict[str, Rule] = {rule.name: rule for rule in (MUON, NORMUON, DION, DION2, DION3, ADAMW, LION)}
