"""What one worker's steps and hand-offs cost, by its own word for as long as it has work.

Pure; each worker of router/worker.py has both, router/workers.py keeps them up to date. A worker
that looks bad gets no work, and without work it measures nothing. So what it said fades to what is
usual when it has had no work for a while: then it is tried again.
"""

from collections import deque
from collections.abc import Collection
from math import inf
from statistics import median, median_low

from kvrelay.wire import worker_pb2
from router.prediction import NEUTRAL_BLOCK_MS, Rates, rates_of

_FADE_SHARE = 0.2  # of the way to what is usual, at each look
_KEPT = 5  # hand-offs whose middle one counts: two may have been held up by anything
_BLOCKS_MIN = 16  # of a hand-off that says what a block costs; of smaller ones, what all cost

_UNKNOWN = Rates(-1.0, -1.0, -1.0)


class _Use:
    """Whether there has been work of one kind lately."""

    def __init__(self) -> None:
        self.lately = True
        self._since_look = True
        self._last_ms = 0.0

    def note(self) -> None:
        self.lately = self._since_look = True

    def look(self, now_ms: float, fade_ms: float) -> None:
        if self._since_look:
            self._last_ms, self._since_look = now_ms, False
        self.lately = now_ms - self._last_ms <= fade_ms


class MeasuredRates:
    """Prompts keep the cost of a prompt's token up to date, answers that of a sequence, and both
    that of a step."""

    def __init__(self, usual: Rates) -> None:
        self.rates = usual
        self.prompts = _Use()
        self.answers = _Use()
        self._told = _UNKNOWN  # last
        self._word: tuple[float, float, float] | None = None  # the same, as it came

    def hear(self, cost: worker_pb2.StepCost, usual: Rates) -> None:
        """What a worker says without work of that kind is no news: its fit moves all figures."""
        word = (cost.base_ms, cost.ms_per_prompt_token, cost.ms_per_sequence)
        if word == self._word:  # nearly always
            return
        self._word = word
        told = rates_of(cost, _UNKNOWN)
        if told == self._told:
            return
        own, rates, lately = list(self._told), list(self.rates), self._lately()
        for which, figure in enumerate(told):
            if figure < 0 and own[which] < 0:
                rates[which] = usual[which]
            elif figure >= 0:
                if own[which] < 0 or lately[which]:
                    rates[which] = figure
                own[which] = figure
        self.rates, self._told = Rates(*rates), Rates(*own)

    def look(self, usual: Rates, now_ms: float, fade_ms: float) -> None:
        """Lets old figures fade; called about once a second."""
        self.prompts.look(now_ms, fade_ms)
        self.answers.look(now_ms, fade_ms)
        if self._told is _UNKNOWN:
            self.rates = usual
            return
        lately = self._lately()
        if self._told[1] >= 0 and self._told[2] >= 0 and lately == (True, True, True):
            return
        faded = Rates(
            *(
                common if told < 0 else mine if kept else mine + _FADE_SHARE * (common - mine)
                for told, mine, common, kept in zip(
                    self._told, self.rates, usual, lately, strict=True
                )
            )
        )
        if faded != self.rates:
            self.rates = faded

    def figure(self, which: int) -> float | None:
        """One of its rates, when that is its own and not old."""
        own = self._told[which] >= 0 and self._lately()[which]
        return self.rates[which] if own else None

    def _lately(self) -> tuple[bool, bool, bool]:
        """In the order of Rates."""
        prompts, answers = self.prompts.lately, self.answers.lately
        return prompts or answers, prompts, answers


def usual_of(fleet: Collection[MeasuredRates], before: Rates) -> Rates:
    """Of each figure the middle one of those who measure it now, of two the lower; `before` while
    nobody does, and the same object while nothing changes."""
    figures = []
    for which, known in enumerate(before):
        own = [value for one in fleet if (value := one.figure(which)) is not None]
        figures.append(median_low(own) if own else known)
    usual = Rates(*figures)
    return before if usual == before else usual


class HandOffs:
    """Exposed time of a hand-off: hand_off_ms, and block_ms for each block of it."""

    def __init__(self) -> None:
        self.hand_off_ms = 0.0
        self.block_ms = NEUTRAL_BLOCK_MS
        self._fixed = _Middle(self.hand_off_ms)
        self._block = _Middle(self.block_ms)

    def note(self, blocks: int, exposed_ms: float) -> None:
        if blocks <= 0 or not 0 <= exposed_ms < inf:
            return
        if blocks >= _BLOCKS_MIN:
            self._block.add(max(0.0, exposed_ms - self.hand_off_ms) / blocks)
        else:
            self._fixed.add(max(0.0, exposed_ms - blocks * self.block_ms))
        self._bring_up_to_date()

    def look(self, now_ms: float, fade_ms: float) -> None:
        """Lets old figures fade; called about once a second."""
        self._fixed.look(now_ms, fade_ms)
        self._block.look(now_ms, fade_ms)
        self._bring_up_to_date()

    def _bring_up_to_date(self) -> None:
        self.hand_off_ms, self.block_ms = self._fixed.value, self._block.value


class _Middle:
    """The middle one of the last few figures, which give way to the usual one when they are old."""

    def __init__(self, usual: float) -> None:
        self.value = usual
        self._usual = usual
        self._last = deque([usual] * _KEPT, maxlen=_KEPT)
        self._own = 0  # of them
        self._use = _Use()

    def add(self, figure: float) -> None:
        self._use.note()
        self._own = min(_KEPT, self._own + 1)
        self._put(figure)

    def look(self, now_ms: float, fade_ms: float) -> None:
        self._use.look(now_ms, fade_ms)
        if self._own and not self._use.lately:
            self._own -= 1
            self._put(self._usual)

    def _put(self, figure: float) -> None:
        self._last.append(figure)
        self.value = median(self._last)
