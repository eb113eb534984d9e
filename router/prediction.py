"""Workers as the router knows them at one moment, and what it predicts that prompts take there.

Pure; placement (router/policy.py) is made of these formulas, and router/workers.py makes the views.
Costs are milliseconds, from what workers have measured of their own steps.
"""

from math import ceil
from typing import NamedTuple

from kvrelay.config import TPOT_SHARE
from kvrelay.wire import worker_pb2

CHUNK_TOKENS = 256  # of prompts in one step of a worker that does not say how many it takes


class Rates(NamedTuple):
    """What a worker's steps cost it."""

    base_ms: float
    prompt_token_ms: float
    sequence_ms: float  # of a sequence that decodes


# While no worker has measured anything: a small model on a few cores. Only their proportions
# matter then.
NEUTRAL = Rates(base_ms=5.0, prompt_token_ms=0.25, sequence_ms=0.5)
NEUTRAL_BLOCK_MS = 0.1  # of handing one block over


_RATES_MIN, _RATES_MAX = 1e-6, 1e6  # ms; beyond them a figure is a mistake


def rates_of(cost: worker_pb2.StepCost, usual: Rates = NEUTRAL) -> Rates:
    """What a worker has measured, completed by what is usual; `usual` itself when that is all.

    A step may cost nothing but its tokens; every other figure must be one that can be computed
    with and divided by.
    """
    token, sequence = cost.ms_per_prompt_token, cost.ms_per_sequence
    if not (cost.base_ms or token or sequence):
        return usual
    return Rates(
        cost.base_ms if 0 <= cost.base_ms <= _RATES_MAX else usual.base_ms,
        token if _RATES_MIN <= token <= _RATES_MAX else usual.prompt_token_ms,
        sequence if _RATES_MIN <= sequence <= _RATES_MAX else usual.sequence_ms,
    )


class PrefillView(NamedTuple):
    """A prefill worker as the router knows it now."""

    worker_id: str
    queued_tokens: int
    blocks_total: int
    block_size: int
    rates: Rates = NEUTRAL
    block_ms: float = NEUTRAL_BLOCK_MS  # of a hand-off, that no computing hides
    hand_off_ms: float = 0.0  # the same of a hand-off of any size
    cached_blocks: int = 0  # leading ones of the prompt
    full: bool = False  # it has just refused for want of room
    queued_prompts: int = 0  # that take turns; 0 with tokens: nobody knows, so all come first
    chunk_tokens: int = CHUNK_TOKENS  # of prompts in one step, at most
    shunned: bool = False  # it has failed whoever was there last


class DecodeView(NamedTuple):
    """A decode worker as the router knows it now."""

    worker_id: str
    blocks_free: int
    sequences: int  # running and on their way
    block_size: int
    rates: Rates = NEUTRAL
    cached_blocks: int = 0  # leading ones of the prompt
    queued_tokens: int = 0  # of prompts that it computes itself
    itl_target_ms: float = 0.0  # 0: none
    full: bool = False  # it has just refused for want of room
    queued_prompts: int = 0  # as of a prefill worker
    chunk_tokens: int = CHUNK_TOKENS
    shunned: bool = False  # it has failed whoever was there last
    decoding: int = 0  # of `sequences`, whose prompts are computed


# ---- what it will take


def tokens_left(worker: PrefillView | DecodeView, prompt_tokens: int) -> int:
    """Of the prompt, to be computed there: all but cached blocks, at least the last token."""
    cached = min(worker.cached_blocks, (prompt_tokens - 1) // worker.block_size)
    return prompt_tokens - cached * worker.block_size


def tokens_ahead(worker: PrefillView | DecodeView, tokens: int, chunk: int) -> int:
    """Of other prompts, computed there before the last of so many of this one: prompts take turns,
    and each of them has a chunk for every chunk of this one at most."""
    queued = worker.queued_tokens
    if not queued or not worker.queued_prompts:
        return queued
    return min(queued, worker.queued_prompts * ceil(tokens / chunk) * chunk)


def prefill_ms(p: PrefillView, tokens: int) -> float:
    """Until P has computed a prompt of so many tokens, with what comes before it there."""
    chunk, rates = p.chunk_tokens, p.rates
    tokens += tokens_ahead(p, tokens, chunk)
    return tokens * rates.prompt_token_ms + ceil(tokens / chunk) * rates.base_ms


def local_ms(d: DecodeView, tokens: int) -> tuple[float, float, bool]:
    """(TTFT, harm, harmless) of a prompt that D computes itself, in chunks within its decode steps.

    A chunk is what the ITL target leaves of a step. harm: each sequence waits for the whole of the
    prompt, chunk by chunk; one more than now, for D's time is wanted by whoever comes next too.
    harmless: the steps of running sequences have room for a block at least.
    """
    base_ms, token_ms, sequence_ms = d.rates
    step_ms = base_ms + d.sequences * sequence_ms
    chunk = d.chunk_tokens
    if d.itl_target_ms:
        chunk = min(chunk, int((d.itl_target_ms - step_ms) / token_ms))
    harmless = chunk >= d.block_size or not d.sequences
    chunk = max(chunk, d.block_size)
    harm_ms = (d.sequences + 1) * tokens * token_ms
    tokens += tokens_ahead(d, tokens, chunk)
    return ceil(tokens / chunk) * step_ms + tokens * token_ms, harm_ms, harmless


def prompt_share(rates: Rates, decoding: int, tpot_ms: float) -> float:
    """Of D's time, that is left for prompts when its answers take as long as they may."""
    step_ms = rates.base_ms + decoding * rates.sequence_ms
    if not decoding or not tpot_ms:
        return 1.0
    return max(0.0, 1 - step_ms / (TPOT_SHARE * tpot_ms))


def aimed_chunk(d: DecodeView, tpot_ms: float) -> float:
    """Prompt tokens that D computes in a step, on average, within the target of its answers, those
    on their way included; never none: prompts are not held back for ever."""
    share = prompt_share(d.rates, d.sequences, tpot_ms)
    if share == 1:
        return d.chunk_tokens
    return min(d.chunk_tokens, max(1.0, share * TPOT_SHARE * tpot_ms / d.rates.prompt_token_ms))


def aimed_local_ms(d: DecodeView, tokens: int, tpot_ms: float) -> float:
    """TTFT of a prompt that D computes itself, in steps that its answers can afford."""
    step_ms = d.rates.base_ms + d.sequences * d.rates.sequence_ms
    tokens += tokens_ahead(d, tokens, d.chunk_tokens)
    return tokens / aimed_chunk(d, tpot_ms) * step_ms + tokens * d.rates.prompt_token_ms
