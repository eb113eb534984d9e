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
        self._states = [BlockState.FREE] * total
        # Of blocks that have any. One owner is a tuple, which all blocks that came to it together
        # share, so that they are soon seen to be alike; several are a set.
        self._owners: dict[int, tuple[object] | set[object]] = {}
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
        return self._states[block]

    def is_used(self, block: int) -> bool:
        return block in self._owners

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
        self._owners.update(dict.fromkeys(blocks, (owner,)))
        self._set(blocks, BlockState.FREE, BlockState.RESERVED)
        return blocks

    def move(self, owner: object, blocks: Sequence[int], event: BlockEvent) -> None:
        """Applies `event` to every block, or raises IllegalMoveError and changes nothing.

        EVICT is nobody's: its owner is None.
        """
        if not blocks:
            return
        if self._are_alike(owner, blocks, event):
            self._move_alike(blocks, event)
            return
        targets = [self._target(owner, block, event) for block in blocks]
        if len(set(blocks)) != len(blocks):
            raise IllegalMoveError(f"{event.name}: a block is named twice in {list(blocks)}")
        for block, target in zip(blocks, targets, strict=True):
            self._unused -= self._is_unused(block)
            self._set_owners(owner, block, event, target)
            self._set([block], self._states[block], target)
            self._unused += self._is_unused(block)
            if target is BlockState.FREE:
                self._free.append(block)

    def _are_alike(self, owner: object, blocks: Sequence[int], event: BlockEvent) -> bool:
        """Whether they are all in one state and this owner's alone, and may all move: what nearly
        every call is about, and quickly found out. False where that is not sure."""
        if event is BlockEvent.SHARE or event is BlockEvent.RESERVE:
            return False
        if min(blocks) < 0 or max(blocks) >= self.total or len(set(blocks)) < len(blocks):
            return False
        states, owner_of = self._states, self._owners.get
        state, held = states[blocks[0]], owner_of(blocks[0])
        mine = held is None if event is BlockEvent.EVICT else held == (owner,)
        if not mine or (state, event) not in MOVES:
            return False
        count = len(blocks)
        return (
            list(map(states.__getitem__, blocks)).count(state) == count
            and list(map(owner_of, blocks)).count(held) == count
        )

    def _move_alike(self, blocks: Sequence[int], event: BlockEvent) -> None:
        state = self._states[blocks[0]]
        target = MOVES[state, event]
        self._set(blocks, state, target)
        if event is BlockEvent.EVICT:
            self._unused -= len(blocks)
        elif event is BlockEvent.UNSHARE:
            self._unused += len(blocks)
        if target is BlockState.FREE:
            self._free.extend(blocks)
        if event is not BlockEvent.EVICT and (
            target is BlockState.FREE or event is BlockEvent.UNSHARE
        ):
            for block in blocks:
                del self._owners[block]

    def cached(self, blocks: Iterable[int]) -> tuple[list[int], list[int]]:
        """Those of `blocks` that are cached, and the others; each in order."""
        states, is_cached = self._states, BlockState.CACHED
        inside: list[int] = []
        outside: list[int] = []
        for block in blocks:
            (inside if states[block] is is_cached else outside).append(block)
        return inside, outside

    def counts(self) -> dict[BlockState, int]:
        """Blocks in each state; they add up to `total`."""
        return {state: self._counts[state] for state in BlockState}

    def check(self) -> None:
        """Raises AssertionError when the books do not balance. Called after every test."""
        assert Counter(self._states) == +self._counts, (self._counts, Counter(self._states))
        assert sum(self._counts.values()) == self.total
        assert sorted(self._free) == [
            block for block, state in enumerate(self._states) if state is BlockState.FREE
        ]
        assert all(self._owners.values()), self._owners
        unused = 0
        for block, state in enumerate(self._states):
            owners = len(self._owners.get(block, ()))
            if state is BlockState.CACHED:
                unused += owners == 0
            else:
                assert owners == (state is not BlockState.FREE), (block, state, owners)
        assert unused == self._unused, (unused, self._unused)

    def _target(self, owner: object, block: int, event: BlockEvent) -> BlockState:
        if not 0 <= block < self.total:
            raise IllegalMoveError(f"block {block} is not one of the {self.total}")
        state = self._states[block]
        if event is BlockEvent.RESERVE or (state, event) not in MOVES:
            raise IllegalMoveError(f"block {block} is {state.name}: no {event.name} from there")
        owners = self._owners.get(block, ())
        if event is BlockEvent.EVICT:
            if owners:
                raise IllegalMoveError(f"block {block} is used by {_names(owners)}: no EVICT")
        elif event is BlockEvent.SHARE:
            if owner in owners:
                raise IllegalMoveError(f"block {block} is used by {owner} already")
        elif owner not in owners:
            raise IllegalMoveError(f"block {block} belongs to {_names(owners)}, not {owner}")
        return MOVES[state, event]

    def _set_owners(self, owner: object, block: int, event: BlockEvent, target: BlockState) -> None:
        owners = self._owners.get(block, ())
        if event is BlockEvent.SHARE:
            if isinstance(owners, set):
                owners.add(owner)
            else:
                self._owners[block] = {*owners, owner} if owners else (owner,)
        elif event is BlockEvent.UNSHARE and len(owners) > 1:
            assert isinstance(owners, set)
            owners.discard(owner)
        elif event is BlockEvent.UNSHARE or target is BlockState.FREE:
            self._owners.pop(block, None)

    def _is_unused(self, block: int) -> bool:
        return self._states[block] is BlockState.CACHED and block not in self._owners

    def _set(self, blocks: Sequence[int], state: BlockState, target: BlockState) -> None:
        """All of them are in `state`."""
        states = self._states
        for block in blocks:
            states[block] = target
        self._counts[state] -= len(blocks)
        self._counts[target] += len(blocks)

    def __repr__(self) -> str:
        counts = " ".join(f"{state.value}={n}" for state, n in self.counts().items() if n)
        return f"<BlockLedger {counts} total={self.total}>"


def _names(owners: Collection[object]) -> str:
    return ", ".join(sorted(map(str, owners))) or "nobody"
