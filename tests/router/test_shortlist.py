import random

from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import decode_worker

from kvrelay.kv.prefix import join_hashes
from kvrelay.wire.worker_pb2 import BlockChanges
from router.ranking import Ranking
from router.shortlist import Shortlist
from router.worker import DecodeWorker

CHAIN = [block.to_bytes(16, "big") for block in range(8)]


def worker(number: int, asked: int = 0, free: int = 10) -> DecodeWorker:
    return decode_worker(number, blocks_free=free, asked=asked)


def shortlist_of(*workers: DecodeWorker, **cached: int) -> Shortlist[DecodeWorker]:
    """cached: leading blocks of CHAIN, by the worker's name."""
    shortlist: Shortlist[DecodeWorker] = Shortlist(1000)
    for one in workers:
        shortlist.up(one, 100)
        added = join_hashes(CHAIN[: cached.get(one.worker_id, 0)])
        shortlist.index.change(one.number, BlockChanges(number=1, everything=True, added=added))
    return shortlist


def picked(shortlist: Shortlist[DecodeWorker]) -> dict[str, int]:
    return {one.worker_id: blocks for one, blocks in shortlist.pick(CHAIN)}


@given(
    changes=st.lists(
        st.tuples(st.integers(0, 6), st.one_of(st.none(), st.integers(0, 5))), max_size=60
    )
)
@settings(deadline=None)
def test_a_ranking_is_sorted_whatever_changes(changes):
    ranking, figures = Ranking(), {}
    for number, figure in changes:
        if figure is not None:
            ranking.put(number, figure)
            figures[number] = figure
        elif number in figures:
            ranking.drop(number)
            del figures[number]
        assert ranking.first(99) == sorted(figures, key=lambda n: (figures[n], n))
        some = {n for n in figures if n % 2}
        assert ranking.first_of(some, 2) == sorted(some, key=lambda n: (figures[n], n))[:2]


def test_of_many_some_near_the_front_are_found():
    ranking = Ranking()
    for number in range(1000):
        ranking.put(number, float(number))
    assert ranking.first_of(range(0, 1000, 3), 3) == [0, 3, 6]
    assert len(ranking.first_of(range(500, 1000), 3)) == 3


def test_the_least_busy_and_the_roomiest_are_looked_at():
    workers = [worker(n, asked=n, free=10 + 5 * (n == 8)) for n in range(1, 10)]
    assert picked(shortlist_of(*workers)) == {"d1": 0, "d2": 0, "d8": 0}


def test_so_are_the_holders_of_the_longest_prefix_and_of_one_that_several_hold():
    workers = [worker(n, asked=n) for n in range(1, 20)]
    shortlist = shortlist_of(*workers, d9=7, d10=3, d11=3, d12=3, d13=1)
    assert picked(shortlist) == {"d1": 0, "d2": 0, "d9": 7, "d10": 3}


def test_a_worker_that_refused_is_the_last_of_all_until_it_has_room_again():
    first, second, third = workers = [worker(n, asked=n) for n in range(1, 4)]
    shortlist = shortlist_of(*workers)
    first.refused = True
    assert not shortlist.rank(first)
    assert picked(shortlist) == {"d2": 0, "d3": 0}
    first.refused = False
    assert shortlist.rank(first), "somebody may have waited for it"
    assert picked(shortlist) == {"d1": 0, "d2": 0}
    second.refused = third.refused = True
    shortlist.rank(second)
    shortlist.rank(third)
    assert shortlist.roomiest() is first


def test_workers_that_failed_are_last_and_others_are_looked_at_in_their_place():
    workers = [worker(n, asked=n, free=10 + 5 * (n == 2)) for n in range(1, 6)]
    shortlist = shortlist_of(*workers)
    workers[0].shunned = True
    shortlist.rank(workers[0])
    assert picked(shortlist) == {"d2": 0, "d3": 0}
    looked_at = {one.worker_id for one, _ in shortlist.pick(CHAIN, distrusted=2)}
    assert looked_at == {"d2", "d3", "d4", "d5", "d1"}


def test_room_that_grows_is_noticed():
    one = worker(1, free=5)
    shortlist = shortlist_of(one)
    for free, backlog, grew in ((5, 0, False), (4, 0, False), (5, 9, True), (5, 8, True)):
        one.blocks_free, one.queued_tokens = free, backlog
        assert shortlist.rank(one) == grew
    shortlist.down(one)
    one.blocks_free = 9
    assert not shortlist.rank(one), "it is gone"
    assert shortlist.roomiest() is None


@given(seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_the_least_busy_of_all_is_always_looked_at(seed):
    dice = random.Random(seed)
    workers = [worker(n, dice.randrange(9), dice.randrange(9)) for n in range(50)]
    cached = {one.worker_id: dice.choice((0, 0, 0, 2, 5, 8)) for one in workers}
    looked_at = picked(shortlist_of(*workers, **cached))
    least = min(workers, key=lambda one: (one.asked, one.number))
    longest = max(cached.values())
    assert least.worker_id in looked_at
    assert longest in looked_at.values()
    assert all(cached[name] == blocks for name, blocks in looked_at.items())
    assert max(one.blocks_free for one in workers) in {
        one.blocks_free for one in workers if one.worker_id in looked_at
    }
    assert len(looked_at) <= 7
