"""What a step costs, for any mesh, before anything runs: FLOPs, bytes by axis and collective, memory, time.

cost = predict(Bucket((1024, 4096), count=48, sizes=(4, 2), shards=(0, 1)), "muon", "assemble")
choice = choose(bucket, "muon", hardware)
"""

from dion_dtensor.planning.buckets import Bucket, Cost, Transfer, sharing, total
from dion_dtensor.planning.choice import Choice, Duration, Hardware, choose, duration, usual_hardware
from dion_dtensor.planning.predict import ALGORITHMS, predict, ways

__all__ = [
    "ALGORITHMS",
    "Bucket",
    "Choice",
    "Cost",
    "Duration",
    "Hardware",
    "Transfer",
    "choose",
    "duration",
    "predict",
    "sharing",
    "total",
    "usual_hardware",
    "ways",
]
