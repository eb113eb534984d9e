"""Who owns each KV block of a pool, and which moves are legal.

A pure object: workers call it from their event loop, and nothing else says whether a block may be
used. The states and moves are the one table MOVES; anything not in it raises and changes nothing.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from enum import Enum


class BlockState(Enum):
    __hash__ = object.__hash__  # in C: a request asks for hundreds

    FREE = "free"
    CACHED = "cached"  # holds a finished part of a prefix; read by any number, written by none
    RESERVED = "reserved"  # promised to a request, nobody writes yet
    WRITING = "writing"  # a peer may write at any moment
    OWNED = "owned"  # holds KV of a request, used by the local engine
    QUARANTINED = "quarantined"  # let go of while somebody may still write


class BlockEvent(Enum):
    __hash__ = object.__hash__

    RESERVE = "reserve"
    BEGIN = "begin"  # a peer gets leave to write
    COMMIT = "commit"  # every byte is in and checked
    CLAIM = "claim"  # the local engine will write
    RELEASE = "release"  # nobody writes and nobody needs it
    ABORT = "abort"  # not needed, but the writer has not let go yet
    WRITER_GONE = "writer_gone"  # the writer has acknowledged, or is known dead
    CACHE = "cache"  # complete: its owner becomes its first user and writes it no more
    SHARE = "share"  # one more user
    UNSHARE = "unshare"  # one less; the last one leaves it evictable
    EVICT = "evict"  # only what has no user


MOVES: dict[tuple[BlockState, BlockEvent], BlockState] = {
    (BlockState.FREE, BlockEvent.RESERVE): BlockState.RESERVED,
    (BlockState.RESERVED, BlockEvent.BEGIN): BlockState.WRITING,
    (BlockState.RESERVED, BlockEvent.CLAIM): BlockState.OWNED,
    (BlockState.RESERVED, BlockEvent.RELEASE): BlockState.FREE,
    (BlockState.WRITING, BlockEvent.COMMIT): BlockState.OWNED,
    (BlockState.WRITING, BlockEvent.ABORT): BlockState.QUARANTINED,
    (BlockState.WRITING, BlockEvent.WRITER_GONE): BlockState.FREE,
    (BlockState.OWNED, BlockEvent.RELEASE): BlockState.FREE,
    (BlockState.OWNED, BlockEvent.ABORT): BlockState.QUARANTINED,
    (BlockState.OWNED, BlockEvent.CACHE): BlockState.CACHED,
    (BlockState.QUARANTINED, BlockEvent.WRITER_GONE): BlockState.FREE,
    (BlockState.CACHED, BlockEvent.SHARE): BlockState.CACHED,
    (BlockState.CACHED, BlockEvent.UNSHARE): BlockState.CACHED,
    (BlockState.CACHED, BlockEvent.EVICT): BlockState.FREE,
}


# What is known of one block: its state and its owners. Of several owners they are a set, which is
# this block's alone; all blocks that came to one owner together share the whole, so that they are
# soon seen to be alike.
_Holding = tuple[BlockState, tuple[object, ...] | set[object]]

_FREE: _Holding = (BlockState.FREE, ())
_UNUSED: _Holding = (BlockState.CACHED, ())


class OutOfBlocksError(Exception):
    """Not enough free blocks now; nothing was reserved."""


class IllegalMoveError(Exception):
    """A bug in the caller: a move that MOVES does not have, or a block of somebody else's."""


