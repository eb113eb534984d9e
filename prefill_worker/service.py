"""The prefill worker: serves routers over gRPC, pushes KV to decode workers over the KV links.

Run by cluster/ inside a Ray actor, or by tests in process. It carries out what Schedule decides.
Each job has a task that pushes blocks as chunks finish, so chunk k travels while chunk k+1 is
computed. All state is touched from one event loop; only engine steps and copies run elsewhere.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from kvrelay.announcer import Announcer
from kvrelay.config import WorkerConfig
from kvrelay.engine.host import EngineHost
from kvrelay.engine.sampling import NOT_A_NUMBER, SamplingParams, history_of
from kvrelay.engine.step import CancelFlag, StepCancelledError
from kvrelay.engine.turns import Chunk
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.ledger import BlockLedger
from kvrelay.kv.prefix import split_hashes
from kvrelay.membership import MembershipDoor
from kvrelay.rpc import RouterSession, listen, make_server, serve_session
from kvrelay.transport.channel import to_end
from kvrelay.transport.errors import LinkError
from kvrelay.transport.nccl_link import find_nccl
from kvrelay.transport.writer import Transfer
from kvrelay.transport.writer_pool import WriterPool
from kvrelay.wire import worker_pb2, worker_pb2_grpc
from kvrelay.wire.worker_pb2 import FailureCode, PrefillCommand, PrefillEvent
from prefill_worker.schedule import InvalidJobError, Job, JobState, QueueFullError, Schedule

log = logging.getLogger(__name__)


class PrefillService(worker_pb2_grpc.PrefillWorkerServicer):
    """Made by `start`; `address` is where routers reach it."""

    def __init__(self, config: WorkerConfig, engine: EngineHost) -> None:
        self.instance_id = f"prefill-{uuid.uuid4().hex[:12]}"
        self.address = ""
        self.ledger = BlockLedger(engine.pool.blocks)
        self._config = config
        self._engine = engine
        self._layout = engine.pool.layout
        self._schedule = Schedule(
            self._layout,
            self.ledger,
            chunk_tokens=config.chunk_tokens,
            jobs_max=config.jobs_max,
        )
        self._writers = WriterPool(config, self.instance_id, engine.pool, find_nccl(config))
        self._work = asyncio.Event()
        self._steps = 0  # ended
        self._step: Sequence[Chunk[Job]] = ()
        self._step_cancelled = CancelFlag()
        self._running: dict[Job, _Progress] = {}
        self._server = make_server()
        self._door: MembershipDoor
        self._sessions: set[RouterSession[PrefillEvent]] = set()
        self._announcer = Announcer(config, self._schedule.cache.journal, self._announce)
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, config: WorkerConfig) -> "PrefillService":
        """Loads the model and listens; raises UnsupportedModelError when that cannot be."""
        service = cls(config, await EngineHost.load(config, shared_pool=False))
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(service, service._server)
        port = listen(service._server, f"{config.host}:0", config.certificates)
        service.address = f"{config.host}:{port}"
        service._door = MembershipDoor(config.cluster_key, service.address)
        await service._server.start()
        service._tasks = [
            asyncio.create_task(service._compute()),
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
        await _cancel(self._tasks)
        await self._engine.idle()  # the task is gone, its step may not be
        for progress in self._running.values():
            progress.step_ended()
        await _cancel([progress.task for progress in self._running.values()])
        await self._writers.close()
        await asyncio.to_thread(self._engine.close)

    # ---- the router's side

    async def Session(self, request_iterator: AsyncIterator[PrefillCommand], context: Any) -> None:
        await self._door.admit(context)
        session: RouterSession[PrefillEvent] = RouterSession(self._config.session_events_max)
        self._sessions.add(session)
        info = self._engine.info(self.instance_id, self._schedule.chunk_tokens)
        self._send(session, PrefillEvent(info=info))
        self._announcer.open(session)
        await serve_session(session, request_iterator, context, self._command, self._closed)

    def _command(self, session: RouterSession[PrefillEvent], command: PrefillCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "prefill":
            self._accept(session, command.prefill)
        elif kind == "cancel":
            self._abort((session, command.cancel.key))
        elif kind == "resync":
            self._announcer.resync(session)

    def _closed(self, session: RouterSession[PrefillEvent]) -> None:
        self._announcer.close(session)
        self._sessions.discard(session)
        for key in self._schedule.of_session(session):
            self._abort(key)

    def _accept(self, session: RouterSession[PrefillEvent], prefill: worker_pb2.Prefill) -> None:
        job = Job(
            key=(session, prefill.key),
            prompt=list(prefill.prompt_token_ids),
            sampling=SamplingParams.from_wire(prefill.sampling),
            ticket=prefill.ticket,
        )
        differences = self._layout.mismatch(KVLayout.from_wire(prefill.ticket.layout))
        if differences:
            message = f"KV layouts of prefill and decode worker differ: {differences}"
            self._fail(job, FailureCode.FAILURE_CODE_INVALID, message)
            return
        try:
            if self._config.prefix_caching:
                job.hashes = split_hashes(prefill.block_hashes)
            tokens = len(job.prompt)
            job.history = history_of(job.sampling, job.prompt, tokens, prefill.answered)
            self._schedule.add(job)
        except (InvalidJobError, ValueError) as error:
            self._fail(job, FailureCode.FAILURE_CODE_INVALID, str(error))
        except QueueFullError as error:
            self._fail(job, FailureCode.FAILURE_CODE_EXHAUSTED, str(error))
        else:
            self._running[job] = _Progress(asyncio.create_task(self._hand_off(job)))
            self._work.set()

    def _abort(self, key: tuple[object, int]) -> None:
        job = self._schedule.abort(key)
        if job is not None:
            # Not at once: a task that never began would not run its clean-up either.
            asyncio.get_running_loop().call_soon(self._running[job].task.cancel)
            if all(chunk.job.state is JobState.ABORTING for chunk in self._step):
                self._step_cancelled.set()  # or its blocks would wait for a chunk nobody wants

    # ---- computing

    async def _compute(self) -> None:
        while True:
            step = self._schedule.next_step()
            if not step:
                self._work.clear()
                await self._work.wait()
                continue
            self._step_begins(step)
            try:
                tokens = await self._engine.step(
                    [chunk.slice() for chunk in step],
                    [chunk.job.sampling if chunk.is_last else None for chunk in step],
                    [len(chunk.job.prompt) for chunk in step],
                    [chunk.job.history for chunk in step],
                    self._step_cancelled,
                )
            except StepCancelledError:
                for chunk in step:
                    self._running[chunk.job].step_ended()
            except Exception as error:
                log.exception("a prefill step failed")
                self._step_failed(step, error)
            else:
                self._step_done(step, tokens)

    def _step_begins(self, step: Sequence[Chunk[Job]]) -> None:
        self._step, self._step_cancelled = step, CancelFlag()
        for chunk in step:
            progress = self._running[chunk.job]
            progress.engine_idle.clear()
            progress.advanced.set()  # what others have computed can travel during this step
            if chunk.is_first:
                progress.started_s = time.perf_counter()
                started = worker_pb2.PrefillStarted(
                    key=chunk.job.key[1], cached_tokens=chunk.job.cached_tokens
                )
                self._send(chunk.job.key[0], PrefillEvent(started=started))

    def _step_done(self, step: Sequence[Chunk[Job]], tokens: Sequence[int | None]) -> None:
        remaining = iter(tokens)
        self._steps += 1
        for chunk in step:
            self._schedule.computed(chunk)
            token = next(remaining) if chunk.is_last else None
            if chunk.job.state is JobState.HANDING_OFF:
                if token is None:
                    self._schedule.distrust(chunk.job)
                    self._fail(chunk.job, FailureCode.FAILURE_CODE_INTERNAL, NOT_A_NUMBER)
                    self._abort(chunk.job.key)
                else:
                    self._first_token(chunk.job, token)
            self._running[chunk.job].step_ended()

    def _first_token(self, job: Job, token: int) -> None:
        job.first_token = token
        progress = self._running[job]
        progress.computed_s = time.perf_counter()
        event = worker_pb2.FirstToken(
            key=job.key[1],
            token_id=token,
            prefill_ms=(progress.computed_s - progress.started_s) * 1000,
            cached_tokens=job.cached_tokens,
        )
        self._send(job.key[0], PrefillEvent(first_token=event))

    def _step_failed(self, step: Sequence[Chunk[Job]], error: Exception) -> None:
        for chunk in step:
            self._running[chunk.job].step_ended()
            self._fail(chunk.job, FailureCode.FAILURE_CODE_INTERNAL, f"prefill step: {error}")
            self._abort(chunk.job.key)

    # ---- handing off

    async def _hand_off(self, job: Job) -> None:
        """Lives as long as the job. However it ends, the blocks come back."""
        transfer: Transfer | None = None
        try:
            transfer = await self._writers.begin(job.ticket)
            await self._push(job, transfer)
            assert job.first_token is not None
            await transfer.commit(job.first_token, self._config.link_reply_ms / 1000)
            self._acknowledged(job, transfer)
        except LinkError as error:
            self._fail(job, FailureCode.FAILURE_CODE_PEER_LOST, str(error))
        except asyncio.CancelledError:
            log.debug("%s, attempt %d: cancelled", job.ticket.request_id, job.ticket.attempt)
        except Exception as error:
            log.exception("handing off %s failed", job.ticket.request_id)
            self._fail(job, FailureCode.FAILURE_CODE_INTERNAL, f"hand-off: {error}")
        finally:
            await to_end(self._let_go(job, transfer))  # a cancel must not cut it short

    async def _push(self, job: Job, transfer: Transfer) -> None:
        """Sends every block that the ticket asks for as soon as it is filled; returns when the
        prompt is computed, too."""
        progress = self._running[job]
        while True:
            done = job.first_token is not None
            filled = len(job.blocks) if done else job.computed // self._layout.block_size
            first = job.ticket.first_block + transfer.blocks_sent
            blocks = job.blocks[first:filled]
            if blocks:
                await transfer.push(blocks)
            elif done:
                return
            else:
                await self._wait_for_chunk(progress, transfer)

    async def _wait_for_chunk(self, progress: "_Progress", transfer: Transfer) -> None:
        progress.advanced.clear()
        steps, wait_s = self._steps, transfer.ticket.lease_ms / 3000
        try:
            async with asyncio.timeout(wait_s):
                await progress.advanced.wait()
            progress.idle_s = 0.0
        except TimeoutError:
            if self._steps > steps:  # waiting its turn at an engine that moves
                await transfer.push([])  # renews the lease
                progress.idle_s = 0.0
                return
            progress.idle_s += wait_s
            if progress.idle_s >= 3 * wait_s:  # the lease on this side
                raise LinkError("the engine made no step within the ticket's lease") from None

    def _acknowledged(self, job: Job, transfer: Transfer) -> None:
        if job.state is not JobState.HANDING_OFF:
            return  # cancelled in the same moment
        progress = self._running[job]
        self._schedule.acknowledged(job)
        event = worker_pb2.HandedOff(
            key=job.key[1],
            kv_bytes=transfer.bytes_sent,
            kv_transfer_ms=transfer.busy_s * 1000,
            kv_exposed_ms=(time.perf_counter() - progress.computed_s) * 1000,
            transport=transfer.transport,
        )
        self._send(job.key[0], PrefillEvent(handed_off=event))

    async def _let_go(self, job: Job, transfer: Transfer | None) -> None:
        self._schedule.abort(job.key)  # first: no cancel comes after it
        if transfer is not None:
            if not transfer.committed:
                with contextlib.suppress(LinkError):
                    await transfer.abort("the prefill worker gave the request up")
            transfer.close()
        progress = self._running[job]
        await progress.engine_idle.wait()
        if job.state is JobState.ABORTING:
            self._schedule.quiet(job)
        del self._running[job]
        self._work.set()  # blocks are free: somebody may be waiting for them
        for session in self._sessions:
            self._send(session, PrefillEvent())

    def _fail(self, job: Job, code: FailureCode, message: str) -> None:
        failed = worker_pb2.Failed(key=job.key[1], code=code, message=message)
        self._send(job.key[0], PrefillEvent(failed=failed))

    def _announce(
        self, session: RouterSession[PrefillEvent], blocks: worker_pb2.BlockChanges | None
    ) -> None:
        self._send(session, PrefillEvent(blocks=blocks))

    def _send(self, session: Any, event: PrefillEvent) -> None:
        event.load.queued_tokens = self._schedule.queued_tokens
        event.load.queued_prompts = self._schedule.queued_prompts
        event.load.cost.CopyFrom(self._engine.cost())
        event.load.blocks_free = self.ledger.available
        session.send(event)


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Progress:
    """What the service keeps of a job beside the schedule: its task, its events, its times."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task
        self.advanced = asyncio.Event()  # a chunk is done
        self.engine_idle = asyncio.Event()  # no step with this job is running
        self.engine_idle.set()
        self.started_s = 0.0
        self.computed_s = 0.0
        self.idle_s = 0.0  # waited for an engine that made no step

    def step_ended(self) -> None:
        self.engine_idle.set()
        self.advanced.set()
