"""The arrangements that share the same cores in turn, and how each is set up for an SLO.

All run the same code on the same targets, and differ in who may compute a prompt.
"""

from dataclasses import dataclass

from cluster.options import ServeOptions
from cluster.workload.slo import Slo
from kvrelay.config import LocalPrefill, Quantize

COLOCATED, DISAGGREGATED, ADAPTIVE = "colocated", "disaggregated", "adaptive"


@dataclass(frozen=True)
class Arrangement:
    name: str
    prefill: int
    local_prefill: LocalPrefill
    meaning: str

    def options(self, quantize: Quantize, cores: int, slo: Slo | None = None) -> ServeOptions:
        """Every worker has as many of the cores as every other. Prompts share nothing, so caching
        would only remember those of the run before."""
        return ServeOptions(
            port=0,
            http_port=0,
            prefill=self.prefill,
            decode=1,
            threads=max(1, cores // (self.prefill + 1)),
            quantize=quantize,
            local_prefill=self.local_prefill,
            prefix_caching=False,
            itl_target_ms=0,  # the SLO has no bound for one gap
            ttft_target_ms=slo.ttft_ms if slo else 0.0,
            tpot_target_ms=slo.tpot_ms if slo else 0.0,
        )


ARRANGEMENTS = (
    Arrangement(
        COLOCATED,
        prefill=0,
        local_prefill="auto",
        meaning="one worker on all cores, chunks of prompts within its decode steps",
    ),
    Arrangement(
        DISAGGREGATED,
        prefill=1,
        local_prefill="never",
        meaning="a prefill and a decode worker, half of the cores each, lent while they are idle",
    ),
    Arrangement(
        ADAPTIVE,
        prefill=1,
        local_prefill="auto",
        meaning="the same two workers; prompts also at the decode worker where SLOs allow",
    ),
)
