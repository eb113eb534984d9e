"""The life of a place in a run: one process after another has it, a worker or a router.

A pure object. cluster/pools.py has one for each worker that there is to be, cluster/routers.py one
for each router; both do what the state asks for.
"""

from enum import Enum

from kvrelay.lifecycle import advance

RESTART_BACKOFF_S = (0.0, 1.0, 5.0, 15.0, 30.0)
_STEADY_S = 60.0  # a process that served so long leaves a place with no failures


class PlaceState(Enum):
    VACANT = "vacant"  # another process is started when it is due
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"  # finishes what it has, takes nothing new
    RETIRED = "retired"  # idle, or out of time; the routers are being told that it is gone
    STOPPING = "stopping"


class PlaceEvent(Enum):
    LAUNCH = "launch"
    STARTED = "started"
    DRAIN = "drain"
    DRAINED = "drained"
    TOLD = "told"  # every router knows that it is gone
    ENDED = "ended"  # the process: by itself, by its supervisor, or it could not start


_S, _E = PlaceState, PlaceEvent

TRANSITIONS: dict[tuple[PlaceState, PlaceEvent], PlaceState] = {
    (_S.VACANT, _E.LAUNCH): _S.STARTING,
    (_S.STARTING, _E.STARTED): _S.SERVING,
    (_S.STARTING, _E.ENDED): _S.VACANT,
    (_S.SERVING, _E.DRAIN): _S.DRAINING,
    (_S.SERVING, _E.ENDED): _S.VACANT,
    (_S.DRAINING, _E.DRAINED): _S.RETIRED,
    (_S.DRAINING, _E.ENDED): _S.VACANT,
    (_S.RETIRED, _E.TOLD): _S.STOPPING,
    (_S.RETIRED, _E.ENDED): _S.VACANT,
    (_S.STOPPING, _E.ENDED): _S.VACANT,
}
# The routers place requests there.
OPEN_STATES = frozenset({_S.SERVING, _S.DRAINING})
# Its end is nobody's failure.
_LEAVING = frozenset({_S.RETIRED, _S.STOPPING})


class Place:
    """Failures are counted for each place alone: a process that cannot live in one of them makes
    no other wait."""

    def __init__(self) -> None:
        self.state = PlaceState.VACANT
        self.since_s = 0.0  # it is in this state
        self.due_s = 0.0  # while vacant: the next start
        self.failed_starts = 0  # in a row
        self._failures = 0  # in a row, those after the start included
        self._started_s = 0.0

    def on(self, event: PlaceEvent, now_s: float) -> None:
        """Raises IllegalTransitionError, and changes nothing, for what TRANSITIONS has not."""
        before = self.state
        self.state = advance(TRANSITIONS, before, event)
        if event is PlaceEvent.STARTED:
            self.failed_starts = 0
            self._started_s = now_s
        elif event is PlaceEvent.ENDED:
            self._ended(before, now_s)
        self.since_s = now_s

    def is_due(self, now_s: float) -> bool:
        return self.state is PlaceState.VACANT and self.due_s <= now_s

    def _ended(self, before: PlaceState, now_s: float) -> None:
        if before is PlaceState.STARTING:
            self.failed_starts += 1
        elif before in _LEAVING:
            self._failures = 0
            self.due_s = now_s
            return
        elif now_s - self._started_s > _STEADY_S:
            self._failures = 0
        backoff_s = RESTART_BACKOFF_S[min(self._failures, len(RESTART_BACKOFF_S) - 1)]
        self.due_s = now_s + backoff_s
        self._failures += 1
