"""Draws the rows of the engine bench. Loads matplotlib, which only the `bench` extra brings."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.bench.report import BenchError, Report, Row, number
from cluster.preparation import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _THEIRS, _LIMIT = "#2563eb", "#b6bcc6", "#111827"
_BAR = 0.4  # of the distance between two rows
_DOTS_PER_INCH = 144
_TEXT_WIDTH = 0.13  # of the panel's, at most
_LIMIT_LABEL = "limit measured in the same run"


def check_plot(file: Path, *, option: str = "--plot", suffix: str = ".png") -> None:
    """Raises BenchError if a plot could not be drawn: said before minutes are spent measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError(f"{option} needs matplotlib: pip install 'kvrelay[bench]'")
    if file.suffix != suffix:
        raise BenchError(f"{option} {file}: its name has to end in {suffix}")
    if not file.parent.is_dir():
        raise BenchError(f"{option} {file}: there is no folder {file.parent}")


def draw(report: Report, file: Path, baseline_name: str) -> None:
    """Writes a PNG with a panel for prefill and one for decode.

    Raises:
        BenchError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    panels = {
        phase: rows
        for phase in ("prefill", "decode")
        if (rows := [row for row in report.rows if row.name.startswith(f"{phase}/")])
    }
    heights = [len(rows) + 1.0 for rows in panels.values()]
    figure = Figure(figsize=(9, 1.6 + 0.5 * sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (phase, rows) in zip(all_axes, panels.items(), strict=True):
        _panel(axes, phase, rows, baseline_name)
    machine = report.machine
    where = f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    figure.suptitle(f"{machine['model']}: {machine['engine']}\n{where}", fontsize=11)
    by_label = dict(zip(*reversed(all_axes[0].get_legend_handles_labels()), strict=True))
    order = [name for name in ("kvrelay", baseline_name, _LIMIT_LABEL) if name in by_label]
    figure.legend(
        [by_label[name] for name in order],
        order,
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    try:
        figure.savefig(file, dpi=_DOTS_PER_INCH)
    except OSError as error:
        raise BenchError(f"--plot {file}: {one_line(error)}") from error


def _panel(axes: "Axes", phase: str, rows: Sequence[Row], baseline_name: str) -> None:
    at = [float(index) for index in range(len(rows))]
    compared = any(row.baseline for row in rows)
    shift = _BAR / 2 if compared else 0.0
    widest = max(max(row.value, row.baseline or 0.0, row.limit or 0.0) for row in rows)
    axes.barh(
        [place - shift for place in at],
        [row.value for row in rows],
        _BAR,
        color=_OURS,
        label="kvrelay",
    )
    if compared:
        values = [row.baseline or 0.0 for row in rows]
        below = [place + shift for place in at]
        axes.barh(below, values, _BAR, color=_THEIRS, label=baseline_name)
    for place, row in zip(at, rows, strict=True):
        ratio = f"  ({row.ratio:.1f}x)" if row.ratio else ""
        _write(axes, place - shift, row.value, f"{number(row.value)}{ratio}", row.limit, widest)
        if row.baseline:
            _write(axes, place + shift, row.baseline, number(row.baseline), row.limit, widest)
    if limited := [(row.limit, place) for place, row in zip(at, rows, strict=True) if row.limit]:
        axes.plot(*zip(*limited, strict=True), "|", color=_LIMIT, ms=18, mew=2, label=_LIMIT_LABEL)
    axes.set_yticks(at, [row.name.removeprefix(f"{phase}/") for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, widest * 1.2)
    axes.set_xlabel(rows[0].unit)
    axes.set_title(phase, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _write(
    axes: "Axes", place: float, value: float, text: str, limit: float | None, widest: float
) -> None:
    """The figure at the end of its bar; beyond the mark of the limit where they would meet."""
    meets = limit is not None and value - widest * 0.01 <= limit <= value + widest * _TEXT_WIDTH
    after = limit if meets and limit is not None else value
    offset = {"xytext": (5, 0), "textcoords": "offset points"}
    axes.annotate(text, (after, place), va="center", fontsize=8, **offset)
