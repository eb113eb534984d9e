"""One page of all that the suite has found: a section for each part, with its table and its plot.

Called by commands.py. Loads matplotlib, which only the `bench` extra brings.
"""

import html
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.bench.machine import commit, cores_usable, describe_machine
from cluster.bench.page import html_table, paragraph, svg_of, write_page
from cluster.bench.report import MISSING, Report, number
from cluster.bench.suite.parts import Part
from cluster.bench.suite.run import Ran

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OURS = "#2563eb"
_BODY = re.compile(r"<body>(.*)</body>", re.DOTALL)
_HEADINGS = re.compile(r"<(/?)h([1-5])\b")
_RATIOS_MAX = 40  # bars of one plot


def write_suite_page(ran: Sequence[Ran], folder: Path, file: Path) -> None:
    """Raises BenchError when the file cannot be written."""
    write_page(file, "kvrelay: all benchmarks", _body(ran, folder))


def _body(ran: Sequence[Ran], folder: Path) -> Iterator[str]:
    yield "<h1>kvrelay: all benchmarks</h1>"
    machine = {**describe_machine(cores_usable()), "commit": commit() or "-"}
    yield paragraph(Report(machine, ()).heading())
    links = [f"<a href='#{one.part.name}'>{one.part.name}</a>" for one in ran]
    yield f"<p>{' · '.join(links)}</p>"
    for one in ran:
        yield f"<h2 id='{one.part.name}'>{one.part.name}</h2>"
        yield paragraph(one.part.about)
        yield f"<p><code>{html.escape(' '.join(('kvrelay', *one.part.words)))}</code></p>"
        if one.error:
            yield paragraph(f"No results: {one.error}", "failed")
        else:
            yield from _section(one.part, folder)


def _section(part: Part, folder: Path) -> Iterator[str]:
    if part.paged:
        yield _embedded(part.page(folder).read_text(encoding="utf-8"))
        return
    found = json.loads(part.json(folder).read_text(encoding="utf-8"))
    yield paragraph(Report(found["machine"], ()).heading())
    rows = found["rows"]
    if any(row["ratio"] for row in rows):
        yield f"<figure>{svg_of(_ratios(part, rows))}</figure>"
    yield html_table(*_table(part, rows))


def _embedded(page: str) -> str:
    """The body of a page of its own, its headings one step lower than ours."""
    found = _BODY.search(page)
    body = found[1] if found else html.escape(page)
    return _HEADINGS.sub(lambda tag: f"<{tag[1]}h{int(tag[2]) + 2 if int(tag[2]) < 4 else 6}", body)


def _table(
    part: Part, rows: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Columns that no row fills are left out."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "name": lambda row: row["name"],
        "value": lambda row: number(row["value"]),
        "unit": lambda row: row["unit"],
    }
    if any(row["ratio"] for row in rows):
        columns[part.beside] = lambda row: number(row["baseline"])
        columns["ratio"] = lambda row: f"{row['ratio']:.2f}x" if row["ratio"] else MISSING
    if any(row["limit_ratio"] for row in rows):
        columns["of limit"] = lambda row: (
            f"{row['limit_ratio'] * 100:.0f} %" if row["limit_ratio"] else MISSING
        )
    return list(columns), [[shown(row) for shown in columns.values()] for row in rows]


def _ratios(part: Part, rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Each value as a share of what it stands beside."""
    from matplotlib.figure import Figure

    compared = [row for row in rows if row["ratio"]][:_RATIOS_MAX]
    figure = Figure(figsize=(9, 0.8 + 0.22 * len(compared)), layout="constrained")
    axes = figure.subplots()
    at = range(len(compared))
    axes.barh(at, [row["ratio"] - 1 for row in compared], left=1, color=_OURS, height=0.6)
    axes.axvline(1, color="#111827", linewidth=1)
    axes.set_yticks(at, [row["name"] for row in compared], fontsize=8)
    axes.set_ylim(len(compared) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlabel(f"times {part.beside}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}x")
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
