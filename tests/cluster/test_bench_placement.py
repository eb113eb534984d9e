"""`kvrelay bench placement`: its rows, and that placement does not grow with the fleet."""

import json

import pytest
from click.testing import CliRunner

from cluster.bench import placement
from cluster.bench.placement import PlacementBench, bench_placement
from cluster.cli import main

RATIO_MAX = 8.0  # 3 is what is promised of a quiet machine; a scan of all workers would cost 100


def test_a_hundred_times_the_workers_cost_no_hundred_times_as_much():
    asked = PlacementBench(fleets=(10, 1_000), blocks=50_000, quick=True)
    rows = {row.name: row for row in bench_placement(asked, lambda *_: None).rows}
    assert rows["placement/10/p50"].ratio == 1
    assert rows["placement/1000/p50"].ratio < RATIO_MAX
    assert rows["placement/1000/p99"].value >= rows["placement/1000/p50"].value > 0
    assert rows["naming/1500"].value > 0


def test_the_command_prints_one_object(monkeypatch: pytest.MonkeyPatch):
    small = PlacementBench(fleets=(4, 8), blocks=800, quick=True)
    monkeypatch.setattr(placement, "PlacementBench", lambda **_: small)
    result = CliRunner().invoke(main, ["bench", "placement", "--json"])
    assert result.exit_code == 0, result.output
    names = [row["name"] for row in json.loads(result.stdout)["rows"]]
    assert names == [
        *(f"placement/{workers}/{which}" for workers in (4, 8) for which in ("p50", "p99")),
        "naming/1500",
    ]
