"""Finds the KV blocks of earlier requests by the names of their prefixes, and says which go first.

A pure object over the block ledger, one for each worker: HandOff (decode worker) and Schedule
(prefill worker) take blocks and let go of them here. What is cached is never written, so any
number of requests may read it; what nobody reads is evicted when room is needed, least recently
used first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvrelay.kv.block_journal import BlockJournal
from kvrelay.kv.ledger import BlockEvent, BlockLedger, BlockState, OutOfBlocksError


class PrefixCache:
    """`hashes` are a prompt's PrefixChain.hashes, from its first block on."""

    def __init__(self, ledger: BlockLedger) -> None:
        self.ledger = ledger
        self._block_of: dict[bytes, int] = {}
        self.journal = BlockJournal(self._block_of)  # told of every name that comes or goes
        self._hash_of: list[bytes | None] = [None] * ledger.total  # by block
        self._in_doubt: set[int] = set()  # forgotten while somebody used them
        # In the order of eviction: children before their parents.
        self._unused: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._block_of)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest prefix that is cached."""
        blocks = []
        for name in hashes:
            block = self._block_of.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def take(
        self, owner: object, hashes: Iterable[bytes], total: int, keep: int = 0
    ) -> tuple[list[int], list[int]]:
        """`total` blocks for `owner`, all or nothing: those it shares of the longest cached prefix,
        and private ones for the rest. keep: so many must be left for somebody else.

        Raises:
            OutOfBlocksError: too few are free or could be evicted.
        """
        shared = self.match(hashes)
        count = total - len(shared)
        room = self.ledger.available - sum(block in self._unused for block in shared)
        if count > room - keep:
            kept = f", {keep} of them kept for a larger request" if keep else ""
            raise OutOfBlocksError(f"{count} KV blocks asked for, {room} free or evictable{kept}")
        self.ledger.move(owner, shared, BlockEvent.SHARE)
        for block in shared:
            self._unused.pop(block, None)
        self._evict(count - self.ledger.free)
        return shared, self.ledger.reserve(owner, count)

    def catch_up(
        self, owner: object, blocks: list[int], hashes: Sequence[bytes], places: range
    ) -> int:
        """Puts cached blocks into the places of `owner`'s own, which hold nothing yet and nobody
        uses: as many of `places` as are cached in a row. Changes `blocks`, the owner's table.

        Returns how many.
        """
        for place in places:
            other = self._block_of.get(hashes[place])
            if other is None or other == blocks[place]:
                return place - places.start
            self.ledger.move(owner, [other], BlockEvent.SHARE)
            self._unused.pop(other, None)
            self.ledger.move(owner, [blocks[place]], BlockEvent.RELEASE)
            blocks[place] = other
        return len(places)

    def insert(
        self,
        owner: object,
        blocks: Sequence[int],
        hashes: Sequence[bytes],
        *,
        first: int = 0,
        end: int | None = None,
    ) -> None:
        """Lets others share these blocks of `owner`, which are complete; those before `first` have
        been given here earlier, those from `end` on are not complete.

        A block whose name another one has already stays private, and ends with its owner. Blocks
        that are cached already are passed over; after one that was forgotten meanwhile, the rest is
        in doubt, too.
        """
        end = len(hashes) if end is None else end
        first = min(first, end)
        if first and (self._in_doubt or hashes[first - 1] not in self._block_of):
            first = 0  # something before it has gone
        new = self._new(blocks[first:end], hashes[first:end])
        self.ledger.move(owner, list(new.values()), BlockEvent.CACHE)
        self._block_of.update(new)
        hash_of = self._hash_of
        for name, block in new.items():
            hash_of[block] = name
        self.journal.add(new)

    def _new(self, blocks: Sequence[int], hashes: Sequence[bytes]) -> dict[bytes, int]:
        """By name, those of somebody's complete blocks that are to be cached."""
        if not self.ledger.cached(blocks)[0] and self._block_of.keys().isdisjoint(hashes):
            return dict(zip(hashes, blocks, strict=True))  # nearly always
        new: dict[bytes, int] = {}
        for block, name in zip(blocks, hashes, strict=True):
            if self.ledger.state(block) is BlockState.CACHED:
                if self._hash_of[block] is None:
                    break
            elif name not in self._block_of:
                new.setdefault(name, block)
        return new

    def private(self, blocks: Sequence[int]) -> list[int]:
        """Those of somebody's blocks that nobody else may read."""
        return self.ledger.cached(blocks)[1]

    def let_go(
        self, owner: object, blocks: Sequence[int], event: BlockEvent, hashes: Iterable[bytes] = ()
    ) -> None:
        """Ends the use of `blocks`: `event` for the private ones, UNSHARE for the cached.

        hashes: the owner's whole chain, which counts as used just now.
        """
        shared, private = self.ledger.cached(blocks)
        self.ledger.move(owner, private, event)
        self.ledger.move(owner, shared, BlockEvent.UNSHARE)
        self._rest(self.ledger.without_owner(reversed(shared)))
        # The chain may name blocks that others have put here, and that this owner had twice:
        # they too must outlive their children.
        named = list(map(self._block_of.get, hashes))
        if named == shared:
            return  # nearly always: they stand as they should
        for place in reversed(named):
            if place is not None and place in self._unused:
                self._unused.move_to_end(place)

    def forget(self, hashes: Iterable[bytes]) -> None:
        """Nobody shares these any more: what is in them is in doubt."""
        for name in hashes:
            block = self._block_of.pop(name, None)
            if block is None:
                continue
            self._hash_of[block] = None
            self.journal.remove([name])
            if block in self._unused:
                del self._unused[block]
                self.ledger.move(None, [block], BlockEvent.EVICT)
            else:
                self._in_doubt.add(block)

    def check(self) -> None:
        """Raises AssertionError when index and ledger differ. Called after every test."""
        self.ledger.check()
        named = {block: name for block, name in enumerate(self._hash_of) if name is not None}
        assert {block: name for name, block in self._block_of.items()} == named
        cached = {b for b in range(self.ledger.total) if self.ledger.state(b) is BlockState.CACHED}
        unused = {block for block in cached if not self.ledger.is_used(block)}
        assert unused == set(self._unused)
        assert unused <= named.keys() <= cached
        assert self._in_doubt == cached - named.keys()

    def _rest(self, blocks: Sequence[int]) -> None:
        """Nobody uses these any more; children come before their parents."""
        if not self._in_doubt:  # nearly always
            self._unused.update(dict.fromkeys(blocks))
            return
        for block in blocks:
            if self._hash_of[block] is not None:
                self._unused[block] = None
            else:
                self._in_doubt.remove(block)
                self.ledger.move(None, [block], BlockEvent.EVICT)

    def _evict(self, count: int) -> None:
        if count <= 0:
            return
        blocks = [self._unused.popitem(last=False)[0] for _ in range(count)]
        names = []
        for block in blocks:
            name, self._hash_of[block] = self._hash_of[block], None
            assert name is not None, "forgotten blocks do not wait for their eviction"
            del self._block_of[name]
            names.append(name)
        self.journal.remove(names)
        self.ledger.move(None, blocks, BlockEvent.EVICT)
