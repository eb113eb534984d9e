"""Workers in the order of a figure: the least first, in O(log n) for every change.

Pure; used by router/shortlist.py.
"""

from collections.abc import Collection
from itertools import islice

from sortedcontainers import SortedList

_LOOKS_MAX = 16  # entries of a long order, or of a long list of workers, that one call looks at


class Ranking:
    """Workers by number. Equal figures go by number: the same events give the same order."""

    def __init__(self) -> None:
        self._order = SortedList()  # of (figure, number)
        self._figures: dict[int, float] = {}

    def put(self, number: int, figure: float) -> None:
        known = self._figures.get(number)
        if known == figure:
            return
        if known is not None:
            self._order.remove((known, number))
        self._figures[number] = figure
        self._order.add((figure, number))

    def drop(self, number: int) -> None:
        self._order.remove((self._figures.pop(number), number))

    def first(self, count: int) -> list[int]:
        return [number for _, number in self._order.islice(0, count)]

    def first_of(self, among: Collection[int], count: int) -> list[int]:
        """The first `count` of `among`. Its cost has a bound, so of many they may be others near
        the front: those among the first of all, or some of `among`, whatever their place."""
        if len(among) > _LOOKS_MAX:
            found = [number for number in self.first(_LOOKS_MAX) if number in among][:count]
            if len(found) == count:
                return found
            among = {*found, *islice(among, _LOOKS_MAX)}
        ranked = sorted((self._figures[number], number) for number in among)
        return [number for _, number in ranked[:count]]
