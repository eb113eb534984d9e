"""The NCCL pairs of a worker: which are opened and closed (the book), and that it is done."""

import asyncio
import threading
from dataclasses import replace

import pytest
from nccl_double import DoubleNccl
from nccl_ends import DEADLINE_S, Memory
from waiting import until

from kvrelay.lifecycle import IllegalTransitionError, advance
from kvrelay.transport.nccl_book import TRANSITIONS, NcclLimits, PairBook, PeerEvent, PeerState
from kvrelay.transport.nccl_errors import NcclError
from kvrelay.transport.nccl_pair import PairState
from kvrelay.transport.nccl_pairs import Invitation, NcclPairs

LIMITS = NcclLimits(
    pairs_max=2, hung_max=1, open_s=0.2, close_s=0.2, abort_s=0.2, backoff_s=1, backoff_max_s=5
)


# ---- the book


@pytest.fixture
def book():
    return PairBook(LIMITS)


def open_in(book, name, now_s=0.0, hung=0):
    victim = book.begin(name, now_s, hung)
    book.opened(name, book.epoch(name), now_s)
    return victim


def test_every_event_that_the_table_does_not_have_raises():
    for state in PeerState:
        for event in PeerEvent:
            if (state, event) not in TRANSITIONS:
                with pytest.raises(IllegalTransitionError):
                    advance(TRANSITIONS, state, event)


def test_each_pair_with_a_peer_has_a_higher_epoch(book):
    for epoch in (1, 2, 3):
        open_in(book, "a")
        assert book.epoch("a") == epoch
        book.ended("a", epoch, 0, failed=False)


def test_one_pair_a_peer(book):
    book.begin("a", 0, 0)
    with pytest.raises(NcclError, match="the pair with a is OPENING"):
        book.begin("a", 0, 0)
    book.opened("a", 1, 0)
    with pytest.raises(NcclError, match="the pair with a is OPEN"):
        book.begin("a", 0, 0)


def test_at_the_cap_the_least_recently_used_pair_goes(book):
    open_in(book, "a", 1)
    open_in(book, "b", 2)
    assert book.hold("a", 3)
    book.release("a", 1, 4)
    assert open_in(book, "c", 5) == "b"
    assert book.open_pairs == 2
    assert not book.hold("b", 6)


def test_a_pair_counts_as_used_until_its_transfer_ends(book):
    open_in(book, "a", 1)
    open_in(book, "b", 1)
    for name, hold_s, release_s in (("a", 2, 9), ("b", 3, 4)):
        book.hold(name, hold_s)
        book.release(name, 1, release_s)
    assert book.begin("c", 10, 0) == "b"


def test_a_failed_pair_takes_its_holds_along(book):
    open_in(book, "a", 0)
    book.hold("a", 0)
    book.ended("a", 1, 0, failed=True)
    open_in(book, "a", 1)
    open_in(book, "b", 2)
    assert book.begin("c", 3, 0) == "a"


def test_a_pair_that_a_transfer_holds_is_not_closed(book):
    open_in(book, "a", 1)
    open_in(book, "b", 2)
    assert book.hold("a", 3)
    assert book.hold("a", 3)
    book.release("a", 1, 3)
    assert open_in(book, "c", 9) == "b"
    assert book.hold("c", 9)
    with pytest.raises(NcclError, match="all 2 NCCL pairs are in use"):
        book.begin("d", 10, 0)
    assert book.open_pairs == 2


def test_a_refusal_changes_nothing(book):
    for name in ("a", "b"):
        open_in(book, name)
        book.hold(name, 0)
    for hung, reason in ((0, "in use"), (1, "1 NCCL pairs hang")):
        with pytest.raises(NcclError, match=reason):
            book.begin("c", 0, hung)
    book.release("a", 1, 0)
    assert book.begin("c", 0, 0) == "a"
    assert book.epoch("c") == 1


