"""The SLOs of a run, and what is told of what it found."""

import json

import pytest

from cluster.bench.goodput.arrangements import ARRANGEMENTS
from cluster.bench.goodput.page import write_goodput_page
from cluster.bench.goodput.result import Cell, Goodput, Tried
from cluster.bench.goodput.scale import TPOT_BESIDE, TTFT_BESIDE, Unloaded, points
from cluster.bench.report import BenchError
from cluster.load.result import LoadResult, LoopLateness
from cluster.load.targets import Server
from cluster.workload.asks import Ask
from cluster.workload.figures import Quantiles
from cluster.workload.outcomes import Outcome
from cluster.workload.slo import Slo

UNIT = Unloaded(ttft_ms=200.0, tpot_ms=10.0)


def quantiles(p50: float, p99: float) -> Quantiles:
    return Quantiles(p50, p50, p99, p50, p99, 100)


def cell(goodput: float) -> Cell:
    tried = [
        Tried(1.0, 0.99, 300.0, 11.0, quantiles(10, 14), 0, 1.0),
        Tried(2.0, 0.80, 900.0, 12.0, quantiles(11, 30), 0, 1.0),
    ]
    return Cell(goodput, 1.0, tried)


def run_of(*goodputs: float) -> Goodput:
    todo = points(UNIT, (2.0, 5.0), (20.0,), (Slo(2000, 150),))
    names = [a.name for a in ARRANGEMENTS]
    cells = {
        point: dict(zip(names, map(cell, goodputs), strict=True)) for point in todo if goodputs
    }
    unloaded = dict.fromkeys(names[:2], UNIT)
    return Goodput({"model": "tiny"}, UNIT, unloaded, todo, cells, ["a note with <marks>"])


@pytest.mark.parametrize(("sent_s", "woke_ms", "late_ms"), [(0.004, 30.0, 30.0), (0.05, 2.0, 50.0)])
def test_a_load_generator_is_late_in_sending_or_in_reading(sent_s, woke_ms, late_ms):
    outcomes = [Outcome(Ask(0.0, 8, 2), sent_s, 0.1, 0.2, tokens=2)]
    server = Server("gRPC", "tiny", "token ids")
    result = LoadResult("url", "uniform", 0, server, outcomes, LoopLateness(p99=woke_ms))
    tried = Tried.of(3.0, result, Slo(2000, 150))
    assert (tried.rate, tried.attainment, tried.failed) == (3.0, 1.0, 0)
    assert tried.late_ms == pytest.approx(late_ms)


def test_the_unit_is_what_every_arrangement_can_do():
    assert Unloaded.slowest([Unloaded(90, 12), Unloaded(200, 9)]) == Unloaded(200, 12)


def test_two_curves_cross_and_fixed_points_follow():
    found = points(UNIT, (5.0, 2.0), (20.0, TTFT_BESIDE), (Slo(2000, 150),))
    assert [(p.tpot_scale, p.ttft_scale) for p in found] == [
        (2, TTFT_BESIDE),
        (TPOT_BESIDE, TTFT_BESIDE),
        (TPOT_BESIDE, 20),
        (None, None),
    ]
    assert found[0].slo == Slo(2000, 20)
    assert [p.name for p in found][::3] == ["tpot2x-ttft10x", "ttft2000ms-tpot150ms"]


def test_workers_share_the_cores_and_know_the_slo():
    for arrangement in ARRANGEMENTS:
        options = arrangement.options("int8", 4, Slo(2000, 150))
        assert options.threads_each * (options.prefill + options.decode) == 4
        assert (options.ttft_target_ms, options.tpot_target_ms) == (2000, 150)


def test_ratios_are_to_the_best_of_the_others():
    found = run_of(2.0, 3.0, 3.3)
    told = json.loads(found.to_json())["points"][0]
    assert told["disaggregated_to_colocated"] == 1.5
    assert told["adaptive_to_best"] == pytest.approx(1.1)
    assert told["arrangements"]["colocated"]["tried"][1]["attainment"] == 0.8


def test_without_goodput_there_is_nothing_to_divide_by():
    assert json.loads(run_of(0.0, 0.0, 1.0).to_json())["points"][0]["adaptive_to_best"] is None


def test_a_row_has_a_cell_for_every_column_even_without_figures():
    for found in (run_of(2.0, 3.0, 3.3), run_of()):
        assert {len(row) for row in found.rows()} == {len(found.columns())}
    row = next(run_of(2.0, 3.0, 3.3).rows())
    assert row[0] == "2x, 20 ms"
    assert row[-1] == "1.40x"


@pytest.mark.parametrize("goodputs", [(2.0, 3.0, 3.3), (0.0, 0.0, 0.0), ()])
def test_the_page_stands_alone(tmp_path, goodputs):
    pytest.importorskip("matplotlib")
    write_goodput_page(run_of(*goodputs), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "a note with &lt;marks&gt;" in page
    assert page.count("<svg") == 1
    assert 'src="http' not in page


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(BenchError, match="--report"):
        write_goodput_page(run_of(), tmp_path / "none" / "page.html")
