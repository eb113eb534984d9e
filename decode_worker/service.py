"""The decode worker: serves routers over gRPC and prefill workers over the KV links.

Run by cluster/ inside a Ray actor, or by tests in process. It carries out what the pure objects
decide: HandOff (who may write which block), Batch and LocalPrompts (what each step computes). All
state is touched from one event loop; only the engine's steps and copies run on other threads.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from decode_worker import messages
from decode_worker.batch import Batch, Ending, Output, Running
from decode_worker.book import Book
from decode_worker.claims import Claims
from decode_worker.handoff import HandOff
from decode_worker.prompts import LocalPrompt, LocalPrompts, PromptsFullError
from decode_worker.reservation import InvalidReservationError, Key, Reservation
from decode_worker.step import DecodeStep
from kvrelay.announcer import Announcer
from kvrelay.config import WorkerConfig
from kvrelay.engine.host import EngineHost
from kvrelay.engine.sampling import NOT_A_NUMBER, SamplingParams
from kvrelay.engine.step import CancelFlag, StepCancelledError
from kvrelay.engine.turns import Chunk
from kvrelay.failpoints import Failpoints, Point
from kvrelay.kv.ledger import BlockLedger, OutOfBlocksError
from kvrelay.membership import MembershipDoor
from kvrelay.rpc import RouterSession, listen, make_server, serve_session
from kvrelay.transport.listener import Listener
from kvrelay.transport.nccl_link import find_nccl
from kvrelay.wire import worker_pb2, worker_pb2_grpc
from kvrelay.wire.worker_pb2 import DecodeCommand, DecodeEvent, FailureCode

log = logging.getLogger(__name__)

_REAP_EVERY_S = 1.0


class DecodeService(worker_pb2_grpc.DecodeWorkerServicer):
    """Made by `start`; `address` is where routers reach it."""

    def __init__(self, config: WorkerConfig, engine: EngineHost) -> None:
        self.instance_id = f"decode-{uuid.uuid4().hex[:12]}"
        self.address = ""
        self.ledger = BlockLedger(engine.pool.blocks)
        self._config = config
        self._failpoints = Failpoints(config.failpoints)
        self._engine = engine
        self._layout = engine.pool.layout
        self._handoff = HandOff(
            self._layout,
            self.ledger,
            lease_ms=config.lease_ms,
            reservations_max=config.reservations_max,
            resends_max=config.resends_max,
            claims=Claims(
                claim_ms=config.claim_ms,
                hold_ms=config.claim_hold_ms,
                claims_max=config.claims_max,
            ),
        )
        self._batch = Batch(config.batch_max)
        self._prompts = LocalPrompts(
            self._layout.block_size,
            chunk_tokens=config.chunk_tokens,
            itl_target_ms=config.itl_target_ms,
            prompts_max=config.local_prompts_max,
            look_again=lambda prompt: self._handoff.catch_up(prompt.key, prompt.computed),
        )
        self._decoding: dict[Key, Running] = {}
        self._in_step: set[Key] = set()
        self._step_cancelled = CancelFlag()
        self._work = asyncio.Event()
        self._announced_free = self.ledger.available
        book = Book(self._handoff, _now_ms, self._committed, self._writer_lost, self._failpoints)
        self._listener = Listener(config, self.instance_id, engine.pool, book, find_nccl(config))
        self._server = make_server()
        self._door: MembershipDoor
        self._sessions: set[RouterSession[DecodeEvent]] = set()
        self._announcer = Announcer(config, self._handoff.cache.journal, self._announce)
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
            asyncio.create_task(service._announcer.run()),
        ]
        return service

    async def wait_for_end(self) -> None:
        """Does not return while the worker lives. Raises what ended its loops, which no request
        would survive: whoever waits here replaces the worker."""
        await asyncio.gather(*self._tasks)

    async def stop(self) -> None:
        await self._server.stop(grace=None)
        self._step_cancelled.set()
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
        info = self._engine.info(self.instance_id, self._prompts.chunk_tokens)
        info.itl_target_ms = self._config.itl_target_ms
        self._send(session, DecodeEvent(info=info))
        self._announcer.open(session)
        await serve_session(session, request_iterator, context, self._command, self._closed)

    def _command(self, session: RouterSession[DecodeEvent], command: DecodeCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "reserve":
            self._reserve(session, command.reserve)
        elif kind == "cancel":
            self._abort((session, command.cancel.key), "the request was cancelled")
        elif kind == "resync":
            self._announcer.resync(session)

    def _closed(self, session: RouterSession[DecodeEvent]) -> None:
        self._announcer.close(session)
        self._sessions.discard(session)
        for key in self._handoff.session_ended(session):
            self._abort(key, "the router's session ended")

    def _reserve(self, session: RouterSession[DecodeEvent], reserve: worker_pb2.Reserve) -> None:
        key = (session, reserve.key)
        try:
            reservation = self._reservation(key, reserve)
        except (OutOfBlocksError, PromptsFullError) as error:
            self._fail(key, FailureCode.FAILURE_CODE_EXHAUSTED, str(error))
            return
        except InvalidReservationError as error:
            self._fail(key, FailureCode.FAILURE_CODE_INVALID, str(error))
            return
        self._announced_free = self.ledger.available
        reserved = worker_pb2.Reserved(key=reserve.key)
        if reserve.prefill_here:
            self._handoff.claim_for_engine(key)
            block_size = self._layout.block_size
            self._prompts.add(messages.local_prompt(reserve, reservation, block_size))
            self._work.set()
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
        self._send(session, DecodeEvent(reserved=reserved))

    def _reservation(self, key: Key, reserve: worker_pb2.Reserve) -> Reservation:
        chain = None
        if self._config.prefix_caching:
            chain = messages.prefix_chain(reserve, self._layout.block_size)
        if reserve.prefill_here:
            messages.check_prompt(reserve)
            self._prompts.check_room()
        sampling = SamplingParams.from_wire(reserve.sampling)
        history = messages.token_history(reserve, sampling)
        reservation = self._handoff.reserve(
            key,
            reserve.prompt_tokens,
            sampling,
            _now_ms(),
            chain,
            prefill_here=reserve.prefill_here,
        )
        reservation.history = history
        return reservation

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
        self._publish([self._join(sequence, first_token)])
        self._announce_load()
        self._work.set()
        self._failpoints.hit(Point.DECODE_COMMITTED)

    def _writer_lost(self, transfer_id: int, reason: str) -> None:
        failed = self._handoff.writer_lost(transfer_id)
        if failed is not None:
            self._fail(failed.key, FailureCode.FAILURE_CODE_PEER_LOST, reason)
        self._announce_load()

    # ---- steps

    async def _decode(self) -> None:
        while True:
            running = self._batch.next_step()
            step = DecodeStep(running, self._prompts.next_chunks(len(running), self._engine.fit))
            if not step:
                self._work.clear()
                await self._work.wait()
                continue
            self._step_begins(step)
            try:
                self._failpoints.hit(Point.DECODE_BEFORE_STEP)
                tokens = await self._engine.step(
                    step.slices(),
                    step.params(),
                    step.positions(),
                    step.histories(),
                    self._step_cancelled,
                )
                self._failpoints.hit(Point.DECODE_AFTER_STEP)
            except StepCancelledError:
                self._engine_idle(step)
            except Exception as error:
                log.exception("a decode step failed")
                self._step_failed(step, error)
            else:
                self._step_done(step, tokens)

    def _step_begins(self, step: DecodeStep) -> None:
        self._in_step |= set(step.keys)
        self._step_cancelled = CancelFlag()
        for chunk in step.chunks:
            if chunk.is_first:
                chunk.job.started_s = time.perf_counter()
                self._send(chunk.job.key[0], messages.started(chunk.job))

    def _step_done(self, step: DecodeStep, tokens: Sequence[int | None]) -> None:
        self._engine_idle(step)
        whole = []
        for sequence, token in zip(step.running, step.tokens_of_running(tokens), strict=True):
            if token is None:
                self._spoilt(sequence.key)
            else:
                whole.append((sequence, token))
        outputs = self._batch.apply([s for s, _ in whole], [token for _, token in whole])
        for chunk, token in zip(step.chunks, step.tokens_of_chunks(tokens), strict=True):
            if self._prompts.computed(chunk):
                outputs += self._chunk_done(chunk, token)
        self._publish(outputs)
        self._announce_load()

    def _chunk_done(self, chunk: Chunk[LocalPrompt], token: int | None) -> list[Output]:
        prompt = chunk.job
        self._handoff.share_prompt(prompt.key, prompt.computed)
        if not chunk.is_last:
            return []
        if token is None:
            self._spoilt(prompt.key)
            return []
        self._handoff.computed(prompt.key)
        prefill_ms = (time.perf_counter() - prompt.started_s) * 1000
        self._send(prompt.key[0], messages.first_token(prompt, token, prefill_ms))
        sequence = Running(
            key=prompt.key,
            prompt_tokens=len(prompt.prompt),
            sampling=prompt.sampling,
            blocks=prompt.blocks,
            history=prompt.history,
        )
        return [self._join(sequence, token)]

    def _join(self, sequence: Running, first_token: int) -> Output:
        self._decoding[sequence.key] = sequence
        return self._batch.join(sequence, first_token)

    def _spoilt(self, key: Key) -> None:
        self._handoff.distrust(key)
        self._abort(key, NOT_A_NUMBER)
        self._fail(key, FailureCode.FAILURE_CODE_INTERNAL, NOT_A_NUMBER)

    def _step_failed(self, step: DecodeStep, error: Exception) -> None:
        self._engine_idle(step)
        for key in step.keys:
            self._abort(key, "a decode step failed")
            self._fail(key, FailureCode.FAILURE_CODE_INTERNAL, f"decode step: {error}")

    def _engine_idle(self, step: DecodeStep) -> None:
        """Frees what was aborted while the step ran."""
        self._handoff.engine_moved(_now_ms())
        for key in step.keys:
            self._in_step.discard(key)
            if self._handoff.is_aborting(key):
                self._handoff.engine_idle(key)

    def _publish(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            if output.ending is not Ending.NONE:
                self._failpoints.hit(Point.DECODE_FINISH)
                self._handoff.finish(output.key, self._decoding.pop(output.key).answer)
        for session, event in messages.step_outputs(outputs).items():
            self._send(session, event)

    # ---- letting go

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(_REAP_EVERY_S)
            for key in self._handoff.expired(_now_ms()):
                self._abort(key, "its lease ran out")
                self._fail(key, FailureCode.FAILURE_CODE_EXPIRED, "no progress within the lease")

    def _abort(self, key: Key, reason: str) -> None:
        self._batch.leave(key)
        self._prompts.leave(key)
        sequence = self._decoding.pop(key, None)
        answer = sequence.answer if sequence else ()
        transfer_id = self._handoff.abort(key, answer, in_step=key in self._in_step)
        if transfer_id is not None:
            self._listener.abort(transfer_id, reason)
        if all(map(self._handoff.is_aborting, self._in_step)):
            self._step_cancelled.set()  # or its blocks would wait for a step nobody wants
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

    def _announce(
        self, session: RouterSession[DecodeEvent], blocks: worker_pb2.BlockChanges | None
    ) -> None:
        self._send(session, DecodeEvent(blocks=blocks))

    def _send(self, session: Any, event: DecodeEvent) -> None:
        event.load.blocks_free = self.ledger.available
        event.load.running = len(self._batch)
        event.load.queued_tokens = self._prompts.queued_tokens
        event.load.queued_prompts = self._prompts.queued_prompts
        event.load.cost.CopyFrom(self._engine.cost())
        session.send(event)


def _now_ms() -> float:
    return time.monotonic() * 1000
