"""Simulated routers: the production's fleet on a loop of its own, and calls of clients to it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from cluster.simulation.loop import ProcessLoop
from cluster.simulation.model import EOS, Ask
from cluster.simulation.network import End
from cluster.simulation.processes import SimProcess, Surroundings
from kvrelay.clock import now_ms
from kvrelay.config import RouterConfig
from router.admission import Sampling
from router.answer import Answer
from router.commands import DuplicateRequestError, OverloadError, Trouble
from router.fleet import Fleet
from router.metrics import Metrics
from router.request import Ending, Request, Times
from router.resumption import Resumption


@dataclass(frozen=True)
class Refused:
    """How a call ends that brings no whole answer, and what its router knew of it then.

    waited_ms: since its newest token came there, or without one since it came itself.
    failed: its attempts that failed, as the router counts them.
    """

    kind: str
    text: str
    queue_full: bool
    waited_ms: float = 0.0
    failed: int = 0


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
        self._requests: dict[End, Request] = {}  # that clients read, by their calls
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
                end.send(("refused", self._refused(error, self._requests.get(end))))
        except ConnectionError:
            return  # the client is gone
        finally:
            self._requests.pop(end, None)

    def _refused(self, error: Exception, request: Request | None) -> Refused:
        assert self.fleet is not None
        queue_full = self.fleet.dispatcher.queued >= self._config.queue_max
        refused = Refused(type(error).__name__, str(error), queue_full)
        if request is None:
            return refused
        began_ms = request.times.last_token_at_ms or request.times.arrived_at_ms
        waited_ms = now_ms() - began_ms
        return replace(refused, waited_ms=waited_ms, failed=request.attempts_failed)

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
        self._requests[end] = request
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