def test_after_each_failure_the_wait_is_twice_as_long_up_to_its_limit(book):
    now_s = 0.0
    for epoch, wait_s in enumerate((1, 2, 4, 5, 5), start=1):
        book.begin("a", now_s, 0)
        book.ended("a", epoch, now_s, failed=True)
        with pytest.raises(NcclError, match=f"failed {epoch} times; tried again in 0.1 s"):
            book.begin("a", now_s + wait_s - 0.1, 0)
        now_s += wait_s


def test_a_transfer_that_went_well_ends_the_back_off(book):
    book.begin("a", 0, 0)
    book.ended("a", 1, 0, failed=True)
    open_in(book, "a", 1)
    book.hold("a", 1)
    book.release("a", 2, 1)
    book.ended("a", 2, 1, failed=True)
    book.begin("a", 2, 0)


def test_a_pair_that_opens_but_never_carries_anything_is_backed_off_from(book):
    open_in(book, "a", 0)
    book.ended("a", 1, 0, failed=True)
    open_in(book, "a", 1)
    book.ended("a", 2, 1, failed=True)
    with pytest.raises(NcclError, match="failed 2 times"):
        book.begin("a", 2.5, 0)


def test_an_old_epoch_is_not_accepted(book):
    book.accept("a", 3, 0, 0)
    book.ended("a", 3, 0, failed=True)
    for epoch in (2, 3):
        with pytest.raises(NcclError, match=f"a asks for epoch {epoch}; epoch 3 has been"):
            book.accept("a", epoch, 0, 0)
    book.accept("a", 4, 0, 0)


def test_what_is_said_of_an_old_epoch_changes_nothing(book):
    open_in(book, "a")
    book.ended("a", 1, 0, failed=False)
    open_in(book, "a")
    book.hold("a", 0)
    book.ended("a", 1, 0, failed=True)
    book.release("a", 1, 0)
    assert not book.opening("a", 1)
    assert book.open_pairs == 1
    book.release("a", 2, 0)


def test_no_more_peers_are_remembered_than_the_limit():
    book = PairBook(replace(LIMITS, peers_max=4))
    for number in range(100):
        open_in(book, str(number), number)
        if number % 3:
            book.ended(str(number), 1, number, failed=True)
    assert len(book._peers) == 4


# ---- the pairs of a prefill worker and a decode worker


class Worker:
    def __init__(self, rank, limits=LIMITS):
        self.library = DoubleNccl()
        self.told = []
        self.pairs = NcclPairs(
            self.library, rank, 0, limits, lambda *about: self.told.append(about)
        )

    async def end(self):
        self.library.faults.hang.clear()
        self.library.faults.release.set()
        async with asyncio.timeout(DEADLINE_S):
            await self.pairs.close()
        await until(lambda: all(c._over for c in self.library.communicators), within_s=DEADLINE_S)


@pytest.fixture
async def prefill():
    worker = Worker(0)
    yield worker
    await worker.end()


@pytest.fixture
async def decode():
    worker = Worker(1)
    yield worker
    await worker.end()


async def connect(prefill, decode, p="P", d="D"):
    invitation = await prefill.pairs.invite(d)
    await asyncio.gather(prefill.pairs.open(d, invitation), decode.pairs.accept(p, invitation))
    return invitation


async def carry(prefill, decode, p="P", d="D"):
    """One transfer from P to D, and whether the bytes are right."""
    source, target = Memory(bytes(range(200)), "cpu"), Memory(bytes(200), "cpu")
    ends = prefill.pairs.hold(d), decode.pairs.hold(p)
    await asyncio.gather(
        ends[0].pair.send(source.regions(), DEADLINE_S),
        ends[1].pair.receive(target.regions(), DEADLINE_S),
    )
    prefill.pairs.release(ends[0])
    decode.pairs.release(ends[1])
    return source.read() == target.read()


async def test_a_pair_is_made_on_demand_and_used_again(prefill, decode):
    assert prefill.pairs.hold("D") is None
    await connect(prefill, decode)
    assert await carry(prefill, decode)
    assert await carry(prefill, decode)
    assert prefill.pairs.open_pairs == decode.pairs.open_pairs == 1


