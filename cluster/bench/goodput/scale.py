"""The SLOs of a run: multiples of what a request takes when it is alone. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.workload.slo import Slo

TPOT_SCALE = (1.5, 2.0, 2.5, 3.0, 5.0, 10.0, 20.0)
TTFT_SCALE = (2.0, 5.0, 20.0)
TTFT_BESIDE = 10.0  # of the unloaded prefill, along the curve over TPOT
TPOT_BESIDE = 5.0  # of the unloaded step, along the curve over TTFT


@dataclass(frozen=True)
class Unloaded:
    """Of requests that are alone, in the middle."""

    ttft_ms: float
    tpot_ms: float

    @classmethod
    def slowest(cls, each: Sequence["Unloaded"]) -> "Unloaded":
        """What every arrangement can do at least: the unit of the scale."""
        return cls(max(one.ttft_ms for one in each), max(one.tpot_ms for one in each))


@dataclass(frozen=True)
class Point:
    """One SLO. tpot_scale and ttft_scale: in units of Unloaded; None where it was given in ms."""

    slo: Slo
    tpot_scale: float | None = None
    ttft_scale: float | None = None

    @property
    def name(self) -> str:
        if self.tpot_scale is None or self.ttft_scale is None:
            return f"ttft{self.slo.ttft_ms:g}ms-tpot{self.slo.tpot_ms:g}ms"
        return f"tpot{self.tpot_scale:g}x-ttft{self.ttft_scale:g}x"


def points(
    unit: Unloaded,
    tpot_scale: Sequence[float],
    ttft_scale: Sequence[float],
    fixed: Sequence[Slo] = (),
) -> list[Point]:
    """Two curves that cross: over TPOT at TTFT_BESIDE, over TTFT at TPOT_BESIDE; then the fixed
    ones. From tight to loose, none twice."""
    pairs = [(tpot, TTFT_BESIDE) for tpot in sorted(tpot_scale)]
    pairs += [(TPOT_BESIDE, ttft) for ttft in sorted(ttft_scale)]
    scaled = [
        Point(Slo(ttft * unit.ttft_ms, tpot * unit.tpot_ms), tpot, ttft)
        for tpot, ttft in dict.fromkeys(pairs)
    ]
    return scaled + [Point(slo) for slo in fixed]
