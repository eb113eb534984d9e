"""The simulated cluster: its processes, and a supervisor that replaces those that die.

Layered for who simulates something else: no fault and no check is in here. What happens to the
processes from outside (kill, stop, cut) is a method each.
"""

from collections.abc import Callable
from random import Random

from cluster.simulation.loop import Life, ProcessLoop, Timeline
from cluster.simulation.processes import (
    SimDecode,
    SimPrefill,
    SimProcess,
    SimWorker,
    Surroundings,
)
from cluster.simulation.routers import SimRouter
from cluster.simulation.settings import Settings

_RESTART_S = 0.05
_ANNOUNCED_S = 0.03  # until every router has heard of a change, at most
_DRAIN_GRACE_S = 0.1  # a worker's own word that its time to drain is over comes a little later


class Cluster:
    """told: of what happens to processes, for the trace."""

    def __init__(
        self,
        settings: Settings,
        timeline: Timeline,
        around: Surroundings,
        rng: Random,
        told: Callable[[str], None],
    ) -> None:
        self.workers: dict[int, SimWorker] = {}  # by slot
        self.routers: dict[int, SimRouter] = {}
        self.by_name: dict[str, SimProcess] = {}  # those that have died too
        self._settings = settings
        self._timeline = timeline
        self._around = around
        self._rng = rng
        self._told = told
        self._leaving: dict[str, None] = {}  # workers that have drained, and are not announced
        self._born = 0
        self._loops: list[ProcessLoop] = []
        shape = settings.shape
        self._slots: list[tuple[type[SimWorker], int]] = [
            *((SimPrefill, blocks) for blocks in shape.prefill_blocks),
            *((SimDecode, blocks) for blocks in shape.decode_blocks),
        ]
        for slot in range(len(self._slots)):
            self._begin_worker(slot)
        for slot in range(shape.routers):
            self._begin_router(slot)
        self.announce()

    @property
    def processes(self) -> list[SimProcess]:
        """All that are not dead."""
        every: list[SimProcess] = [*self.workers.values(), *self.routers.values()]
        return [process for process in every if process.place.alive]

    def new_loop(self, name: str) -> ProcessLoop:
        """Clocks of processes differ."""
        offset_s = float(self._rng.randrange(0, 5000, 250))
        loop = ProcessLoop(self._timeline, offset_s, failed=lambda text: self._failed(name, text))
        self._loops.append(loop)
        return loop

    def _failed(self, name: str, text: str) -> None:
        self._around.violated(self._around.network.places[name], text)

    def _name(self, role: str) -> tuple[str, ProcessLoop]:
        self._born += 1
        name = f"{role}-{self._born}"
        return name, self.new_loop(name)

    def _begin_worker(self, slot: int) -> None:
        kind, blocks = self._slots[slot]
        name, loop = self._name(kind.role)
        settings = self._settings
        worker = kind(name, loop, self._around, settings.worker, settings.cost, blocks)
        self.workers[slot] = self.by_name[name] = worker
        self._told(f"{name} begins")

    def _begin_router(self, slot: int) -> None:
        name, loop = self._name("router")
        router = SimRouter(name, loop, self._around, self._settings.router)
        self.routers[slot] = self.by_name[name] = router
        self._told(f"{name} begins")

    def announce(self) -> None:
        """Tells every router which workers there are, as the pools do."""
        staying = [w for w in self.workers.values() if w.name not in self._leaving]
        prefill = [w.address for w in staying if w.role == "prefill"]
        decode = [w.address for w in staying if w.role == "decode"]
        for router in self.routers.values():
            if router.place.alive:
                when_s = self._timeline.now_s + self._rng.uniform(0, _ANNOUNCED_S)
                router.loop.post(when_s, router.set_workers, prefill, decode)

    # ---- what happens to processes

    def kill(self, process: SimProcess, restart_s: float) -> None:
        """At once; a new one takes its place after a while."""
        if not process.place.alive:
            return
        self._told(f"{process.name} is killed")
        process.loop.die()
        self._around.network.gone(process.place)
        self._timeline.call_later(0, process.loop.unwind)
        self._timeline.call_later(restart_s, lambda: self._replace(process))

    def drain(self, process: SimProcess, within_s: float) -> None:
        """As a rolling restart does: it takes nothing new, and when it is idle or the time is up
        routers let go of it, and it is replaced."""
        if isinstance(process, SimWorker) and process.service is not None:
            self._told(f"{process.name} drains")
            later = self._timeline.call_later

            def drained() -> None:
                later(0, lambda: self._leave(process))

            process.loop.post(self._timeline.now_s, process.drain, within_s, drained)
            later(within_s + _DRAIN_GRACE_S, drained)

    def _leave(self, worker: SimWorker) -> None:
        if not worker.place.alive or worker.name in self._leaving:
            return
        self._told(f"{worker.name} has drained")
        self._leaving[worker.name] = None
        self.announce()
        self._timeline.call_later(_ANNOUNCED_S, lambda: self.kill(worker, _RESTART_S))

    def _replace(self, process: SimProcess) -> None:
        for slot, worker in self.workers.items():
            if worker is process:
                self._around.targets.pop(process.name, None)
                self._begin_worker(slot)
        for slot, router in self.routers.items():
            if router is process:
                self._begin_router(slot)
        self.announce()

    def stop(self, process: SimProcess) -> None:
        """As SIGSTOP does."""
        if process.loop.life is Life.RUNNING:
            self._told(f"{process.name} is stopped")
            process.loop.stop_running()
            self._around.network.stopped(process.place)

    def go_on(self, process: SimProcess) -> None:
        """As SIGCONT does."""
        if process.loop.life is Life.STOPPED:
            self._told(f"{process.name} goes on")
            process.loop.go_on()

    def unwind(self) -> None:
        """The end of the run: nothing that was begun is left behind."""
        for loop in self._loops:
            loop.unwind()
