"""Simulated KV pools: what was really written in every block, and by whose leave.

A block has for each of its positions the state of the prefix that ends there (model.py), and the
state before its first. Every write says who writes and is checked against the worker's ledger at
that moment; every read is checked for being one prefix without a gap. What is wrong is told to
`violated` and the run ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.simulation.model import EMPTY, after
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.ledger import BlockLedger, BlockState
from kvrelay.kv.pool import KVPool

BLOCK_SIZE = 4
LAYOUT = KVLayout("simulated", "float32", layers=1, block_size=BLOCK_SIZE, kv_heads=1, head_dim=1)

_WRITABLE = {
    "engine": (BlockState.OWNED, BlockState.QUARANTINED),
    "peer": (BlockState.WRITING, BlockState.QUARANTINED),
}


@dataclass
class SimBlock:
    """states: of the positions from `first` on; None where nothing was written."""

    first: int = -1
    base: int = 0  # the state before `first`
    states: list[int | None] = field(default_factory=lambda: [None] * BLOCK_SIZE)
    version: int = 0  # grows with every write

    def content(self) -> "SimBlock":
        return SimBlock(self.first, self.base, list(self.states))


class SimPool(KVPool):
    """A KVPool without bytes. `ledger` is the worker's, once there is a worker."""

    def __init__(self, name: str, blocks: int, violated: Callable[[str], None]) -> None:
        # Not KVPool's own: there is no memory to map.
        self.layout = LAYOUT
        self.blocks = blocks
        self.fd = -1
        self.content = [SimBlock() for _ in range(blocks)]
        self.ledger: BlockLedger | None = None
        self._name = name
        self._violated = violated

    @property
    def staged(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to give back."""

    # ---- reads

    def prefix(self, blocks: Sequence[int], end: int, who: str) -> int:
        """The state after the first `end` positions of a sequence in these blocks."""
        state = EMPTY
        for place in range(-(-end // BLOCK_SIZE)):
            block = self.content[blocks[place]]
            last = min(end - place * BLOCK_SIZE, BLOCK_SIZE) - 1
            here = block.states[last]
            whole = block.first == place * BLOCK_SIZE and block.base == state
            if not whole or here is None or None in block.states[:last]:
                self._violated(
                    f"{self._name}: {who} reads block {blocks[place]} for positions from "
                    f"{place * BLOCK_SIZE}, which holds {_told(block)}"
                )
                return state ^ end
            state = here
        return state

    def versions(self, blocks: Sequence[int], end: int) -> int:
        """Changes with every write to what `prefix` reads, up to the block that `end` is in."""
        return sum(self.content[block].version for block in blocks[: end // BLOCK_SIZE])

    # ---- writes

    def owner(self, block: int) -> object:
        """Whoever may write it; None for nobody."""
        assert self.ledger is not None
        owners = self.ledger.owners(block)
        return next(iter(owners)) if len(owners) == 1 else None

    def check_leave(self, block: int, owner: object, kind: str) -> None:
        """kind: "engine" or "peer". A violation unless `owner` may write this block now."""
        assert self.ledger is not None
        state = self.ledger.state(block)
        if state not in _WRITABLE[kind]:
            self._violated(f"{self._name}: {kind} writes block {block}, which is {state.value}")
        elif self.owner(block) != owner:
            self._violated(f"{self._name}: {kind} writes block {block} of somebody else")

    def extend(self, blocks: Sequence[int], start: int, tokens: Sequence[int], state: int) -> int:
        """The engine writes tokens from position `start` on, after `state`; the state after."""
        for position, token in enumerate(tokens, start):
            block = self.content[blocks[position // BLOCK_SIZE]]
            offset = position % BLOCK_SIZE
            if offset == 0:
                block.first, block.base = position, state
                block.states = [None] * BLOCK_SIZE
            state = after(state, token)
            block.states[offset] = state
            block.version += 1
        return state

    def put(self, block: int, content: SimBlock) -> None:
        """A peer's bytes."""
        target = self.content[block]
        target.first, target.base = content.first, content.base
        target.states = list(content.states)
        target.version += 1


def spoilt(content: SimBlock) -> SimBlock:
    """What a broken wire makes of a block. Its checksum is not that of `content`."""
    return SimBlock(-2, ~content.base, [None] * BLOCK_SIZE)


def _told(block: SimBlock) -> str:
    if block.first < 0:
        return "nothing that anybody wrote"
    written = sum(state is not None for state in block.states)
    return f"{written} positions from {block.first} on, of this prefix or of another"
