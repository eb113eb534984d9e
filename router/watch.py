"""Which workers have said nothing for too long.

Pure, used by router/fleet.py. Time in which the router itself was held up is nobody's silence: what
they said meanwhile has not been read yet. Nor is a session that breaks soon after it a death: the
worker may have taken the router for dead.
"""

from math import inf

TICKS = 6  # in the longest silence


class Watch:
    """To be asked every tick_ms; a worker is found at most a tick after its silence_ms."""

    def __init__(self, silence_ms: float) -> None:
        self.tick_ms = silence_ms / TICKS
        self._silence_ms = silence_ms
        self._heard_at_ms: dict[str, float] = {}  # on our own clock, by worker
        self._ticked_at_ms: float | None = None  # None: not yet
        self._own_ms = 0.0  # the time that has passed for us, at the last tick
        self._held_up_at_ms = -inf  # when we noticed it last

    def heard(self, worker_id: str, now_ms: float) -> None:
        """It has said something; the first time it begins to be watched."""
        if self._ticked_at_ms is None:
            self._ticked_at_ms = now_ms
        self._heard_at_ms[worker_id] = self._own(now_ms)

    def gone(self, worker_id: str) -> None:
        self._heard_at_ms.pop(worker_id, None)

    def tick(self, now_ms: float) -> list[str]:
        """Those that have been silent for too long."""
        if self._is_late(now_ms):
            self._held_up_at_ms = now_ms
        self._own_ms, self._ticked_at_ms = self._own(now_ms), now_ms
        since_ms = self._own_ms - self._silence_ms
        return [worker for worker, at_ms in self._heard_at_ms.items() if at_ms < since_ms]

    def was_held_up(self, now_ms: float) -> bool:
        """Whether this router has stood still, now or within the last silence_ms."""
        return self._is_late(now_ms) or now_ms - self._held_up_at_ms < self._silence_ms

    def _is_late(self, now_ms: float) -> bool:
        return self._ticked_at_ms is not None and now_ms - self._ticked_at_ms > 2 * self.tick_ms

    def _own(self, now_ms: float) -> float:
        """A tick that is late by more than a tick counts as one."""
        if self._ticked_at_ms is None:
            return self._own_ms
        passed_ms = self.tick_ms if self._is_late(now_ms) else now_ms - self._ticked_at_ms
        return self._own_ms + passed_ms
