import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrelay.kv.ledger import BlockEvent, BlockLedger, BlockState, OutOfBlocksError
from kvrelay.kv.prefix import PrefixChain, chain_root
from kvrelay.kv.prefix_cache import PrefixCache

S, E = BlockState, BlockEvent
TOTAL = 8
ROOT = chain_root("model", 1, "")


@pytest.fixture
def cache():
    cache = PrefixCache(BlockLedger(TOTAL))
    yield cache
    cache.check()


def names(text: str) -> list[bytes]:
    """One block for each letter."""
    chain = PrefixChain(ROOT, 1)
    chain.extend([ord(letter) for letter in text])
    return chain.hashes


def use(cache: PrefixCache, owner: str, text: str, total: int | None = None) -> list[int]:
    """Takes blocks for a prompt, computes what is missing and shares it."""
    hashes = names(text)
    shared, private = cache.take(owner, hashes, len(text) if total is None else total)
    cache.ledger.move(owner, private, E.CLAIM)
    blocks = shared + private
    cache.insert(owner, blocks[: len(text)], hashes)
    return blocks


def end(cache: PrefixCache, owner: str, blocks: list[int], text: str = "") -> None:
    cache.let_go(owner, blocks, E.RELEASE, names(text))


def served(cache: PrefixCache, text: str) -> list[int]:
    blocks = use(cache, text, text)
    end(cache, text, blocks, text)
    return blocks


def cached(cache: PrefixCache, text: str) -> int:
    return len(cache.match(names(text)))


def test_an_ended_request_leaves_its_blocks_for_the_next(cache):
    blocks = served(cache, "abc")
    assert cache.ledger.counts()[S.CACHED] == 3
    assert cache.ledger.available == TOTAL
    shared, private = cache.take("B", names("abd"), 3)
    assert shared == blocks[:2]
    assert cache.ledger.available == TOTAL - 3
    end(cache, "B", shared + private)
    assert cache.ledger.available == TOTAL


def test_the_match_ends_at_the_first_block_that_is_not_there(cache):
    served(cache, "abc")
    found = {"abc": 3, "abx": 2, "axc": 1, "xbc": 0, "": 0, "abcd": 3}
    assert {text: cached(cache, text) for text in found} == found


def test_several_running_requests_share_one_block(cache):
    a = use(cache, "A", "abx")
    b = use(cache, "B", "aby")
    assert a[:2] == b[:2]
    assert a[2] != b[2]
    assert cache.ledger.counts()[S.CACHED] == 4
    end(cache, "A", a, "abx")
    assert cache.ledger.available == TOTAL - 3  # "a" and "b" are still B's
    end(cache, "B", b, "aby")
    assert cache.ledger.available == TOTAL


def test_the_second_of_two_equal_blocks_ends_with_its_owner(cache):
    a, b = cache.take("A", (), 2)[1], cache.take("B", (), 2)[1]
    for owner, blocks in (("A", a), ("B", b)):
        cache.ledger.move(owner, blocks, E.CLAIM)
        cache.insert(owner, blocks, names("ab"))
    assert cache.match(names("ab")) == a
    assert cache.private(b) == b
    end(cache, "B", b, "ab")
    end(cache, "A", a, "ab")
    assert cache.ledger.counts()[S.FREE] == TOTAL - 2


def test_room_is_made_when_it_is_needed_and_no_sooner(cache):
    served(cache, "abcdef")
    cache.take("B", (), 2)
    assert cached(cache, "abcdef") == 6
    cache.take("C", (), 1)
    assert cached(cache, "abcdef") == 5
    assert cache.ledger.free == 0


def test_the_least_recently_used_goes_first_and_children_before_their_parents(cache):
    served(cache, "abc")
    served(cache, "xyz")
    served(cache, "abc")
    assert len(cache) == 6
    order = []
    for _ in range(6):
        cache._evict(1)
        order.append((cached(cache, "abc"), cached(cache, "xyz")))
        cache.check()
    assert order == [(3, 2), (3, 1), (3, 0), (2, 0), (1, 0), (0, 0)]


def test_a_parent_that_its_user_had_twice_outlives_its_children_all_the_same(cache):
    a = cache.take("A", (), 3)[1]
    cache.ledger.move("A", a, E.CLAIM)
    served(cache, "a")  # another one: ours stays private
    cache.insert("A", a, names("abc"))
    end(cache, "A", a, "abc")
    for left in (2, 1, 0):
        cache._evict(1)
        assert cached(cache, "abc") == left


def test_what_is_in_use_is_never_evicted(cache):
    blocks = use(cache, "A", "abc")
    with pytest.raises(OutOfBlocksError, match="6 KV blocks asked for, 5 free or evictable"):
        cache.take("B", (), 6)
    assert cache.ledger.available == 5
    end(cache, "A", blocks, "abc")


