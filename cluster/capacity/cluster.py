"""A simulated cluster: its workers and routers, and what kills and replaces them."""

from collections.abc import Callable
from functools import partial
from random import Random

from cluster.capacity.decode import SimDecode
from cluster.capacity.engine import Hosts
from cluster.capacity.meter import Meter
from cluster.capacity.prefill import SimPrefill
from cluster.capacity.router import SimRouter
from cluster.capacity.surroundings import Surroundings
from router.request import Request

Worker = SimPrefill | SimDecode

_NOTICED_S = 0.01  # after its death a router knows: its session has broken
_REPLACED_S = 5.0  # after its death another one is ready


class Cluster:
    """Every router has a session with every worker. ended: as SimRouter's."""

    def __init__(
        self,
        around: Surroundings,
        prefill: int,
        decode: int,
        routers: int,
        ended: Callable[[Request, str], None],
        meter: Meter | None = None,
    ) -> None:
        self.kills = 0
        self.workers: dict[str, Worker] = {}
        self._around = around
        self._hosts = Hosts(around.profile)
        self._born = 0
        for number in range(routers):
            name = f"router-{number}"
            around.routers[name] = SimRouter(name, around, ended, meter)
        self.routers = list(around.routers.values())
        kinds = _in_turns(prefill, decode)
        for kind in kinds:
            self._begin(kind)

    def _begin(self, kind: type[Worker]) -> None:
        self._born += 1
        name = f"{kind.role}-{self._born}"
        worker = kind(name, self._around, self._hosts.next())
        self.workers[name] = worker
        if isinstance(worker, SimDecode):
            self._around.decode[name] = worker
        for router in self.routers:
            router.connect(worker)

    def kill_every(self, every_s: float, dice: Random) -> None:
        """One worker after another, whichever it hits; each is replaced a while later."""

        def kill() -> None:
            if self.workers:
                self.kill(dice.choice(list(self.workers.values())))
            self._around.timeline.call_later(every_s, kill)

        self._around.timeline.call_later(every_s, kill)

    def kill(self, worker: Worker) -> None:
        self.kills += 1
        del self.workers[worker.name]
        self._around.decode.pop(worker.name, None)
        worker.die()
        later = self._around.timeline.call_later
        for router in self.routers:
            later(self._around.network_s + _NOTICED_S, partial(router.lose, worker))
        later(_REPLACED_S, lambda: self._begin(type(worker)))

    @property
    def is_idle(self) -> bool:
        return all(worker.is_idle for worker in self.workers.values())

    def check(self, *, deep: bool) -> None:
        """Raises AssertionError when anything is left of requests that have ended. deep: looks at
        every block of every worker, and at all that routers know of them; for tests."""
        for router in self.routers:
            assert len(router.dispatcher) == 0, f"{router.name} has requests left"
            if deep:
                router.dispatcher.check()
        for worker in self.workers.values():
            assert worker.is_idle, f"{worker.name} has something left"
            if deep:
                worker.check()


def _in_turns(prefill: int, decode: int) -> list[type[Worker]]:
    """So that hosts have both roles where they can."""
    kinds: list[type[Worker]] = []
    for number in range(max(prefill, decode)):
        kinds += [SimPrefill] * (number < prefill) + [SimDecode] * (number < decode)
    return kinds
