"""The few workers of one role that are worth a look for a prompt, whatever the size of the fleet.

Pure; one for each role, used by router/workers.py.
"""

from collections.abc import Collection, Sequence
from math import inf
from typing import Generic, TypeVar

from router.prefix_index import PrefixIndex
from router.ranking import Ranking
from router.worker import NO_ROOM, DecodeWorker, PrefillWorker

_LEAST_BUSY = 2
_HOLDERS = 2  # of each prefix
_SHUNNED_MS = 1e9  # added to a load: after all that are not shunned, before those without room

W = TypeVar("W", PrefillWorker, DecodeWorker)


class Shortlist(Generic[W]):
    """Workers in order of load and of room, and by the blocks they cache."""

    def __init__(self, names_total_max: int) -> None:
        self.index = PrefixIndex(names_total_max)
        self._workers: dict[int, W] = {}  # by number
        self._by_load = Ranking()
        self._by_room = Ranking()

    def up(self, worker: W, names_max: int) -> None:
        """names_max: cached blocks of the worker that are remembered."""
        self._workers[worker.number] = worker
        self.index.up(worker.number, names_max)
        self.rank(worker)

    def down(self, worker: W) -> None:
        del self._workers[worker.number]
        self.index.down(worker.number)
        self._by_load.drop(worker.number)
        self._by_room.drop(worker.number)

    def rank(self, worker: W) -> bool:
        """Brings the order up to date with the worker's figures, if it is here.

        Whether it has become able to take what it could not take before.
        """
        if self._workers.get(worker.number) is not worker:
            return False
        if worker.refused or worker.draining:  # worker.full, asked for with every event
            load_ms, standing = inf, NO_ROOM
        else:
            load_ms = worker.load_ms
            if worker.shunned:
                load_ms += _SHUNNED_MS
            queued, asked = worker.queued_tokens, worker.asked_tokens
            standing = (queued if queued > asked else asked, -worker.room_blocks)
        number, before = worker.number, worker.standing
        self._by_load.put(number, load_ms)
        if standing == before:
            return False
        self._by_room.put(number, standing[1])
        worker.standing = standing
        return standing[0] < before[0] or standing[1] < before[1]

    def roomiest(self, without: Collection[str] = ()) -> W | None:
        """Whoever has the most room, but for some; without room there, nobody else has it."""
        first = (self._workers[number] for number in self._by_room.first(1 + len(without)))
        return next((worker for worker in first if worker.worker_id not in without), None)

    def pick(self, chain: Sequence[bytes], distrusted: int = 0) -> list[tuple[W, int]]:
        """Workers, each with the number of leading blocks of `chain` that it caches.

        The least busy, the one with the most room, and the least busy holders of two prefixes: the
        longest that anybody caches, and the longest that several do, for its holder may be busy.
        distrusted: workers that have failed; of each kind so many more, lest there be no other.
        """
        picked: dict[int, int | None] = dict.fromkeys(self._by_load.first(_LEAST_BUSY + distrusted))
        picked.update(dict.fromkeys(self._by_room.first(1 + distrusted)))
        longest = self.index.longest(chain)
        if longest:
            holders = self.index.holders(chain[longest - 1])
            count = _HOLDERS + distrusted
            picked.update(dict.fromkeys(self._by_load.first_of(holders, count), longest))
            if len(holders) < _HOLDERS and (shared := self.index.longest(chain, _HOLDERS)):
                holders = self.index.holders(chain[shared - 1])
                others = self._by_load.first_of(holders, count)
                picked.update(dict.fromkeys(n for n in others if n not in picked))
        return [
            (self._workers[n], self.index.depth(n, chain, longest) if known is None else known)
            for n, known in picked.items()
        ]

    def check(self, worker: W) -> None:
        """Asserts that a worker stands where its figures put it. For tests."""
        before = worker.standing
        assert not self.rank(worker)
        assert worker.standing == before
        self.index.check()
