"""How long a step may take so that every answer keeps its mean time per token.

Pure; step_loop.py asks before each step with prompts to compute. TPOT is a mean over an answer, so
an answer that has had short steps can afford a long one: what its tokens may take by the target,
less what they have taken. That is never more than it has saved, for it may end with any token.
"""

from collections.abc import Sequence
from math import inf

from decode_worker.batch import Running

_TARGET_SHARE = 0.94  # of the target: the rest is for the way of tokens to the client


def step_left_ms(
    running: Sequence[Running],
    now_ms: float,
    target_ms: float,
    plain_ms: float,
    *,
    expecting: bool = False,
) -> float:
    """The longest that the next step may take; below 0 when somebody is behind already, inf when
    nobody minds.

    plain_ms: what a step without prompts takes. Who misses the target even if all that is left of
    its answer comes in such steps has nothing to lose. expecting: an answer may join during the
    step, and wait for its end.
    """
    target_ms *= _TARGET_SHARE
    left_ms = target_ms if expecting and not running else inf
    for sequence in running:
        spent_ms = now_ms - sequence.begun_ms
        gaps = len(sequence.answer)  # with the one that this step ends
        all_gaps = sequence.sampling.max_tokens - 1
        if spent_ms + (all_gaps - gaps + 1) * plain_ms <= all_gaps * target_ms:
            left_ms = min(left_ms, gaps * target_ms - spent_ms)
    return left_ms