async def test_nobody_waits_for_a_pair_that_is_being_opened(prefill, decode):
    invitation = await prefill.pairs.invite("D")
    opening = asyncio.ensure_future(prefill.pairs.open("D", invitation))
    await asyncio.sleep(0)
    assert prefill.pairs.hold("D") is None
    with pytest.raises(NcclError, match="OPENING"):
        await prefill.pairs.invite("D")
    await decode.pairs.accept("P", invitation)
    await opening
    assert await carry(prefill, decode)


async def test_at_the_cap_the_least_used_pair_is_closed_and_its_peer_told(prefill, decode):
    for name in ("D1", "D2"):
        await connect(prefill, decode, p=f"P-{name}", d=name)
    assert await carry(prefill, decode, p="P-D1", d="D1")
    decode.pairs.fail("P-D2", 1, "P said so")  # D's end, so that it has room, too
    await connect(prefill, decode, p="P-D3", d="D3")
    assert prefill.told == [("D2", 1, "closed to make room for another pair")]
    assert prefill.pairs.hold("D2") is None
    assert await carry(prefill, decode, p="P-D1", d="D1")
    assert await carry(prefill, decode, p="P-D3", d="D3")


async def test_a_decode_worker_at_its_cap_closes_its_least_used_pair(prefill, decode):
    for name in ("D1", "D2"):
        await connect(prefill, decode, p=f"P-{name}", d=name)
    prefill.pairs.fail("D1", 1, "told to")  # the cap is then D's alone
    await connect(prefill, decode, p="P-D3", d="D3")
    assert decode.told == [("P-D1", 1, "closed to make room for another pair")]
    assert decode.pairs.open_pairs == 2
    ended = decode.library.communicators[0]
    await until(lambda: ended._over, within_s=DEADLINE_S)


async def test_a_pair_that_hangs_while_it_makes_room_counts_as_hung(prefill, decode):
    for name in ("D1", "D2"):
        await connect(prefill, decode, p=f"P-{name}", d=name)
    prefill.library.faults.hang.add("finalize")
    await prefill.pairs.invite("D3")
    assert prefill.pairs.hung == 1


async def test_a_pair_that_failed_is_rebuilt_under_a_new_epoch(prefill, decode):
    await connect(prefill, decode)
    prefill.pairs.fail("D", 1, "the control link ended")
    assert prefill.told == [("D", 1, "the control link ended")]
    assert prefill.pairs.hold("D") is None
    with pytest.raises(NcclError, match="failed 1 times"):
        await prefill.pairs.invite("D")
    prefill.pairs._book._peers["D"].retry_s = 0.0  # the back-off is over
    invitation = await connect(prefill, decode)  # D has not noticed yet: its old pair is ended
    assert invitation.epoch == 2
    assert decode.told == [("P", 1, "replaced by epoch 2")]
    assert await carry(prefill, decode)


async def test_an_invitation_of_an_old_epoch_is_refused_and_the_pair_lives(prefill, decode):
    invitation = await connect(prefill, decode)
    with pytest.raises(NcclError, match="P asks for epoch 1; epoch 1 has been"):
        await decode.pairs.accept("P", invitation)
    assert await carry(prefill, decode)


async def test_word_of_an_old_epoch_does_not_end_the_new_pair(prefill, decode):
    await connect(prefill, decode)
    decode.pairs.fail("P", 0, "late")
    assert await carry(prefill, decode)


async def test_a_decode_worker_that_does_not_come_costs_one_deadline_then_tcp(prefill):
    invitation = await prefill.pairs.invite("D")
    with pytest.raises(NcclError, match=r"did not open within 0.2 s"):
        await prefill.pairs.open("D", invitation)
    with pytest.raises(NcclError, match="failed 1 times; tried again in"):
        await prefill.pairs.invite("D")
    assert prefill.pairs.open_pairs == 0


