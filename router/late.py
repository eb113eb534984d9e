"""Which of those who wait are late for their first tokens.

Pure, used by the queue alone, which looks at late ones beside the others. Whoever waits is late
from one moment to another, both known when it comes, so time turns each of them twice and nobody is
asked again and again.
"""

from heapq import heappop, heappush
from math import inf

from sortedcontainers import SortedDict

from router.request import Request

Key = tuple[bool, int, float, int]  # of the queue's order


class Late:
    """Who is late now, and who is not, in the order of the queue; each change costs O(log n)."""

    def __init__(self) -> None:
        self._late = SortedDict()  # of Key to Request
        self._others = SortedDict()
        self._spans: dict[Key, tuple[float, float]] = {}  # late after, and up to
        self._turns: list[tuple[float, Key]] = []  # a heap; of those who are gone too

    def add(self, key: Key, request: Request, after_ms: float, until_ms: float) -> None:
        """It is looked at for the first time when time has come to `turn` it."""
        self._spans[key] = after_ms, until_ms
        self._others[key] = request
        if after_ms < until_ms:
            heappush(self._turns, (after_ms, key))

    def drop(self, key: Key) -> None:
        del self._spans[key]
        (self._late if key in self._late else self._others).pop(key)

    def first(self, most: int, now_ms: float) -> list[Request]:
        """In order: as many who are late, and as many who are not."""
        self._turn(now_ms)
        keys = [*self._late.islice(0, most), *self._others.islice(0, most)]
        return [self._late.get(key) or self._others[key] for key in sorted(keys)]

    def _turn(self, now_ms: float) -> None:
        while self._turns and self._turns[0][0] < now_ms:
            _, key = heappop(self._turns)
            after_ms, until_ms = self._spans.get(key, (inf, inf))
            is_late = after_ms < now_ms <= until_ms
            if is_late and key in self._others:
                self._late[key] = self._others.pop(key)
                heappush(self._turns, (until_ms, key))
            elif not is_late and key in self._late:
                self._others[key] = self._late.pop(key)

    def check(self, waiting: dict[Request, Key]) -> None:
        """Asserts that everybody is in one of them. For tests."""
        assert {**self._late, **self._others} == {key: r for r, key in waiting.items()}
        assert len(self._late) + len(self._others) == len(waiting) == len(self._spans)
