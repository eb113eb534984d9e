"""The router's workers, and the carrying out of what the dispatcher decides.

router/frontdoor.py submits requests here; router/control.py says which workers there are. What they
say comes from router/worker_session.py.
"""

import asyncio
import logging
import secrets
from collections.abc import Iterable
from typing import Any

from kvrelay.clock import now_ms
from kvrelay.config import PROTOCOL_VERSION, RouterConfig
from kvrelay.kv.layout import KVLayout
from kvrelay.wire import worker_pb2
from router.answer import Answer
from router.commands import (
    Command,
    Deliver,
    Failed,
    Finished,
    NotKept,
    Resumed,
    ToDecode,
    ToPrefill,
    Trouble,
)
from router.dispatcher import Dispatcher
from router.metrics import Metrics
from router.readers import Readers
from router.request import Request
from router.resumption import Resumption
from router.watch import Watch
from router.worker_calls import Connect, over_grpc
from router.worker_session import WorkerSession
from router.workers import Workers

log = logging.getLogger(__name__)

_REAP_EVERY_S = 0.5


class Fleet:
    def __init__(
        self, config: RouterConfig, metrics: Metrics | None = None, connect: Connect = over_grpc
    ) -> None:
        self.connect = connect
        self.router_id = secrets.token_hex(16)
        self.dispatcher = Dispatcher(config)
        self.metrics = metrics or Metrics()
        self._config = config
        self._readers = Readers()
        self._shut_down: Trouble | None = None
        self._workers: dict[tuple[str, str], WorkerSession] = {}  # by role and address
        self._connected: dict[str, WorkerSession] = {}  # by instance id
        self._layout: KVLayout | None = None
        self._changed = asyncio.Event()  # set, and replaced, when workers come or go
        self._tasks: set[asyncio.Task[None]] = set()
        self._placing: asyncio.TimerHandle | None = None  # the next look for places
        self._placed_at_ms = 0.0  # the last
        self._watch = Watch(config.silence_ms)
        self._loops = [asyncio.create_task(self._reap()), asyncio.create_task(self._listen())]

    # ---- for the public service

    def submit(self, request: Request) -> Answer:
        """Raises DuplicateRequestError, QueueFullError or DeadlineError; after `shut_down` its
        Trouble."""
        if self._shut_down is not None:
            raise self._shut_down
        commands = self.dispatcher.submit(request)
        answer = self._readers.open(request)
        self.carry_out(commands)
        return answer

    async def resume(self, wish: Resumption) -> tuple[Request, Answer]:
        """A request whose client has lost its router, and its answer from the first token on.

        Raises:
            NotKeptTrouble: it is nowhere. After `shut_down`: its Trouble.
        """
        if self._shut_down is not None:
            raise self._shut_down
        found = self._readers.wait(wish)
        try:
            self.carry_out(self.dispatcher.resume(wish))
            return await found
        except asyncio.CancelledError:
            if not found.cancelled() and found.exception() is None:
                self.let_go(*found.result())
            raise
        finally:
            self._readers.forget(wish)
            self.dispatcher.withdraw(wish)

    def let_go(self, request: Request, answer: Answer, *, resumable: bool = False) -> None:
        """Nobody reads this answer any more. The request ends, unless another call reads it; or,
        where it is resumable, this router shuts down: D keeps it for whoever its client asks."""
        if not self._readers.close(request, answer):
            return
        if not resumable or self._shut_down is None:
            self.carry_out(self.dispatcher.let_go(request))

    def shut_down(self, trouble: Trouble) -> None:
        """Ends all answers that are not whole, and begins none any more."""
        self._shut_down = trouble
        self._readers.shut_down(trouble)

    # ---- for the control service

    def set_workers(self, prefill: Iterable[str], decode: Iterable[str]) -> None:
        wanted = {("prefill", a) for a in prefill} | {("decode", a) for a in decode}
        for key in sorted(set(self._workers) - wanted):
            self._workers.pop(key).stop()
        for role, address in sorted(wanted - set(self._workers)):
            worker = WorkerSession(self, self._config, self.connect, self.router_id, role, address)
            self._workers[role, address] = worker
            self._tasks.add(worker.task)
            worker.task.add_done_callback(self._tasks.discard)
        self._announce()

    def connected(self, role: str) -> int:
        return sum(worker.role == role for worker in self._connected.values())

    @property
    def not_ready(self) -> str:
        """Why no request can be served now; empty when every role that has an address has a worker
        that takes work.

        Decode workers alone compute prompts themselves; without one nothing can be served.
        """
        expected = ["decode"]
        if any(role == "prefill" for role, _ in self._workers):
            expected.insert(0, "prefill")
        missing = [role for role in expected if not self.workers.taking(role)]
        if not missing:
            return ""
        drain = all(self.connected(role) for role in missing)
        return f"no {' and no '.join(missing)} worker {'takes work' if drain else 'is connected'}"

    @property
    def requests(self) -> tuple[int, int]:
        """Requests with a worker, and requests that wait for one."""
        queued = self.dispatcher.queued
        return len(self.dispatcher) - queued, queued

    @property
    def workers(self) -> Workers:
        """As they are known, for looking at."""
        return self.dispatcher.workers

    async def wait_ready(self) -> None:
        """Returns when every worker of the last set is connected."""
        while len(self._connected) != len(self._workers):
            await self.next_change().wait()

    def next_change(self) -> asyncio.Event:
        """Set when a worker comes or goes after this call: take it before looking at them."""
        return self._changed

    async def close(self) -> None:
        self.set_workers((), ())
        for loop in self._loops:
            loop.cancel()
        if self._placing is not None:
            self._placing.cancel()
        await asyncio.gather(*self._loops, *self._tasks, return_exceptions=True)

    # ---- for workers' sessions

    def worker_up(self, worker: WorkerSession, info: worker_pb2.WorkerInfo) -> None:
        """Raises ValueError when the worker does not fit the others."""
        if info.protocol_version != PROTOCOL_VERSION:
            raise ValueError(f"protocol {PROTOCOL_VERSION} here, {info.protocol_version} there")
        layout = KVLayout.from_wire(info.layout)
        if self._connected and self._layout and self._layout.mismatch(layout):
            raise ValueError(f"KV layouts differ: {self._layout.mismatch(layout)}")
        self._lost(info.instance_id)  # two addresses of one worker, or the router was held up
        up = self.dispatcher.prefill_up if worker.role == "prefill" else self.dispatcher.decode_up
        up(info.instance_id, info)
        self._layout = layout
        self._connected[info.instance_id] = worker
        self._watch.heard(info.instance_id, now_ms())
        self._place_soon()
        self._announce()

    def worker_said(self, worker: WorkerSession, event: Any) -> None:
        """Ignores one that is lost: its requests are elsewhere."""
        if self._connected.get(worker.instance_id) is not worker:
            return
        at_ms = now_ms()
        self._watch.heard(worker.instance_id, at_ms)
        prefill = worker.role == "prefill"
        heard = self.dispatcher.on_prefill_event if prefill else self.dispatcher.on_decode_event
        self.carry_out(heard(worker.instance_id, event, at_ms))
        if event.load.draining != worker.draining:
            worker.draining = event.load.draining
            self._announce()

    def worker_down(self, worker: WorkerSession) -> None:
        if self._connected.get(worker.instance_id) is worker:
            self._lost(worker.instance_id, taken_away=worker.stopped)

    def _lost(self, worker_id: str, *, taken_away: bool = False) -> None:
        if self._connected.pop(worker_id, None) is not None:
            self._watch.gone(worker_id)
            at_ms = now_ms()
            died = not taken_away and not self._watch.was_held_up(at_ms)
            self.carry_out(self.dispatcher.worker_down(worker_id, at_ms, died=died))
            self._announce()

    def carry_out(self, commands: Iterable[Command]) -> None:
        for command in commands:
            try:
                self._carry_out(command)
            except Exception:  # the other commands are other requests'
                log.exception("not carried out: %s", command)
        self._place_soon()

    def _place_soon(self) -> None:
        """Once for all that happens in a pass of the event loop, and not too often under load."""
        if self._placing is None and self.dispatcher.to_place:
            wait_ms = max(0.0, self._placed_at_ms + self._config.queue_pump_ms - now_ms())
            loop = asyncio.get_running_loop()
            self._placing = loop.call_later(wait_ms / 1000, self._place)

    def _place(self) -> None:
        self._placing, self._placed_at_ms = None, now_ms()
        self.carry_out(self.dispatcher.pump(self._placed_at_ms))

    def _carry_out(self, command: Command) -> None:
        match command:
            case Deliver(request, _, tokens):
                self._readers.put(request, tokens)
            case ToPrefill(worker_id, message):
                self._connected[worker_id].send(message)
            case ToDecode(worker_id, message):
                self._connected[worker_id].send(message)
                if message.HasField("reserve"):
                    self.metrics.placed(message.reserve)
            case Finished(request, ending):
                self._readers.put(request, ending)
            case Resumed(wish, request):
                unread = self._readers.found(wish, request)
                if unread is not None:
                    self.let_go(request, unread)
            case NotKept(wish, trouble):
                self._readers.not_found(wish, trouble)
            case Failed(request, trouble):
                log.warning("request %s: %s", request.request_id, trouble)
                self._readers.put(request, trouble)

    def _announce(self) -> None:
        """Wakes everybody who waits for the next change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(_REAP_EVERY_S)
            try:
                self.carry_out(self.dispatcher.expire(now_ms()))
            except Exception:  # without the reaper no wait would end
                log.exception("looking for waits to end failed")

    async def _listen(self) -> None:
        """Ends the sessions of workers that say nothing."""
        while True:
            await asyncio.sleep(self._watch.tick_ms / 1000)
            try:
                for worker_id in self._watch.tick(now_ms()):
                    self._connected[worker_id].end_session()
            except Exception:  # without it a worker that hangs would keep its requests
                log.exception("looking for silent workers failed")
