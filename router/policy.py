"""Where a request goes: a few workers as they are now and a request in, a placement out.

Pure; called by router/workers.py. All formulas of placement are here. Costs are milliseconds, from
what workers have measured of their own steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from types import MappingProxyType
from typing import NamedTuple

from kvrelay.kv.layout import blocks_for, reserved_blocks
from kvrelay.wire import worker_pb2

_STEP_TOKENS = 256  # of prompts in one step, where nothing else limits it
_ANSWER_TOKENS_MAX = 64  # of an answer that count: most end before their limit
_MESSAGES_MS = 2.0  # of a hand-off: what is said before and after, which no worker measures


class Rates(NamedTuple):
    """What a worker's steps cost it."""

    base_ms: float
    prompt_token_ms: float
    sequence_ms: float  # of a sequence that decodes


# While no worker has measured anything: a small model on a few cores. Only their proportions
# matter then.
NEUTRAL = Rates(base_ms=5.0, prompt_token_ms=0.25, sequence_ms=0.5)
NEUTRAL_BLOCK_MS = 0.1  # of handing one block over


def rates_of(cost: worker_pb2.StepCost, usual: Rates = NEUTRAL) -> Rates:
    """What a worker has measured, completed by what is usual; `usual` itself when that is all."""
    token, sequence = cost.ms_per_prompt_token, cost.ms_per_sequence
    if not (cost.base_ms or token or sequence):
        return usual
    return Rates(
        cost.base_ms,
        token or usual.prompt_token_ms,
        sequence or usual.sequence_ms,
    )


class PrefillView(NamedTuple):
    """A prefill worker as the router knows it now."""

    worker_id: str
    queued_tokens: int
    blocks_total: int
    block_size: int
    rates: Rates = NEUTRAL
    block_ms: float = NEUTRAL_BLOCK_MS  # of a hand-off, that no computing hides
    cached_blocks: int = 0  # leading ones of the prompt
    full: bool = False  # it has just refused for want of room
    shunned: bool = False  # it has failed whoever was there last


class DecodeView(NamedTuple):
    """A decode worker as the router knows it now."""

    worker_id: str
    blocks_free: int
    blocks_total: int
    sequences: int  # running and on their way
    block_size: int
    rates: Rates = NEUTRAL
    cached_blocks: int = 0  # leading ones of the prompt
    queued_tokens: int = 0  # of prompts that it computes itself
    itl_target_ms: float = 0.0  # 0: none
    full: bool = False  # it has just refused for want of room
    shunned: bool = False  # it has failed whoever was there last


Pair = tuple[str | None, str]


class Placement(NamedTuple):
    prefill: str | None  # None: the decode worker computes the prompt itself
    decode: str
    predicted_ttft_ms: float  # from now
    predicted_tpot_ms: float
    tokens: int  # of the prompt that are not cached where it is computed

    @property
    def pair(self) -> Pair:
        return self.prefill, self.decode


class Wish(NamedTuple):
    """What placement needs to know of a request.

    failures: attempts of it that have failed, by worker. local: decode workers may compute the
    prompt themselves although there are prefill workers.
    """

    prompt_tokens: int
    max_tokens: int
    backlog_tokens_max: int
    failures: Mapping[str, int] = MappingProxyType({})
    local: bool = True


class Choice(NamedTuple):
    """The best placement, and whether its workers take it now; else it is better to wait."""

    placement: Placement
    now: bool


def place(
    prefill: Sequence[PrefillView], decode: Sequence[DecodeView], wish: Wish
) -> Choice | None:
    """The placement with the least cost; None when no decode worker has room.

    The cost is the predicted TTFT, the time of the answer's tokens, and what others lose. Before
    it count: how often both have failed the request, that they have not just failed others, that D
    can compute a prompt without missing its ITL target for those whose answers it writes, and that
    it keeps the target once it writes this answer too.

    A worker that has more than backlog_tokens_max of prompts to compute does not take another now:
    what cannot start soon stays where it can still go elsewhere. An idle one takes any prompt.
    """
    able_d = [
        d
        for d in decode
        if not d.full
        and reserved_blocks(wish.prompt_tokens, wish.max_tokens, d.block_size) <= d.blocks_free
    ]
    able_p = [p for p in prefill if blocks_for(wish.prompt_tokens, p.block_size) <= p.blocks_total]
    best = min(_options(able_p, able_d, wish), default=None)
    if best is None:
        return None
    (*_, decode_id, prefill_id), ttft_ms, tpot_ms, tokens, now = best
    return Choice(Placement(prefill_id or None, decode_id, ttft_ms, tpot_ms, tokens), now)


