"""The faults of one run, all drawn from its seed, and their end: after a time everything is well.

A fault happens at a time, or with the n-th message of a kind, at whoever sent or received it: so it
meets the narrow moments too.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from cluster.simulation.cluster import Cluster
from cluster.simulation.loop import Timeline
from cluster.simulation.network import End, Network
from cluster.simulation.processes import SimPrefill, SimProcess, SimWorker
from cluster.simulation.routers import SimRouter
from cluster.simulation.settings import Settings

_TAIL_S = 1.5  # after the last arrival no fault begins
_KINDS = {
    "kill": 6,
    "stop": 4,
    "stop and kill": 1,
    "drain": 2,
    "cut": 3,
    "break": 4,
    "slow": 2,
    "fail steps": 1,
    "spoil tokens": 1,
    "spoil blocks": 3,
    "double frame": 1,
}
_OF_LINKS = ("spoil blocks", "double frame")
_OF_ENGINES = ("slow", "fail steps", "spoil tokens")
_HOLDS_UP = ("stop", "stop and kill", "cut", "slow")
_LEAST_WAIT_S = 0.4  # of those that settings.py draws for leases, reservations and links
_MOMENTS = {
    "reserve": 8,
    "reserved": 8,
    "prefill": 8,
    "started": 8,
    "first_token": 8,
    "handed_off": 8,
    "step": 40,
    "cancel": 3,
    "hello": 2,
    "begin": 8,
    "begun": 8,
    "blocks": 16,
    "commit": 8,
    "committed": 8,
    "abort": 2,
    "aborted": 2,
    "resend": 2,
    "tokens": 40,
}


@dataclass(frozen=True)
class Fault:
    """moment: with that many messages of a kind; at_s counts when it is ""."""

    kind: str
    at_s: float
    moment: str
    number: int
    at_sender: bool
    lasts_s: float


class Faults:
    """told: of each that happens, for the trace."""

    def __init__(
        self,
        settings: Settings,
        cluster: Cluster,
        network: Network,
        timeline: Timeline,
        rng: Random,
        told: Callable[[str], None],
    ) -> None:
        self.happened: Counter[str] = Counter()
        self.struck: dict[str, None] = {}  # workers that a router may take for dead
        self.failures = 0  # attempts of one request that may have failed, without a death
        self._cluster, self._network, self._timeline = cluster, network, timeline
        self._rng = rng
        self._told = told
        self._heard: Counter[str] = Counter()
        self._due: dict[tuple[str, int], list[Fault]] = {}
        last_s = settings.arrivals[-1].at_s + _TAIL_S
        self._ends_s = timeline.now_s + last_s
        self.over_s = self._ends_s  # when the last has ended
        for _ in range(rng.randint(0, settings.faults_max)):
            fault = self._draw(last_s)
            if fault.moment:
                self._due.setdefault((fault.moment, fault.number), []).append(fault)
            else:
                timeline.call_later(fault.at_s, partial(self._begin, fault, None))

    def _draw(self, last_s: float) -> Fault:
        rng = self._rng
        moment = rng.choice(list(_MOMENTS)) if rng.random() < 0.6 else ""
        return Fault(
            kind=rng.choices(list(_KINDS), list(_KINDS.values()))[0],
            at_s=rng.uniform(0, last_s),
            moment=moment,
            number=rng.randint(1, _MOMENTS.get(moment, 1)),
            at_sender=rng.random() < 0.5,
            lasts_s=rng.choice((0.05, 0.3, 1.0, 2.5)),
        )

    def heard(self, end: End, kind: str) -> None:
        """A message of this kind has come to `end`."""
        if not self._due or kind not in _MOMENTS:
            return
        self._heard[kind] += 1
        for fault in self._due.pop((kind, self._heard[kind]), ()):
            self._timeline.call_later(0, partial(self._begin, fault, end))

    def _begin(self, fault: Fault, end: End | None) -> None:
        now_s = self._timeline.now_s
        if now_s > self._ends_s:
            return
        process = self._met(fault, end)
        if process is None:
            return
        self.happened[fault.kind] += 1
        self.over_s = max(self.over_s, now_s + 2 * fault.lasts_s)
        self._happen(fault, process, end)

    def _met(self, fault: Fault, end: End | None) -> SimProcess | None:
        """Whom it meets; None when they are gone, or are clients."""
        if fault.kind in _OF_LINKS or fault.kind in _OF_ENGINES:
            role = SimPrefill if fault.kind in _OF_LINKS else SimWorker
            able = [p for p in self._cluster.processes if isinstance(p, role)]
            return self._rng.choice(able) if able else None
        if end is not None:
            name = (end.peer if fault.at_sender else end).place.name
            process = self._cluster.by_name.get(name)
            return process if process is not None and process.place.alive else None
        processes = self._cluster.processes
        return self._rng.choice(processes) if processes else None

    def _happen(self, fault: Fault, process: SimProcess, end: End | None) -> None:
        cluster, later = self._cluster, self._timeline.call_later
        if fault.kind in ("kill", "stop", "stop and kill"):
            self._strike(process.name)
        if fault.kind in _HOLDS_UP:
            self.failures += 1 + int(fault.lasts_s / _LEAST_WAIT_S)
        if fault.kind == "kill":
            cluster.kill(process, fault.lasts_s)
        elif fault.kind == "stop":
            cluster.stop(process)
            later(fault.lasts_s, lambda: cluster.go_on(process))
        elif fault.kind == "stop and kill":
            cluster.stop(process)
            later(fault.lasts_s, lambda: cluster.kill(process, fault.lasts_s))
        elif fault.kind == "drain":
            cluster.drain(process, fault.lasts_s)
        elif fault.kind == "cut":
            self._cut(process, end, fault.lasts_s)
        elif fault.kind == "break":
            self._break(process, end)
        elif isinstance(process, SimWorker):
            self._spoil(fault, process)

    def _cut(self, process: SimProcess, end: End | None, lasts_s: float) -> None:
        """Between it and one that it talks to."""
        ends = [e for e in process.place.ends if e.peer.place.name != "clients"]
        if not ends:
            return
        one, other = process.name, self._rng.choice(ends).peer.place.name
        self._told(f"{one} and {other} are cut apart")
        self._part(one, other)
        self._network.cut(one, other)
        self._timeline.call_later(lasts_s, lambda: self._network.heal(one, other))

    def _break(self, process: SimProcess, end: End | None) -> None:
        ends = [e for e in process.place.ends if e.kind != "shm"]
        if ends:
            broken = end if end in ends else self._rng.choice(ends)
            assert broken is not None
            self.failures += 1
            if broken.kind == "session":
                self._part(process.name, broken.peer.place.name)
            self._told(f"{broken.kind} of {process.name} and {broken.peer.place.name} breaks")
            self._network.break_stream(broken)

    def _part(self, one: str, other: str) -> None:
        """A router that hears nothing of a worker takes it for dead; workers do not judge."""
        names = {one: None, other: None}
        if any(isinstance(self._cluster.by_name.get(name), SimRouter) for name in names):
            for name in names:
                self._strike(name)

    def _strike(self, name: str) -> None:
        if isinstance(self._cluster.by_name.get(name), SimWorker):
            self.struck[name] = None

    def _spoil(self, fault: Fault, worker: SimWorker) -> None:
        self._told(f"{worker.name}: {fault.kind}")
        engine, amount = worker.engine.faults, self._rng.randint(1, 3)
        self.failures += amount if fault.kind != "slow" else 0
        if fault.kind == "slow":
            engine.slowness = self._rng.choice((5.0, 40.0))
            self._timeline.call_later(fault.lasts_s, lambda: setattr(engine, "slowness", 1.0))
        elif fault.kind == "fail steps":
            engine.failing += amount
        elif fault.kind == "spoil tokens":
            engine.spoilt += amount
        elif isinstance(worker, SimPrefill) and fault.kind == "spoil blocks":
            worker.link_faults.spoilt_blocks += amount
        elif isinstance(worker, SimPrefill):
            worker.link_faults.doubled_frames += 1
