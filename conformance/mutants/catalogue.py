"""All mutants, those on meshes included."""

from __future__ import annotations

from conformance.mutants import oracle, production
from conformance.mutants.mutant import GATHERING, Mutant


def mutants() -> list[Mutant]:
    """In the order of the table: the oracle's, our port's, those of the gathering port."""
    return [*oracle.mutants(), *production.mutants(), *_gathering()]


def _gathering() -> list[Mutant]:
    def one(name: str, level: str, algorithm: str, kind: str, *layouts: str) -> Mutant:
        return Mutant(name, GATHERING, level, (algorithm,), layouts=layouts, kind=kind)

    return [
        one("a piece taken for the whole", "L4", "muon", "LocalPiece", "4-S0", "2x2-S0S1"),
        one("_StridedShard not seen as a shard", "L4", "muon", "LastAxisOnly", "2x2-T0S0"),
        one("one axis not gathered", "L4", "muon", "LastAxisOnly", "2x2-S0S1"),
        one("a shard dropped", "L4", "dion", "DroppedShard", "4-S0"),
        one("padding leaked", "L4", "muon", "LeakedPadding", "4-S0"),
        one("scale of a shard's shape", "L4", "dion2", "ShardScale", "4-S0"),
        one("local top-k", "L4", "dion2", "LocalSelection", "4-S0", "2-S1"),
        one("local top-k of rows", "L4", "dion3", "LocalSelection", "4-S0"),
        one("k rounded up by shard", "L4", "dion2", "CountByShard", "4-S0"),
        one("rescale by shard", "L4", "normuon", "ShardRescale", "4-S0"),
        one("variance of a shard's columns", "L4", "normuon", "ShardVariance", "4-S1"),
        one("zero test by shard", "L4", "dion", "ZeroTestByShard", "4-S0"),
        one("Q drawn by rank", "L4", "dion", "RandomByRank", "4-S0"),
        one("replicas not averaged", "L4", "dion", "BiasedReplicas", "2x2-RS0"),
        one("an average still to be taken, not taken", "L4", "muon", "LocalGradient", "2x2-PS0"),
        one("momentum lost on resume", "L3", "muon", "LostOnLoad", "4-S0-to-2x2-S0S1"),
        one("stale Q after resume", "L3", "dion", "StaleQ", "4-S0-to-2x2-S0S1"),
        one("step lost on resume", "L3", "adamw", "LostStep", "4-S0-to-2x2-S0S1"),
        one("second moment lost on resume", "L3", "adamw", "LostMoment", "2-S0-to-2-S0"),
        one("shards saved as plain tensors", "L3", "muon", "LocalCheckpoint", "2-S0-to-2-S0"),
        one("state keys missing on one rank", "L3", "muon", "MissingKeys", "2-S0-to-2-S0"),
    ]
