"""Where a request goes: a few workers as they are now and a request in, a placement out.

Pure; called by router/workers.py. What prompts take at each worker is router/prediction.py's.
"""

from collections.abc import Mapping, Sequence
from math import inf
from types import MappingProxyType
from typing import NamedTuple

from kvrelay.kv.layout import blocks_for, reserved_blocks
from router.prediction import (
    DecodeView,
    PrefillView,
    aimed_chunk,
    aimed_local_ms,
    local_ms,
    prefill_ms,
    tokens_ahead,
    tokens_left,
)

_ANSWER_TOKENS_MAX = 64  # of an answer that count: most end before their limit
_LOCAL_RISK = 1.25  # answers that join D meanwhile make a prompt that it computes take longer
_MESSAGES_MS = 2.0  # of a hand-off: what is said before and after, which no worker measures

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


class Aim(NamedTuple):
    """What a request is to meet."""

    ttft_left_ms: float = inf  # until its first token is due; below 0: it is late
    tpot_ms: float = 0.0  # of every answer, on average; 0: none


class Wish(NamedTuple):
    """What placement needs to know of a request.

    failures: attempts of it that have failed, by worker. local: decode workers may compute the
    prompt themselves although there are prefill workers. aim: None where there are no targets.
    """

    prompt_tokens: int
    max_tokens: int
    backlog_tokens_max: int
    failures: Mapping[str, int] = MappingProxyType({})
    local: bool = True
    aim: Aim | None = None


class Choice(NamedTuple):
    """The best placement, and whether its workers take it now; else it is better to wait."""

    placement: Placement
    now: bool


def place(
    prefill: Sequence[PrefillView], decode: Sequence[DecodeView], wish: Wish
) -> Choice | None:
    """The placement with the least cost; None when no worker has room, so that nothing is worth a
    wait but room.

    The cost is the predicted TTFT, the time of the answer's tokens, and what others lose. Before
    it count: how often both have failed the request, that they have not just failed others, that D
    can compute a prompt without missing its ITL target for those whose answers it writes, and that
    it keeps the target once it writes this answer too.

    A worker that would compute more than backlog_tokens_max, with what comes before this prompt,
    does not take it now: what cannot start soon stays where it can still go elsewhere. An idle one
    takes any prompt. Whoever has just refused is left out.

    With an aim, what counts before the cost is that the request meets its targets, and of such
    placements that it need not wait: a worker without work while prompts wait is lost. Then workers
    take only as many prompts as they need not to run out of them, no decode worker takes an answer
    that would make those it writes late, and chunks on D cost others nothing: they wait until all
    can afford them (decode_worker/slack.py).
    """
    able_d = [
        d
        for d in decode
        if not d.full
        and reserved_blocks(wish.prompt_tokens, wish.max_tokens, d.block_size) <= d.blocks_free
    ]
    large = [p for p in prefill if blocks_for(wish.prompt_tokens, p.block_size) <= p.blocks_total]
    able_p = [p for p in large if not p.full]
    trust, trusted = _most_trusted(able_p, wish)
    # By name, which decides among equals.
    computing = [_computing(p, wish) for p in sorted(trusted)]
    options = []
    for d in able_d:
        answer = _answer(d, wish)
        if computing:
            options.append(_through_p(computing, trust, answer, wish))
        if wish.local or not large:
            options.append(_here_on_d(answer, wish, p_refused=len(able_p) < len(large)))
    if not options:
        return None
    best = _Option(*min(options))
    return Choice(
        Placement(best.prefill or None, best.decode, best.ttft_ms, best.tpot_ms, best.tokens),
        best.now,
    )


class _Option(NamedTuple):
    """A placement; its fields are in the order in which they count, so the least is the best.

    Most are made as plain tuples, which is three times as fast, and only the best is named.
    """

    failures: int  # of both, for this request
    shunned: int  # how many of both are
    late: bool  # a target is missed
    waits: bool  # with an aim: it may not go there now
    cost_ms: float
    sequences: int  # on D
    blocks_lacking: int  # on D: less room is more
    decode: str
    prefill: str  # "": D itself
    ttft_ms: float
    tpot_ms: float
    tokens: int  # of the prompt, to be computed
    now: bool  # whether it may go there now


_PlainOption = tuple[int, int, bool, bool, float, int, int, str, str, float, float, int, bool]


class _Computing(NamedTuple):
    """The prompt on a prefill worker, but for the hand-off of its blocks."""

    worker_id: str
    ms: float
    block_ms: float
    tokens: int
    now: bool


class _Answer(NamedTuple):
    """The answer on a decode worker, wherever its prompt is computed."""

    d: DecodeView
    failures: int
    tpot_ms: float
    ms: float
    late: bool
    crowded: bool  # with an aim: others would be late for it


def _most_trusted(
    prefill: Sequence[PrefillView], wish: Wish
) -> tuple[tuple[int, bool], Sequence[PrefillView]]:
    """Failures for this request, whether shunned, and those of which there are no better ones:
    whatever D it is, one of them wins."""
    trusts = [(wish.failures.get(p.worker_id, 0), p.shunned) for p in prefill]
    best = min(trusts, default=(0, False))
    return best, [p for p, trust in zip(prefill, trusts, strict=True) if trust == best]


