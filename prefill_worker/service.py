"""The prefill worker: serves routers over gRPC, pushes KV to decode workers over the KV links.

Run by cluster/ inside a Ray actor, or by tests in process. It carries out what Schedule decides.
Each job has a Push that sends blocks as chunks finish, so chunk k travels while chunk k+1 is
computed. All state is touched from one event loop; only engine steps and copies run elsewhere.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from kvrelay.clock import now_s
from kvrelay.config import WorkerConfig
from kvrelay.draining import DrainingError, drained
from kvrelay.engine.host import EngineHangsError, EngineHost
from kvrelay.engine.sampling import NOT_A_NUMBER
from kvrelay.engine.sampling_params import SamplingParams, history_of
from kvrelay.engine.step import CancelFlag, StepCancelledError
from kvrelay.engine.turns import Chunk
from kvrelay.failpoints import Failpoints, Point
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.ledger import BlockLedger
from kvrelay.kv.pool import KVPool
from kvrelay.kv.prefix import split_hashes
from kvrelay.membership import MembershipDoor
from kvrelay.rpc import RouterSession, listen, make_server, serve_session
from kvrelay.sessions import Sessions
from kvrelay.transport.nccl_link import find_nccl
from kvrelay.transport.writer_pool import WriterPool
from kvrelay.wire import worker_pb2, worker_pb2_grpc
from kvrelay.wire.worker_pb2 import FailureCode, PrefillCommand, PrefillEvent
from prefill_worker import messages
from prefill_worker.push import Push
from prefill_worker.schedule import (
    InvalidJobError,
    Job,
    JobEvent,
    JobState,
    Key,
    QueueFullError,
    Schedule,
)

log = logging.getLogger(__name__)

MakeWriters = Callable[[WorkerConfig, str, KVPool], WriterPool]


def make_writers(config: WorkerConfig, instance_id: str, pool: KVPool) -> WriterPool:
    return WriterPool(config, instance_id, pool, find_nccl(config))


class PrefillService(worker_pb2_grpc.PrefillWorkerServicer):
    """Made by `start`; `address` is where routers reach it. The simulation makes it with an engine,
    links and a name of its own, and serves sessions without gRPC: `begin`, `serve`."""

    def __init__(
        self,
        config: WorkerConfig,
        engine: EngineHost,
        writers: MakeWriters = make_writers,
        instance_id: str = "",
    ) -> None:
        self.instance_id = instance_id or f"prefill-{uuid.uuid4().hex[:12]}"
        self.address = ""
        self.ledger = BlockLedger(engine.pool.blocks)
        self._config = config
        self._failpoints = Failpoints(config.failpoints)
        self._engine = engine
        self._layout = engine.pool.layout
        self._schedule = Schedule(
            self._layout,
            self.ledger,
            chunk_tokens=config.chunk_tokens,
            jobs_max=config.jobs_max,
        )
        self._writers = writers(config, self.instance_id, engine.pool)
        self._work = asyncio.Event()
        self._steps = 0  # ended
        self._step: Sequence[Chunk[Job]] = ()
        self._step_cancelled = CancelFlag()
        self._running: dict[Job, Push] = {}
        self._changed = asyncio.Event()  # one of those has ended
        self._server: grpc.aio.Server
        self._door: MembershipDoor
        journal = self._schedule.cache.journal
        self._sessions: Sessions[PrefillEvent] = Sessions(
            config, journal, PrefillEvent, self._write_load
        )
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, config: WorkerConfig) -> "PrefillService":
        """Loads the model and listens; raises UnsupportedModelError when that cannot be."""
        service = cls(config, await EngineHost.load(config, shared_pool=False))
        await service.begin()
        service._server = make_server()
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(service, service._server)
        port = listen(service._server, f"{config.host}:0", config.certificates)
        service.address = f"{config.host}:{port}"
        service._door = MembershipDoor(config.cluster_key, service.address)
        await service._server.start()
        return service

    async def begin(self) -> None:
        """Makes steps from now on."""
        self._tasks = [
            asyncio.create_task(self._compute()),
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
        log.info("draining: %d prompts are here", len(self._running))
        self._schedule.drain()
        self._sessions.tell_load()
        # Each is there until no step has its job.
        return await drained(lambda: not self._running, self._changed, deadline_s)

    async def stop(self) -> None:
        await self._server.stop(grace=None)
        self._step_cancelled.set()
        await _cancel(self._tasks)
        await self._engine.idle()  # the task is gone, its step may not be
        for push in self._running.values():
            push.step_ended()
        await _cancel([push.task for push in self._running.values()])
        await self._writers.close()
        await asyncio.to_thread(self._engine.close)

    # ---- the router's side

    async def Session(self, request_iterator: AsyncIterator[PrefillCommand], context: Any) -> None:
        await self._door.admit(context)
        await self.serve(request_iterator, context)

    async def serve(self, commands: AsyncIterator[PrefillCommand], context: Any) -> None:
        """The session of a router that has been let in, to its end. Events go to context.write."""
        info = self._engine.info(self.instance_id, self._schedule.chunk_tokens)
        session = self._sessions.open(info)
        await serve_session(session, commands, context, self._command, self._closed)

    def _command(self, session: RouterSession[PrefillEvent], command: PrefillCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "prefill":
            self._accept(session, command.prefill)
        elif kind == "cancel":
            self._abort((session, command.cancel.key), JobEvent.CANCEL)
        elif kind == "resync":
            self._sessions.announcer.resync(session)

    def _closed(self, session: RouterSession[PrefillEvent]) -> None:
        self._sessions.close(session)
        for key in self._schedule.of_session(session):
            self._abort(key, JobEvent.ROUTER_LOST)

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
            self._sessions.fail(job.key, FailureCode.FAILURE_CODE_INVALID, message)
            return
        try:
            if self._config.prefix_caching:
                job.hashes = split_hashes(prefill.block_hashes)
            tokens = len(job.prompt)
            job.history = history_of(job.sampling, job.prompt, tokens, prefill.answered)
            self._schedule.add(job)
        except (InvalidJobError, ValueError) as error:
            self._sessions.fail(job.key, FailureCode.FAILURE_CODE_INVALID, str(error))
        except (DrainingError, QueueFullError) as error:
            self._sessions.fail(job.key, FailureCode.FAILURE_CODE_EXHAUSTED, str(error))
        else:
            self._running[job] = self._push(job)
            self._work.set()

    def _push(self, job: Job) -> Push:
        return Push(
            job,
            self._schedule,
            self._writers,
            self._sessions,
            block_size=self._layout.block_size,
            reply_s=self._config.link_reply_ms / 1000,
            steps=lambda: self._steps,
            ended=self._ended,
            failpoints=self._failpoints,
        )

    def _ended(self, job: Job) -> None:
        del self._running[job]
        self._changed.set()
        self._work.set()  # blocks are free: somebody may be waiting for them
        self._sessions.tell_load()

    def _abort(self, key: Key, why: JobEvent) -> None:
        job = self._schedule.abort(key, why)
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
                self._engine.lend_cores()
                self._work.clear()
                await self._work.wait()
                continue
            self._step_begins(step)
            try:
                self._failpoints.hit(Point.PREFILL_BEFORE_CHUNK)
                tokens = await self._engine.step(
                    [chunk.slice() for chunk in step],
                    [chunk.job.sampling if chunk.is_last else None for chunk in step],
                    [len(chunk.job.prompt) for chunk in step],
                    [chunk.job.history for chunk in step],
                    self._step_cancelled,
                )
                self._failpoints.hit(Point.PREFILL_AFTER_CHUNK)
            except StepCancelledError:
                for chunk in step:
                    self._running[chunk.job].step_ended()
            except EngineHangsError:
                raise  # the worker is lost
            except Exception as error:
                log.exception("a prefill step failed")
                self._step_failed(step, error)
            else:
                self._step_done(step, tokens)

    def _step_begins(self, step: Sequence[Chunk[Job]]) -> None:
        self._step, self._step_cancelled = step, CancelFlag()
        for chunk in step:
            push = self._running[chunk.job]
            push.step_begins()
            if chunk.is_first:
                push.started_s = now_s()
                self._sessions.send(chunk.job.key[0], messages.started(chunk.job))

    def _step_done(self, step: Sequence[Chunk[Job]], tokens: Sequence[int | None]) -> None:
        remaining = iter(tokens)
        self._steps += 1
        for chunk in step:
            self._schedule.computed(chunk)
            token = next(remaining) if chunk.is_last else None
            if chunk.job.state is JobState.HANDING_OFF:
                if token is None:
                    self._schedule.distrust(chunk.job)
                    self._sessions.fail(
                        chunk.job.key, FailureCode.FAILURE_CODE_INTERNAL, NOT_A_NUMBER
                    )
                    self._abort(chunk.job.key, JobEvent.FAIL)
                else:
                    self._first_token(chunk.job, token)
            self._running[chunk.job].step_ended()

    def _first_token(self, job: Job, token: int) -> None:
        job.first_token = token
        push = self._running[job]
        push.computed_s = now_s()
        prefill_ms = (push.computed_s - push.started_s) * 1000
        self._sessions.send(job.key[0], messages.first_token(job, token, prefill_ms))

    def _step_failed(self, step: Sequence[Chunk[Job]], error: Exception) -> None:
        for chunk in step:
            self._running[chunk.job].step_ended()
            self._sessions.fail(
                chunk.job.key, FailureCode.FAILURE_CODE_INTERNAL, f"prefill step: {error}"
            )
            self._abort(chunk.job.key, JobEvent.FAIL)

    # ---- the load

    def _write_load(self, load: worker_pb2.PrefillLoad) -> None:
        messages.write_load(load, self._schedule, self._engine.cost())


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
