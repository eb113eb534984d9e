"""One simulated run: a cluster, its clients and its faults on one timeline, and what must hold.

`run(seed)` is all that others call. The run ends when every request has ended, faults are over and
every block is back, or at the first violation.
"""

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.simulation import checks
from cluster.simulation.clients import SimClients
from cluster.simulation.cluster import Cluster
from cluster.simulation.engine import EngineFaultError
from cluster.simulation.faults import Faults
from cluster.simulation.loop import Life, LivelockError, ProcessLoop, Timeline
from cluster.simulation.network import End, Network, Place
from cluster.simulation.processes import SimWorker, Surroundings
from cluster.simulation.refusals import Refusals
from cluster.simulation.routers import SimRouter
from cluster.simulation.settings import Settings, draw, generator
from cluster.simulation.trace import Trace, shown
from kvrelay.wire import worker_pb2

WAIT_MAX_S = 60.0  # of any request, once the last fault is over
SETTLE_MAX_S = 12.0  # until every block is back, once the last request has ended
UNWANTED_MAX_S = 1.0  # that a worker goes on with what its router has let go of
_LOOK_S = 0.25  # between two looks whether it has ended
_DEEP_EVERY = 64  # cheap checks


@dataclass(frozen=True)
class Result:
    """trace: the last lines, or all."""

    seed: int
    hash: str
    violations: list[str]
    outcomes: Counter[str]  # of requests
    messages: Counter[str]
    faults: Counter[str]
    virtual_s: float
    entries: int
    trace: list[str]


def run(seed: int, *, whole_trace: bool = False, settings: Settings | None = None) -> Result:
    """Plays one seed. The same seed gives the same result, in any process."""
    collecting = gc.isenabled()
    gc.disable()  # what it finds at a time of its own would run at that time
    try:
        return World(settings or draw(seed), whole_trace=whole_trace).play()
    finally:
        if collecting:
            gc.enable()


