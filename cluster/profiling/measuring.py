"""Times steps of engines: alone for the fit, and beside a busy neighbour. Called by profile.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from cluster.capacity.device import BusyNeighbour
from cluster.preparation import Progress
from cluster.profiling.engines import Engine, Engines
from cluster.profiling.steps import StepShape

_NEIGHBOUR_DECODES = 8  # sequences


@dataclass(frozen=True)
class Effort:
    """How long is measured. A turn is of one step, and the steps take turns, so that a neighbour on
    the machine hits all of them."""

    rounds: int = 5
    turn_s: float = 0.15

    @classmethod
    def of(cls, *, quick: bool) -> "Effort":
        return cls(2, 0.02) if quick else cls()


def step_times(
    engine: Engine, shapes: Sequence[StepShape], effort: Effort, on_progress: Progress
) -> list[float]:
    """The median of each, in ms."""
    taken: list[list[float]] = [[] for _ in shapes]
    for number in range(effort.rounds):
        for index, shape in enumerate(shapes):
            done = (number * len(shapes) + index) / (effort.rounds * len(shapes))
            on_progress("measuring steps", done)
            taken[index] += engine.times_ms(shape, effort.turn_s)
    return [median(times) for times in taken]


def neighbour_slows(
    engines: Engines,
    prompts: Sequence[StepShape],
    decodes: Sequence[StepShape],
    effort: Effort,
    on_progress: Progress,
) -> BusyNeighbour:
    """What the steps of each phase lose while the other worker is busy with the other phase."""
    prefill, decode = engines.prefill, engines.decode
    if decode is None or not prompts or not decodes:
        return BusyNeighbour()
    decoding = min(decodes, key=lambda shape: abs(shape.sequences - _NEIGHBOUR_DECODES))
    return BusyNeighbour(
        prefill=_slowed(prefill, prompts, decode, decoding, effort, on_progress),
        decode=_slowed(decode, decodes, prefill, prompts[-1], effort, on_progress),
    )


def _slowed(
    engine: Engine,
    shapes: Sequence[StepShape],
    neighbour: Engine,
    neighbours: StepShape,
    effort: Effort,
    on_progress: Progress,
) -> float:
    """How many times as long, at least 1: alone and beside the other in turns, step by step."""
    ratios = []
    for number in range(effort.rounds):
        on_progress("measuring beside a neighbour", number / effort.rounds)
        for shape in shapes:
            alone = median(engine.times_ms(shape, effort.turn_s))
            with neighbour.busy(neighbours):
                ratios.append(median(engine.times_ms(shape, effort.turn_s)) / alone)
    return max(1.0, median(ratios))
