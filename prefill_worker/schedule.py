"""Which prompt tokens a prefill worker computes next.

A pure object; prefill_worker/service.py runs the steps it names and tells it of cancels. Prompts
are admitted in order of arrival once there is room for their KV blocks, and take turns chunk by
chunk: a short prompt behind a long one waits for a chunk, not for the prompt. What is cached of a
prompt is not computed again.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from kvrelay.draining import DrainingError
from kvrelay.engine.history import TokenHistory
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.engine.turns import Chunk, Turns
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.ledger import BlockEvent, BlockLedger, OutOfBlocksError
from kvrelay.kv.prefix_cache import PrefixCache
from kvrelay.lifecycle import advance
from kvrelay.wire.transfer_pb2 import Ticket


class JobState(Enum):
    __hash__ = object.__hash__  # in C: every event looks both up

    QUEUED = "queued"
    COMPUTING = "computing"
    HANDING_OFF = "handing_off"  # computed; the decode worker has not acknowledged all
    ABORTING = "aborting"  # not wanted, but the engine or a push still uses its blocks
    CLOSED = "closed"


class JobEvent(Enum):
    __hash__ = object.__hash__

    ADMIT = "admit"  # there is room for its blocks
    COMPUTED = "computed"
    ACKNOWLEDGED = "acknowledged"  # by the decode worker
    CANCEL = "cancel"  # its router does not want it any more
    TIMEOUT = "timeout"  # no step, or no answer of the decode worker, in time
    ROUTER_LOST = "router lost"  # its router's session ended
    DECODER_LOST = "decoder lost"  # the decode worker gave it up, or its link ended
    FAIL = "fail"  # the engine could not do it
    QUIET = "quiet"  # neither the engine nor a push uses its blocks any more
    DRAIN = "drain"  # this worker takes nothing new from here on


_S, _E = JobState, JobEvent

TRANSITIONS: dict[tuple[JobState, JobEvent], JobState] = {
    (_S.QUEUED, _E.ADMIT): _S.COMPUTING,
    (_S.QUEUED, _E.CANCEL): _S.CLOSED,
    (_S.QUEUED, _E.TIMEOUT): _S.CLOSED,
    (_S.QUEUED, _E.ROUTER_LOST): _S.CLOSED,
    (_S.QUEUED, _E.DECODER_LOST): _S.CLOSED,
    (_S.QUEUED, _E.FAIL): _S.CLOSED,
    (_S.QUEUED, _E.DRAIN): _S.QUEUED,
    (_S.COMPUTING, _E.COMPUTED): _S.HANDING_OFF,
    (_S.COMPUTING, _E.CANCEL): _S.ABORTING,
    (_S.COMPUTING, _E.TIMEOUT): _S.ABORTING,
    (_S.COMPUTING, _E.ROUTER_LOST): _S.ABORTING,
    (_S.COMPUTING, _E.DECODER_LOST): _S.ABORTING,
    (_S.COMPUTING, _E.FAIL): _S.ABORTING,
    (_S.COMPUTING, _E.DRAIN): _S.COMPUTING,
    (_S.HANDING_OFF, _E.ACKNOWLEDGED): _S.CLOSED,
    (_S.HANDING_OFF, _E.CANCEL): _S.ABORTING,
    (_S.HANDING_OFF, _E.TIMEOUT): _S.ABORTING,
    (_S.HANDING_OFF, _E.ROUTER_LOST): _S.ABORTING,
    (_S.HANDING_OFF, _E.DECODER_LOST): _S.ABORTING,
    (_S.HANDING_OFF, _E.FAIL): _S.ABORTING,
    (_S.HANDING_OFF, _E.DRAIN): _S.HANDING_OFF,
    (_S.ABORTING, _E.CANCEL): _S.ABORTING,
    (_S.ABORTING, _E.TIMEOUT): _S.ABORTING,
    (_S.ABORTING, _E.ROUTER_LOST): _S.ABORTING,
    (_S.ABORTING, _E.DECODER_LOST): _S.ABORTING,
    (_S.ABORTING, _E.FAIL): _S.ABORTING,
    (_S.ABORTING, _E.QUIET): _S.CLOSED,
    (_S.ABORTING, _E.DRAIN): _S.ABORTING,
}

# Why a job is let go of before it is handed off; Schedule.abort takes these.
CAUSES = frozenset({_E.CANCEL, _E.TIMEOUT, _E.ROUTER_LOST, _E.DECODER_LOST, _E.FAIL})


class InvalidJobError(Exception):
    """Can never be served by this worker; the message says why."""


class QueueFullError(Exception):
    """`jobs_max` prompts are here already."""


Key = tuple[object, int]  # the router's session, its key for the request attempt


@dataclass(eq=False)
class Job:
    """One prompt. Its first `computed` tokens have their KV in `blocks`."""

    key: Key
    prompt: Sequence[int]
    sampling: SamplingParams
    ticket: Ticket
    hashes: Sequence[bytes] = ()  # of the prompt's full blocks; none: nothing of it is cached
    history: TokenHistory | None = None  # what sampling has to know of the prompt
    state: JobState = JobState.QUEUED
    blocks: list[int] = field(default_factory=list)
    computed: int = 0  # those found in the cache included
    cached_tokens: int = 0
    shared_blocks: int = 0  # others may read so many from the first on
    first_token: int | None = None

    def on(self, event: JobEvent) -> None:
        self.state = advance(TRANSITIONS, self.state, event)


class Schedule:
    """All prompts of one worker."""

    def __init__(
        self, layout: KVLayout, ledger: BlockLedger, *, chunk_tokens: int, jobs_max: int
    ) -> None:
        self.ledger = ledger
        self.cache = PrefixCache(ledger)
        self._layout = layout
        self.chunk_tokens = max(chunk_tokens, layout.block_size)  # of one step, at most
        self._jobs_max = jobs_max
        self._waiting: deque[Job] = deque()
        self._waiting_tokens = 0
        self._turns: Turns[Job] = Turns(layout.block_size, self._look_again)  # computing
        self._jobs: dict[Key, Job] = {}
        self.draining = False
        self.causes: Counter[JobEvent] = Counter()  # why jobs were let go of

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens accepted and not yet computed."""
        return self._waiting_tokens + self._turns.tokens

    @property
    def queued_prompts(self) -> int:
        """That queued_tokens are of."""
        return len(self._waiting) + len(self._turns)

    def add(self, job: Job) -> None:
        """Raises DrainingError, InvalidJobError or QueueFullError and changes nothing."""
        if self.draining:
            raise DrainingError("this worker is draining: it takes nothing new")
        needed = self._layout.blocks_for(len(job.prompt))
        if needed == 0:
            raise InvalidJobError("the prompt is empty")
        if needed > self.ledger.total:
            raise InvalidJobError(
                f"{len(job.prompt)} prompt tokens need {needed} KV blocks; this prefill worker "
                f"has {self.ledger.total}"
            )
        if needed != job.ticket.first_block + len(job.ticket.block_ids):
            raise InvalidJobError(
                f"a ticket for blocks {job.ticket.first_block} to "
                f"{job.ticket.first_block + len(job.ticket.block_ids)}, not to {needed}"
            )
        full = len(job.prompt) // self._layout.block_size
        if job.hashes and len(job.hashes) != full:
            raise InvalidJobError(f"{len(job.hashes)} block hashes for {full} full blocks")
        if job.key in self._jobs:
            raise InvalidJobError("this request attempt is here already")
        if len(self._jobs) >= self._jobs_max:
            raise QueueFullError(f"{self._jobs_max} prompts are here already")
        self._jobs[job.key] = job
        self._waiting.append(job)
        self._waiting_tokens += len(job.prompt)

    def next_step(self) -> list[Chunk[Job]]:
        """Chunks of up to chunk_tokens in all; empty when there is nothing to compute."""
        self._admit()
        return self._turns.next_chunks(self.chunk_tokens)

    def computed(self, chunk: Chunk[Job]) -> None:
        """A step with this chunk has ended. Its job's turn is over."""
        job = chunk.job
        if job.state is not JobState.COMPUTING:
            return  # aborted while the step ran
        self._turns.computed(chunk)
        self._share_computed(job)
        if chunk.is_last:
            job.on(JobEvent.COMPUTED)
        else:
            self._admit()  # whoever came during this step goes first
            self._turns.join(job)

    def acknowledged(self, job: Job) -> None:
        """The decode worker has every block: ours are free, or wait for who needs the same."""
        job.on(JobEvent.ACKNOWLEDGED)
        self.cache.let_go(job.key, job.blocks, BlockEvent.RELEASE, job.hashes)
        del self._jobs[job.key]

    def abort(self, key: Key, why: JobEvent) -> Job | None:
        """Lets go of a job in any state. Until `quiet`, its blocks stay in quarantine, and in use
        those that it shares: a push may still read them.

        why: one of CAUSES.

        Returns the job, or None when it was let go of earlier, or has ended.
        """
        assert why in CAUSES, why
        job = self._jobs.get(key)
        if job is None:
            return None
        before = job.state
        job.on(why)
        if job.state is before:
            return None
        self.causes[why] += 1
        if before is JobState.QUEUED:
            self._waiting.remove(job)
            self._waiting_tokens -= len(job.prompt)
            del self._jobs[key]
            return job
        if before is JobState.COMPUTING:
            self._turns.leave(job)
        self.ledger.move(key, self.cache.private(job.blocks), BlockEvent.ABORT)
        return job

    def drain(self) -> None:
        """Nothing new from here on; what is here goes on."""
        self.draining = True
        for job in self._jobs.values():
            job.on(JobEvent.DRAIN)

    def distrust(self, job: Job) -> None:
        """What the engine made of this prompt is wrong: nobody else shall read its KV."""
        self.cache.forget(job.hashes)
        job.hashes = ()

    def quiet(self, job: Job) -> None:
        """Nobody uses the blocks of this aborted job any more."""
        job.on(JobEvent.QUIET)
        self.cache.let_go(job.key, job.blocks, BlockEvent.WRITER_GONE, job.hashes)
        del self._jobs[job.key]

    def of_session(self, session: object) -> list[Key]:
        return [key for key in self._jobs if key[0] is session]

    def _admit(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            needed = self._layout.blocks_for(len(job.prompt))
            reusable = self._reusable_blocks(job)
            try:
                shared, private = self.cache.take(job.key, job.hashes[:reusable], needed)
            except OutOfBlocksError:
                return
            self.ledger.move(job.key, private, BlockEvent.CLAIM)
            job.blocks = shared + private
            job.computed = job.cached_tokens = len(shared) * self._layout.block_size
            job.on(JobEvent.ADMIT)
            self._waiting.popleft()
            self._waiting_tokens -= len(job.prompt)
            self._turns.join(job)

    def _reusable_blocks(self, job: Job) -> int:
        """The last token is always computed, for its logits; its block is written, so private."""
        return min(len(job.hashes), (len(job.prompt) - 1) // self._layout.block_size)

    def _look_again(self, job: Job) -> int:
        """Between steps, so only a push may be using the job's blocks, and none that is not
        computed."""
        size = self._layout.block_size
        places = range(job.computed // size, self._reusable_blocks(job))
        return self.cache.catch_up(job.key, job.blocks, job.hashes, places) * size

    def _share_computed(self, job: Job) -> None:
        """Full blocks are not written again: others may read them from now on."""
        full = min(job.computed // self._layout.block_size, len(job.hashes))
        self.cache.insert(job.key, job.blocks, job.hashes, first=job.shared_blocks, end=full)
        job.shared_blocks = full
