"""What one simulation brought, as people and programs read it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from cluster.bench.report import number
from cluster.capacity.cells import simulate_cells
from cluster.capacity.run import Played, Setting
from cluster.preparation import Progress
from cluster.workload.asks import Workload
from cluster.workload.figures import Figures, figures
from cluster.workload.slo import Slo


@dataclass(frozen=True)
class Result:
    """tried: of a search, rates and the attainment at each, in the order of trying."""

    setting: Setting
    workload: str
    played: Played
    figures: Figures
    tried: tuple[tuple[float, float], ...] = field(default=())

    @classmethod
    def of(
        cls,
        setting: Setting,
        workload: Workload,
        slo: Slo,
        on_progress: Progress,
        jobs: int = 1,
    ) -> "Result":
        """Raises SimulationError."""
        total = len(workload.asks)
        what = f"simulating {total:,} requests"
        on_progress(what, 0.0)
        played = simulate_cells(setting, workload, jobs, lambda n: on_progress(what, n / total))
        return cls(setting, workload.name, played, figures(played.outcomes, slo))

    @property
    def workers(self) -> int:
        return self.setting.prefill + self.setting.decode

    def heading(self) -> str:
        setting = self.setting
        routers = "1 router" if setting.routers == 1 else f"{setting.routers} routers"
        return (
            f"{self.workload} on {setting.prefill:,} prefill and {setting.decode:,} decode workers,"
            f" {routers}\n{setting.profile.name}: {_short(str(setting.profile.source))}"
            f" · seed {setting.seed}"
        )

    def rows(self) -> list[tuple[str, float | int, str]]:
        played, found = self.played, self.figures
        rows: list[tuple[str, float | int, str]] = [
            ("goodput per worker", found.goodput_rps / self.workers, "requests/s"),
            ("prompts on decode workers", played.local_prompts, "requests"),
            ("placements", played.attempts, ""),
            ("workers killed", played.kills, ""),
            ("simulator", found.requests / played.cpu_s * 60, "requests a minute of processor"),
            ("its processor time", played.cpu_s, "s"),
        ]
        return rows + self._router_rows()

    def _router_rows(self) -> list[tuple[str, float | int, str]]:
        meter = self.played.meter
        if meter is None:
            return []
        requests = self.figures.requests
        rows: list[tuple[str, float | int, str]] = [
            (f"router: {name}", spent.seconds / requests * 1e6, "us a request")
            for name, spent in meter.spent.items()
        ]
        each_s = meter.seconds / requests
        rows.append(("router: decisions", each_s * 1e6, "us a request"))
        return [*rows, ("router: at most", 1 / each_s, "requests/s, by decisions alone")]

    def table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("simulation", no_wrap=True)
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for name, value, unit in self.rows():
            table.add_row(name, number(value), unit)
        return table

    def notes(self) -> list[str]:
        notes = [
            f"Failed with {kind}: {count} of {self.figures.requests}."
            for kind, count in self.figures.errors.items()
        ]
        if self.tried:
            notes.append(
                "Tried, requests/s and attainment: "
                + ", ".join(f"{rate:.4g}: {share:.1%}" for rate, share in self.tried)
            )
        return notes

    def to_json(self) -> str:
        """One object."""
        setting = {k: v for k, v in vars(self.setting).items() if k != "profile"}
        body: Mapping[str, Any] = {
            "workload": self.workload,
            "profile": self.setting.profile.name,
            "source": str(self.setting.profile.source),
            "setting": setting,
            "figures": asdict(self.figures),
            "simulation": {name: value for name, value, _ in self.rows()},
            "virtual_s": self.played.virtual_s,
            "hash": self.played.hash,
            "tried": self.tried,
        }
        return json.dumps(body, allow_nan=False)


def _short(source: str) -> str:
    """Its first sentence; the rest is in the profile."""
    return source.split(". ")[0]
