import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.kv.prefix import join_hashes
from kvrelay.wire.worker_pb2 import BlockChanges
from router.prefix_index import PrefixIndex


def name(block: int) -> bytes:
    return block.to_bytes(16, "big")


def names(*blocks: int) -> bytes:
    return join_hashes(map(name, blocks))


def everything(number: int, *blocks: int) -> BlockChanges:
    return BlockChanges(number=number, everything=True, added=names(*blocks))


def index_of(*held: list[int], names_max: int = 100, total_max: int = 1000) -> PrefixIndex:
    """Worker 1 holds the first list of blocks, worker 2 the second, and so on."""
    index = PrefixIndex(total_max)
    for worker, blocks in enumerate(held, start=1):
        index.up(worker, names_max)
        assert index.change(worker, everything(1, *blocks))
    return index


CHAIN = [name(block) for block in range(20)]


def test_a_block_has_those_who_told_of_it():
    index = index_of([1, 2], [2, 3], [2])
    assert [set(index.holders(name(n))) for n in range(4)] == [set(), {1}, {1, 2, 3}, {2}]


def test_what_is_removed_is_held_by_the_others_alone():
    index = index_of([1], [1], [1])
    for number, left in ((1, {2, 3}), (2, {3}), (3, set())):
        assert index.change(number, BlockChanges(number=2, removed=names(1, 7)))
        assert set(index.holders(name(1))) == left
    assert len(index) == 0


def test_everything_replaces_what_was_known():
    index = index_of([1, 2])
    assert index.change(1, everything(7, 3))
    assert (list(index.holders(name(1))), list(index.holders(name(3)))) == ([], [1])


def test_a_gap_asks_once_for_everything_and_believes_nothing_until_it_comes():
    index = index_of([1])
    assert index.change(1, BlockChanges(number=2, added=names(2)))
    assert not index.change(1, BlockChanges(number=4, added=names(3)))
    assert index.change(1, BlockChanges(number=5, added=names(4)))
    assert (list(index.holders(name(3))), list(index.holders(name(4)))) == ([], [])
    assert index.change(1, everything(6, 5))
    assert index.change(1, BlockChanges(number=7, added=names(6)))
    assert [list(index.holders(name(n))) for n in (1, 5, 6)] == [[], [1], [1]]
    assert not index.change(1, BlockChanges(number=9)), "another gap, another question"


def test_a_worker_that_does_not_begin_with_everything_is_asked_for_it():
    index = PrefixIndex(1000)
    index.up(1, 100)
    assert not index.change(1, BlockChanges(number=1, added=names(1)))


@pytest.mark.parametrize("field", ["added", "removed"])
def test_half_a_name_is_a_gap(field):
    index = index_of([1])
    assert not index.change(1, BlockChanges(number=2, **{field: b"half"}))
    assert index.change(1, BlockChanges(number=3, everything=True, added=b"again"))
    index.check()


def test_a_worker_that_is_gone_holds_nothing():
    index = index_of([1, 2], [2])
    index.down(1)
    assert [list(index.holders(name(n))) for n in (1, 2)] == [[], [2]]
    index.up(1, 100)
    assert not index.change(1, BlockChanges(number=2)), "a new session, from everything on"


def test_a_worker_with_too_many_names_is_not_remembered_beyond_its_limit():
    index = index_of(list(range(50)), names_max=10)
    assert len(index) == 10
    assert index.change(1, BlockChanges(number=2, added=names(*range(50, 90))))
    assert len(index) == 10
    assert index.change(1, BlockChanges(number=3, removed=names(0, 49), added=names(100, 101)))
    assert len(index) == 10
    assert list(index.holders(name(100))) == [1]
    index.check()


def test_what_a_worker_held_that_is_gone_is_deleted_a_part_at_a_time():
    index = index_of(list(range(50)), [0, 1], [0])
    index.down(1)
    assert len(index) == 50, "nothing yet"
    assert set(index.holders(name(0))) == {2, 3}
    assert (set(index.holders(name(1))), set(index.holders(name(9)))) == ({2}, set())
    assert index.longest(CHAIN) == 2
    for left in (30, 10, 2):
        index.sweep(20)
        index.check()
        assert len(index) in range(left, left + 3)
    assert len(index) == 2
    index.sweep(20)
    assert set(index.holders(name(0))) == {2, 3}


def test_what_comes_makes_room_for_itself():
    index = index_of(list(range(50)), [60], total_max=50)
    index.down(1)
    assert index.change(2, BlockChanges(number=2, added=names(*range(61, 81))))
    assert len(index) == (50 - 2 * 20) + 20
    index.check()


def test_all_workers_together_have_a_limit_too():
    index = index_of(list(range(40)), total_max=50)
    index.up(2, 100)
    index.up(3, 100)
    assert index.change(2, everything(1, *range(100, 140)))
    assert len(index) == 50
    assert index.change(1, BlockChanges(number=2, added=names(41), removed=names(*range(10))))
    assert not index.holders(name(41)), "it has more than a third still"
    assert index.change(3, everything(1, *range(200, 240)))
    assert len(index) == 50
    index.check()


@pytest.mark.parametrize("held", range(21))
def test_the_longest_prefix_is_found_whatever_its_length(held):
    index = index_of(list(range(held)), list(range(held // 2)))
    assert index.longest(CHAIN) == held
    assert index.longest(CHAIN, 2) == held // 2
    assert index.depth(1, CHAIN, held) == held
    assert index.depth(2, CHAIN, held) == held // 2
    assert index.longest([]) == 0


@given(held=st.sets(st.integers(0, 19)))
def test_a_cache_with_holes_gives_a_prefix_that_somebody_may_hold(held):
    index = index_of(sorted(held))
    longest = index.longest(CHAIN)
    assert (longest > 0) == (0 in held)
    if longest:
        assert longest - 1 in held
        assert longest == 20 or longest not in held
    assert 0 <= index.depth(1, CHAIN, longest) <= longest


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_after_any_changes_it_is_what_a_naive_model_is(seed, steps):
    dice = random.Random(seed)
    index, held, number, gap = PrefixIndex(1000), {}, {}, {}
    for _ in range(steps):
        worker = dice.randrange(5)
        if worker not in held:
            index.up(worker, 1000)
            held[worker], number[worker], gap[worker] = set(), 0, True
        elif dice.random() < 0.1:
            index.down(worker)
            index.sweep(dice.randrange(4))
            index.check()
            del held[worker]
            continue
        number[worker] += 2 if dice.random() < 0.1 else 1
        gap[worker] |= dice.random() < 0.05
        if gap[worker]:
            number[worker] += 1
        all_of_it = dice.random() < 0.3
        added = {dice.randrange(30) for _ in range(dice.randrange(6))}
        removed = {dice.randrange(30) for _ in range(dice.randrange(6))} - added
        known = held[worker]
        before = index_number(index, worker)
        index.change(
            worker,
            BlockChanges(
                number=number[worker],
                everything=all_of_it,
                added=names(*added),
                removed=names(*removed),
            ),
        )
        if all_of_it:
            held[worker], gap[worker] = set(added), False
        elif before is not None and number[worker] == before + 1:
            held[worker] = (known - removed) | added
        index.check()
        for block in range(30):
            expected = {w for w, blocks in held.items() if block in blocks}
            assert set(index.holders(name(block))) == expected


def index_number(index: PrefixIndex, worker: int) -> int | None:
    return index._told[worker].number
