import copy
import itertools
import re

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrelay.kv.ledger import (
    MOVES,
    BlockEvent,
    BlockLedger,
    BlockState,
    IllegalMoveError,
    OutOfBlocksError,
)

S, E = BlockState, BlockEvent

# How a reserved block gets into each state.
WAYS = {
    S.RESERVED: [],
    S.WRITING: [E.BEGIN],
    S.OWNED: [E.CLAIM],
    S.QUARANTINED: [E.BEGIN, E.ABORT],
    S.CACHED: [E.CLAIM, E.CACHE],
}
PRODUCT = list(itertools.product(S, E))
LEGAL = [pair for pair in PRODUCT if pair in MOVES and pair[1] is not E.RESERVE]
ILLEGAL = [pair for pair in PRODUCT if pair not in LEGAL]  # RESERVE is for reserve() alone


def names(pair: object) -> str:
    return getattr(pair, "name", str(pair))


def ledger_with(state: BlockState) -> BlockLedger:
    """Two blocks; block 0 is in `state` and A's."""
    ledger = BlockLedger(2)
    if state is not S.FREE:
        ledger.reserve("A", 1)
        for event in WAYS[state]:
            ledger.move("A", [0], event)
    return ledger


@pytest.mark.parametrize(("state", "event"), LEGAL, ids=names)
def test_a_legal_event_moves_the_block(state, event):
    ledger = ledger_with(state)
    if event is E.EVICT:
        ledger.move("A", [0], E.UNSHARE)
    ledger.move({E.SHARE: "B", E.EVICT: None}.get(event, "A"), [0], event)
    assert ledger.counts()[MOVES[state, event]] == (2 if MOVES[state, event] is S.FREE else 1)
    ledger.check()


@pytest.mark.parametrize(("state", "event"), ILLEGAL, ids=names)
def test_an_illegal_event_raises_and_changes_nothing(state, event):
    ledger = ledger_with(state)
    before = copy.deepcopy(vars(ledger))
    with pytest.raises(IllegalMoveError, match=f"block 0 is {state.name}: no {event.name}"):
        ledger.move("A", [0], event)
    assert vars(ledger) == before


def test_the_table_leads_out_of_every_state_back_to_free():
    reached = {S.FREE}
    while more := {state for (state, _), to in MOVES.items() if to in reached} - reached:
        reached |= more
    assert reached == set(S)


def test_reserve_gives_all_or_nothing():
    ledger = BlockLedger(3)
    assert len(ledger.reserve("A", 2)) == 2
    with pytest.raises(OutOfBlocksError, match="2 KV blocks asked for, 1 free"):
        ledger.reserve("B", 2)
    assert ledger.free == 1
    assert ledger.reserve("B", 0) == []
    ledger.check()


def test_move_applies_to_all_blocks_or_to_none():
    ledger = BlockLedger(2)
    first, second = ledger.reserve("A", 2)
    ledger.move("A", [first], E.BEGIN)
    before = copy.deepcopy(vars(ledger))
    for blocks in ([first, second], [second, first]):
        with pytest.raises(IllegalMoveError):
            ledger.move("A", blocks, E.COMMIT)
        assert vars(ledger) == before


@pytest.mark.parametrize("block", [-1, 2])
def test_a_block_outside_the_pool_is_refused(block):
    with pytest.raises(IllegalMoveError, match=re.escape(f"block {block} is not one of the 2")):
        BlockLedger(2).move("A", [block], E.RELEASE)


def test_nobody_moves_a_block_of_another_owner():
    ledger = ledger_with(S.OWNED)
    with pytest.raises(IllegalMoveError, match="block 0 belongs to A, not B"):
        ledger.move("B", [0], E.RELEASE)
    assert ledger.counts()[S.OWNED] == 1


def test_a_freed_block_is_nobodys_any_more():
    ledger = ledger_with(S.OWNED)
    ledger.move("A", [0], E.RELEASE)
    assert ledger.reserve("B", 2)
    with pytest.raises(IllegalMoveError, match="belongs to B, not A"):
        ledger.move("A", [0], E.RELEASE)


def test_a_cached_block_has_any_number_of_users_and_goes_when_it_has_none():
    ledger = ledger_with(S.CACHED)
    ledger.move("B", [0], E.SHARE)
    assert (ledger.free, ledger.available) == (1, 1)
    for user in "AB":
        assert ledger.is_used(0)
        with pytest.raises(IllegalMoveError, match="block 0 is used by"):
            ledger.move(None, [0], E.EVICT)
        ledger.move(user, [0], E.UNSHARE)
    assert not ledger.is_used(0)
    assert (ledger.free, ledger.available) == (1, 2)
    ledger.check()
    ledger.move(None, [0], E.EVICT)
    assert (ledger.free, ledger.available) == (2, 2)
    ledger.check()


