"""What a router's own decisions cost: processor time of each kind of call to its dispatcher."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")
_CALIBRATION = 20_000


@dataclass
class Spent:
    calls: int = 0
    seconds: float = 0.0


class Meter:
    """The clock's own time is measured first, and taken off."""

    def __init__(self) -> None:
        self.spent: dict[str, Spent] = {}
        clock = time.thread_time
        began = clock()
        for _ in range(_CALIBRATION):
            clock()
        self._clock_s = (clock() - began) / _CALIBRATION

    def of(self, name: str, call: Callable[_P, _R]) -> Callable[_P, _R]:
        """The same call, measured."""
        spent, clock, own_s = self.spent.setdefault(name, Spent()), time.thread_time, self._clock_s

        def measured(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            began = clock()
            try:
                return call(*args, **kwargs)
            finally:
                spent.calls += 1
                spent.seconds += clock() - began - own_s

        return measured

    @classmethod
    def together(cls, meters: Sequence["Meter"]) -> "Meter":
        """What all of them measured."""
        total = cls()
        for meter in meters:
            for name, spent in meter.spent.items():
                sums = total.spent.setdefault(name, Spent())
                sums.calls += spent.calls
                sums.seconds += spent.seconds
        return total

    @property
    def seconds(self) -> float:
        return sum(spent.seconds for spent in self.spent.values())

    def clear(self) -> None:
        """The start of what counts."""
        for spent in self.spent.values():
            spent.calls, spent.seconds = 0, 0.0
