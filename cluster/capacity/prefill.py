"""A simulated prefill worker: the production's Schedule, in the place of whose service this is.

Blocks leave one after another as chunks end; a request waits for those of its last chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.capacity.device import attended
from cluster.capacity.engine import Engine, Host
from cluster.capacity.surroundings import (
    CostWord,
    Measuring,
    SimSession,
    Speaker,
    Surroundings,
    info,
)
from kvrelay.draining import DrainingError
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.engine.step_cost import StepFit
from kvrelay.engine.turns import Chunk
from kvrelay.kv.ledger import BlockLedger
from kvrelay.kv.prefix import split_hashes
from kvrelay.sessions import Sessions
from kvrelay.transport.errors import RefusedError
from kvrelay.wire import worker_pb2
from kvrelay.wire.worker_pb2 import FailureCode, PrefillCommand, PrefillEvent
from prefill_worker import messages
from prefill_worker.schedule import (
    InvalidJobError,
    Job,
    JobEvent,
    JobState,
    QueueFullError,
    Schedule,
)

if TYPE_CHECKING:
    from cluster.capacity.decode import SimDecode

_SAMPLING = SamplingParams(0.0, 0, 1.0, 0, 1, frozenset())  # nothing here depends on it


@dataclass(eq=False, slots=True)
class _Push:
    """One job's way to its decode worker."""

    job: Job
    decode: "SimDecode"
    sent: int = 0  # blocks
    started_s: float = 0.0
    computed_s: float = 0.0
    in_step: bool = False
    over: bool = False  # no block moves any more


