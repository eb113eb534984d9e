"""The steps that a simulated decode worker has made, and the sequences that took part in them.

Steps of a batch that nobody joins or leaves are one run: when each of them ends follows from the
cost model, so nothing is to be done for any but the last. A sequence gets its tokens when it ends,
or when somebody wants to see them.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from decode_worker.batch import Running
from decode_worker.reservation import Key

_LOG_MAX = 1 << 13  # steps that are kept without a look whether anybody needs them


@dataclass(eq=False, slots=True)
class Playing:
    """A sequence in the batch. first: the step that made its second token, or will."""

    running: Running
    first: int
    sent: int = 0  # tokens that its router has been told


class Played:
    """stamp: the token that is made at a time. Behind: sequences lack the tokens of steps that
    have ended, until `catch_up`."""

    def __init__(self, stamp: Callable[[float], int]) -> None:
        self.steps = 0  # in runs, that have ended
        self.context = 0  # of all sequences together, in the next step
        self.sequences: dict[Key, Playing] = {}
        self.behind = True
        self._stamp = stamp
        self._log: list[int] = []  # the tokens of the newest steps
        self._from = 0  # the step of the first of them
        self._ends: list[tuple[int, int, Playing]] = []  # by the steps after which they end
        self._joined = 0

    def join(self, running: Running, first: int) -> Playing:
        """It has its first token; `first`: the step in which it takes part first."""
        playing = self.sequences[running.key] = Playing(running, first)
        self.context += running.prompt_tokens + 1
        self._note_end(playing)
        return playing

    def leave(self, key: Key) -> list[int] | None:
        """Its whole answer so far; None for one that is not here."""
        playing = self.sequences.get(key)
        if playing is None:
            return None
        self.catch_up(playing)
        del self.sequences[key]
        self.context -= playing.running.prompt_tokens + len(playing.running.answer)
        return playing.running.answer

    def left(self) -> int:
        """Steps until the next sequence ends."""
        ends = self._ends
        while not self._is_here(ends[0][2]):
            heapq.heappop(ends)
        return ends[0][0] - self.steps

    def ended(self, times_s: Sequence[float], sequences: int) -> list[Playing]:
        """Steps of a run of so many sequences have ended at these times. Whose last tokens are
        those of the newest step; they have all others."""
        stamp = self._stamp
        self._log += [stamp(at_s) for at_s in times_s]
        self.steps += len(times_s)
        self.context += sequences * len(times_s)
        if len(self._log) > _LOG_MAX:
            self._forget()
        done = []
        ends = self._ends
        while ends and ends[0][0] <= self.steps:
            playing = heapq.heappop(ends)[2]
            if self._is_here(playing):
                self.catch_up(playing, but=1)
                done.append(playing)
        return done

    def last(self) -> int:
        """The token of the newest step."""
        return self._log[-1]

    def catch_up(self, playing: Playing, *, but: int = 0) -> None:
        """Adds its tokens so far, all but the last few."""
        if self.behind:
            answer = playing.running.answer
            at = playing.first - 1 + len(answer)  # the step of its next token
            answer += self._log[max(0, at - self._from) : self.steps - but - self._from]

    def recount(self) -> None:
        """Of the context, when a sequence has left amid a run."""
        self.context = sum(
            p.running.prompt_tokens + 1 + max(0, self.steps - p.first)
            for p in self.sequences.values()
        )

    def settle(self) -> None:
        """From now on sequences get their tokens step by step, from whoever plays them."""
        if self.behind:
            for playing in self.sequences.values():
                self.catch_up(playing)
            self.behind = False

    def go_on(self) -> None:
        """In runs again."""
        if self.behind:
            return
        self.behind = True
        self._ends = []
        for playing in self.sequences.values():
            playing.first = self.steps + 1 - len(playing.running.answer)
            self._note_end(playing)
        self.recount()

    def _note_end(self, playing: Playing) -> None:
        self._joined += 1
        last = playing.first + playing.running.sampling.max_tokens - 1
        heapq.heappush(self._ends, (last, self._joined, playing))

    def _is_here(self, playing: Playing) -> bool:
        return self.sequences.get(playing.running.key) is playing

    def _forget(self) -> None:
        """Steps that are in every answer, or were before it. The newest stays: an answer that ends
        with it has not got it yet."""
        for playing in self.sequences.values():
            self.catch_up(playing, but=1)
        self._log, self._from = self._log[-1:], self.steps - 1
