"""Ctrl-C amid `kvrelay bench goodput`: what was found is told, with what is missing."""

from types import SimpleNamespace

import pytest

from cluster.bench.goodput import run
from cluster.bench.goodput.result import Cell
from cluster.bench.goodput.run import GoodputBench, StoppedError, bench_goodput
from cluster.bench.goodput.scale import Unloaded

ASKED = GoodputBench((2.0, 5.0), (), (), (8, 16), (2, 4), "none", requests=10)


def bench_with(monkeypatch: pytest.MonkeyPatch, cells: int, end: BaseException) -> None:
    """Finds so many cells before it is stopped."""
    alone = {name: Unloaded(100.0, 10.0) for name in ("colocated", "disaggregated")}
    found = iter(range(cells))

    def cell(*_: object) -> Cell:
        if next(found, None) is None:
            raise end
        return Cell(1.0, 1.0, [])

    monkeypatch.setattr(run, "pack_weights", lambda *_: None)
    monkeypatch.setattr(run._Bench, "unloaded", lambda _: alone)
    monkeypatch.setattr(run._Bench, "cell", cell)


@pytest.mark.parametrize("end", [StoppedError("stopped"), KeyboardInterrupt()])
def test_what_was_found_until_then_is_told(monkeypatch, end):
    bench_with(monkeypatch, 4, end)
    model = SimpleNamespace(path=None, name="tiny")
    found = bench_goodput(model, ASKED, lambda what, share: None)
    first, second = found.points
    assert set(found.cells[first]) == {"colocated", "disaggregated", "adaptive"}
    assert set(found.cells[second]) == {"adaptive"}
    assert found.notes[0].startswith("stopped before it was done")
    assert len(list(found.rows())) == 2
    assert '"adaptive_to_best": null' in found.to_json()


def test_nothing_found_is_an_error(monkeypatch):
    bench_with(monkeypatch, 0, StoppedError("stopped before it was done"))
    with pytest.raises(StoppedError):
        bench_goodput(SimpleNamespace(path=None, name="tiny"), ASKED, lambda what, share: None)