class SimPrefill:
    role = "prefill"

    def __init__(self, name: str, around: Surroundings, host: Host | None) -> None:
        self.name = name
        self.alive = True
        self.schedule = Schedule(
            around.layout,
            BlockLedger(around.kv_blocks),
            chunk_tokens=around.worker.chunk_tokens,
            jobs_max=around.worker.jobs_max,
        )
        self.fit = StepFit()
        self._around = around
        self._engine = Engine(around.timeline, host, around.profile.busy_neighbour.prefill)
        self._measure = Measuring(self.fit)
        self._cost = CostWord(self.fit)
        self._sessions: Sessions[PrefillEvent] = Sessions(
            around.worker,
            self.schedule.cache.journal,
            PrefillEvent,
            self._write_load,
            lambda _, router: SimSession(around, self, router),
        )
        self._speaker = Speaker(
            around.timeline, self._sessions.announcer, self.schedule.cache.journal
        )
        self._pushes: dict[Job, _Push] = {}
        self._step: Sequence[Chunk[Job]] = ()
        self._step_ms = 0.0
        self._link_free_s = 0.0

    def connect(self, router: str) -> SimSession:
        word = info(self._around, self.name, self.schedule.chunk_tokens)
        session = self._sessions.open(word, router)
        assert isinstance(session, SimSession)
        return session

    def die(self) -> None:
        """At once; decode workers learn it from their links."""
        self.alive = False
        self._engine.stop()
        self._speaker.stop()
        for push in list(self._pushes.values()):
            push.over = True
            push.decode.writer_lost(push.job.ticket.transfer_id, f"{self.name} is lost")

    @property
    def is_idle(self) -> bool:
        return not self._pushes and not len(self.schedule)

    def check(self) -> None:
        """Raises AssertionError when the books do not balance."""
        self.schedule.cache.check()

    # ---- the routers' side

    def command(self, session: Any, command: PrefillCommand) -> None:
        if not self.alive:
            return
        kind = command.WhichOneof("command")
        if kind == "prefill":
            self._accept(session, command.prefill)
        elif kind == "cancel":
            self._abort((session, command.cancel.key), JobEvent.CANCEL)
        elif kind == "resync":
            self._sessions.announcer.resync(session)

    def _accept(self, session: Any, prefill: worker_pb2.Prefill) -> None:
        ticket = prefill.ticket
        key = session, prefill.key
        decode = self._around.decode.get(ticket.decode_instance_id)
        if decode is None:
            self._sessions.fail(key, FailureCode.FAILURE_CODE_PEER_LOST, "no such decode worker")
            return
        job = Job(
            key=key,
            prompt=range(self._around.prompt_tokens(ticket.request_id) + prefill.answered),
            sampling=_SAMPLING,
            ticket=ticket,
        )
        if self._around.worker.prefix_caching:
            job.hashes = split_hashes(prefill.block_hashes)
        try:
            self.schedule.add(job)
        except InvalidJobError as error:
            self._sessions.fail(job.key, FailureCode.FAILURE_CODE_INVALID, str(error))
            return
        except (DrainingError, QueueFullError) as error:
            self._sessions.fail(job.key, FailureCode.FAILURE_CODE_EXHAUSTED, str(error))
            return
        push = _Push(job, decode)
        self._pushes[job] = push
        try:
            push.decode.begin(ticket, push, self)
        except RefusedError as error:
            self.peer_lost(push, str(error))
            return
        self._compute()

    def peer_lost(self, push: _Push, why: str) -> None:
        """The decode worker is gone, or has let go of the request."""
        if not push.over:
            key = push.job.key
            self._sessions.fail(key, FailureCode.FAILURE_CODE_PEER_LOST, why)
            self._abort(key, JobEvent.DECODER_LOST)

    def _abort(self, key: tuple[Any, int], why: JobEvent) -> None:
        job = self.schedule.abort(key, why)
        if job is None:
            return
        push = self._pushes[job]
        push.over = True
        push.decode.writer_lost(job.ticket.transfer_id, "the prefill worker gave the request up")
        if not push.in_step:
            self._quiet(push)

    def _quiet(self, push: _Push) -> None:
        """Neither the engine nor the link uses its blocks any more."""
        if push.job.state is JobState.ABORTING:
            self.schedule.quiet(push.job)
        self._ended(push)

    def _ended(self, push: _Push) -> None:
        del self._pushes[push.job]
        self._sessions.tell_load()
        self._compute()  # blocks are free: somebody may be waiting for them

    # ---- computing

    def _compute(self) -> None:
        if self._engine.busy:
            return
        step = self.schedule.next_step()
        if not step:
            return
        self._step = step
        prompt_tokens = looked_at = 0
        for chunk in step:
            push = self._pushes[chunk.job]
            push.in_step = True
            if chunk.is_first:
                push.started_s = self._around.timeline.now_s
                self._sessions.send(chunk.job.key[0], messages.started(chunk.job))
                self._move(push)  # what others have computed
            prompt_tokens += chunk.count
            looked_at += attended(chunk.count, chunk.start)
        self._step_ms = self._around.profile.step.ms(prompt_tokens, looked_at, 0, 0)
        self._engine.start(self._step_ms, self._step_done)

    def _step_done(self) -> None:
        step, self._step = self._step, ()
        tokens = sum(chunk.count for chunk in step)
        if tokens > 1:
            self._measure.step(tokens, 0, self._step_ms)
        over = []
        for chunk in step:
            self.schedule.computed(chunk)
            push = self._pushes[chunk.job]
            push.in_step = False
            if push.over:
                over.append(push)
                continue
            arrived_s = self._move(push, whole=chunk.is_last)
            if chunk.job.state is JobState.HANDING_OFF:
                self._first_token(push, arrived_s)
        for push in over:  # last: blocks that get free may begin the next step
            self._quiet(push)
        self._compute()

    def _first_token(self, push: _Push, arrived_s: float) -> None:
        around, job = self._around, push.job
        push.computed_s = around.timeline.now_s
        job.first_token = token = around.stamp(push.computed_s)
        prefill_ms = (push.computed_s - push.started_s) * 1000
        self._sessions.send(job.key[0], messages.first_token(job, token, prefill_ms))
        committed_s = arrived_s + around.hand_off_ms / 1000
        around.timeline.put(committed_s, None, partial(self._commit, push))

    # ---- blocks on their way

    def _move(self, push: _Push, *, whole: bool = False) -> float:
        """Sends what is filled and has not gone yet; when the last of it is there."""
        job, around = push.job, self._around
        ticket = job.ticket
        filled = len(job.blocks) if whole else job.computed // around.layout.block_size
        count = filled - ticket.first_block - push.sent
        now_s = around.timeline.now_s
        if count <= 0:
            return max(now_s, self._link_free_s) if whole and push.sent else now_s
        begins_s = max(now_s, self._link_free_s)
        self._link_free_s = begins_s + count * around.ms_per_block / 1000
        push.decode.received(ticket.transfer_id, push.sent, count)
        push.sent += count
        return self._link_free_s

    def _commit(self, push: _Push) -> None:
        """The decode worker has every block, and says so."""
        if push.over or not self.alive:
            return
        job = push.job
        assert job.first_token is not None
        push.over = True
        push.decode.committed(job.ticket.transfer_id, push.sent, job.first_token)
        self.schedule.acknowledged(job)
        now_s = self._around.timeline.now_s
        exposed_ms = (now_s - push.computed_s) * 1000
        word = worker_pb2.HandedOff(
            key=job.key[1],
            kv_bytes=push.sent * self._around.profile.block_bytes,
            kv_transfer_ms=push.sent * self._around.ms_per_block,
            kv_exposed_ms=exposed_ms,
            transport="simulated",
        )
        self._sessions.send(job.key[0], PrefillEvent(handed_off=word))
        self._ended(push)

    def _write_load(self, load: worker_pb2.PrefillLoad) -> None:
        messages.write_load(load, self.schedule, self._cost())
