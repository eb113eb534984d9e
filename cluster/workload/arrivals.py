"""When requests are due: endless times, in seconds, drawn from `dice`. Used by mixes.py."""

import random
from collections.abc import Callable, Iterator
from typing import Literal

Arrivals = Literal["poisson", "constant", "bursty"]

# Gamma-distributed gaps of this shape vary twice as much as those of a Poisson process (their
# standard deviation is twice their mean): clumps, with quiet times between.
_BURSTY_SHAPE = 0.25


def arrival_times(arrivals: Arrivals, rate: float, dice: random.Random) -> Iterator[float]:
    """`rate` requests a second in the long run."""
    gap_s = _GAPS[arrivals]
    at_s = 0.0
    while True:
        at_s += gap_s(rate, dice)
        yield at_s


def _constant(rate: float, dice: random.Random) -> float:
    return 1 / rate


def _poisson(rate: float, dice: random.Random) -> float:
    return dice.expovariate(rate)


def _bursty(rate: float, dice: random.Random) -> float:
    return dice.gammavariate(_BURSTY_SHAPE, 1 / (rate * _BURSTY_SHAPE))


_GAPS: dict[Arrivals, Callable[[float, random.Random], float]] = {
    "poisson": _poisson,
    "constant": _constant,
    "bursty": _bursty,
}
