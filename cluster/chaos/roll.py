"""Owns who was there: which processes of the cluster were seen, and which ended by themselves.

Pure. Made by run.py, which calls `look` every moment. The supervisor replaces who dies, so a
worker that crashes would be noticed nowhere else.
"""

from collections.abc import Iterable, Mapping, Sequence

from cluster.chaos.faults import Strike

_NOTED_S = 2.0  # an end may be noted so much later


class Roll:
    def __init__(self) -> None:
        self._roles: dict[int, str] = {}
        self._gone: dict[int, float] = {}

    def look(self, living: Mapping[int, str], now_s: float) -> None:
        """`living`: role by id of all that run or are stopped now."""
        for pid in self._roles.keys() - living.keys():
            self._gone.setdefault(pid, now_s)
        self._roles.update(living)

    def deaths(self, strikes: Sequence[Strike], start_s: float) -> list[str]:
        """A line for each that ended although nobody struck it."""
        return [
            f"{self._roles[pid]} {pid} ended by itself, {gone_s - start_s:.1f} s after the start"
            for pid, gone_s in _in_order(self._gone.items())
            if not any(_explains(strike, pid, gone_s) for strike in strikes)
        ]


def _explains(strike: Strike, pid: int, gone_s: float) -> bool:
    """One that was stopped and goes on again may not die later."""
    if strike.pid != pid or gone_s < strike.at_s:
        return False
    return not strike.stops or strike.whole_s is None or gone_s <= strike.whole_s + _NOTED_S


def _in_order(gone: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    return sorted(gone, key=lambda each: each[1])
