"""Owns what the router knows of its workers: what they last told it, and what it has asked since.

Pure, used by the Dispatcher alone. Sums are kept up to date claim by claim, so that a placement
costs no look at every running request.
"""

from collections.abc import Collection
from dataclasses import dataclass

from kvrelay.kv.layout import reserved_blocks
from kvrelay.wire import worker_pb2
from router.policy import DecodeView, Placement, PrefillView
from router.request import Request, RequestState


@dataclass
class PrefillWorker:
    block_size: int
    blocks_total: int
    max_model_tokens: int
    queued_tokens: int = 0  # its own figure, which knows of other routers
    asked_tokens: int = 0  # our prompts that are not computed yet, those under way included
    full: bool = False  # it has just refused for want of room


@dataclass
class DecodeWorker:
    model_fingerprint: str
    block_size: int
    blocks_total: int
    max_model_tokens: int
    blocks_free: int  # its own figure; what it could evict included
    running: int = 0  # its own figure, which knows of other routers
    queued_tokens: int = 0  # of prompts to be computed there; its own figure as well
    asked_tokens: int = 0  # of our prompts that it is to compute itself and has not yet
    asked_blocks: int = 0  # of our Reserves that it has not answered yet
    sequences: int = 0  # ours, running and on their way
    full: bool = False


@dataclass
class _Claim:
    """What one attempt asks of its pair. Its workers may be gone: then nobody reads their sums."""

    computes: PrefillWorker | DecodeWorker  # the prompt
    decode: DecodeWorker
    prompt_tokens: int
    blocks: int


class Workers:
    def __init__(self) -> None:
        self.prefill: dict[str, PrefillWorker] = {}
        self.decode: dict[str, DecodeWorker] = {}
        self.context_tokens_seen = 0  # the most that context_tokens has ever been
        self._claims: dict[int, _Claim] = {}  # by the attempt's key

    # ---- what they say

    def prefill_up(self, worker_id: str, info: worker_pb2.WorkerInfo) -> None:
        self.prefill[worker_id] = PrefillWorker(
            info.layout.block_size, info.blocks_total, info.max_model_tokens
        )
        self.context_tokens_seen = max(self.context_tokens_seen, self.context_tokens or 0)

    def decode_up(self, worker_id: str, info: worker_pb2.WorkerInfo) -> None:
        layout, total = info.layout, info.blocks_total
        self.decode[worker_id] = DecodeWorker(
            layout.model_fingerprint,
            layout.block_size,
            total,
            info.max_model_tokens,
            blocks_free=total,
        )
        self.context_tokens_seen = max(self.context_tokens_seen, self.context_tokens or 0)

    def down(self, worker_id: str) -> None:
        self.prefill.pop(worker_id, None)
        self.decode.pop(worker_id, None)

    def prefill_load(self, worker_id: str, load: worker_pb2.PrefillLoad, *, refused: bool) -> None:
        worker = self.prefill.get(worker_id)
        if worker is not None:
            worker.queued_tokens = load.queued_tokens
            worker.full = refused

    def decode_load(self, worker_id: str, load: worker_pb2.DecodeLoad, *, refused: bool) -> None:
        worker = self.decode.get(worker_id)
        if worker is not None:
            worker.blocks_free = load.blocks_free
            worker.running = load.running
            worker.queued_tokens = load.queued_tokens
            worker.full = refused

    def forget_refusals(self) -> None:
        """A worker that is asked for nothing may have no reason to say that it has room again."""
        for prefill in self.prefill.values():
            prefill.full = False
        for decode in self.decode.values():
            decode.full = False

    @property
    def context_tokens(self) -> int | None:
        """Longest prompt and answer that a connected decode worker can hold; None without any.

        Prefill workers set no limit: a decode worker can compute what none of them holds.
        """
        return max((d.max_model_tokens for d in self.decode.values()), default=None)

    # ---- what is asked of them

    def claim(self, key: int, placement: Placement, prompt_tokens: int, max_tokens: int) -> None:
        decode = self.decode[placement.decode]
        computes = decode if placement.prefill is None else self.prefill[placement.prefill]
        blocks = reserved_blocks(prompt_tokens, max_tokens, decode.block_size)
        self._claims[key] = _Claim(computes, decode, prompt_tokens, blocks)
        computes.asked_tokens += prompt_tokens
        decode.asked_blocks += blocks
        decode.sequences += 1

    def reserved(self, key: int) -> None:
        """From now on the decode worker's own figure knows of the blocks."""
        claim = self._claims[key]
        claim.decode.asked_blocks -= claim.blocks
        claim.blocks = 0

    def computed(self, key: int) -> None:
        """The prompt is no backlog any more."""
        claim = self._claims[key]
        claim.computes.asked_tokens -= claim.prompt_tokens
        claim.prompt_tokens = 0

    def release(self, key: int) -> None:
        self.reserved(key)
        self.computed(key)
        self._claims.pop(key).decode.sequences -= 1

    def check(self, requests: Collection[Request]) -> None:
        """Asserts that the sums are those of the requests with an attempt under way."""
        assert self._claims.keys() == {r.key for r in requests}
        for worker_id, p in self.prefill.items():
            prompts = [
                len(r.prompt) + r.base
                for r in requests
                if r.prefill_id == worker_id and not r.handed_off and len(r.answer) == r.base
            ]
            assert p.asked_tokens == sum(prompts), (worker_id, p, prompts)
        for worker_id, d in self.decode.items():
            mine = [r for r in requests if r.decode_id == worker_id]
            blocks = [
                reserved_blocks(len(r.prompt), r.sampling.max_tokens, d.block_size)
                for r in mine
                if r.state is RequestState.RESERVING
            ]
            assert d.asked_blocks == sum(blocks), (worker_id, d, blocks)
            assert d.sequences == len(mine), (worker_id, d, len(mine))
            prompts = [
                len(r.prompt) + r.base for r in mine if r.prefill_here and len(r.answer) == r.base
            ]
            assert d.asked_tokens == sum(prompts), (worker_id, d, prompts)

    # ---- snapshots for the policy, of those that may have room

    def prefill_views(self) -> list[PrefillView]:
        return [
            PrefillView(
                worker_id, max(p.queued_tokens, p.asked_tokens), p.blocks_total, p.block_size
            )
            for worker_id, p in self.prefill.items()
            if not p.full
        ]

    def decode_views(self) -> list[DecodeView]:
        return [
            DecodeView(
                worker_id,
                d.blocks_free - d.asked_blocks,
                d.blocks_total,
                max(d.sequences, d.running),
                d.block_size,
            )
            for worker_id, d in self.decode.items()
            if not d.full
        ]
