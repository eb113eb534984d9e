"""Simulated processes: what all have, and workers, each the production's service on a loop of its
own. Routers are in routers.py."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from cluster.simulation.engine import SimEngine
from cluster.simulation.links import LinkFaults, SimListener, SimWriterPool, Target
from cluster.simulation.loop import ProcessLoop
from cluster.simulation.memory import SimPool
from cluster.simulation.network import End, Network, Place
from decode_worker.service import DecodeService
from kvrelay.config import WorkerConfig
from kvrelay.engine.step_cost import StepCost
from prefill_worker.service import PrefillService


@dataclass
class Surroundings:
    """What every process of a run shares. violated: hears what must not be."""

    network: Network
    violated: Callable[[Place, str], None]
    targets: dict[str, Target]
    transports: tuple[str, ...]  # of KV links


class SimProcess:
    """A process: a place in the network, and a loop."""

    role = ""

    def __init__(self, name: str, loop: ProcessLoop, around: Surroundings) -> None:
        self.name = name
        self.loop = loop
        self.place = Place(name, loop)
        self.calls: dict[Any, End] = {}  # under way, by the task that serves it
        self._around = around
        around.network.places[name] = self.place

    def violated(self, text: str) -> None:
        self._around.violated(self.place, text)

    def _answer(self, end: End, work: Callable[[End], Coroutine[Any, Any, None]]) -> None:
        """A call: when its stream breaks it is cancelled, as gRPC does."""
        task = asyncio.get_running_loop().create_task(self._to_its_end(end, work))
        end.on_break = task.cancel
        self.calls[task] = end
        task.add_done_callback(self.calls.pop)

    async def _to_its_end(self, end: End, work: Callable[[End], Coroutine[Any, Any, None]]) -> None:
        try:
            await work(end)
        except asyncio.CancelledError:
            pass
        except Exception as error:
            self.violated(f"a call failed: {error!r}")
        finally:
            end.close()


class SimWorker(SimProcess):
    """A worker of either role. address: where routers dial it."""

    def __init__(
        self,
        name: str,
        loop: ProcessLoop,
        around: Surroundings,
        config: WorkerConfig,
        cost: StepCost,
        blocks: int,
    ) -> None:
        super().__init__(name, loop, around)
        self.address = f"{name}:session"
        self.blocks = blocks
        self.pool = SimPool(name, blocks, self.violated)
        self.engine = SimEngine(self.pool, cost)
        self.service: Any = None
        self._config = config
        loop.spawn(self._live())

    def _make(self) -> Any:
        raise NotImplementedError

    async def _live(self) -> None:
        self.service = self._make()
        self.pool.ledger = self.service.ledger
        await self.service.begin()
        self._around.network.listen(self.place, self.address, self._accept)
        try:
            await self.service.wait_for_end()
        except Exception as error:
            self.violated(f"the worker's loops ended: {error!r}")

    def drain(self, within_s: float, drained: Callable[[], None]) -> None:
        """In its own process. drained: called when it is idle, or the time is up."""
        asyncio.get_running_loop().create_task(self._drain(within_s, drained))

    async def _drain(self, within_s: float, drained: Callable[[], None]) -> None:
        await self.service.drain(within_s)
        drained()

    def _accept(self, end: End) -> None:
        self._answer(end, self._session)

    async def _session(self, end: End) -> None:
        await self.service.serve(_commands(end), _Context(end))


class SimPrefill(SimWorker):
    role = "prefill"

    def _make(self) -> PrefillService:
        self.link_faults = LinkFaults()
        return PrefillService(self._config, self.engine, self._writers, self.name)

    def _writers(self, config: WorkerConfig, instance_id: str, _: Any) -> SimWriterPool:
        around = self._around
        return SimWriterPool(
            config,
            instance_id,
            self.pool,
            around.network,
            self.place,
            around.targets,
            self.link_faults,
        )


class SimDecode(SimWorker):
    role = "decode"

    def _make(self) -> DecodeService:
        service = DecodeService(self._config, self.engine, self._listener, self.name)
        target = Target(self.place, self.pool, service._handoff)
        self._around.targets[self.name] = self._links.target = target
        return service

    async def _session(self, end: End) -> None:
        await self.service.serve(_commands(end), _Context(end), end.peer.place.name)

    def _listener(
        self, config: WorkerConfig, instance_id: str, pool: Any, book: Any
    ) -> SimListener:
        network, transports = self._around.network, self._around.transports
        self._links = SimListener(
            config, instance_id, self.pool, book, network, self.place, transports
        )
        return self._links


class _Context:
    """What a worker's service asks of gRPC's."""

    def __init__(self, end: End) -> None:
        self._end = end

    async def write(self, event: Any) -> None:
        if self._end.closed:
            await asyncio.get_running_loop().create_future()  # gRPC cancels the call
        self._end.send(event)


async def _commands(end: End) -> AsyncIterator[Any]:
    """Until the router ends its side; when the stream breaks the whole call is cancelled."""
    try:
        while True:
            yield await end.receive()
    except ConnectionError:
        return
