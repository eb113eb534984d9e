"""How long a step may take so that every answer keeps its mean time per token.

Pure; step_loop.py, and the capacity simulation, ask before each step with prompts to compute, and
step_loop.py before one that may wait for the prompts of a neighbour on the same cores. TPOT
is a mean over an answer, so an answer that has had short steps can afford a long one: what its
tokens may take by the target, less what they have taken. That is never more than it has saved, for
it may end with any token; and it keeps what it will need itself when those have joined who are on
their way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from decode_worker.batch import Running
from kvrelay.config import TPOT_SHARE
from kvrelay.engine.step_cost import StepFit

_CATCH_UP_STEPS = 4  # in which an answer that has waited for a step is to be in time again
_PAUSE_SHARE = 0.85  # of the target: whoever pauses on purpose keeps what a hand-off, and a step
# that the system holds up, may take; a short answer has no later steps to make up for them
_QUIET_MS = 50.0  # an answer that is not expected yet does not come sooner: its prompt takes longer


@dataclass(frozen=True)
class Room:
    """For a step with prompts. left_ms: what all answers can afford; below 0 when somebody is
    behind already. most_ms: what it takes at most, unless it has a single block of prompts."""

    left_ms: float = inf
    most_ms: float = inf


ENDLESS = Room()


def step_room(
    running: Sequence[Running],
    now_ms: float,
    target_ms: float,
    fit: StepFit,
    *,
    coming: int = 0,
    receives: bool = False,
) -> Room:
    """Who misses the target even if no prompt delays what is left of its answer has nothing to
    lose.

    coming: answers on their way, whose prompts others compute. receives: there have been such; they
    join during a step, and wait for its end.
    """
    target_ms *= TPOT_SHARE
    plain_ms = fit.cost.predict_ms(0, len(running))
    # What each step leaves when all are here; the prompt of this one becomes an answer as well.
    spare_ms = target_ms - fit.cost.predict_ms(0, len(running) + coming + 1)
    left_ms = inf
    for sequence in running:
        spent_ms = now_ms - sequence.begun_ms
        gaps = len(sequence.answer)  # with the one that this step ends
        after = sequence.sampling.max_tokens - 1 - gaps
        saved_ms = gaps * target_ms - spent_ms
        if saved_ms - plain_ms + after * (target_ms - plain_ms) >= 0:
            left_ms = min(left_ms, saved_ms - after * max(0.0, -spare_ms))
    if not receives:
        return Room(left_ms)
    most_ms = target_ms + _CATCH_UP_STEPS * max(0.0, spare_ms)
    return Room(left_ms, most_ms if running or coming > 0 else max(most_ms, _QUIET_MS))


class Slack:
    """What the steps of one worker may take. tpot_target_ms: of its answers; 0: they have none."""

    def __init__(self, tpot_target_ms: float) -> None:
        self.target_ms = tpot_target_ms
        self._receives = False

    def received(self) -> None:
        """A prompt that others have computed."""
        self._receives = True

    def room(self, running: Sequence[Running], now_ms: float, fit: StepFit, coming: int) -> Room:
        """For the next step. coming: as of step_room."""
        if not self.target_ms:
            return ENDLESS
        receives = self._receives
        return step_room(running, now_ms, self.target_ms, fit, coming=coming, receives=receives)

    def pause_ms(
        self,
        running: Sequence[Running],
        now_ms: float,
        fit: StepFit,
        coming: int,
        last_ended_ms: float,
    ) -> float:
        """How long the next step may wait; 0 without a target, or with nobody who can meet it. It
        ends within the target from the last one's end on: gaps are even, and what has been saved
        is not spent on one of them."""
        if not self.target_ms:
            return 0.0
        most_ms = _PAUSE_SHARE * self.target_ms
        room = step_room(running, now_ms, most_ms / TPOT_SHARE, fit, coming=coming)
        if room.left_ms == inf:
            return 0.0
        until_ms = min(now_ms + room.left_ms, last_ended_ms + most_ms)
        return max(0.0, until_ms - now_ms - fit.cost.predict_ms(0, len(running)))
