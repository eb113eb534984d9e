"""Where a request goes. Pure: a snapshot of the workers and a request in, a placement out."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PrefillView:
    """A prefill worker as the router knows it now."""

    worker_id: str
    queued_tokens: int
    blocks_total: int
    block_size: int


@dataclass(frozen=True)
class DecodeView:
    """A decode worker as the router knows it now."""

    worker_id: str
    blocks_free: int
    blocks_total: int
    sequences: int  # running and on their way
    block_size: int


@dataclass(frozen=True)
class Placement:
    prefill: str
    decode: str


def place(
    prefill: Sequence[PrefillView],
    decode: Sequence[DecodeView],
    *,
    prompt_tokens: int,
    max_tokens: int,
    backlog_tokens_max: int,
) -> Placement | None:
    """The least busy pair that can take the request now, or None: it waits in the queue.

    A prefill worker that is idle takes any prompt; a busy one only up to backlog_tokens_max, so
    that what cannot start soon stays where it can still go elsewhere.
    """
    able_p = [
        p
        for p in prefill
        if blocks_for(prompt_tokens, p.block_size) <= p.blocks_total
        and (not p.queued_tokens or p.queued_tokens + prompt_tokens <= backlog_tokens_max)
    ]
    able_d = [
        d for d in decode if answer_blocks(prompt_tokens, max_tokens, d.block_size) <= d.blocks_free
    ]
    if not able_p or not able_d:
        return None
    best_p = min(able_p, key=lambda p: (p.queued_tokens, p.worker_id))
    best_d = min(able_d, key=lambda d: (d.sequences, -d.blocks_free, d.worker_id))
    return Placement(best_p.worker_id, best_d.worker_id)


def answer_blocks(prompt_tokens: int, max_tokens: int, block_size: int) -> int:
    """Blocks a decode worker reserves: the KV of the last answer token is never read."""
    return blocks_for(max(prompt_tokens, prompt_tokens + max_tokens - 1), block_size)


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
