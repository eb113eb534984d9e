"""What a goodput run found: one cell for each arrangement and SLO. Tables and JSON of it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from cluster.bench.goodput.arrangements import ADAPTIVE, ARRANGEMENTS, COLOCATED, DISAGGREGATED
from cluster.bench.goodput.scale import Point, Unloaded
from cluster.bench.report import MISSING, number
from cluster.load.result import LoadResult
from cluster.workload.figures import Quantiles
from cluster.workload.slo import Slo

NAMES = tuple(arrangement.name for arrangement in ARRANGEMENTS)


@dataclass(frozen=True)
class Tried:
    """One run of load. late: how far the load generator itself was behind, p99: in sending, or in
    waking to read."""

    rate: float
    attainment: float
    ttft_p90_ms: float | None
    tpot_p90_ms: float | None
    itl: Quantiles | None
    failed: int
    late_ms: float

    @classmethod
    def of(cls, rate: float, result: LoadResult, slo: Slo) -> "Tried":
        found = result.figures(slo)
        ttft, tpot, late = found.ttft_ms, found.tpot_ms, found.lateness_ms
        return cls(
            rate,
            found.attainment,
            ttft.p90 if ttft else None,
            tpot.p90 if tpot else None,
            found.itl_ms,
            found.failed,
            max(late.p99 if late else 0.0, result.loop.p99),
        )


@dataclass(frozen=True)
class Cell:
    """One arrangement under one SLO. passed_at: the highest rate that was run and met it, 0 where
    none did; goodput: interpolated between it and the next that did not."""

    goodput: float
    passed_at: float
    tried: Sequence[Tried]

    @property
    def itl(self) -> Quantiles | None:
        """At passed_at."""
        return next((one.itl for one in self.tried if one.rate == self.passed_at), None)


@dataclass(frozen=True)
class Goodput:
    """`cells`: by point and by the name of an arrangement; a run that was stopped lacks some."""

    machine: Mapping[str, Any]
    unit: Unloaded
    unloaded: Mapping[str, Unloaded]
    points: Sequence[Point]
    cells: Mapping[Point, Mapping[str, Cell]]
    notes: Sequence[str] = ()

    def to_json(self) -> str:
        """One object."""
        return json.dumps(
            {
                "machine": dict(self.machine),
                "unit": asdict(self.unit),
                "unloaded": {name: asdict(of) for name, of in self.unloaded.items()},
                "points": [self._point(point) for point in self.points],
                "notes": list(self.notes),
            },
            allow_nan=False,
        )

    def _point(self, point: Point) -> dict[str, Any]:
        cells = self.cells.get(point, {})
        return {
            "name": point.name,
            **asdict(point),
            "arrangements": {name: asdict(cell) for name, cell in cells.items()},
            "disaggregated_to_colocated": self.ratio(point, DISAGGREGATED, COLOCATED),
            "adaptive_to_best": self.ratio(point, ADAPTIVE, DISAGGREGATED, COLOCATED),
        }

    def ratio(self, point: Point, name: str, *others: str) -> float | None:
        """To the best of others; None where there is nothing to divide by."""
        cells = self.cells.get(point, {})
        best = max((cells[other].goodput for other in others if other in cells), default=0.0)
        return cells[name].goodput / best if name in cells and best else None

    def columns(self) -> tuple[str, ...]:
        return (
            "TPOT",
            "TTFT",
            *(f"{name}, req/s" for name in NAMES),
            "disagg. to coloc.",
            "adaptive to best",
            *(f"ITL p99/p50, {name}" for name in NAMES),
        )

    def rows(self) -> Iterator[tuple[str, ...]]:
        for point in self.points:
            cells = self.cells.get(point, {})
            slo = point.slo
            yield (
                _target(point.tpot_scale, slo.tpot_ms),
                _target(point.ttft_scale, slo.ttft_ms),
                *(number(cells[name].goodput) if name in cells else MISSING for name in NAMES),
                _times(self.ratio(point, DISAGGREGATED, COLOCATED)),
                _times(self.ratio(point, ADAPTIVE, DISAGGREGATED, COLOCATED)),
                *(_tail(cells.get(name)) for name in NAMES),
            )

    def table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in self.columns():
            table.add_column(column, justify="right")
        for row in self.rows():
            table.add_row(*row)
        return table


def _target(scale: float | None, ms: float) -> str:
    return f"{ms:.4g} ms" if scale is None else f"{scale:g}x, {ms:.4g} ms"


def _times(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.2f}x"


def _tail(cell: Cell | None) -> str:
    itl = cell.itl if cell else None
    if itl is None or not itl.p50:
        return MISSING
    return f"{itl.p99 / itl.p50:.2f}x"