def test_what_is_about_to_be_shared_makes_no_room(cache):
    served(cache, "abcdef")
    assert cache.ledger.available == TOTAL
    with pytest.raises(OutOfBlocksError, match="3 KV blocks asked for, 2 free or evictable"):
        cache.take("B", names("abcdef"), 9)
    assert cache.ledger.available == TOTAL  # all or nothing
    shared, private = cache.take("B", names("abcdef"), 8)
    assert (len(shared), len(private)) == (6, 2)
    end(cache, "B", shared + private)


def own(cache: PrefixCache, owner: str, count: int) -> list[int]:
    """Blocks that nothing was computed into yet."""
    _, blocks = cache.take(owner, (), count)
    cache.ledger.move(owner, blocks, E.CLAIM)
    return blocks


def test_a_table_catches_up_with_what_was_cached_meanwhile(cache):
    mine = own(cache, "A", 4)
    last = mine[3]
    others = served(cache, "abc")
    assert cache.catch_up("A", mine, names("abcd"), range(0, 2)) == 2
    assert cache.catch_up("A", mine, names("abcd"), range(2, 2)) == 0
    assert cache.catch_up("A", mine, names("abcd"), range(2, 4)) == 1
    assert mine == [*others, last]
    assert cache.catch_up("A", mine, names("abcd"), range(2, 4)) == 0  # has it already
    cache.check()
    assert cache.ledger.counts() == {
        **dict.fromkeys(S, 0),
        S.FREE: TOTAL - 4,
        S.CACHED: 3,
        S.OWNED: 1,
    }
    assert cache.ledger.available == TOTAL - 4, "what somebody uses is not evictable"
    end(cache, "A", mine, "abcd")


def test_what_is_cached_after_a_gap_is_not_taken(cache):
    mine = own(cache, "A", 3)
    served(cache, "abc")
    cache.forget(names("ab")[1:])
    assert cache.catch_up("A", mine, names("abc"), range(0, 3)) == 1
    end(cache, "A", mine, "abc")


def test_only_what_is_new_is_given_to_others_unless_something_before_it_has_gone(cache):
    mine = own(cache, "A", 4)
    cache.insert("A", mine, names("abcd"), end=2)
    assert cached(cache, "abcd") == 2
    cache.insert("A", mine, names("abcd"), first=2, end=3)
    assert cached(cache, "abcd") == 3
    cache.forget(names("ab"))
    cache.insert("A", mine, names("abcd"), first=3)  # comes after what is in doubt
    assert len(cache) == 1
    end(cache, "A", mine, "abcd")
    assert cache.ledger.counts()[S.CACHED] == 1


def test_a_name_that_was_another_ones_and_has_gone_is_given_again(cache):
    others = served(cache, "ab")
    mine = own(cache, "A", 3)
    cache.insert("A", mine, names("abc"), end=2)
    assert cache.match(names("ab")) == others
    cache._evict(2)
    cache.insert("A", mine, names("abc"), first=2)
    assert cache.match(names("abc")) == mine
    end(cache, "A", mine, "abc")


def test_a_quarantined_block_is_never_found(cache):
    shared, private = cache.take("A", names("ab"), 2)
    cache.ledger.move("A", private, E.CLAIM)
    cache.insert("A", private[:1], names("a"))
    cache.ledger.move("A", cache.private(private), E.ABORT)
    assert cached(cache, "ab") == 1
    cache.let_go("A", private, E.WRITER_GONE, names("ab"))
    assert cache.ledger.counts() == {**dict.fromkeys(S, 0), S.FREE: TOTAL - 1, S.CACHED: 1}
    assert shared == []


def test_what_is_forgotten_is_found_no_more_and_freed_when_nobody_uses_it(cache):
    served(cache, "abc")
    used = use(cache, "A", "ab")
    cache.forget(names("abc"))
    assert len(cache) == 0
    assert cache.ledger.counts()[S.CACHED] == 2
    cache.insert("A", used, names("ab"))  # in doubt: not again
    assert len(cache) == 0
    end(cache, "A", used, "ab")
    assert cache.ledger.free == TOTAL


def test_the_journal_is_told_of_what_comes_goes_and_is_forgotten(cache):
    take = cache.journal.take
    served(cache, "abc")
    assert list(take().added) == names("abc")
    served(cache, "ab")  # shared: nothing new
    assert take() is None
    cache._evict(1)
    assert list(take().removed) == names("abc")[2:]
    cache.forget(names("abc"))
    assert list(take().removed) == names("abc")[:2]


def test_names_of_different_tenants_never_meet(cache):
    tokens = [ord(letter) for letter in "abc"]
    chains = [PrefixChain(chain_root("model", 1, salt), 1) for salt in ("", "a", "b", "a ", "ab")]
    for chain in chains:
        chain.extend(tokens)
    assert len({name for chain in chains for name in chain.hashes}) == 3 * len(chains)
    served(cache, "abc")  # of the tenant without a name
    assert [len(cache.match(chain.hashes)) for chain in chains] == [3, 0, 0, 0, 0]


