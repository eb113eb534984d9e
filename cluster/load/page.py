"""The report of `kvrelay bench serve` as one HTML file that needs nothing else."""

import html
from collections.abc import Iterator
from pathlib import Path

from cluster.bench.page import html_table, paragraph, svg_of, write_page
from cluster.bench.report import number
from cluster.load.plots import draw
from cluster.load.result import LoadResult
from cluster.load.table import TIME_COLUMNS, VALUE_COLUMNS, heading, time_rows, value_rows
from cluster.workload.figures import Figures

_BAR = 0.9  # attainment that is usually asked for


def write_load_page(result: LoadResult, found: Figures, file: Path) -> None:
    """Raises BenchError when the file cannot be written."""
    write_page(file, f"kvrelay bench serve: {result.workload}", _body(result, found))


def _body(result: LoadResult, found: Figures) -> Iterator[str]:
    verdict = "passed" if found.attainment >= _BAR else "failed"
    share = f"{number(found.attainment * 100)} %"
    yield "<h1>kvrelay bench serve</h1>"
    yield paragraph(heading(result))
    yield (
        f"<p><span class='{verdict}'>{html.escape(share)}</span> of {found.requests:,} requests "
        f"had their first token within {found.slo.ttft_ms:g} ms and the others "
        f"{found.slo.tpot_ms:g} ms apart on the mean.</p>"
    )
    yield from (paragraph(f"WARNING {line}", "failed") for line in result.warnings(found))
    yield from map(paragraph, result.notes(found))
    yield "<div class='columns'>"
    yield html_table(TIME_COLUMNS, list(time_rows(found)))
    yield html_table(VALUE_COLUMNS, list(value_rows(found)))
    yield "</div>"
    if result.outcomes:
        yield f"<figure>{svg_of(draw(result.outcomes, found.slo))}</figure>"
