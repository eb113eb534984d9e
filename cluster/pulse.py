"""Whether a process still gives signs of life; a pure object, asked by the supervisor's loop.

One for each worker (cluster/ray_worker.py) and router (cluster/router_process.py).
"""

_LOOK_MAX_S = 2.0  # counted of the time between two looks, at most


class Pulse:
    """How long a process has been silent, in time that was watched.

    A supervisor that was held up itself (stopped, starved of its core) has not listened: of a gap
    between two looks no more than _LOOK_MAX_S counts, so nobody is blamed for it.
    """

    def __init__(self, now_s: float) -> None:
        self.silent_s = 0.0
        self._looked_s = now_s

    def look(self, now_s: float, *, beat: bool) -> None:
        """`beat`: there was a sign of life since the last look."""
        watched_s = min(now_s - self._looked_s, _LOOK_MAX_S)
        self._looked_s = now_s
        self.silent_s = 0.0 if beat else self.silent_s + watched_s
