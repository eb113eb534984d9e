"""The report of `kvrelay chaos` as one HTML file that needs nothing else: figures, plots, faults.

Called by the command. Loads matplotlib, which only the `bench` extra brings.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.bench import page
from cluster.bench.report import Row, number
from cluster.chaos.faults import KINDS, Strike
from cluster.chaos.outcome import Moment, Outcome
from cluster.chaos.processes import ROLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = dict(
    zip(KINDS, ("#dc2626", "#ea580c", "#9333ea", "#f59e0b", "#0891b2", "#16a34a"), strict=True)
)
_TOKENS, _RUNNING = "#2563eb", "#111827"
_ROLE_COLOURS = dict(zip(ROLES, ("#dc2626", "#2563eb", "#9333ea"), strict=True))
_SMOOTH_S = 1.0  # tokens are counted over so long


def write_page(outcome: Outcome, file: Path) -> None:
    """Raises BenchError when the file cannot be written."""
    verdict = "passed" if outcome.passed else "failed"
    page.write_page(file, f"kvrelay chaos: {verdict}", _body(outcome, verdict))


def _body(outcome: Outcome, verdict: str) -> Iterator[str]:
    yield f"<h1>kvrelay chaos: <span class='{verdict}'>{verdict}</span></h1>"
    report = outcome.report()
    yield from map(page.paragraph, (report.heading(), *report.notes))
    if len(outcome.moments) > 1:
        yield f"<figure>{_plot(outcome)}</figure>"
    yield "<div class='columns'>"
    yield page.html_table(("figure", "value", "unit"), [_cells(row) for row in report.rows])
    if outcome.strikes:
        start_s = outcome.moments[0].at_s if outcome.moments else outcome.strikes[0].at_s
        rows = [_strike_cells(strike, start_s) for strike in outcome.strikes]
        yield page.html_table(("at, s", "fault", "process", "whole after, s"), rows)
    yield "</div>"


def _cells(row: Row) -> tuple[str, ...]:
    return row.name, number(row.value), row.unit


def _strike_cells(strike: Strike, start_s: float) -> tuple[str, ...]:
    after = "never" if strike.restart_s is None else f"{strike.restart_s:.1f}"
    return f"{strike.at_s - start_s:.1f}", strike.kind, str(strike.pid), after


# ---- plots


def _plot(outcome: Outcome) -> str:
    """As SVG: tokens a second, streams, processes, one below the other, with the faults in each."""
    from matplotlib.figure import Figure

    panels: tuple[Callable[[Axes, Sequence[Moment]], None], ...] = (_tokens, _streams, _alive)
    figure = Figure(figsize=(11, 7), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=(3, 2, 2))
    start_s = outcome.moments[0].at_s
    marks: dict[str, Any] = {}  # one line of each kind of fault
    for axes, draw in zip(all_axes, panels, strict=True):
        draw(axes, outcome.moments)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        for strike in outcome.strikes:
            marks[strike.kind] = _mark(axes, strike, start_s)
    all_axes[-1].set_xlabel("seconds")
    all_axes[-1].margins(x=0.01)
    all_axes[-1].legend(loc="lower right", ncols=len(ROLES), frameon=False, fontsize=9)
    if marks:
        plain = {"ncols": len(KINDS), "frameon": False, "fontsize": 9}
        figure.legend(marks.values(), marks.keys(), loc="outside upper center", **plain)
    return page.svg_of(figure)


def _mark(axes: "Axes", strike: Strike, start_s: float) -> Any:
    """A line at the fault, which it returns, and a shade until the cluster was whole again."""
    colour = _COLOURS[strike.kind]
    at = strike.at_s - start_s
    if strike.restart_s:
        axes.axvspan(at, at + strike.restart_s, color=colour, alpha=0.12, linewidth=0)
    return axes.axvline(at, color=colour, linewidth=1.2)


def _tokens(axes: "Axes", moments: Sequence[Moment]) -> None:
    at, rates = [], []
    last = moments[0]
    for moment in moments[1:]:
        if (took_s := moment.at_s - last.at_s) >= _SMOOTH_S:
            at.append(moment.at_s - moments[0].at_s)
            rates.append((moment.tokens - last.tokens) / took_s)
            last = moment
    axes.plot(at, rates, color=_TOKENS, linewidth=1)
    axes.set_ylabel("tokens/s")


def _streams(axes: "Axes", moments: Sequence[Moment]) -> None:
    at = [moment.at_s - moments[0].at_s for moment in moments]
    axes.step(at, [moment.running for moment in moments], color=_RUNNING, linewidth=1)
    axes.set_ylabel("streams")


def _alive(axes: "Axes", moments: Sequence[Moment]) -> None:
    at = [moment.at_s - moments[0].at_s for moment in moments]
    for lift, role in enumerate(ROLES):
        # A little apart, or they would hide one another.
        counts = [moment.alive.get(role, 0) + 0.04 * lift for moment in moments]
        axes.step(at, counts, color=_ROLE_COLOURS[role], linewidth=1.2, label=role, where="post")
    axes.set_ylabel("processes")
    axes.yaxis.get_major_locator().set_params(integer=True)
