"""Workers in the order of a figure: the least first, in O(log n) for every change.

Pure; used by router/shortlist.py.
"""

from collections.abc import Collection
from heapq import heapify, heappop, heappush
from itertools import islice

_LOOKS_MAX = 16  # entries of a long order, or of a long list of workers, that one call looks at
_STALE_MAX = 2  # entries for each worker; figures change much more often than anybody asks


class Ranking:
    """Workers by number. Equal figures go by number: the same events give the same order."""

    def __init__(self) -> None:
        # A heap of (figure, number): of every worker its figure, and figures that it had.
        self._entries: list[tuple[float, int]] = []
        self._figures: dict[int, float] = {}

    def put(self, number: int, figure: float) -> None:
        if self._figures.get(number) == figure:
            return
        self._figures[number] = figure
        heappush(self._entries, (figure, number))
        if len(self._entries) > _STALE_MAX * len(self._figures) + _LOOKS_MAX:
            self._entries = [(figure, number) for number, figure in self._figures.items()]
            heapify(self._entries)

    def drop(self, number: int) -> None:
        del self._figures[number]

    def first(self, count: int) -> list[int]:
        entries, figures = self._entries, self._figures
        found: list[tuple[float, int]] = []
        while entries and len(found) < count:
            entry = heappop(entries)
            figure, number = entry
            # A figure that went away and came back is there twice, in a row.
            if figures.get(number) == figure and not (found and found[-1] == entry):
                found.append(entry)
        for entry in found:
            heappush(entries, entry)
        return [number for _, number in found]

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
