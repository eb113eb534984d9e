"""Owns what the router knows of its workers: what they last told it, and what it has asked since.

Pure, used by the Dispatcher alone. Sums are kept up to date claim by claim and workers in order of
load, so that a placement costs no look at every running request or every worker.
"""

from collections.abc import Collection
from itertools import islice
from typing import NamedTuple

from kvrelay.config import RouterConfig
from kvrelay.kv.layout import blocks_for, reserved_blocks
from kvrelay.wire import worker_pb2
from router.choosing import Choosing
from router.claims import Claim, Claims
from router.measured import MeasuredRates, usual_of
from router.openings import Openings
from router.policy import Placement
from router.prediction import CHUNK_TOKENS, NEUTRAL, Rates
from router.request import Request, RequestState
from router.shortlist import Shortlist
from router.shunned import Shunned
from router.worker import DecodeWorker, PrefillWorker, Worker

_SAMPLE = 64  # workers of each role that say what is usual when another comes


class Wanted(NamedTuple):
    """What some requests have in common."""

    tokens_least: int  # of prompt and answer together, of one of them
    tokens_most: int
    aimed: bool  # all of them have aims


class Workers:
    def __init__(self, config: RouterConfig) -> None:
        self.prefill: dict[str, PrefillWorker] = {}
        self.decode: dict[str, DecodeWorker] = {}
        # Longest prompt and answer that a connected decode worker can hold; None without any.
        # Prefill workers set no limit: a decode worker can compute what none of them holds.
        self.context_tokens: int | None = None
        self.context_tokens_seen = 0  # the most that it has ever been
        self._stirred = False  # since the last look at who waits
        self._config = config
        self._numbers = 0
        # The middle of what workers measure, for those that have not yet: a new one must look
        # neither better nor worse than the others, nor D than P.
        self._usual = NEUTRAL
        self._prefill_list: Shortlist[PrefillWorker] = Shortlist(config.index_names_total_max)
        self._decode_list: Shortlist[DecodeWorker] = Shortlist(config.index_names_total_max)
        self.claims = Claims(self._rank)
        self._shunned = Shunned(config)
        self._openings = Openings(config)
        self.choosing = Choosing(
            config,
            self.prefill,
            self.decode,
            self._prefill_list,
            self._decode_list,
            self._shunned,
        )
        self._prefill_tokens = 0  # of the longest prompt that every prefill worker holds

    # ---- what they say

    def prefill_up(self, worker_id: str, info: worker_pb2.WorkerInfo) -> None:
        self.down(worker_id)
        worker = PrefillWorker(
            worker_id=worker_id,
            number=self._next_number(),
            block_size=info.layout.block_size,
            blocks_total=info.blocks_total,
            measured=self._measured_by_nobody(),
            chunk_tokens=info.chunk_tokens or CHUNK_TOKENS,
        )
        self.prefill[worker_id] = worker
        self._prefill_list.up(worker, self._names_max(worker))
        self._openings.note(worker)
        self._note_smallest()
        self.stir()

    def decode_up(self, worker_id: str, info: worker_pb2.WorkerInfo) -> None:
        self.down(worker_id)
        worker = DecodeWorker(
            worker_id=worker_id,
            number=self._next_number(),
            model_fingerprint=info.layout.model_fingerprint,
            block_size=info.layout.block_size,
            blocks_total=info.blocks_total,
            max_model_tokens=info.max_model_tokens,
            itl_target_ms=info.itl_target_ms,
            blocks_free=info.blocks_total,
            measured=self._measured_by_nobody(),
            chunk_tokens=info.chunk_tokens or CHUNK_TOKENS,
        )
        self.decode[worker_id] = worker
        self._decode_list.up(worker, self._names_max(worker))
        self._openings.note(worker)
        self.stir()
        self._note_context()

    def down(self, worker_id: str) -> None:
        self._shunned.forget(worker_id)
        if prefill := self.prefill.pop(worker_id, None):
            self._prefill_list.down(prefill)
            self._lost(prefill)
            self._note_smallest()
        if decode := self.decode.pop(worker_id, None):
            self._decode_list.down(decode)
            self._lost(decode)
            self._note_context()

    def _lost(self, worker: Worker) -> None:
        self._openings.drop(worker)
        self.stir()

    def _note_context(self) -> None:
        self.context_tokens = max((d.max_model_tokens for d in self.decode.values()), default=None)
        self.context_tokens_seen = max(self.context_tokens_seen, self.context_tokens or 0)

    def _note_smallest(self) -> None:
        sizes = (p.blocks_total * p.block_size for p in self.prefill.values())
        self._prefill_tokens = min(sizes, default=0)

    def prefill_load(self, worker_id: str, load: worker_pb2.PrefillLoad, *, refused: bool) -> bool:
        """Whether it has begun to drain."""
        worker = self.prefill.get(worker_id)
        if worker is None:
            return False
        if refused or load.queued_tokens < worker.queued_tokens:
            worker.refused = refused
        if refused:
            self.stir()
        worker.queued_tokens = load.queued_tokens
        worker.queued_prompts = load.queued_prompts
        if load.queued_tokens:
            worker.measured.prompts.note()
        return self._hear(worker, load)

    def decode_load(self, worker_id: str, load: worker_pb2.DecodeLoad, *, refused: bool) -> bool:
        """Whether it has begun to drain."""
        worker = self.decode.get(worker_id)
        if worker is None:
            return False
        grew = load.blocks_free > worker.blocks_free
        if refused or grew or load.queued_tokens < worker.queued_tokens:
            worker.refused = refused
        if refused:
            self.stir()
        worker.blocks_free = load.blocks_free
        worker.running = load.running
        worker.queued_tokens = load.queued_tokens
        worker.queued_prompts = load.queued_prompts
        if load.queued_tokens:
            worker.measured.prompts.note()
        if load.running:
            worker.measured.answers.note()
        return self._hear(worker, load)

    def _hear(self, worker: Worker, load: worker_pb2.PrefillLoad | worker_pb2.DecodeLoad) -> bool:
        drained, worker.draining = worker.draining, load.draining
        if load.HasField("cost"):
            worker.measured.hear(load.cost, self._usual)
            if self._usual is NEUTRAL:
                self._usual = usual_of([worker.measured], NEUTRAL)
        self._rank(worker)
        begins = worker.draining and not drained
        if begins:
            self.stir()
        return begins

    def blocks_changed(self, worker_id: str, changes: worker_pb2.BlockChanges) -> bool:
        """False when the worker must be asked to send everything again."""
        if prefill := self.prefill.get(worker_id):
            return self._prefill_list.index.change(prefill.number, changes)
        if decode := self.decode.get(worker_id):
            return self._decode_list.index.change(decode.number, changes)
        return True

    def forget_refusals(self) -> None:
        """A worker that is asked for nothing may have no reason to say that it has room again."""
        workers: list[Worker] = [*self.prefill.values(), *self.decode.values()]
        for worker in workers:
            if worker.refused:
                worker.refused = False
                self._rank(worker)

    def fade(self, now_ms: float) -> None:
        """Lets go of what is old, a part of it at each call; called about once a second."""
        self._prefill_list.index.sweep()
        self._decode_list.index.sweep()
        workers: list[Worker] = [*self.prefill.values(), *self.decode.values()]
        self._usual = usual_of([worker.measured for worker in workers], self._usual)
        fade_ms = self._config.measured_fade_ms
        for worker in workers:
            before = worker.rates
            if worker.backlog_tokens:
                worker.measured.prompts.note()
            if isinstance(worker, PrefillWorker):
                worker.hand_offs.look(now_ms, fade_ms)
            elif worker.sequences:
                worker.measured.answers.note()
            worker.measured.look(self._usual, now_ms, fade_ms)
            if worker.rates is not before:
                self._rank(worker)

    # ---- whether they fail

    def failed(self, worker_id: str, now_ms: float) -> None:
        """An attempt has failed there: the worker comes last for a while."""
        worker = self._named(worker_id)
        if worker is not None and self._shunned.shun(worker, now_ms):
            self.stir()
            self._rank(worker)

    def succeeded(self, worker_id: str) -> None:
        """A request that was there has ended well."""
        if worker := self._named(worker_id):
            worker.shun_ms = 0.0
            self._trust(worker)

    def forgive(self, now_ms: float) -> None:
        """Those whose time is up are tried again as before."""
        for worker in self._shunned.over(now_ms):
            self._trust(worker)

    def _trust(self, worker: Worker) -> None:
        if self._shunned.trust(worker):
            self.stir()
            self._rank(worker)

    def drains(self, worker_id: str) -> bool:
        worker = self._named(worker_id)
        return worker is not None and worker.draining

    def taking(self, role: str) -> int:
        """How many of a role take new work."""
        workers: Collection[Worker] = (
            self.prefill.values() if role == "prefill" else self.decode.values()
        )
        return sum(not worker.draining for worker in workers)

    def _named(self, worker_id: str) -> Worker | None:
        return self.prefill.get(worker_id) or self.decode.get(worker_id)

    # ---- whether who waits may find a place

    def stir(self) -> None:
        """Who may go where has changed, or what is predicted of it, without a word of room: so may
        who would have waited for a worker that takes nothing any more."""
        self._stirred = True

    @property
    def room_grew(self) -> bool:
        """Whether who waits may find a place that was not there at the last look."""
        return self._stirred or self._openings.entered

    def looked_at(self) -> None:
        """Somebody looks at who waits, with all workers as they are now."""
        self._stirred = False
        self._openings.forget_entered()

    def may_take(self, wanted: Wanted) -> bool:
        """False when surely none of the requests finds a place. Its cost grows with neither them
        nor the workers."""
        d = self._decode_list.roomiest()
        if d is None or d.full:
            return False
        if reserved_blocks(1, wanted.tokens_least - 1, d.block_size) > d.room_blocks:
            return False
        return self._openings.any(aimed=wanted.aimed, local=self._local(wanted))

    def _local(self, wanted: Wanted) -> bool:
        """Whether decode workers may compute one of the prompts."""
        return self._config.local_prefill == "auto" or wanted.tokens_most > self._prefill_tokens

    # ---- what is asked of them

    def computing(self, placement: Placement) -> tuple[Rates, int]:
        """The rates of the worker that would compute the prompt, and how many have its role."""
        if placement.prefill is None:
            return self.decode[placement.decode].rates, len(self.decode)
        return self.prefill[placement.prefill].rates, len(self.prefill)

    def claim(self, key: int, placement: Placement, prompt_tokens: int, max_tokens: int) -> None:
        decode = self.decode[placement.decode]
        computes = decode if placement.prefill is None else self.prefill[placement.prefill]
        blocks = reserved_blocks(prompt_tokens, max_tokens, decode.block_size)
        moved = 0 if computes is decode else blocks_for(prompt_tokens, decode.block_size)
        self.claims.begin(key, Claim(computes, decode, placement.tokens, blocks, moved))

    # ---- their order

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _measured_by_nobody(self) -> MeasuredRates:
        """Of a worker that comes."""
        sample: list[Worker] = [
            *islice(self.prefill.values(), _SAMPLE),
            *islice(self.decode.values(), _SAMPLE),
        ]
        self._usual = usual_of([worker.measured for worker in sample], self._usual)
        return MeasuredRates(self._usual)

    def _names_max(self, worker: Worker) -> int:
        """It cannot cache more blocks than it has."""
        return min(worker.blocks_total, self._config.index_names_max)

    def _rank(self, worker: Worker) -> None:
        """Brings the order up to date with the worker's figures; nothing if it is gone."""
        if self._named(worker.worker_id) is not worker:
            return
        if isinstance(worker, PrefillWorker):
            grew = self._prefill_list.rank(worker)
        else:
            grew = self._decode_list.rank(worker)
        self._openings.note(worker)
        self._stirred |= grew

    def check(self, requests: Collection[Request]) -> None:
        """Asserts that the sums are those of the requests with an attempt under way."""
        assert self.claims.keys == {r.key for r in requests}
        for p in self.prefill.values():
            mine = [r for r in requests if r.prefill_id == p.worker_id and not r.prefill_settled]
            assert (p.asked_tokens, p.asked_prompts) == _uncomputed(mine), (p, mine)
            self._prefill_list.check(p)
        for d in self.decode.values():
            mine = [r for r in requests if r.decode_id == d.worker_id]
            blocks = [
                reserved_blocks(len(r.prompt), r.sampling.max_tokens, d.block_size)
                for r in mine
                if r.state is RequestState.RESERVING
            ]
            assert d.asked_blocks == sum(blocks), (d, blocks)
            assert d.asked == len(mine), (d, len(mine))
            coming = [r for r in mine if r.prefill_here or not r.prefill_settled]
            assert d.coming == _uncomputed(coming)[1], (d, mine)
            here = [r for r in mine if r.prefill_here]
            assert (d.asked_tokens, d.asked_prompts) == _uncomputed(here), (d, mine)
            self._decode_list.check(d)
        self._openings.check([*self.prefill.values(), *self.decode.values()])


def _uncomputed(requests: Collection[Request]) -> tuple[int, int]:
    """Tokens of prompts that no token of an answer has followed yet, and how many prompts."""
    assert all(r.placement is not None for r in requests)
    left = [r.placement.tokens for r in requests if r.placement and len(r.answer) == r.base]
    return sum(left), len(left)
