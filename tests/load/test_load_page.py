"""The page of a run, whatever came of it."""

import random
from array import array
from pathlib import Path

import pytest

from cluster.bench.report import BenchError
from cluster.load.page import write_load_page
from cluster.load.result import LoadResult
from cluster.load.targets import Server
from cluster.workload.asks import Ask
from cluster.workload.outcomes import Outcome
from cluster.workload.slo import Slo

SLO = Slo(500, 50)
SERVER = Server("HTTP", "<b>bold</b>", "text", notes=("It lacks & needs.",))


def outcomes(answered: int, failed: int) -> list[Outcome]:
    dice = random.Random(1)
    found = []
    for at in range(answered):
        gaps_s = array("d", [dice.expovariate(20) for _ in range(3)])
        first_s = at / 10 + dice.expovariate(2)
        ask, last_s = Ask(at / 10, 10, 4), first_s + sum(gaps_s)
        found.append(Outcome(ask, at / 10, first_s, last_s, 4, gaps_s))
    found += [Outcome(Ask(at / 10, 10, 4), at / 10, error="HTTP 500") for at in range(failed)]
    return found


def page_of(found: list[Outcome], folder: Path, **more: object) -> str:
    result = LoadResult("http://x", "a < b", 0, SERVER, found, planned=len(found), **more)
    write_load_page(result, result.figures(SLO), folder / "page.html")
    return (folder / "page.html").read_text()


@pytest.mark.parametrize(("answered", "failed"), [(0, 2), (2500, 600)])
def test_plots_are_drawn_of_whatever_there_is(tmp_path: Path, answered: int, failed: int) -> None:
    page = page_of(outcomes(answered, failed), tmp_path, told={"HTTP 500": "a <script>"})
    assert page.count("<svg") == 1
    assert "SLO 500" in page
    assert "&lt;b&gt;bold" in page
    assert "a &lt; b" in page
    assert "needs." in page
    assert "<script" not in page
    assert ("data:image/png" in page) == (answered + failed > 3000)  # many dots are an image
    assert len(page) < 1_000_000


def test_a_run_that_was_stopped_at_once_has_no_plots(tmp_path: Path) -> None:
    page = page_of([], tmp_path, stopped=True, unfinished=2)
    assert "<svg" not in page
    assert "Stopped: 0 of 0 requests are in the figures, without 2 that ran." in page


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    result = LoadResult("http://x", "w", 0, SERVER, [])
    with pytest.raises(BenchError, match="--report"):
        write_load_page(result, result.figures(SLO), tmp_path)