class BlockLedger:
    """States and owners of `total` blocks. An owner is any hashable name of a request attempt.

    A block has one owner, but for two states: a free one has none, a cached one any number of
    users. Who is neither may not touch it.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._held = [_FREE] * total
        self._free = list(range(total - 1, -1, -1))
        self._counts = Counter({BlockState.FREE: total})
        self._unused = 0  # cached without a user

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def available(self) -> int:
        """What reservations could get: free blocks, and cached ones that nobody uses."""
        return len(self._free) + self._unused

    def state(self, block: int) -> BlockState:
        return self._held[block][0]

    def owners(self, block: int) -> Collection[object]:
        """None of a free block, any number of a cached one, else one."""
        return self._held[block][1]

    def is_used(self, block: int) -> bool:
        return bool(self._held[block][1])

    def reserve(self, owner: object, count: int) -> list[int]:
        """Gives `count` blocks to `owner`, all or nothing.

        Raises:
            OutOfBlocksError: fewer than `count` are free.
        """
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} KV blocks asked for, {len(self._free)} free")
        if not count:
            return []
        blocks = self._free[-count:]
        blocks.reverse()
        del self._free[-count:]
        self._set(blocks, BlockState.FREE, (BlockState.RESERVED, (owner,)))
        return blocks

    def move(self, owner: object, blocks: Sequence[int], event: BlockEvent) -> None:
        """Applies `event` to every block, or raises IllegalMoveError and changes nothing.

        EVICT is nobody's: its owner is None.
        """
        if not blocks:
            return
        if self._are_alike(owner, blocks, event):
            self._move_alike(owner, blocks, event)
            return
        targets = [self._target(owner, block, event) for block in blocks]
        if len(set(blocks)) != len(blocks):
            raise IllegalMoveError(f"{event.name}: a block is named twice in {list(blocks)}")
        for block, target in zip(blocks, targets, strict=True):
            state = self._held[block][0]
            self._unused -= self._is_unused(block)
            self._set([block], state, (target, self._owners_after(owner, block, event, target)))
            self._unused += self._is_unused(block)
            if target is BlockState.FREE:
                self._free.append(block)

    def _are_alike(self, owner: object, blocks: Sequence[int], event: BlockEvent) -> bool:
        """Whether they are all in one state and this owner's alone, and may all move: what nearly
        every call is about, and quickly found out. False where that is not sure."""
        if event is BlockEvent.SHARE or event is BlockEvent.RESERVE:
            return False
        if min(blocks) < 0 or len(set(blocks)) < len(blocks):
            return False
        try:
            held = list(map(self._held.__getitem__, blocks))
        except IndexError:
            return False
        first = held[0]
        owners = () if event is BlockEvent.EVICT else (owner,)
        if first[1] != owners or (first[0], event) not in MOVES:
            return False
        return held.count(first) == len(blocks)

    def _move_alike(self, owner: object, blocks: Sequence[int], event: BlockEvent) -> None:
        state = self._held[blocks[0]][0]
        target = MOVES[state, event]
        if event is BlockEvent.EVICT:
            self._unused -= len(blocks)
        elif event is BlockEvent.UNSHARE:
            self._unused += len(blocks)
        if target is BlockState.FREE:
            self._free.extend(blocks)
            after = _FREE
        else:
            after = _UNUSED if event is BlockEvent.UNSHARE else (target, (owner,))
        self._set(blocks, state, after)

    def cached(self, blocks: Sequence[int]) -> tuple[list[int], list[int]]:
        """Those of `blocks` that are cached, and the others; each in order."""
        held, is_cached = self._held, BlockState.CACHED
        count = [held[block][0] for block in blocks].count(is_cached)
        if not count:
            return [], list(blocks)
        if count == len(blocks):
            return list(blocks), []
        inside: list[int] = []
        outside: list[int] = []
        for block in blocks:
            (inside if held[block][0] is is_cached else outside).append(block)
        return inside, outside

    def without_owner(self, blocks: Iterable[int]) -> list[int]:
        """Those of `blocks` that are nobody's, in order."""
        held = self._held
        return [block for block in blocks if not held[block][1]]

    def counts(self) -> dict[BlockState, int]:
        """Blocks in each state; they add up to `total`."""
        return {state: self._counts[state] for state in BlockState}

    def check(self) -> None:
        """Raises AssertionError when the books do not balance. Called after every test."""
        states = [state for state, _ in self._held]
        assert Counter(states) == +self._counts, (self._counts, Counter(states))
        assert sum(self._counts.values()) == self.total
        free = [block for block, state in enumerate(states) if state is BlockState.FREE]
        assert sorted(self._free) == free
        unused = 0
        for block, (state, owners) in enumerate(self._held):
            if state is BlockState.CACHED:
                unused += not owners
            else:
                assert len(owners) == (state is not BlockState.FREE), (block, state, owners)
        assert unused == self._unused, (unused, self._unused)

    def _target(self, owner: object, block: int, event: BlockEvent) -> BlockState:
        if not 0 <= block < self.total:
            raise IllegalMoveError(f"block {block} is not one of the {self.total}")
        state, owners = self._held[block]
        if event is BlockEvent.RESERVE or (state, event) not in MOVES:
            raise IllegalMoveError(f"block {block} is {state.name}: no {event.name} from there")
        if event is BlockEvent.EVICT:
            if owners:
                raise IllegalMoveError(f"block {block} is used by {_names(owners)}: no EVICT")
        elif event is BlockEvent.SHARE:
            if owner in owners:
                raise IllegalMoveError(f"block {block} is used by {owner} already")
        elif owner not in owners:
            raise IllegalMoveError(f"block {block} belongs to {_names(owners)}, not {owner}")
        return MOVES[state, event]

    def _owners_after(
        self, owner: object, block: int, event: BlockEvent, target: BlockState
    ) -> tuple[object, ...] | set[object]:
        owners = self._held[block][1]
        if event is BlockEvent.SHARE:
            if not isinstance(owners, set):
                return {*owners, owner} if owners else (owner,)
            owners.add(owner)
        elif event is BlockEvent.UNSHARE and len(owners) > 1:
            assert isinstance(owners, set)
            owners.discard(owner)
        elif event is BlockEvent.UNSHARE or target is BlockState.FREE:
            return ()
        return owners

    def _is_unused(self, block: int) -> bool:
        state, owners = self._held[block]
        return state is BlockState.CACHED and not owners

    def _set(self, blocks: Sequence[int], state: BlockState, after: _Holding) -> None:
        """All of them are in `state`."""
        held = self._held
        for block in blocks:
            held[block] = after
        self._counts[state] -= len(blocks)
        self._counts[after[0]] += len(blocks)

    def __repr__(self) -> str:
        counts = " ".join(f"{state.value}={n}" for state, n in self.counts().items() if n)
        return f"<BlockLedger {counts} total={self.total}>"


def _names(owners: Collection[object]) -> str:
    return ", ".join(sorted(map(str, owners))) or "nobody"