async def test_an_invitation_that_d_refused_is_given_up(prefill):
    invitation = await prefill.pairs.invite("D")
    prefill.pairs.fail("D", invitation.epoch, "D refused")
    with pytest.raises(NcclError, match="the pair with D of epoch 1 was given up"):
        await prefill.pairs.open("D", invitation)
    assert prefill.pairs.open_pairs == 0


async def test_a_cancelled_opener_leaves_an_open_pair(prefill, decode):
    invitation = await prefill.pairs.invite("D")
    opening = asyncio.ensure_future(prefill.pairs.open("D", invitation))
    await asyncio.sleep(0)
    opening.cancel()
    await decode.pairs.accept("P", invitation)
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert await carry(prefill, decode)


async def test_hung_pairs_end_the_use_of_nccl_until_they_return(prefill, decode):
    await connect(prefill, decode)
    prefill.library.faults.hang.add("abort")
    prefill.pairs.fail("D", 1, "told to")
    assert prefill.pairs.hung == 0  # aborting is not hung
    await until(lambda: prefill.pairs.hung == 1, within_s=DEADLINE_S)
    with pytest.raises(NcclError, match="1 NCCL pairs hang in this worker; no more are opened"):
        await prefill.pairs.invite("D2")
    prefill.library.faults.hang.clear()
    prefill.library.faults.release.set()
    await until(lambda: prefill.pairs.hung == 0, within_s=DEADLINE_S)
    await connect(prefill, decode, p="P2", d="D2")
    assert await carry(prefill, decode, p="P2", d="D2")


async def test_an_id_that_nccl_never_gives_counts_as_hung(prefill):
    prefill.library.faults.hang.add("unique_id")
    with pytest.raises(NcclError, match=r"NCCL gave no id within 0.2 s"):
        await prefill.pairs.invite("D")
    assert prefill.pairs.hung == 1
    assert prefill.pairs.open_pairs == 0
    with pytest.raises(NcclError, match="no more are opened"):
        await prefill.pairs.invite("D2")


async def test_an_id_that_nccl_refuses_is_a_failure_like_any(prefill):
    prefill.library.faults.fail["unique_id"] = 2
    with pytest.raises(NcclError, match="a system call or the network failed"):
        await prefill.pairs.invite("D")
    assert prefill.pairs.hung == 0
    with pytest.raises(NcclError, match="failed 1 times"):
        await prefill.pairs.invite("D")


@pytest.mark.parametrize("step", ["invite", "open"])
async def test_a_worker_without_threads_to_spare_refuses(prefill, monkeypatch, step):
    def none_left(thread):
        raise RuntimeError("can't start new thread")

    invitation = await prefill.pairs.invite("D") if step == "open" else None
    monkeypatch.setattr(threading.Thread, "start", none_left)
    work = prefill.pairs.open("D", invitation) if invitation else prefill.pairs.invite("D")
    with pytest.raises(NcclError, match="no thread for"):
        await work
    assert prefill.pairs.open_pairs == 0


async def test_a_transfer_on_a_pair_that_fails_releases_without_harm(prefill, decode):
    await connect(prefill, decode)
    held = prefill.pairs.hold("D")
    prefill.pairs.fail("D", 1, "told to")
    with pytest.raises(NcclError, match="told to"):
        await held.pair.send([], DEADLINE_S)
    prefill.pairs.release(held)


async def test_close_ends_every_pair_a_hung_one_included(prefill, decode):
    for name in ("D1", "D2"):
        await connect(prefill, decode, p=f"P-{name}", d=name)
    ends = [prefill.pairs.hold(name).pair for name in ("D1", "D2")]
    prefill.library.faults.hang.add("finalize")
    await asyncio.wait_for(prefill.pairs.close(), DEADLINE_S)
    assert [end.state for end in ends] == [PairState.HUNG] * 2
    assert [about[2] for about in prefill.told] == ["the worker ends"] * 2
    with pytest.raises(NcclError, match="the worker ends"):
        await prefill.pairs.invite("D3")


def test_the_id_of_a_pair_is_not_printed():
    assert "secret" not in repr(Invitation(1, b"secret"))
