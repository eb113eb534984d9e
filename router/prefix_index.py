"""Which worker caches which block, by what workers tell of their prefix caches.

Pure; one for each role, used by router/shortlist.py. It is a hint: who is asked for a block that it
has evicted since computes it again. Memory is bounded by `names_max` for each worker, and by
`names_total_max` for all: nobody gets more than an equal share of it, and who has more keeps that
until its blocks go.

What a worker held that is gone is passed over at once and deleted a part at a time.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from kvrelay.kv.prefix import split_hashes
from kvrelay.wire import worker_pb2

# A block's holders: most blocks have one, and then no set is spent on it.
_Holders = int | set[int]

_SWEPT_MAX = 2_000  # names that one call deletes: about 1 ms


@dataclass
class _Told:
    """What one worker has told."""

    names_max: int
    names: set[bytes] = field(default_factory=set)
    number: int | None = None  # of its last BlockChanges; None: what is known has a gap
    asked: bool = False  # to send everything again


class PrefixIndex:
    """Workers by number."""

    def __init__(self, names_total_max: int) -> None:
        self._names_total_max = names_total_max
        self._names = 0  # of all workers together, those of the gone included
        self._holders: dict[bytes, _Holders] = {}
        self._told: dict[int, _Told] = {}
        self._gone: dict[int, set[bytes]] = {}  # their names that are still to be deleted

    def __len__(self) -> int:
        """Names that are remembered."""
        return len(self._holders)

    # ---- what workers say

    def up(self, worker: int, names_max: int) -> None:
        """names_max: names beyond it are not remembered, until others of this worker go."""
        self._clear(worker, self._gone.pop(worker, set()))
        self._told[worker] = _Told(names_max)

    def down(self, worker: int) -> None:
        """Costs nothing now, whatever the worker held; see `sweep`."""
        told = self._told.pop(worker)
        if told.names:
            self._gone[worker] = told.names

    def sweep(self, names_max: int = _SWEPT_MAX) -> None:
        """Deletes some of the names of workers that are gone; called about once a second, and
        with every change, so that what comes makes room for itself."""
        while self._gone and names_max > 0:
            worker, names = next(iter(self._gone.items()))
            for _ in range(min(len(names), names_max)):
                self._remove(names.pop(), worker)
                names_max -= 1
            if not names:
                del self._gone[worker]

    def change(self, worker: int, changes: worker_pb2.BlockChanges) -> bool:
        """False when the worker must be asked, once, to send everything again.

        After a gap nothing is believed until everything has come.
        """
        told = self._told[worker]
        follows = told.number is not None and changes.number == told.number + 1
        try:
            added, removed = split_hashes(changes.added), split_hashes(changes.removed)
        except ValueError:
            follows = False
        else:
            if changes.everything or follows:
                self._apply(worker, added, removed, everything=changes.everything)
                told.number, told.asked = changes.number, False
                return True
        told.number = None
        asked, told.asked = told.asked, True
        return asked

    def _apply(
        self, worker: int, added: Sequence[bytes], removed: Sequence[bytes], *, everything: bool
    ) -> None:
        if everything:
            self._forget(worker)
        if self._gone:
            self.sweep(min(2 * len(added), _SWEPT_MAX))
        told = self._told[worker]
        for name in removed:
            if name in told.names:
                told.names.remove(name)
                self._remove(name, worker)
        share = min(told.names_max, max(1, self._names_total_max // len(self._told)))
        room = min(share - len(told.names), self._names_total_max - self._names)
        if len(added) <= room and self._holders.keys().isdisjoint(added):  # nearly always
            self._add_new(told, added, worker)
            return
        for name in added[:share]:
            if len(told.names) >= share or self._names >= self._names_total_max:
                break
            if name not in told.names:
                told.names.add(name)
                self._add(name, worker)

    def _add_new(self, told: _Told, names: Sequence[bytes], worker: int) -> None:
        """Names that nobody else holds, nor this worker."""
        before = len(told.names)
        told.names.update(names)
        self._names += len(told.names) - before
        self._holders.update(dict.fromkeys(names, worker))

    def _add(self, name: bytes, worker: int) -> None:
        self._names += 1
        held = self._holders.get(name)
        if held is None:
            self._holders[name] = worker
        elif isinstance(held, set):
            held.add(worker)
        else:
            self._holders[name] = {held, worker}

    def _remove(self, name: bytes, worker: int) -> None:
        self._names -= 1
        held = self._holders[name]
        if isinstance(held, set) and len(held) > 2:
            held.remove(worker)
        elif isinstance(held, set):
            (self._holders[name],) = held - {worker}
        else:
            del self._holders[name]

    def _forget(self, worker: int) -> None:
        told = self._told[worker]
        self._clear(worker, told.names)
        told.names = set()

    def _clear(self, worker: int, names: Collection[bytes]) -> None:
        for name in names:
            self._remove(name, worker)

    # ---- what placement asks

    def holders(self, name: bytes) -> Collection[int]:
        held = self._holders.get(name, ())
        holders = (held,) if isinstance(held, int) else held
        if self._gone and not self._gone.keys().isdisjoint(holders):
            return set(holders) - self._gone.keys()
        return holders

    def longest(self, chain: Sequence[bytes], holders_min: int = 1) -> int:
        """Leading blocks of `chain` that at least so many workers hold.

        Whoever holds a block nearly always holds those before it, so a bisection finds it. Where
        that is not so the number may be any that fits; nothing is wrong but the prediction.
        """

        if holders_min == 1 and not self._gone:  # nearly always: without a call for each look
            return _bisect(lambda block: chain[block] in self._holders, len(chain))
        return _bisect(lambda block: len(self.holders(chain[block])) >= holders_min, len(chain))

    def depth(self, worker: int, chain: Sequence[bytes], longest: int) -> int:
        """Leading blocks of `chain` that the worker holds, found as in `longest`, which is given:
        nobody holds more."""
        names = self._told[worker].names
        return _bisect(lambda block: chain[block] in names, longest)

    def check(self) -> None:
        """Asserts that the holders are those who told so. For tests."""
        pairs = {(name, w) for w, told in self._told.items() for name in told.names}
        assert pairs == {(name, w) for name in self._holders for w in self.holders(name)}
        held = [*(told.names for told in self._told.values()), *self._gone.values()]
        assert self._names == sum(map(len, held))


def _bisect(held: Callable[[int], bool], blocks: int) -> int:
    """How many leading blocks are held, when held ones come before all others."""
    # Most prompts are new from their first block on, or known to the last.
    if not blocks or not held(0):
        return 0
    if held(blocks - 1):
        return blocks
    low, high = 1, blocks - 1  # the first `low` are held, the one at `high` is not
    while low < high:
        middle = (low + high) // 2
        if held(middle):
            low = middle + 1
        else:
            high = middle
    return low
