"""Simulated processes: routers and workers, each the production's objects on a loop of its own."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from typing import Any

from cluster.simulation.engine import SimEngine
from cluster.simulation.links import LinkFaults, SimListener, SimWriterPool, Target
from cluster.simulation.loop import ProcessLoop
from cluster.simulation.memory import SimPool
from cluster.simulation.model import EOS, Ask
from cluster.simulation.network import End, Network, Place
from decode_worker.service import DecodeService
from kvrelay.clock import now_ms
from kvrelay.config import RouterConfig, WorkerConfig
from kvrelay.engine.step_cost import StepCost
from prefill_worker.service import PrefillService
from router.admission import Sampling
from router.answer import Answer
from router.commands import DuplicateRequestError, OverloadError, Trouble
from router.fleet import Fleet
from router.metrics import Metrics
from router.request import Ending, Request, Times
from router.resumption import Resumption


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

    def drain(self, within_s: float) -> None:
        """In its own process."""
        asyncio.get_running_loop().create_task(self.service.drain(within_s))

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


class SimRouter(SimProcess):
    """A router: its fleet, and calls of clients to it, without protocols in front."""

    role = "router"

    def __init__(
        self, name: str, loop: ProcessLoop, around: Surroundings, config: RouterConfig
    ) -> None:
        super().__init__(name, loop, around)
        self.address = f"{name}:client"
        self.fleet: Fleet | None = None
        self._config = config
        self._workers: tuple[list[str], list[str]] = ([], [])
        loop.spawn(self._live())

    async def _live(self) -> None:
        self.fleet = Fleet(self._config, _metrics(), connect=self._connect)
        self.fleet.set_workers(*self._workers)
        self._around.network.listen(self.place, self.address, self._accept)

    def set_workers(self, prefill: list[str], decode: list[str]) -> None:
        """In its own process."""
        self._workers = prefill, decode
        if self.fleet is not None:
            self.fleet.set_workers(prefill, decode)

    @contextlib.asynccontextmanager
    async def _connect(
        self,
        config: RouterConfig,
        role: str,
        address: str,
        commands: AsyncIterator[Any],
        router_id: str,
    ) -> AsyncIterator[AsyncIterator[Any]]:
        """What goes wrong is a ValueError, as the fleet knows it from gRPC's own. Workers know this
        router by its name, which is the same in every play."""
        try:
            end = await self._around.network.dial(self.place, address, "session")
        except ConnectionError as error:
            raise ValueError(str(error)) from error
        sending = asyncio.get_running_loop().create_task(_send_all(commands, end))
        try:
            yield _events(end)
        finally:
            sending.cancel()
            end.close()

    def _accept(self, end: End) -> None:
        self._answer(end, self._serve)

    async def _serve(self, end: End) -> None:
        """One call of a client: Ask or Resume first, and every answer ends with a word of it."""
        try:
            kind, *asked = await end.receive()
            try:
                await (self._generate(end, *asked) if kind == "ask" else self._resume(end, *asked))
            except (Trouble, OverloadError, DuplicateRequestError) as error:
                end.send(("refused", type(error).__name__, str(error)))
        except ConnectionError:
            return  # the client is gone

    async def _generate(self, end: End, ask: Ask) -> None:
        assert self.fleet is not None
        request = _request(ask)
        await self._stream(end, request, self.fleet.submit(request), 0)

    async def _resume(self, end: End, name: tuple[str, str], seen: int, kept_at: str) -> None:
        assert self.fleet is not None
        tenant, request_id = name
        wish = Resumption(request_id, tenant, kept_at, 0, seen, now_ms())
        request, answer = await self.fleet.resume(wish)
        await self._stream(end, request, answer, seen)

    async def _stream(self, end: End, request: Request, answer: Answer, first: int) -> None:
        """What comes after the first tokens, which the client has."""
        assert self.fleet is not None
        passed = 0
        try:
            while not isinstance(event := await answer.next(), Ending):
                new = event[max(0, first - passed) :]
                passed += len(event)
                if new:
                    end.send(("tokens", passed - len(new), request.decode_id, *new))
            end.send(("finished", event.name))
        finally:
            self.fleet.let_go(request, answer)


@cache
def _metrics() -> Metrics:
    """One for all: nobody looks."""
    return Metrics()


def _request(ask: Ask) -> Request:
    sampling = Sampling(
        temperature=1.0 if ask.seed else 0.0,
        top_k=0,
        top_p=1.0,
        seed=ask.seed,
        max_tokens=ask.max_tokens,
        stop=(),
        eos_token_ids=() if ask.ignore_eos else (EOS,),
        presence_penalty=0.5 if ask.penalties else 0.0,
        min_tokens=ask.min_tokens,
    )
    return Request(
        ask.request_id,
        ask.prompt,
        sampling,
        Times(now_ms()),
        tenant=ask.tenant,
        priority=ask.priority,
        ttft_deadline_ms=ask.ttft_deadline_ms,
    )


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


async def _events(end: End) -> AsyncIterator[Any]:
    """Until the worker ends the session; raises ConnectionError when the stream breaks."""
    while True:
        try:
            event = await end.receive()
        except ConnectionError as error:
            raise ValueError(str(error)) from error
        yield event


async def _send_all(commands: AsyncIterator[Any], end: End) -> None:
    with contextlib.suppress(ConnectionError):
        async for command in commands:
            end.send(command)
        end.close()
