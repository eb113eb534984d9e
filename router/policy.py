"""Where a request goes. Pure: a snapshot of the workers and a request in, a placement out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from kvrelay.kv.layout import blocks_for, reserved_blocks


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
    prefill: str | None  # None: the decode worker computes the prompt itself
    decode: str


def place(
    prefill: Sequence[PrefillView],
    decode: Sequence[DecodeView],
    *,
    prompt_tokens: int,
    max_tokens: int,
    backlog_tokens_max: int,
    colocated: bool = False,
    avoid: frozenset[tuple[str | None, str]] = frozenset(),
) -> Placement | None:
    """The least busy pair that can take the request now, or None: it waits in the queue.

    A prefill worker that is idle takes any prompt; a busy one only up to backlog_tokens_max, so
    that what cannot start soon stays where it can still go elsewhere. A pair (prefill, decode) in
    `avoid` is chosen only when no other is able. colocated: there are no prefill workers, decode
    workers compute prompts themselves.
    """
    able_p = [
        p
        for p in prefill
        if blocks_for(prompt_tokens, p.block_size) <= p.blocks_total
        and (not p.queued_tokens or p.queued_tokens + prompt_tokens <= backlog_tokens_max)
    ]
    able_d = [
        d
        for d in decode
        if reserved_blocks(prompt_tokens, max_tokens, d.block_size) <= d.blocks_free
    ]
    if not able_d or not (able_p or colocated):
        return None
    ranked_p: list[str | None] = [None]
    if not colocated:
        ranked_p = [
            p.worker_id for p in sorted(able_p, key=lambda p: (p.queued_tokens, p.worker_id))
        ]
    ranked_d = sorted(able_d, key=lambda d: (d.sequences, -d.blocks_free, d.worker_id))
    pairs = [(p, d.worker_id) for p, d in product(ranked_p, ranked_d)]
    return Placement(*next((pair for pair in pairs if pair not in avoid), pairs[0]))
