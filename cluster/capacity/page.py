"""The report of `kvrelay simulate` as one HTML file that needs nothing else."""

import html
from collections.abc import Iterator
from pathlib import Path

from cluster.bench.page import html_table, paragraph, svg_of, write_page
from cluster.bench.report import number
from cluster.capacity.result import Result
from cluster.load.plots import draw
from cluster.load.table import TIME_COLUMNS, VALUE_COLUMNS, time_rows, value_rows

_OUTCOMES_MAX = 50_000  # in the plots: of more, one in so many


def write_simulation_page(result: Result, file: Path) -> None:
    """Raises BenchError when the file cannot be written."""
    write_page(file, f"kvrelay simulate: {result.workload}", _body(result))


def _body(result: Result) -> Iterator[str]:
    found = result.figures
    yield "<h1>kvrelay simulate</h1>"
    yield paragraph(result.heading())
    share = f"{number(found.attainment * 100)} %"
    yield (
        f"<p>{html.escape(share)} of {found.requests:,} requests had their first token within "
        f"{found.slo.ttft_ms:g} ms and the others {found.slo.tpot_ms:g} ms apart on the mean.</p>"
    )
    yield from map(paragraph, result.notes())
    yield "<div class='columns'>"
    yield html_table(TIME_COLUMNS, list(time_rows(found)))
    yield html_table(VALUE_COLUMNS, list(value_rows(found)))
    rows = [(name, number(value), unit) for name, value, unit in result.rows()]
    yield html_table(("simulation", "value", ""), rows)
    yield "</div>"
    outcomes = result.played.outcomes
    every = -(-len(outcomes) // _OUTCOMES_MAX)
    if every > 1:
        yield paragraph(f"The plots show one request in {every}.")
    yield f"<figure>{svg_of(draw(outcomes[::every], found.slo))}</figure>"
