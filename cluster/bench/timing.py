"""Times programs against each other on a machine that is not quiet. Every bench that compares two
programs calls one of the `interleaved_...`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

Clock = Callable[[], float]
# Does a piece of work and says how long it took, in seconds: only it knows what of it counts.
Work = Callable[[], float]


@dataclass(frozen=True)
class Budget:
    """How long one row may be measured. `rounds_min` holds however long a round takes."""

    rounds_min: int = 3
    row_s: float = 5.0
    turn_s: float = 0.25  # of one side, before it is the other's turn
    samples_min: int = 100  # behind a 99th percentile

    @classmethod
    def quick(cls) -> "Budget":
        return cls(rounds_min=3, row_s=0.3, turn_s=0.05, samples_min=10)


def interleaved_medians(
    sides: Sequence[Work], budget: Budget, *, clock: Clock = time.perf_counter
) -> list[float]:
    """The median time of each side, in seconds; see `interleaved_times`."""
    return [median(taken) for taken in interleaved_times(sides, budget, clock=clock)]


def interleaved_times(
    sides: Sequence[Work], budget: Budget, *, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """All times of each side, in seconds.

    The sides take turns, so that a neighbour on the machine hits all of them. A turn goes on for
    `turn_s`: short work is repeated, so that it is not timed only with caches that the other side
    has just filled.
    """
    times: list[list[float]] = [[] for _ in sides]
    end = clock() + budget.row_s
    rounds = 0
    while rounds < budget.rounds_min or clock() < end:
        for work, taken in zip(sides, times, strict=True):
            turn_end = clock() + budget.turn_s
            taken.append(work())
            while clock() < turn_end:
                taken.append(work())
        rounds += 1
    return times


def timed(work: Callable[[], object], *, clock: Clock = time.perf_counter) -> float:
    """Seconds that one call of `work` takes."""
    start = clock()
    work()
    return clock() - start
