"""Owns what is done to the cluster, and when: one fault at a time, by seed. Pure.

Called by siege.py, which carries it out. The next fault waits until the cluster is whole again.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from kvrelay.lifecycle import advance

KINDS = (
    "kill-prefill",
    "kill-decode",
    "kill-router",
    "stop-prefill",
    "stop-decode",
    "stop-router",
)
_JITTER = 0.25
_STOP_S = (0.5, 5.0)  # some shorter than what makes others think it dead, some longer
_HANG_S = 20.0  # longer than the supervisor waits: it ends the process
_HANG_SHARE = 0.25  # of stops
_WHOLE_FOR_S = 1.0  # so long it has to look whole before it is


@dataclass(frozen=True)
class Fault:
    """`kind` is one of KINDS: a signal (SIGKILL or SIGSTOP) and whom it meets."""

    kind: str
    wait_s: float  # since the fault before
    pick: float  # which of those it may meet, 0 to 1
    stop_s: float

    @property
    def kills(self) -> bool:
        return self.kind.startswith("kill-")

    @property
    def role(self) -> str:
        return self.kind.partition("-")[2]


def faults(kinds: Sequence[str], every_s: float, seed: int) -> Iterator[Fault]:
    """Without end: every kind once in an order drawn by seed, then again."""
    dice = random.Random(seed)
    while True:
        for kind in dice.sample(sorted(kinds), len(kinds)):
            wait_s = every_s * dice.uniform(1 - _JITTER, 1 + _JITTER)
            stop_s = _HANG_S if dice.random() < _HANG_SHARE else dice.uniform(*_STOP_S)
            yield Fault(kind, wait_s, dice.random(), stop_s)


class State(Enum):
    QUIET = auto()
    STOPPED = auto()  # a process is, until it is woken
    BROKEN = auto()  # until the cluster is whole


class Event(Enum):
    STOPS = auto()
    KILLS = auto()
    WAKES = auto()
    WHOLE = auto()
    GIVEN_UP = auto()


TRANSITIONS = {
    (State.QUIET, Event.STOPS): State.STOPPED,
    (State.QUIET, Event.KILLS): State.BROKEN,
    (State.STOPPED, Event.WAKES): State.BROKEN,
    (State.BROKEN, Event.WHOLE): State.QUIET,
    (State.BROKEN, Event.GIVEN_UP): State.QUIET,
}


@dataclass
class Strike:
    """A fault that was done. `whole_s` None: the cluster was not whole again within the bound.
    A process that was stopped goes on at `woken_s`, or somebody has ended it by `ended_s`."""

    kind: str
    pid: int
    at_s: float
    whole_s: float | None = None
    woken_s: float | None = None
    ended_s: float | None = None

    @property
    def role(self) -> str:
        return self.kind.partition("-")[2]

    @property
    def stops(self) -> bool:
        return self.kind.startswith("stop-")

    @property
    def restart_s(self) -> float | None:
        return None if self.whole_s is None else self.whole_s - self.at_s


class Course:
    """Which fault is due. Tell it what was done and how the cluster is."""

    def __init__(self, coming: Iterator[Fault], start_s: float, whole_max_s: float) -> None:
        self.state = State.QUIET
        self.strikes: list[Strike] = []
        self._coming = coming
        self._next = next(coming)
        self._due_s = start_s + self._next.wait_s
        self._whole_max_s = whole_max_s
        self._wake_s = 0.0
        self._since_s: float | None = None  # it has looked whole
        self._give_up_s = 0.0

    def due(self, now_s: float) -> Fault | None:
        """What is to be done now."""
        return self._next if self.state is State.QUIET and now_s >= self._due_s else None

    def wake_due(self, now_s: float) -> bool:
        """The process that was stopped is to go on."""
        return self.state is State.STOPPED and now_s >= self._wake_s

    def struck(self, pid: int, now_s: float) -> None:
        """What was due was done to this process."""
        fault = self._next
        self._advance(Event.KILLS if fault.kills else Event.STOPS, now_s)
        self.strikes.append(Strike(fault.kind, pid, now_s))
        self._wake_s = now_s + fault.stop_s
        self._next = next(self._coming)
        self._due_s = now_s + self._next.wait_s

    def missed(self, now_s: float) -> None:
        """There was nobody for what was due: another kind comes instead, a little later."""
        self._next = next(self._coming)
        self._due_s = now_s + _WHOLE_FOR_S

    def woken(self, now_s: float) -> None:
        self._advance(Event.WAKES, now_s)
        self.strikes[-1].woken_s = now_s

    def ended(self, now_s: float) -> None:
        """The process that was stopped will not go on: its supervisor has ended it."""
        self._advance(Event.WAKES, now_s)
        self.strikes[-1].ended_s = now_s

    def looked(self, whole: bool, now_s: float) -> None:
        """The cluster looks whole, or it does not."""
        if self.state is not State.BROKEN:
            return
        if not whole:
            self._since_s = None
            if now_s >= self._give_up_s:
                self._advance(Event.GIVEN_UP, now_s)
            return
        if self._since_s is None:
            self._since_s = now_s
        if now_s - self._since_s >= _WHOLE_FOR_S:
            self.strikes[-1].whole_s = self._since_s
            self._advance(Event.WHOLE, now_s)

    def _advance(self, event: Event, now_s: float) -> None:
        self.state = advance(TRANSITIONS, self.state, event)
        self._since_s = None
        self._give_up_s = now_s + self._whole_max_s
