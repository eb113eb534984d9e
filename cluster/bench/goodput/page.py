"""The page and the plot of a goodput run. Loads matplotlib, which only the `bench` extra brings."""

import html
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.bench.goodput.arrangements import ADAPTIVE, ARRANGEMENTS, COLOCATED, DISAGGREGATED
from cluster.bench.goodput.result import NAMES, Cell, Goodput
from cluster.bench.goodput.scale import TPOT_BESIDE, TTFT_BESIDE, Point
from cluster.bench.page import html_table, paragraph, svg_of, write_page
from cluster.bench.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {COLOCATED: "#6b7280", DISAGGREGATED: "#2563eb", ADAPTIVE: "#16a34a"}
_MARKS = {COLOCATED: "s", DISAGGREGATED: "o", ADAPTIVE: "D"}
_Curve = list[tuple[float, Cell]]


def write_goodput_page(found: Goodput, file: Path) -> None:
    """Raises BenchError when the file cannot be written."""
    write_page(file, "kvrelay bench goodput", _body(found))


def _body(found: Goodput) -> Iterator[str]:
    yield "<h1>kvrelay bench goodput</h1>"
    yield paragraph(Report(found.machine, ()).heading())
    meanings = "".join(f"<li><b>{a.name}</b>: {html.escape(a.meaning)}</li>" for a in ARRANGEMENTS)
    yield f"<ul>{meanings}</ul>"
    yield from map(paragraph, found.notes)
    yield f"<figure>{svg_of(draw(found))}</figure>"
    yield html_table(found.columns(), list(found.rows()))


def draw(found: Goodput) -> "Figure":
    """Goodput above and ITL tails below, over TPOT and where it was measured over TTFT."""
    from matplotlib.figure import Figure

    sides = [side for side in (_over_tpot(found), _over_ttft(found)) if side[1]]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    if not sides:
        return figure
    rows = figure.subplots(
        2, len(sides), squeeze=False, height_ratios=(3, 2), sharex="col", sharey="row"
    )
    for column, (label, curves) in enumerate(sides):
        above, below = rows[0][column], rows[1][column]
        for name in NAMES:
            _curve(above, name, curves.get(name, []), lambda cell: cell.goodput)
            _curve(below, name, curves.get(name, []), _itl_p99)
            _curve(below, name, curves.get(name, []), _itl_p50, dashed=True)
        below.set_xlabel(label)
        below.set_yscale("log")
        above.set_ylim(bottom=0)
        _scale_axis(below, sorted({at for curve in curves.values() for at, _ in curve}))
    rows[0][0].set_ylabel("goodput, requests/s")
    rows[1][0].set_ylabel("ITL, ms: p99, p50 dashed")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    rows[0][0].legend(frameon=False)
    return figure


def _over_tpot(found: Goodput) -> tuple[str, dict[str, _Curve]]:
    label = f"TPOT, times the unloaded step (TTFT {TTFT_BESIDE:g}x)"
    chosen = [point for point in found.points if point.ttft_scale == TTFT_BESIDE]
    return label, _curves(found, chosen, lambda point: point.tpot_scale)


def _over_ttft(found: Goodput) -> tuple[str, dict[str, _Curve]]:
    label = f"TTFT, times the unloaded prefill (TPOT {TPOT_BESIDE:g}x)"
    chosen = [point for point in found.points if point.tpot_scale == TPOT_BESIDE]
    if len(chosen) < 2:
        return label, {}
    return label, _curves(found, chosen, lambda point: point.ttft_scale)


def _curves(
    found: Goodput, chosen: Sequence[Point], scale_of: Callable[[Point], float | None]
) -> dict[str, _Curve]:
    curves: dict[str, _Curve] = {}
    for point in chosen:
        at = scale_of(point)
        for name, cell in found.cells.get(point, {}).items():
            if at is not None:
                curves.setdefault(name, []).append((at, cell))
    return {name: sorted(curve, key=lambda pair: pair[0]) for name, curve in curves.items()}


def _curve(
    axes: "Axes",
    name: str,
    curve: _Curve,
    value_of: Callable[[Cell], float | None],
    *,
    dashed: bool = False,
) -> None:
    known = [(at, value) for at, cell in curve if (value := value_of(cell)) is not None]
    if known:
        axes.plot(
            *zip(*known, strict=True),
            color=_COLOURS[name],
            marker=_MARKS[name],
            markersize=3 if dashed else 5,
            linestyle="--" if dashed else "-",
            linewidth=1 if dashed else 1.8,
            label=None if dashed else name,
        )


def _itl_p99(cell: Cell) -> float | None:
    return cell.itl.p99 if cell.itl else None


def _itl_p50(cell: Cell) -> float | None:
    return cell.itl.p50 if cell.itl else None


def _scale_axis(axes: "Axes", at: Sequence[float]) -> None:
    """Logarithmic, with the measured points as its marks."""
    axes.set_xscale("log")
    axes.set_xticks(at, [f"{x:g}x" for x in at])
    axes.minorticks_off()
