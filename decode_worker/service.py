"""The decode worker: serves routers over gRPC and prefill workers over the KV links.

Run by cluster/ inside a Ray actor, or by tests in process. It carries out what the pure objects
decide: HandOff (who may write which block), Batch (what each step computes). All state is touched
from one event loop; only the engine's steps and copies run on other threads.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from decode_worker.batch import Batch, Ending, Output, Running
from decode_worker.handoff import HandOff, InvalidReservationError, Key
from kvrelay.config import WorkerConfig
from kvrelay.engine.host import EngineHost
from kvrelay.engine.sampling import NOT_A_NUMBER, SamplingParams
from kvrelay.kv.ledger import BlockLedger, OutOfBlocksError
from kvrelay.kv.prefix import PrefixChain, split_hashes
from kvrelay.membership import MembershipDoor
from kvrelay.rpc import RouterSession, listen, make_server, serve_session
from kvrelay.transport.listener import Listener
from kvrelay.transport.nccl_link import find_nccl
from kvrelay.wire import transfer_pb2, worker_pb2, worker_pb2_grpc
from kvrelay.wire.worker_pb2 import DecodeCommand, DecodeEvent, FailureCode

log = logging.getLogger(__name__)

_REAP_EVERY_S = 1.0
_ENDINGS = {
    Ending.NONE: worker_pb2.ENDING_NONE,
    Ending.EOS: worker_pb2.ENDING_EOS,
    Ending.LENGTH: worker_pb2.ENDING_LENGTH,
}


class DecodeService(worker_pb2_grpc.DecodeWorkerServicer):
    """Made by `start`; `address` is where routers reach it."""

    def __init__(self, config: WorkerConfig, engine: EngineHost) -> None:
        self.instance_id = f"decode-{uuid.uuid4().hex[:12]}"
        self.address = ""
        self.ledger = BlockLedger(engine.pool.blocks)
        self._config = config
        self._engine = engine
        self._layout = engine.pool.layout
        self._handoff = HandOff(
            self._layout,
            self.ledger,
            lease_ms=config.lease_ms,
            reservations_max=config.reservations_max,
            resends_max=config.resends_max,
        )
        self._batch = Batch(config.batch_max)
        self._decoding: dict[Key, Running] = {}
        self._in_step: set[Key] = set()
        self._work = asyncio.Event()
        self._announced_free = self.ledger.available
        book = _Book(self, self._handoff)
        self._listener = Listener(config, self.instance_id, engine.pool, book, find_nccl(config))
        self._server = make_server()
        self._door: MembershipDoor
        self._sessions: set[RouterSession[DecodeEvent]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, config: WorkerConfig) -> "DecodeService":
        """Loads the model and listens; raises UnsupportedModelError when that cannot be."""
        service = cls(config, await EngineHost.load(config, shared_pool=True))
        await service._listener.start()
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(service, service._server)
        port = listen(service._server, f"{config.host}:0", config.certificates)
        service.address = f"{config.host}:{port}"
        service._door = MembershipDoor(config.cluster_key, service.address)
        await service._server.start()
        service._tasks = [
            asyncio.create_task(service._decode()),
            asyncio.create_task(service._reap()),
        ]
        return service

    async def wait_for_end(self) -> None:
        """Does not return while the worker lives. Raises what ended its loops, which no request
        would survive: whoever waits here replaces the worker."""
        await asyncio.gather(*self._tasks)

    async def stop(self) -> None:
        await self._server.stop(grace=None)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._listener.close()
        await asyncio.to_thread(self._engine.close)

    # ---- the router's side

    async def Session(self, request_iterator: AsyncIterator[DecodeCommand], context: Any) -> None:
        await self._door.admit(context)
        session: RouterSession[DecodeEvent] = RouterSession(self._config.session_events_max)
        self._sessions.add(session)
        self._send(session, DecodeEvent(info=self._engine.info(self.instance_id)))
        await serve_session(session, request_iterator, context, self._command, self._closed)

    def _command(self, session: RouterSession[DecodeEvent], command: DecodeCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "reserve":
            self._reserve(session, command.reserve)
        elif kind == "cancel":
            self._abort((session, command.cancel.key), "the request was cancelled")

    def _closed(self, session: RouterSession[DecodeEvent]) -> None:
        self._sessions.discard(session)
        for key in self._handoff.of_session(session):
            self._abort(key, "the router's session ended")

    def _reserve(self, session: RouterSession[DecodeEvent], reserve: worker_pb2.Reserve) -> None:
        key = (session, reserve.key)
        sampling = SamplingParams.from_wire(reserve.sampling)
        try:
            chain = self._chain(reserve)
            reservation = self._handoff.reserve(
                key, reserve.prompt_tokens, sampling, _now_ms(), chain
            )
        except OutOfBlocksError as error:
            self._fail(key, FailureCode.FAILURE_CODE_EXHAUSTED, str(error))
            return
        except InvalidReservationError as error:
            self._fail(key, FailureCode.FAILURE_CODE_INVALID, str(error))
            return
        self._announced_free = self.ledger.available
        ticket = transfer_pb2.Ticket(
            request_id=reserve.request_id,
            attempt=reserve.attempt,
            decode_instance_id=self.instance_id,
            layout=self._layout.to_wire(),
            endpoints=self._listener.endpoints,
            lease_ms=self._config.lease_ms,
        )
        self._handoff.sign(reservation, ticket)
        reserved = worker_pb2.Reserved(key=reserve.key, ticket=ticket)
        self._send(session, DecodeEvent(reserved=reserved))

    def _chain(self, reserve: worker_pb2.Reserve) -> PrefixChain | None:
        if not self._config.prefix_caching or not reserve.hash_root:
            return None
        try:
            hashes = split_hashes(reserve.block_hashes)
        except ValueError as error:
            raise InvalidReservationError(str(error)) from error
        size = self._layout.block_size
        return PrefixChain(reserve.hash_root, size, hashes, reserve.tail_token_ids)

    # ---- the prefill workers' side, called by _Book

    def committed(self, transfer_id: int, blocks: int, first_token: int) -> None:
        reservation = self._handoff.commit(transfer_id, blocks)
        if reservation is None:
            return
        self._listener.committed(transfer_id)
        sequence = Running(
            key=reservation.key,
            prompt_tokens=reservation.prompt_tokens,
            sampling=reservation.sampling,
            blocks=reservation.blocks,
        )
        self._handoff.share_prompt(sequence.key)
        self._decoding[sequence.key] = sequence
        self._publish([self._batch.join(sequence, first_token)])
        self._announce_load()
        self._work.set()

    def writer_lost(self, transfer_id: int, reason: str) -> None:
        failed = self._handoff.writer_lost(transfer_id)
        if failed is not None:
            self._fail(failed.key, FailureCode.FAILURE_CODE_PEER_LOST, reason)
        self._announce_load()

    # ---- decoding

    async def _decode(self) -> None:
        while True:
            step = self._batch.next_step()
            if not step:
                self._work.clear()
                await self._work.wait()
                continue
            self._in_step |= {sequence.key for sequence in step}
            try:
                tokens = await self._engine.step(
                    [sequence.slice() for sequence in step],
                    [sequence.sampling for sequence in step],
                    [sequence.next_position for sequence in step],
                )
            except Exception as error:
                log.exception("a decode step failed")
                self._step_failed(step, error)
            else:
                self._step_done(step, tokens)

    def _step_done(self, step: Sequence[Running], tokens: Sequence[int | None]) -> None:
        self._engine_idle(step)
        whole = [(s, token) for s, token in zip(step, tokens, strict=True) if token is not None]
        for sequence in set(step) - {s for s, _ in whole}:
            self._handoff.distrust(sequence.key)
            self._abort(sequence.key, NOT_A_NUMBER)
            self._fail(sequence.key, FailureCode.FAILURE_CODE_INTERNAL, NOT_A_NUMBER)
        self._publish(self._batch.apply([s for s, _ in whole], [token for _, token in whole]))
        self._announce_load()

    def _step_failed(self, step: Sequence[Running], error: Exception) -> None:
        self._engine_idle(step)
        for sequence in step:
            self._abort(sequence.key, "a decode step failed")
            self._fail(sequence.key, FailureCode.FAILURE_CODE_INTERNAL, f"decode step: {error}")

    def _engine_idle(self, step: Sequence[Running]) -> None:
        """Frees what was aborted while the step ran."""
        for sequence in step:
            self._in_step.discard(sequence.key)
            if self._handoff.is_aborting(sequence.key):
                self._handoff.engine_idle(sequence.key)

    def _publish(self, outputs: Sequence[Output]) -> None:
        """One message for each router with all its requests' tokens."""
        by_session: dict[Any, list[worker_pb2.SequenceOutput]] = {}
        for output in outputs:
            session, key = output.key
            if output.ending is not Ending.NONE:
                self._handoff.finish(output.key, self._decoding.pop(output.key).answer)
            by_session.setdefault(session, []).append(
                worker_pb2.SequenceOutput(
                    key=key,
                    offset=output.offset,
                    token_ids=[output.token],
                    ending=_ENDINGS[output.ending],
                )
            )
        for session, messages in by_session.items():
            self._send(session, DecodeEvent(step=worker_pb2.StepOutput(outputs=messages)))

    # ---- letting go

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(_REAP_EVERY_S)
            for key in self._handoff.expired(_now_ms()):
                self._abort(key, "its lease ran out")
                self._fail(key, FailureCode.FAILURE_CODE_EXPIRED, "no KV came within the lease")

    def _abort(self, key: Key, reason: str) -> None:
        self._batch.leave(key)
        sequence = self._decoding.pop(key, None)
        answer = sequence.answer if sequence else ()
        transfer_id = self._handoff.abort(key, answer, in_step=key in self._in_step)
        if transfer_id is not None:
            self._listener.abort(transfer_id, reason)
        self._announce_load()

    def _fail(self, key: Key, code: FailureCode, message: str) -> None:
        session, number = key
        failed = worker_pb2.Failed(key=number, code=code, message=message)
        self._send(session, DecodeEvent(failed=failed))

    def _announce_load(self) -> None:
        """Tells every router when there are more blocks: requests may be waiting for them."""
        if self.ledger.available > self._announced_free:
            for session in self._sessions:
                self._send(session, DecodeEvent())
        self._announced_free = self.ledger.available

    def _send(self, session: Any, event: DecodeEvent) -> None:
        event.load.blocks_free = self.ledger.available
        event.load.running = len(self._batch)
        session.send(event)


class _Book:
    """What the KV links may ask: the hand-off with the clock added."""

    def __init__(self, service: DecodeService, handoff: HandOff) -> None:
        self._handoff = handoff
        self.expect = handoff.expect
        self.awaits_again = handoff.awaits_again
        self.lost = service.writer_lost
        self.commit = service.committed

    def begin(self, ticket: transfer_pb2.Ticket) -> None:
        self._handoff.begin(ticket, _now_ms())

    def received(self, transfer_id: int, first_index: int, count: int, bad: Sequence[int]) -> None:
        self._handoff.received(transfer_id, first_index, count, bad, _now_ms())


def _now_ms() -> float:
    return time.monotonic() * 1000