def test_nobody_uses_a_cached_block_twice_or_ends_a_use_that_he_has_not():
    ledger = ledger_with(S.CACHED)
    with pytest.raises(IllegalMoveError, match="block 0 is used by A already"):
        ledger.move("A", [0], E.SHARE)
    with pytest.raises(IllegalMoveError, match="block 0 belongs to A, not B"):
        ledger.move("B", [0], E.UNSHARE)
    assert ledger.available == 1
    ledger.check()


def test_what_is_cached_is_never_written_again():
    assert {event for state, event in MOVES if state is S.CACHED} == {E.SHARE, E.UNSHARE, E.EVICT}


def test_a_block_named_twice_is_refused():
    ledger = ledger_with(S.OWNED)
    with pytest.raises(IllegalMoveError, match="named twice"):
        ledger.move("A", [0, 0], E.RELEASE)
    assert ledger.counts()[S.OWNED] == 1
    ledger.check()


def test_repr_tells_the_counts():
    assert repr(ledger_with(S.WRITING)) == "<BlockLedger free=1 writing=1 total=2>"


class LedgerMachine(RuleBasedStateMachine):
    """Owners reserve and move at random; the model is a dict of block to (owners, state)."""

    TOTAL = 6

    def __init__(self) -> None:
        super().__init__()
        self.ledger = BlockLedger(self.TOTAL)
        self.model: dict[int, tuple[frozenset[str], BlockState]] = {}

    @rule(owner=st.sampled_from("ABC"), count=st.integers(0, TOTAL + 1))
    def reserve(self, owner: str, count: int) -> None:
        if count > self.TOTAL - len(self.model):
            with pytest.raises(OutOfBlocksError):
                self.ledger.reserve(owner, count)
            return
        blocks = self.ledger.reserve(owner, count)
        assert len(set(blocks)) == count
        assert not set(blocks) & set(self.model), "a block in use was given away"
        self.model.update((block, (frozenset(owner), S.RESERVED)) for block in blocks)

    @rule(
        owner=st.sampled_from("ABC"),
        blocks=st.lists(st.integers(0, TOTAL - 1), max_size=3),
        event=st.sampled_from(E),
    )
    def move(self, owner: str, blocks: list[int], event: BlockEvent) -> None:
        held = [self.model.get(block, (frozenset(), S.FREE)) for block in blocks]
        legal = len(set(blocks)) == len(blocks) and all(
            self.allowed(owner, owners, event) and (state, event) in MOVES for owners, state in held
        )
        if not legal:
            with pytest.raises(IllegalMoveError):
                self.ledger.move(owner, blocks, event)
            return
        self.ledger.move(owner, blocks, event)
        for block, (owners, state) in zip(blocks, held, strict=True):
            if event is E.SHARE:
                owners = owners | {owner}
            elif event is E.UNSHARE:
                owners = owners - {owner}
            self.model[block] = (owners, MOVES[state, event])
            if MOVES[state, event] is S.FREE:
                del self.model[block]

    @staticmethod
    def allowed(owner: str, owners: frozenset[str], event: BlockEvent) -> bool:
        if event is E.EVICT:
            return not owners
        return (owner not in owners) if event is E.SHARE else (owner in owners)

    @rule(data=st.data())
    def move_own(self, data: st.DataObject) -> None:
        """A move of blocks in one state, of one or of several owners: random ones are seldom legal,
        and never of blocks that go together."""
        if self.model:
            block = data.draw(st.sampled_from(sorted(self.model)))
            owners, state = self.model[block]
            owner = data.draw(st.sampled_from(sorted(owners) or ["A"]))
            alike = [b for b, (o, s) in self.model.items() if s is state and (owner in o or not o)]
            blocks = data.draw(st.lists(st.sampled_from(sorted(alike)), min_size=1, unique=True))
            events = [event for s, event in MOVES if s is state]
            self.move(owner, blocks, data.draw(st.sampled_from(events)))

    @invariant()
    def the_books_balance(self) -> None:
        self.ledger.check()
        counts = self.ledger.counts()
        assert sum(counts.values()) == self.TOTAL
        for state in S:
            held = sum(s is state for _, s in self.model.values())
            assert counts[state] == (held if state is not S.FREE else self.TOTAL - len(self.model))
        unused = sum(not owners for owners, _ in self.model.values())
        assert self.ledger.available == counts[S.FREE] + unused


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
