"""What every `kvrelay bench` hands over: rows and the machine they were measured on.

Owns the names in the JSON and the table that people read. The benches make a Report; commands.py
prints it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

MISSING = "-"


class BenchError(Exception):
    """Nothing can be measured; the text is for the person, one line."""


@dataclass(frozen=True)
class Row:
    """One measured thing. `baseline` is what the program compared with does of the same thing,
    `limit` what the machine allows; both in the row's own unit, None where there is none."""

    name: str
    value: float
    unit: str
    baseline: float | None = None
    limit: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.value / self.baseline if self.baseline else None

    @property
    def limit_ratio(self) -> float | None:
        return self.value / self.limit if self.limit else None


@dataclass(frozen=True)
class Report:
    """`notes` are sentences for people only: what was left out, how to read a column."""

    machine: Mapping[str, Any]
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    def to_json(self) -> str:
        """One object; null where a row was compared with nothing."""
        rows = [
            {
                "name": row.name,
                "value": row.value,
                "unit": row.unit,
                "baseline": row.baseline,
                "ratio": row.ratio,
                "limit_ratio": row.limit_ratio,
            }
            for row in self.rows
        ]
        return json.dumps({"machine": dict(self.machine), "rows": rows}, allow_nan=False)

    def heading(self) -> str:
        """The machine, a few settings a line."""
        pairs = [f"{key} {_shown(value)}" for key, value in self.machine.items()]
        return "\n".join(" · ".join(pairs[at : at + 4]) for at in range(0, len(pairs), 4))

    def table(self, baseline_name: str) -> Table:
        """One line a row; fits 80 columns. Columns that no row fills are left out."""
        compared = any(row.baseline for row in self.rows)
        limited = any(row.limit for row in self.rows)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("name", no_wrap=True)
        columns = ["value", "unit"]
        columns += [baseline_name, "ratio"] if compared else []
        columns += ["limit", "of limit"] if limited else []
        for column in columns:
            table.add_column(column, justify="left" if column == "unit" else "right", no_wrap=True)
        for row in self.rows:
            cells = [number(row.value), row.unit]
            cells += [number(row.baseline), _times(row.ratio)] if compared else []
            cells += [number(row.limit), _share(row.limit_ratio)] if limited else []
            table.add_row(row.name, *cells)
        return table


def number(value: float | None) -> str:
    """Four digits, or all that stand before the point; of a count all."""
    if value is None:
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}"


def _times(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.2f}x"


def _share(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio * 100:.0f} %"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or MISSING
    return str(value)
