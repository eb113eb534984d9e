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


def check_plot(file: Path) -> None:
    """Raises BenchError if a plot could not be drawn: said before minutes are spent measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'kvrelay[bench]'")
    if file.suffix != ".png":
        raise BenchError(f"--plot {file}: the name of a plot ends in .png")
    if not file.parent.is_dir():
        raise BenchError(f"--plot {file}: there is no folder {file.parent}")


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
    figure.suptitle(
        f"{machine['model']}: {machine['engine']}\n{machine['cpu']}, {machine['threads']} threads",
        fontsize=11,
    )
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    try:
        figure.savefig(file, dpi=_DOTS_PER_INCH)
    except OSError as error:
        raise BenchError(f"--plot {file}: {one_line(error)}") from error


def _panel(axes: "Axes", phase: str, rows: Sequence[Row], baseline_name: str) -> None:
    at = [float(index) for index in range(len(rows))]
    compared = any(row.baseline for row in rows)
    shift = _BAR / 2 if compared else 0.0
    above = [place - shift for place in at]
    ours = axes.barh(above, [row.value for row in rows], _BAR, color=_OURS, label="kvrelay")
    axes.bar_label(ours, [_label(row) for row in rows], padding=3, fontsize=8)
    if compared:
        below = [place + shift for place in at]
        values = [row.baseline or 0.0 for row in rows]
        theirs = axes.barh(below, values, _BAR, color=_THEIRS, label=baseline_name)
        axes.bar_label(theirs, [number(row.baseline) for row in rows], padding=3, fontsize=8)
    limited = [(place, row.limit) for place, row in zip(at, rows, strict=True) if row.limit]
    if limited:
        places, limits = zip(*limited, strict=True)
        axes.plot(
            limits, places, "|", color=_LIMIT, ms=18, mew=2, label="limit measured in the same run"
        )
    axes.set_yticks(at, [row.name.removeprefix(f"{phase}/") for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(rows[0].unit)
    axes.set_title(phase, loc="left", fontsize=11)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _label(row: Row) -> str:
    ratio = f"  ({row.ratio:.1f}x)" if row.ratio else ""
    return f"{number(row.value)}{ratio}"