# ---- all of it at random


class PrefixCacheMachine(RuleBasedStateMachine):
    """Requests come, compute, are aborted and end. `content` is what the pool really holds."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(BlockLedger(TOTAL))
        self.content: list[str] = [""] * TOTAL  # the text up to and with each block's letter
        self.running: dict[int, tuple[str, list[int], int]] = {}  # text, blocks, shared
        self.aborted: dict[int, list[int]] = {}
        self.number = 0
        self.heard: set[bytes] = set()  # what somebody knows who reads the journal

    @rule(text=st.text("ab", min_size=1, max_size=6), more=st.integers(0, 2))
    def take(self, text: str, more: int) -> None:
        self.number += 1
        expected = len(self.cache.match(names(text)))
        room = self.cache.ledger.available
        try:
            shared, private = self.cache.take(self.number, names(text), len(text) + more)
        except OutOfBlocksError:
            assert self.cache.ledger.available == room
            return
        assert len(shared) == expected
        used = [b for _, blocks, _ in self.running.values() for b in blocks]
        used += [b for blocks in self.aborted.values() for b in blocks]
        assert not set(private) & set(used), "a block in use was given away"
        for index, block in enumerate(shared):
            assert self.content[block] == text[: index + 1], "not what its name says"
        self.cache.ledger.move(self.number, private, E.CLAIM)
        self.running[self.number] = (text, shared + private, len(shared))

    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        """Writes every private block, and shares those with a name."""
        if self.running:
            owner = data.draw(st.sampled_from(sorted(self.running)))
            text, blocks, _ = self.running[owner]
            for block in self.cache.private(blocks):
                at = blocks.index(block)
                assert self.cache.ledger.state(block) is S.OWNED
                self.content[block] = text[: at + 1] if at < len(text) else "?"
            share = data.draw(st.integers(0, len(text)))
            self.cache.insert(owner, blocks[:share], names(text)[:share])

    @rule(data=st.data())
    def catch_up(self, data: st.DataObject) -> None:
        """From its first block on that is its own, whatever is in it."""
        if self.running:
            owner = data.draw(st.sampled_from(sorted(self.running)))
            text, blocks, _ = self.running[owner]
            first = next((i for i, b in enumerate(blocks) if b in self.cache.private([b])), 0)
            end = data.draw(st.integers(0, len(text)))
            before = list(blocks)
            count = self.cache.catch_up(owner, blocks, names(text), range(first, end))
            changed = [i for i, block in enumerate(blocks) if block != before[i]]
            assert changed == list(range(first, first + count))
            for index in changed:
                assert self.content[blocks[index]] == text[: index + 1], "not what its name says"
                assert self.cache.ledger.state(before[index]) is S.FREE

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.running:
            owner = data.draw(st.sampled_from(sorted(self.running)))
            text, blocks, _ = self.running.pop(owner)
            self.cache.let_go(owner, blocks, E.RELEASE, names(text))

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.running:
            owner = data.draw(st.sampled_from(sorted(self.running)))
            _, blocks, _ = self.running.pop(owner)
            self.cache.ledger.move(owner, self.cache.private(blocks), E.ABORT)
            self.aborted[owner] = blocks

    @rule(data=st.data())
    def quiet(self, data: st.DataObject) -> None:
        if self.aborted:
            owner = data.draw(st.sampled_from(sorted(self.aborted)))
            blocks = self.aborted.pop(owner)
            for block in self.cache.private(blocks):
                self.content[block] = "torn"  # up to now it was written
            self.cache.let_go(owner, blocks, E.WRITER_GONE)

    @rule(text=st.text("ab", min_size=1, max_size=4))
    def forget(self, text: str) -> None:
        self.cache.forget(names(text))
        assert cached(self.cache, text) == 0

    @rule()
    def hear(self) -> None:
        changes = self.cache.journal.take()
        if changes is not None:
            assert not set(changes.added) & self.heard
            assert set(changes.removed) <= self.heard
            self.heard = self.heard - set(changes.removed) | set(changes.added)
        assert self.heard == set(self.cache._block_of)

    @invariant()
    def the_books_balance(self) -> None:
        self.cache.check()

    def teardown(self) -> None:
        for owner, (text, blocks, _) in self.running.items():
            self.cache.let_go(owner, blocks, E.RELEASE, names(text))
        for owner, blocks in self.aborted.items():
            self.cache.let_go(owner, blocks, E.WRITER_GONE)
        self.hear()
        self.cache.check()
        assert self.cache.ledger.available == TOTAL


TestPrefixCacheMachine = PrefixCacheMachine.TestCase
TestPrefixCacheMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
