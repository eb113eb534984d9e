"""The figures of one run as a person reads them, in a terminal or on a page."""

from collections.abc import Iterator

from rich import box
from rich.table import Table

from cluster.bench.report import number
from cluster.load.result import LoadResult
from cluster.workload.figures import Figures, Quantiles

TIME_COLUMNS = ("milliseconds", "p50", "p90", "p99", "max", "")
VALUE_COLUMNS = ("figure", "value", "unit")

Cells = tuple[str, ...]


def time_rows(found: Figures) -> Iterator[Cells]:
    """Quantiles, and what each is of; fits 80 columns. What the server does not tell is left
    out."""
    slo = found.slo
    rows: tuple[tuple[str, Quantiles | None, str], ...] = (
        ("TTFT", found.ttft_ms, f"since it was due; SLO {slo.ttft_ms:g}"),
        ("TPOT", found.tpot_ms, f"mean of an answer; SLO {slo.tpot_ms:g}"),
        ("ITL", found.itl_ms, "each gap between tokens"),
        ("queue", found.queue_ms, "at the server's router"),
        ("prefill", found.prefill_ms, "first chunk to first token"),
        ("hand-off", found.hand_off_ms, "from the end of prefill on"),
        ("sent late", found.lateness_ms, "by the load generator"),
    )
    for name, times, what in rows:
        if times is not None:
            four = (times.p50, times.p90, times.p99, times.most)
            yield name, *map(number, four), what


def value_rows(found: Figures) -> Iterator[Cells]:
    yield "requests", number(found.requests), ""
    yield "failed", number(found.failed), "requests"
    yield "asked", number(found.offered_rps), "requests/s"
    yield "answered", number(found.answered_rps), "requests/s"
    yield "output", number(found.output_tokens_per_s), "tokens/s"
    yield "prompts", number(found.prompt_tokens_per_s), "tokens/s"
    yield "SLO attainment", number(found.attainment * 100), "% of requests"
    yield "goodput", number(found.goodput_rps), "requests/s that meet the SLO"
    yield "cached", number(found.cached_share * 100), "% of prompt tokens"
    yield "took", number(found.seconds), "s"


def heading(result: LoadResult) -> str:
    server = result.server
    return (
        f"{result.url} · {server.model} over {server.protocol}, prompts as {server.prompts}\n"
        f"{result.workload} · seed {result.seed}"
    )


def time_table(found: Figures) -> Table:
    return _table(TIME_COLUMNS, time_rows(found), left={0, 5})


def value_table(found: Figures) -> Table:
    return _table(VALUE_COLUMNS, value_rows(found), left={0, 2})


def _table(columns: Cells, rows: Iterator[Cells], left: set[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
