"""The decode worker: serves routers over gRPC and prefill workers over the KV links.

Run by cluster/ inside a Ray actor, or by tests in process. It carries out what
HandOff decides (who may write which block), and brings StepLoop what is to be computed. All state
is touched from one event loop; only the engine's steps and copies run on other threads.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from decode_worker import messages
from decode_worker.batch import Batch, Running
from decode_worker.book import Book
from decode_worker.kept import Kept
from decode_worker.making import make_handoff, make_prompts
from decode_worker.reservation import (
    Key,
    Reservation,
    ReservationEvent,
)
from decode_worker.step_loop import StepLoop
from kvrelay.clock import now_ms
from kvrelay.config import WorkerConfig
from kvrelay.draining import drained
from kvrelay.engine.host import EngineHost
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.failpoints import Failpoints, Point
from kvrelay.kv.ledger import BlockLedger, OutOfBlocksError
from kvrelay.kv.pool import KVPool
from kvrelay.membership import MembershipDoor
from kvrelay.rpc import RouterSession, listen, make_server, router_of, serve_session
from kvrelay.sessions import Sessions
from kvrelay.transport.listener import Listener
from kvrelay.transport.nccl_link import find_nccl
from kvrelay.transport.reader import TransferBook
from kvrelay.wire import worker_pb2, worker_pb2_grpc
from kvrelay.wire.worker_pb2 import DecodeCommand, DecodeEvent, FailureCode

log = logging.getLogger(__name__)

_REAP_EVERY_S = 1.0

MakeListener = Callable[[WorkerConfig, str, KVPool, TransferBook], Listener]


def make_listener(
    config: WorkerConfig, instance_id: str, pool: KVPool, book: TransferBook
) -> Listener:
    return Listener(config, instance_id, pool, book, find_nccl(config))


class DecodeService(worker_pb2_grpc.DecodeWorkerServicer):
    """Made by `start`; `address` is where routers reach it. The simulation makes it with an engine,
    a listener and a name of its own, and serves sessions without gRPC: `begin`, `serve`."""

    def __init__(
        self,
        config: WorkerConfig,
        engine: EngineHost,
        listener: MakeListener = make_listener,
        instance_id: str = "",
    ) -> None:
        self.instance_id = instance_id or f"decode-{uuid.uuid4().hex[:12]}"
        self.address = ""
        self.ledger = BlockLedger(engine.pool.blocks)
        self._config = config
        self._failpoints = Failpoints(config.failpoints)
        self._engine = engine
        self._layout = engine.pool.layout
        self._handoff = make_handoff(config, self._layout, self.ledger)
        self._batch = Batch(config.batch_max)
        self._prompts = make_prompts(config, self._layout, self._handoff)
        journal = self._handoff.cache.journal
        self._sessions: Sessions[DecodeEvent] = Sessions(
            config, journal, DecodeEvent, self._write_load
        )
        self._kept = Kept(kept_ms=config.kept_ms, kept_max=config.kept_max)
        self._steps = StepLoop(
            engine,
            self._handoff,
            self._batch,
            self._prompts,
            self._kept,
            self._sessions,
            tpot_target_ms=config.tpot_target_ms,
            freed=self._announce_load,
            failpoints=self._failpoints,
        )
        self._room = messages.RoomNews(self.ledger.available)
        self._changed = asyncio.Event()  # something may have ended
        book = Book(self._handoff, now_ms, self._committed, self._writer_lost, self._failpoints)
        self._listener = listener(config, self.instance_id, engine.pool, book)
        self._server: grpc.aio.Server
        self._door: MembershipDoor
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, config: WorkerConfig) -> "DecodeService":
        """Loads the model and listens; raises UnsupportedModelError when that cannot be."""
        service = cls(config, await EngineHost.load(config, shared_pool=True))
        await service.begin()
        service._server = make_server()
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(service, service._server)
        port = listen(service._server, f"{config.host}:0", config.certificates)
        service.address = f"{config.host}:{port}"
        service._door = MembershipDoor(config.cluster_key, service.address)
        await service._server.start()
        return service

    async def begin(self) -> None:
        """Takes KV links and makes steps from now on."""
        await self._listener.start()
        self._tasks = [
            asyncio.create_task(self._steps.run()),
            asyncio.create_task(self._reap()),
            asyncio.create_task(self._sessions.announcer.run()),
        ]
        for task in self._tasks:
            task.add_done_callback(self._sessions.end)

    async def wait_for_end(self) -> None:
        """Does not return while the worker lives. Raises what ended its loops, which no request
        would survive: whoever waits here replaces the worker."""
        await asyncio.gather(*self._tasks)

    async def drain(self, deadline_s: float) -> bool:
        """Takes nothing new from here on, tells every router so, and returns when nothing runs
        here any more; False when that took longer than deadline_s. May be called again."""
        log.info("draining: %d requests are here", len(self._handoff))
        self._handoff.drain()
        self._sessions.tell_load()
        return await drained(self._is_idle, self._changed, deadline_s)

    async def stop(self) -> None:
        await self._server.stop(grace=None)
        self._steps.cancelled.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._listener.close()
        await asyncio.to_thread(self._engine.close)

    # ---- the router's side

    async def Session(self, request_iterator: AsyncIterator[DecodeCommand], context: Any) -> None:
        await self._door.admit(context)
        await self.serve(request_iterator, context, router_of(context))

    async def serve(
        self, commands: AsyncIterator[DecodeCommand], context: Any, router: str = ""
    ) -> None:
        """The session of a router that has been let in, to its end. Events go to context.write.

        router: who it is, if it says so; only then it may find that it was here before.
        """
        if router:
            self._placed_again(router)
        info = self._engine.info(self.instance_id, self._prompts.chunk_tokens)
        info.itl_target_ms = self._config.itl_target_ms
        session = self._sessions.open(info, router)
        await serve_session(session, commands, context, self._command, self._closed)

    def _command(self, session: RouterSession[DecodeEvent], command: DecodeCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "reserve":
            self._reserve(session, command.reserve)
        elif kind == "cancel":
            key = self._kept.key_of((session, command.cancel.key))
            if key is not None:
                self._abort(key, ReservationEvent.CANCEL, "the request was cancelled")
        elif kind == "adopt":
            self._adopt(session, command.adopt)
        elif kind == "acknowledge":
            self._kept.acknowledge(session, command.acknowledge.keys)
        elif kind == "resync":
            self._sessions.announcer.resync(session)

    def _closed(self, session: RouterSession[DecodeEvent]) -> None:
        self._sessions.close(session)
        self._kept.session_ended(session, now_ms(), session.router)
        for key in self._handoff.session_ended(session):  # the others go on, and are kept
            self._abort(key, ReservationEvent.ROUTER_LOST, "the router's session ended")
        if self._sessions.has(session.router):
            self._placed_again(session.router)

    def _placed_again(self, router: str) -> None:
        """A router with a newer session lives, and gave up what it had in the one that ended."""
        for key in self._kept.orphans(router):
            self._abort(key, ReservationEvent.CANCEL, "its router has placed it again")

    def _reserve(self, session: RouterSession[DecodeEvent], reserve: worker_pb2.Reserve) -> None:
        key = (session, reserve.key)
        try:
            reservation = self._reservation_with_room(key, reserve)
        except tuple(messages.REFUSALS) as error:
            self._sessions.fail(key, messages.refusal_code(error), str(error))
            return
        self._kept.reserved(key, reserve)
        self._room.told(self.ledger.available)
        reserved = worker_pb2.Reserved(key=reserve.key)
        if reserve.prefill_here:
            self._handoff.claim_for_engine(key)
            block_size = self._layout.block_size
            self._steps.add(messages.local_prompt(reserve, reservation, block_size))
        else:
            ticket = messages.ticket(
                reserve,
                instance_id=self.instance_id,
                layout=self._layout.to_wire(),
                endpoints=self._listener.endpoints,
                lease_ms=self._config.lease_ms,
            )
            reserved.ticket.CopyFrom(self._handoff.sign(reservation, ticket))
        self._failpoints.hit(Point.DECODE_RESERVED)
        self._sessions.send(session, DecodeEvent(reserved=reserved))

    def _reservation_with_room(self, key: Key, reserve: worker_pb2.Reserve) -> Reservation:
        """Answers without a router make room. The room of one that is in a step is there only after
        it: then the refused router asks again."""
        while True:
            try:
                return self._reservation(key, reserve)
            except OutOfBlocksError:
                orphan = next(iter(self._kept.orphans()), None)
                if orphan is None:
                    raise
                self._abort(orphan, ReservationEvent.TIMEOUT, "others need its room")
                if self._handoff.is_aborting(orphan):
                    raise

    def _reservation(self, key: Key, reserve: worker_pb2.Reserve) -> Reservation:
        chain = None
        if self._config.prefix_caching:
            chain = messages.prefix_chain(reserve, self._layout.block_size)
        messages.check_prompt(reserve)
        if reserve.prefill_here:
            self._prompts.check_room()
        sampling = SamplingParams.from_wire(reserve.sampling)
        history = messages.token_history(reserve, sampling)
        reservation = self._handoff.reserve(
            key,
            reserve.prompt_tokens,
            sampling,
            now_ms(),
            chain,
            prefill_here=reserve.prefill_here,
        )
        reservation.history = history
        return reservation

    def _adopt(self, session: RouterSession[DecodeEvent], adopt: worker_pb2.Adopt) -> None:
        holder = (session, adopt.key)
        found = self._kept.adopt((adopt.tenant, adopt.request_id, adopt.nonce), holder)
        if found is None:
            self._sessions.fail(holder, FailureCode.FAILURE_CODE_NOT_KEPT, "it is not kept here")
            return
        answer, before = found
        if before is not None:  # a router that hangs may find it when it goes on
            why = "another router goes on with it"
            self._sessions.fail(before, FailureCode.FAILURE_CODE_TAKEN_OVER, why)
        self._sessions.send(session, messages.adopted(adopt.key, answer))

    # ---- the prefill workers' side, called by Book

    def _committed(self, transfer_id: int, blocks: int, first_token: int) -> None:
        reservation = self._handoff.commit(transfer_id, blocks)
        if reservation is None:
            return
        self._listener.committed(transfer_id)
        sequence = Running(
            key=reservation.key,
            prompt_tokens=reservation.prompt_tokens,
            sampling=reservation.sampling,
            blocks=reservation.blocks,
            history=reservation.history,
        )
        self._handoff.share_prompt(sequence.key)
        self._steps.join(sequence, first_token)
        self._announce_load()
        self._failpoints.hit(Point.DECODE_COMMITTED)

    def _writer_lost(self, transfer_id: int, reason: str) -> None:
        failed = self._handoff.writer_lost(transfer_id)
        if failed is not None:
            self._kept.let_go(failed.key)
            self._sessions.fail(failed.key, FailureCode.FAILURE_CODE_PEER_LOST, reason)
        self._announce_load()

    # ---- letting go

    def _is_idle(self) -> bool:
        return len(self._handoff) == 0  # whoever is in a step has a reservation until it ends

    async def _reap(self) -> None:
        crowded_out = 0
        while True:
            await asyncio.sleep(_REAP_EVERY_S)
            self._listener.log_rejected()
            for key in self._handoff.expired(now_ms()):
                self._abort(key, ReservationEvent.TIMEOUT, "its lease ran out")
                self._sessions.fail(
                    key, FailureCode.FAILURE_CODE_EXPIRED, "no progress within the lease"
                )
            for key in self._kept.expired(now_ms()):
                self._abort(key, ReservationEvent.TIMEOUT, "no router has adopted it")
            if self._kept.crowded_out > crowded_out:
                log.warning("more than %d whole answers to keep", self._config.kept_max)
                crowded_out = self._kept.crowded_out

    def _abort(self, key: Key, why: ReservationEvent, reason: str) -> None:
        transfer_id = self._steps.let_go(key, why)
        if transfer_id is not None:
            self._listener.abort(transfer_id, reason)

    def _announce_load(self) -> None:
        self._changed.set()
        if self._room.grew(self.ledger.available):
            self._sessions.tell_load()

    def _write_load(self, load: worker_pb2.DecodeLoad) -> None:
        messages.write_load(load, self._handoff, self._batch, self._prompts, self._engine.cost())