# In the order in which they count: failures of both for this request, how many of the two are
# shunned, a target is missed, cost in ms, sequences on D, room on D, names of D and P ("": D
# itself).
_Rank = tuple[int, int, bool, float, int, int, str, str]
# TTFT, TPOT, tokens left, whether it may go there now. Plain tuples, for speed.
_Option = tuple[_Rank, float, float, int, bool]


def _options(
    prefill: Sequence[PrefillView], decode: Sequence[DecodeView], wish: Wish
) -> Iterator[_Option]:
    failures = wish.failures
    # Whatever D it is, the most trusted of them win.
    failed_p, shunned_p = min(
        ((failures.get(p.worker_id, 0), p.shunned) for p in prefill), default=(0, False)
    )
    computing = []
    for p in sorted(prefill):  # by name, which decides among equals
        if (failures.get(p.worker_id, 0), p.shunned) != (failed_p, shunned_p):
            continue
        tokens = tokens_left(p, wish)
        ms = prefill_ms(p, tokens) + _MESSAGES_MS
        computing.append((ms, p.block_ms, p.worker_id, tokens, _takes(p, tokens, wish)))
    answer_tokens = min(wish.max_tokens, _ANSWER_TOKENS_MAX)
    for d in decode:
        name, sequences, room = d.worker_id, d.sequences, -d.blocks_free
        tpot_ms = d.rates.base_ms + (sequences + 1) * d.rates.sequence_ms
        slow = 0 < d.itl_target_ms < tpot_ms
        answer_ms = answer_tokens * tpot_ms
        failed, shunned = failures.get(name, 0), d.shunned
        blocks = max(0, blocks_for(wish.prompt_tokens, d.block_size) - d.cached_blocks)
        if computing:
            # Only the best of them can win.
            costs = [ms + blocks * block_ms for ms, block_ms, *_ in computing]
            ttft_ms = min(costs)
            _, _, p_name, tokens, takes = computing[costs.index(ttft_ms)]
            trust = (failed + failed_p, shunned + shunned_p)
            rank = (*trust, slow, ttft_ms + answer_ms, sequences, room, name, p_name)
            yield rank, ttft_ms, tpot_ms, tokens, takes
        if wish.local or not prefill:
            tokens = tokens_left(d, wish)
            ttft_ms, harm_ms, harmless = local_ms(d, tokens)
            cost_ms = ttft_ms + answer_ms + harm_ms
            slow |= not harmless
            rank = (failed, int(shunned), slow, cost_ms, sequences, room, name, "")
            yield rank, ttft_ms, tpot_ms, tokens, _takes(d, tokens, wish)


def _takes(worker: PrefillView | DecodeView, tokens: int, wish: Wish) -> bool:
    backlog = worker.queued_tokens
    return not worker.full and (not backlog or backlog + tokens <= wish.backlog_tokens_max)


# ---- the formulas


def tokens_left(worker: PrefillView | DecodeView, wish: Wish) -> int:
    """Of the prompt, to be computed there: all but cached blocks, at least the last token."""
    cached = min(worker.cached_blocks, (wish.prompt_tokens - 1) // worker.block_size)
    return wish.prompt_tokens - cached * worker.block_size


def prefill_ms(p: PrefillView, tokens: int) -> float:
    """Until P has computed a prompt of so many tokens, behind all that it has to compute."""
    tokens += p.queued_tokens
    return tokens * p.rates.prompt_token_ms + ceil(tokens / _STEP_TOKENS) * p.rates.base_ms


def local_ms(d: DecodeView, tokens: int) -> tuple[float, float, bool]:
    """(TTFT, harm, harmless) of a prompt that D computes itself, in chunks within its decode steps.

    A chunk is what the ITL target leaves of a step. harm: each sequence waits for the whole of the
    prompt, chunk by chunk; one more than now, for D's time is wanted by whoever comes next too.
    harmless: the steps of running sequences have room for a block at least.
    """
    step_ms = d.rates.base_ms + d.sequences * d.rates.sequence_ms
    chunk = _STEP_TOKENS
    if d.itl_target_ms:
        chunk = min(chunk, int((d.itl_target_ms - step_ms) / d.rates.prompt_token_ms))
    harmless = chunk >= d.block_size or not d.sequences
    own_ms = tokens * d.rates.prompt_token_ms
    tokens += d.queued_tokens
    steps = ceil(tokens / max(chunk, d.block_size))
    ttft_ms = steps * step_ms + tokens * d.rates.prompt_token_ms
    return ttft_ms, (d.sequences + 1) * own_ms, harmless
