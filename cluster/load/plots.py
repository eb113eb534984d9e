"""Plots of one run: how long clients waited, and when. Called by page.py.

Loads matplotlib, which only the `bench` extra brings.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cluster.workload.figures import gaps_ms
from cluster.workload.outcomes import Outcome
from cluster.workload.slo import Slo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TIMES, _LIMIT, _LATE, _RUNNING = "#2563eb", "#b91c1c", "#dc2626", "#111827"
_CURVE_POINTS = 400  # of a distribution, however many values it has
_DOTS_AS_VECTORS_MAX = 3000  # more are drawn as an image
_LOG_FROM = 30.0  # a curve whose end is so many times its middle is drawn over a logarithm
_LOG_DOTS_FROM = 30.0  # dots, when the largest is so many times the smallest
_LEAST_MS = 0.01  # a logarithm has no place for 0
_BINS_MAX = 300  # over time


def draw(outcomes: Sequence[Outcome], slo: Slo) -> "Figure":
    """Distributions side by side; below them what happened over time, one under the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 13), layout="constrained")
    rows = figure.add_gridspec(5, 1, height_ratios=(4, 3, 3, 2, 2))
    answered = [outcome for outcome in outcomes if outcome.ended]
    heads = rows[0].subgridspec(1, 3)
    ttft, tpot = _present("ttft_ms", answered), _present("tpot_ms", answered)
    first = figure.add_subplot(heads[0])
    first.set_ylabel("share of requests")
    _curve(first, ttft, "TTFT, ms", slo.ttft_ms)
    _curve(figure.add_subplot(heads[1]), tpot, "TPOT, ms", slo.tpot_ms)
    last = figure.add_subplot(heads[2])
    _curve(last, gaps_ms(answered), "ITL, ms", None)
    last.set_ylabel("share of gaps")
    over = figure.add_subplot(rows[1])
    _dots(over, outcomes, "ttft_ms", "TTFT, ms", slo.ttft_ms)
    below = figure.add_subplot(rows[2], sharex=over)
    _dots(below, outcomes, "tpot_ms", "TPOT, ms", slo.tpot_ms)
    _running(figure.add_subplot(rows[3], sharex=over), outcomes)
    bottom = figure.add_subplot(rows[4], sharex=over)
    _tokens(bottom, outcomes)
    bottom.set_xlabel("seconds")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.align_ylabels()
    return figure


def _curve(axes: "Axes", values: np.ndarray, label: str, limit: float | None) -> None:
    """The share of values that are at most so large."""
    shown = values if limit is None else np.append(values, limit)
    if values.size:
        shares = np.linspace(0, 1, min(_CURVE_POINTS, max(2, values.size)))
        axes.plot(np.quantile(values, shares), shares, color=_TIMES, linewidth=1.5)
    if limit is not None:
        axes.axvline(limit, color=_LIMIT, linewidth=1, linestyle="--")
        axes.set_title(f"SLO {limit:g}", loc="right", fontsize=9, color=_LIMIT)
    if values.size and shown.max() > _LOG_FROM * max(np.median(values), _LEAST_MS):
        _logarithmic(axes, "x")
        axes.set_xlim(max(shown.min(), _LEAST_MS) * 0.9, shown.max() * 1.2)
    elif shown.size:
        axes.set_xlim(0, shown.max() * 1.05)
    axes.set_xlabel(label)
    axes.set_ylim(0, 1.02)


def _dots(axes: "Axes", outcomes: Sequence[Outcome], name: str, label: str, limit: float) -> None:
    """One of each request, at its due time; those that failed at the bottom."""
    shown = [(o.ask.at_s, getattr(o, name)) for o in outcomes if o.ended]
    pairs = np.array([pair for pair in shown if pair[1] is not None]).reshape(-1, 2)
    pairs[:, 1] = np.maximum(pairs[:, 1], _LEAST_MS)
    failed = [outcome.ask.at_s for outcome in outcomes if not outcome.ended]
    many = len(outcomes) > _DOTS_AS_VECTORS_MAX
    good = pairs[:, 1] <= limit
    for those, colour in ((good, _TIMES), (~good, _LATE)):
        axes.plot(*pairs[those].T, ".", color=colour, markersize=4, alpha=0.7, rasterized=many)
    axes.axhline(limit, color=_LIMIT, linewidth=1, linestyle="--", label=f"SLO {limit:g}")
    values = np.append(pairs[:, 1], limit)
    bottom = 0.0
    if values.max() > _LOG_DOTS_FROM * values.min():
        _logarithmic(axes, "y")
        bottom = values.min() / 1.5
    axes.set_ylim(bottom, values.max() * 1.5)
    if failed:
        plain = {"color": _LATE, "markersize": 5, "rasterized": many, "clip_on": False}
        axes.plot(failed, [bottom] * len(failed), "x", **plain, label="failed")
    axes.legend(loc="upper right", ncols=2, frameon=False, fontsize=9)
    axes.set_ylabel(label)
    axes.tick_params(labelbottom=False)


def _logarithmic(axes: "Axes", which: str) -> None:
    """With numbers as people write them."""
    from matplotlib.ticker import NullFormatter

    axes.set(**{f"{which}scale": "log"})
    ticks = getattr(axes, f"{which}axis")
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(NullFormatter())


def _running(axes: "Axes", outcomes: Sequence[Outcome]) -> None:
    """Requests that were sent and not ended. One that failed ends with its last token."""
    starts = np.array([outcome.sent_s for outcome in outcomes])
    ends = np.array([_end_s(outcome) for outcome in outcomes])
    at = np.concatenate((starts, ends))
    steps = np.concatenate((np.ones(len(starts)), -np.ones(len(ends))))
    order = np.argsort(at, kind="stable")
    axes.step(at[order], np.cumsum(steps[order]), color=_RUNNING, linewidth=1, where="post")
    axes.set_ylabel("running")
    axes.set_ylim(bottom=0)
    axes.tick_params(labelbottom=False)


def _tokens(axes: "Axes", outcomes: Sequence[Outcome]) -> None:
    times = [_token_times(outcome) for outcome in outcomes if outcome.first_token_s is not None]
    end_s = max((_end_s(outcome) for outcome in outcomes), default=0.0)
    bins = int(min(_BINS_MAX, max(1.0, end_s)))  # of a second, or more
    at = np.concatenate(times) if times else np.empty(0)
    counts, edges = np.histogram(at, bins=bins, range=(0.0, max(end_s, 1e-9)))
    axes.stairs(counts / np.diff(edges), edges, color=_TIMES, linewidth=1)
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)


def _token_times(outcome: Outcome) -> np.ndarray:
    gaps_s = np.asarray(outcome.gaps_s, np.float64)
    return np.concatenate(([0.0], np.cumsum(gaps_s))) + (outcome.first_token_s or 0.0)


def _end_s(outcome: Outcome) -> float:
    return outcome.sent_s if outcome.last_token_s is None else outcome.last_token_s


def _present(name: str, outcomes: Sequence[Outcome]) -> np.ndarray:
    values = (getattr(outcome, name) for outcome in outcomes)
    return np.array([value for value in values if value is not None], np.float64)
