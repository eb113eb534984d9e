"""The promise that a request is measured against."""

import math
from dataclasses import dataclass

from cluster.workload.asks import WorkloadError
from cluster.workload.outcomes import Outcome


@dataclass(frozen=True)
class Slo:
    """The most that a client waits for the first token, and on the mean for each after it."""

    ttft_ms: float
    tpot_ms: float

    def __post_init__(self) -> None:
        for name, value in (("TTFT", self.ttft_ms), ("TPOT", self.tpot_ms)):
            if not (math.isfinite(value) and value > 0):
                raise WorkloadError(f"an SLO of {value:g} ms for {name}: it must be above 0")

    def met(self, outcome: Outcome) -> bool:
        """A request that failed has not met it; one token has no TPOT to be late with."""
        ttft_ms, tpot_ms = outcome.ttft_ms, outcome.tpot_ms
        if not outcome.ended or ttft_ms is None:
            return False
        return ttft_ms <= self.ttft_ms and (tpot_ms is None or tpot_ms <= self.tpot_ms)
