"""A callable in; time, memory and FLOPs in a record out. And the limit that arithmetic sets to the gain."""

from trimtab.bench.amdahl import Gain, StepParts, advice, advice_on_counts, expected_gain, times_faster
from trimtab.bench.bound import SpeedModel, SpeedPrediction
from trimtab.bench.measure import count_flops, peak_memory
from trimtab.bench.timing import time_steps

__all__ = [
    "Gain",
    "SpeedModel",
    "SpeedPrediction",
    "StepParts",
    "advice",
    "advice_on_counts",
    "count_flops",
    "expected_gain",
    "peak_memory",
    "time_steps",
    "times_faster",
]