def _computing(p: PrefillView, wish: Wish) -> _Computing:
    tokens = tokens_left(p, wish.prompt_tokens)
    ms = prefill_ms(p, tokens) + p.hand_off_ms + _MESSAGES_MS
    return _Computing(p.worker_id, ms, p.block_ms, tokens, _takes(p, tokens, wish))


def _answer(d: DecodeView, wish: Wish) -> _Answer:
    failures = wish.failures.get(d.worker_id, 0)
    tokens = min(wish.max_tokens, _ANSWER_TOKENS_MAX)
    if wish.aim is None:
        tpot_ms = d.rates.base_ms + (d.sequences + 1) * d.rates.sequence_ms
        late = 0 < d.itl_target_ms < tpot_ms
        return _Answer(d, failures, tpot_ms, tokens * tpot_ms, late, crowded=False)
    target_ms = wish.aim.tpot_ms
    tpot_ms = d.rates.base_ms + (d.decoding + 1) * d.rates.sequence_ms
    # The whole target, where prompts get what answers leave of TPOT_SHARE of it: this is the step
    # of the fullest moment, and an answer's mean is less.
    late = 0 < target_ms < tpot_ms
    # A target that not even a lone answer meets is no reason to write one at a time.
    crowded = late and d.decoding > 0 and d.rates.base_ms + d.rates.sequence_ms <= target_ms
    return _Answer(d, failures, tpot_ms, tokens * tpot_ms, late, crowded)


def _through_p(
    computing: Sequence[_Computing], trust: tuple[int, bool], answer: _Answer, wish: Wish
) -> _PlainOption:
    """With the best prefill worker for this decode worker: no other can win."""
    d = answer.d
    blocks = max(0, blocks_for(wish.prompt_tokens, d.block_size) - d.cached_blocks)
    costs_ms = [ms + blocks * block_ms for _, ms, block_ms, *_ in computing]
    ttft_ms = min(costs_ms)
    p = computing[costs_ms.index(ttft_ms)]
    now, aim = p.now and not answer.crowded, wish.aim
    return (
        answer.failures + trust[0],
        d.shunned + trust[1],
        answer.late or (aim is not None and ttft_ms > aim.ttft_left_ms),
        aim is not None and not now,
        ttft_ms + answer.ms,
        d.sequences,
        -d.blocks_free,
        d.worker_id,
        p.worker_id,
        ttft_ms,
        answer.tpot_ms,
        p.tokens,
        now,
    )


def _here_on_d(answer: _Answer, wish: Wish, *, p_refused: bool) -> _PlainOption:
    """p_refused: a prefill worker that has just refused may have room again soon, so this is no
    reason to make running answers late."""
    d = answer.d
    tokens = tokens_left(d, wish.prompt_tokens)
    now, aim = _takes(d, tokens, wish), wish.aim
    if aim is None:
        ttft_ms, harm_ms, harmless = local_ms(d, tokens)
        now = now and (harmless or not p_refused)
        late = answer.late or not harmless
    else:
        ttft_ms, harm_ms = aimed_local_ms(d, tokens, aim.tpot_ms), 0.0
        now = now and not answer.crowded
        late = answer.late or ttft_ms * _LOCAL_RISK > aim.ttft_left_ms
    return (
        answer.failures,
        int(d.shunned),
        late,
        aim is not None and not now,
        ttft_ms + answer.ms + harm_ms,
        d.sequences,
        -d.blocks_free,
        d.worker_id,
        "",
        ttft_ms,
        answer.tpot_ms,
        tokens,
        now,
    )


def _takes(worker: PrefillView | DecodeView, tokens: int, wish: Wish) -> bool:
    if not worker.queued_tokens:
        return True
    if wish.aim is not None:
        return _runs_out(worker, tokens, wish.aim)
    ahead = tokens_ahead(worker, tokens, worker.chunk_tokens)
    return ahead + tokens <= wish.backlog_tokens_max


def _runs_out(worker: PrefillView | DecodeView, tokens: int, aim: Aim) -> bool:
    """Whether it might have nothing to compute before it could be told of another prompt, as in its
    last step for those it has. More than that would only take turns with them, and make all later.
    A decode worker has its answers to go on with."""
    if isinstance(worker, DecodeView):
        return worker.queued_tokens + tokens <= 2 * aimed_chunk(worker, aim.tpot_ms)
    return worker.queued_tokens <= worker.chunk_tokens


# ---- whether a worker takes anything


def computes_any(worker: PrefillView | DecodeView, wish: Wish) -> bool:
    """Whether it would compute a prompt now, if it were short enough."""
    return _takes(worker, 1, wish)


def writes_any(d: DecodeView, wish: Wish) -> bool:
    """Whether it would write an answer now, if it had room for it."""
    return not _answer(d, wish).crowded
