"""The engine of a simulated worker: it is busy for as long as the cost model says.

Workers of one host may hold each other up (DeviceProfile.busy_neighbour): then what is left of a
step is stretched for as long as a neighbour computes.
"""

from collections.abc import Callable
from functools import partial

from cluster.capacity.device import DeviceProfile
from cluster.simulation.loop import Timeline


class Host:
    """The engines of one host."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []

    def changed(self, engine: "Engine") -> None:
        """This one has begun or ended to compute."""
        for other in self.engines:
            if other is not engine and other.busy:
                other.stretch()

    def shared(self, engine: "Engine") -> bool:
        return any(other.busy for other in self.engines if other is not engine)


class Engine:
    """One step, or several in a row, at a time. factor: so many times as long a step takes while
    another engine of its host computes."""

    def __init__(self, timeline: Timeline, host: Host | None, factor: float) -> None:
        self.busy = False
        self.began_s = 0.0  # what runs now
        self.alone = host is None  # nobody else can change how long a step takes
        self._timeline = timeline
        self._host = host
        self._factor = factor
        self._pace = 1.0
        self._left_ms = 0.0  # at full speed, at _since_s
        self._since_s = 0.0
        self._run = 0  # only the end of the newest is one
        self._done: Callable[[], None] = _nothing
        if host is not None:
            host.engines.append(self)

    def start(self, ms: float, done: Callable[[], None]) -> None:
        """Calls `done` when so many ms of work are done."""
        assert not self.busy, "a step while another runs"
        self.busy = True
        self.began_s = self._since_s = self._timeline.now_s
        self._left_ms, self._done = ms, done
        if self._host is not None:
            self._pace = self._factor if self._host.shared(self) else 1.0
            self._host.changed(self)
        self._put()

    def cut(self, ms: float) -> None:
        """What runs ends after so many ms of work in all: earlier than was said."""
        assert self.busy
        assert self.alone, "its steps may be stretched"
        self._left_ms = ms
        self._put()

    def stop(self) -> None:
        """For ever: the worker is dead."""
        self._run += 1
        self.busy = False
        if self._host is not None:
            self._host.engines.remove(self)
            self._host.changed(self)

    def stretch(self) -> None:
        """A neighbour has begun or ended to compute."""
        assert self._host is not None
        passed_ms = (self._timeline.now_s - self._since_s) * 1000
        self._left_ms = max(0.0, self._left_ms - passed_ms / self._pace)
        self._since_s = self._timeline.now_s
        self._pace = self._factor if self._host.shared(self) else 1.0
        self._put()

    def _put(self) -> None:
        self._run += 1
        ends_s = self._since_s + self._left_ms * self._pace / 1000
        self._timeline.put(ends_s, None, partial(self._end, self._run))

    def _end(self, run: int) -> None:
        if run != self._run:
            return
        self.busy = False
        self._done()
        if self._host is not None and not self.busy:
            self._host.changed(self)


class Hosts:
    """Puts workers on hosts in the order of their coming; none where hosts make no difference."""

    def __init__(self, profile: DeviceProfile) -> None:
        self._size = profile.workers_per_host
        factors = profile.busy_neighbour
        self._matter = self._size > 1 and max(factors.prefill, factors.decode) > 1
        self._last: Host | None = None

    def next(self) -> Host | None:
        if not self._matter:
            return None
        if self._last is None or len(self._last.engines) >= self._size:
            self._last = Host()
        return self._last


def _nothing() -> None:
    """Nothing runs."""
