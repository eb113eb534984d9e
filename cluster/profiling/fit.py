"""The step time that explains measured steps best. Pure.

Least squares of the relative errors, so that short steps count as much as long ones, and those far
off for little; with every coefficient at least 0: a step with more in it never takes less.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, quantiles

import numpy as np

from cluster.capacity.device import StepTime
from cluster.profiling.steps import StepShape

_KNOT_RATIO = 2  # of the tokens of two neighbours, at least
_PLAIN = 5  # coefficients before those of the knots
_REWEIGHTED = 8
_NEAR = 0.03  # relative errors up to here count by their square
_TINY = 1e-12
_ROUNDS_A_COLUMN = 10


@dataclass(frozen=True)
class Fit:
    """errors: of each step that was fitted, predicted over measured, less 1."""

    step: StepTime
    errors: tuple[float, ...]

    @property
    def median_error(self) -> float:
        return median(map(abs, self.errors))

    @property
    def p90_error(self) -> float:
        return quantiles(map(abs, self.errors), n=10, method="inclusive")[-1]


def fit_steps(measured: Sequence[tuple[StepShape, float]]) -> Fit:
    """measured: at least two steps, each with what it took, in ms, more than 0."""
    times = np.array([ms for _, ms in measured])
    knots = _knots({shape.prompt_tokens + shape.sequences for shape, _ in measured})
    parts = np.array([_parts(shape, knots) for shape, _ in measured])
    found = _steady(parts / times[:, None]).tolist()
    layers_ms = np.cumsum([0.0, *found[_PLAIN:]]).tolist()
    step = StepTime(
        base_ms=found[0],
        ms_per_prompt_token=found[1],
        ms_per_attended=found[2],
        ms_per_sequence=found[3],
        ms_per_context_token=found[4],
        ms_by_tokens=tuple(zip(knots, layers_ms, strict=True)) if len(knots) > 1 else (),
    )
    errors = [step.ms(*shape.work) / ms - 1 for shape, ms in measured]
    return Fit(step, tuple(errors))


def _steady(shares: np.ndarray) -> np.ndarray:
    """The coefficients that bring each row nearest to 1. A row that is far off, because something
    held up the machine, counts for little: by its distance and not by the square of it."""
    weights = np.ones(len(shares))
    for _ in range(_REWEIGHTED):
        x = least_squares(shares * weights[:, None], weights)
        weights = (_NEAR / np.maximum(np.abs(shares @ x - 1), _NEAR)) ** 0.5
    return x


def _knots(tokens: set[int]) -> list[int]:
    """The largest, and of the others those that are not too close together."""
    chosen = [max(tokens)]
    for count in sorted(tokens, reverse=True):
        if count * _KNOT_RATIO <= chosen[-1]:
            chosen.append(count)
    return chosen[::-1]


def _parts(shape: StepShape, knots: Sequence[int]) -> list[float]:
    """What each coefficient is multiplied with. A knot's is what the layers take more with its
    tokens than with those of the knot before."""
    tokens = shape.prompt_tokens + shape.sequences
    at = min(bisect_right(knots, tokens), len(knots) - 1)  # of the piece's upper end
    pieces = [
        float(number < at) if number != at else (tokens - low) / (high - low)
        for number, (low, high) in enumerate(pairwise(knots), start=1)
    ]
    return [1.0, *map(float, shape.work), *pieces]


def least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x >= 0 for which |ax - b| is least (Lawson and Hanson's active sets).

    a: [rows, columns]; b: [rows].
    """
    columns = a.shape[1]
    scale = np.linalg.norm(a, axis=0)
    scaled = a / np.where(scale > 0, scale, 1.0)  # columns differ by orders of magnitude
    free = np.zeros(columns, bool)
    x = np.zeros(columns)
    for _ in range(_ROUNDS_A_COLUMN * columns):
        gain = np.where(free, -np.inf, scaled.T @ (b - scaled @ x))
        best = int(gain.argmax())
        if gain[best] <= _TINY * len(b):
            break
        free[best] = True
        x = _least_of(scaled, b, free, x)
    return x / np.where(scale > 0, scale, 1.0)


def _least_of(a: np.ndarray, b: np.ndarray, free: np.ndarray, x: np.ndarray) -> np.ndarray:
    """With `free` columns alone; those that would go below 0 on the way are fixed at 0, and are
    no longer free afterwards."""
    while free.any():
        wanted = np.zeros_like(x)
        wanted[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
        below = free & (wanted <= 0)
        if not below.any():
            return wanted
        steps = x[below] / np.maximum(x[below] - wanted[below], _TINY)
        x = x + min(1.0, float(steps.min())) * (wanted - x)
        free &= x > _TINY
        x = np.where(free, x, 0.0)
    return np.zeros_like(x)