class World:
    def __init__(self, settings: Settings, *, whole_trace: bool = False) -> None:
        self.violations: list[str] = []
        seed = settings.seed
        shuffle = generator(seed, "order") if settings.shuffle else None
        self.timeline = Timeline(shuffle)
        self.trace = Trace(whole=whole_trace)
        self._settings = settings
        self._network = Network(
            self.timeline, generator(seed, "network"), settings.delays, self._heard
        )
        around = Surroundings(self._network, self._violated, {}, settings.shape.transports)
        self._tenants = {a.ask.request_id: a.ask.tenant for a in settings.arrivals}
        self._touched: dict[str, None] = {}
        self._checked = 0
        self._unwanted: dict[tuple[Any, ...], float] = {}  # since when
        self._roots: dict[bytes, str] = {}  # of prefix chains, and whose they are
        self.cluster = Cluster(
            settings, self.timeline, around, generator(seed, "cluster"), self._told
        )
        self.faults = Faults(
            settings,
            self.cluster,
            self._network,
            self.timeline,
            generator(seed, "faults"),
            self._told,
        )
        self.clients = SimClients(
            "clients",
            self.cluster.new_loop("clients"),
            around,
            settings.arrivals,
            lambda: list(self.cluster.routers.values()),
            generator(seed, "clients"),
            Refusals(settings, self.faults).wrong,
        )

    def play(self) -> Result:
        began_s = self.timeline.now_s
        with self._listening_to_errors():
            try:
                self._play()
            except LivelockError as error:
                self._note_violation(str(error))
            played_s, entries = self.timeline.now_s - began_s, self.timeline.entries
            self.cluster.unwind()
        return Result(
            seed=self._settings.seed,
            hash=self.trace.hash,
            violations=self.violations,
            outcomes=Counter(client.outcome for client in self.clients.clients),
            messages=self.trace.counts,
            faults=self.faults.happened,
            virtual_s=played_s,
            entries=entries,
            trace=self.trace.tail(),
        )

    def _play(self) -> None:
        timeline, look_s = self.timeline, 0.0
        settled_by_s: float | None = None
        while not self.violations:
            if not timeline.step():
                self._note_violation("nothing is left to happen")
                return
            if self._touched:
                self._check()
            if timeline.now_s < look_s:
                continue
            look_s = timeline.now_s + _LOOK_S
            self._check_wanted()
            if timeline.now_s < self.faults.over_s:
                continue
            if self.clients.waiting:
                self._check_waits()
                continue
            if settled_by_s is None:
                settled_by_s = timeline.now_s + SETTLE_MAX_S
            left = [what for process in self.cluster.processes for what in checks.left(process)]
            if not left:
                self._check_all()
                return
            if timeline.now_s > settled_by_s:
                self.violations += left
                return

    def _check_waits(self) -> None:
        if self.timeline.now_s > self.faults.over_s + WAIT_MAX_S:
            names = [client.ask.request_id for client in self.clients.waiting]
            self._note_violation(f"requests wait for ever: {names}")

    def _check_wanted(self) -> None:
        """While everybody can be reached, nobody works for long on what nobody wants."""
        now_s, processes = self.timeline.now_s, self.cluster.processes
        if self._network.is_cut or any(p.loop.life is not Life.RUNNING for p in processes):
            self._unwanted.clear()
            return
        routers = {p.name: p for p in processes if isinstance(p, SimRouter)}
        found = {
            (worker.name, *what): now_s
            for worker in processes
            if isinstance(worker, SimWorker)
            for what in checks.unwanted(worker, routers)
        }
        self._unwanted = {what: self._unwanted.get(what, now_s) for what in found}
        for (worker, *what), since_s in self._unwanted.items():
            if now_s - since_s > UNWANTED_MAX_S:
                self._note_violation(f"{worker} works on what nobody wants: {what}")

    # ---- what happens

    def _heard(self, end: End, message: Any) -> None:
        kind, text = shown(message)
        sender, receiver = end.peer.place.name, end.place.name
        self.trace.note(self.timeline.now_s, f"{sender}>{receiver} {text}", kind)
        self._touched[receiver] = None
        if kind == "reserve":
            self._check_root(message.reserve)
        self.faults.heard(end, kind)

    def _told(self, text: str) -> None:
        self.trace.note(self.timeline.now_s, f"** {text}", "event")

    def _violated(self, place: Place, text: str) -> None:
        if place.alive:
            self._note_violation(text)

    def _note_violation(self, text: str) -> None:
        self.violations.append(text)
        self.trace.note(self.timeline.now_s, f"!! {text}", "violation")

    # ---- what must hold

    def _check_root(self, reserve: worker_pb2.Reserve) -> None:
        """No two tenants share prefixes."""
        tenant = self._tenants[reserve.request_id]
        if self._roots.setdefault(reserve.hash_root, tenant) != tenant:
            self._note_violation(f"{reserve.request_id}: its prefixes are those of another tenant")

    def _check(self) -> None:
        for name in self._touched:
            process = self.cluster.by_name.get(name)
            if process is None or not process.place.alive:
                continue
            self._checked += 1
            for what in checks.cheap(process):
                self._note_violation(what)
            if self._checked % _DEEP_EVERY == 0:
                for what in checks.deep(process):
                    self._note_violation(what)
        self._touched.clear()

    def _check_all(self) -> None:
        for process in self.cluster.processes:
            for what in (*checks.cheap(process), *checks.deep(process)):
                self._note_violation(what)

    @contextmanager
    def _listening_to_errors(self) -> Iterator[None]:
        """What production code logs as an error is a bug there, unless it was planned."""
        root, handler = logging.getLogger(), _Errors(self)
        before, disabled = root.handlers[:], root.manager.disable
        root.handlers[:] = [handler]
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
            root.handlers[:] = before


class _Errors(logging.Handler):
    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        loop = asyncio.get_running_loop()
        planned = isinstance(error, EngineFaultError)
        if not planned and isinstance(loop, ProcessLoop) and not loop.is_closed():
            self._world._note_violation(f"{record.name}: {record.getMessage()}: {error!r}")
