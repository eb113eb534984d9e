"""One worker as the router knows it: what it last told, and what it was asked since.

Plain records, kept up to date by router/workers.py.
"""

from dataclasses import dataclass, field
from math import inf

from router.measured import HandOffs, MeasuredRates
from router.prediction import CHUNK_TOKENS, NEUTRAL, DecodeView, PrefillView, Rates

_Standing = tuple[float, float]  # backlog in tokens, blocks that are lacking: less is better
NO_ROOM: _Standing = (inf, inf)


def _unmeasured() -> MeasuredRates:
    return MeasuredRates(NEUTRAL)


@dataclass(kw_only=True)
class _Known:
    """What is known of a worker of either role: both may compute prompts."""

    worker_id: str
    number: int  # in the order of coming; never used twice
    block_size: int
    blocks_total: int
    measured: MeasuredRates = field(default_factory=_unmeasured)
    # Of prompts to be computed there, by its own word, which knows of other routers.
    queued_tokens: int = 0
    queued_prompts: int = 0  # that those tokens are of
    asked_tokens: int = 0  # of our prompts that are not computed yet, those under way included
    asked_prompts: int = 0
    chunk_tokens: int = CHUNK_TOKENS  # of prompts in one step, at most
    refused: bool = False  # for want of room, and since then nothing has grown less
    draining: bool = False  # it finishes what it has, and takes nothing new
    shunned: bool = False  # it comes last for a while: attempts there have failed
    shun_ms: float = 0.0  # how long the last time, since an attempt there ended well
    standing: _Standing = NO_ROOM

    @property
    def rates(self) -> Rates:
        return self.measured.rates

    @property
    def full(self) -> bool:
        """Whether it gets nothing now."""
        return self.refused or self.draining

    @property
    def backlog_tokens(self) -> int:
        return max(self.queued_tokens, self.asked_tokens)

    @property
    def backlog_prompts(self) -> int:
        return max(self.queued_prompts, self.asked_prompts)


@dataclass(kw_only=True)
class PrefillWorker(_Known):
    hand_offs: HandOffs = field(default_factory=HandOffs)

    @property
    def room_blocks(self) -> int:
        return self.blocks_total

    @property
    def load_ms(self) -> float:
        # Without the properties: it is asked for with every event.
        return max(self.queued_tokens, self.asked_tokens) * self.measured.rates.prompt_token_ms

    def view(self, cached_blocks: int) -> PrefillView:
        return PrefillView(
            self.worker_id,
            self.backlog_tokens,
            self.blocks_total,
            self.block_size,
            self.rates,
            self.hand_offs.block_ms,
            self.hand_offs.hand_off_ms,
            cached_blocks,
            self.full,
            self.backlog_prompts,
            self.chunk_tokens,
            self.shunned,
        )


@dataclass(kw_only=True)
class DecodeWorker(_Known):
    model_fingerprint: str
    max_model_tokens: int
    itl_target_ms: int
    blocks_free: int  # its own figure; what it could evict included
    running: int = 0  # its own figure, which knows of other routers
    asked_blocks: int = 0  # of our Reserves that it has not answered yet
    asked: int = 0  # sequences of ours, running and on their way
    coming: int = 0  # of these, whose prompts are not computed yet

    @property
    def room_blocks(self) -> int:
        return self.blocks_free - self.asked_blocks

    @property
    def load_ms(self) -> float:
        base_ms, token_ms, sequence_ms = self.measured.rates
        sequences_ms = max(self.running, self.asked) * sequence_ms
        return base_ms + sequences_ms + max(self.queued_tokens, self.asked_tokens) * token_ms

    @property
    def sequences(self) -> int:
        return max(self.running, self.asked)

    @property
    def decoding(self) -> int:
        return max(self.running, self.asked - self.coming)

    def view(self, cached_blocks: int) -> DecodeView:
        return DecodeView(
            self.worker_id,
            self.room_blocks,
            self.sequences,
            self.block_size,
            self.rates,
            cached_blocks,
            self.backlog_tokens,
            self.itl_target_ms,
            self.full,
            self.backlog_prompts,
            self.chunk_tokens,
            self.shunned,
            self.decoding,
        )


Worker = PrefillWorker | DecodeWorker
