"""A transfer fails, the link lives; no block is used again while somebody may write to it."""

import asyncio
import threading

import pytest
from kv_fixtures import (
    decode_end,
    prefill_end,
)
from links import (
    REPLY_S,
    hand_over,
    link_of,
    rounds,
    until,
)

from kvrelay.transport import shm
from kvrelay.transport.errors import LinkError


async def test_a_commit_with_blocks_missing_ends_that_transfer_and_no_other(decode, prefill):
    transfer = await prefill.begin(decode.ticket(2))
    await transfer.push([0])
    with pytest.raises(LinkError, match="Commit of 1 blocks while 1 are missing"):
        await transfer.commit(1, REPLY_S)
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])
    decode.check_all_free()
    await hand_over(decode, prefill)


async def test_the_writer_gives_up_and_its_blocks_are_free(decode, prefill):
    transfer = await prefill.begin(decode.ticket(2))
    await transfer.push([0])
    await transfer.abort("cancelled")
    transfer.close()
    await decode.book.until(lambda: ("lost", 1, "cancelled") in decode.book.events)
    decode.check_all_free()
    with pytest.raises(LinkError):
        await transfer.push([1])
    await hand_over(decode, prefill)


async def test_the_decode_worker_gives_up_and_hears_when_the_writer_has_stopped(decode, prefill):
    transfer = await prefill.begin(decode.ticket(2))
    await transfer.push([0])
    decode.abort(1)
    assert decode.ledger.free == 14
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])
    decode.check_all_free()
    with pytest.raises(LinkError, match="gave up: not wanted"):
        await transfer.push([1])
    with pytest.raises(LinkError, match="gave up: not wanted"):
        await transfer.commit(1, REPLY_S)
    await hand_over(decode, prefill)


async def test_an_abort_while_the_writer_waits_for_commit_reaches_it(decode, prefill, monkeypatch):
    monkeypatch.setattr(decode.book, "committed", lambda transfer_id: None)
    transfer = await prefill.begin(decode.ticket(1))
    waiting = asyncio.ensure_future(transfer.commit(1, REPLY_S))
    with pytest.raises(LinkError, match="missing"):
        await waiting


async def test_a_commit_without_answer_ends_in_time(decode, prefill):
    decode.book.committed = lambda transfer_id: None
    transfer = await prefill.begin(decode.ticket(1))
    await transfer.push([0])
    with pytest.raises(LinkError, match=r"no answer to Commit within 0\.05 s"):
        await transfer.commit(1, 0.05)


async def test_an_abort_of_a_transfer_the_writer_has_closed_is_answered_too(decode, prefill):
    transfer = await prefill.begin(decode.ticket(2))
    transfer.close()
    decode.abort(1)
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])


async def test_blocks_stay_in_quarantine_until_the_push_under_way_has_ended(decode, prefill, gate):
    transfer = await prefill.begin(decode.ticket(2))
    push = asyncio.ensure_future(transfer.push([0]))
    await gate.entered.wait()
    decode.abort(1)
    await until(transfer.answer.done)  # the writer knows
    await rounds()
    assert decode.book.lost_transfers() == []
    assert decode.ledger.free == 14
    gate.open.set()
    await push
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])
    decode.check_all_free()
    await hand_over(decode, prefill)


async def test_the_writers_own_abort_waits_for_its_push_too(decode, prefill, gate):
    transfer = await prefill.begin(decode.ticket(2))
    push = asyncio.ensure_future(transfer.push([0]))
    await gate.entered.wait()
    abort = asyncio.ensure_future(transfer.abort("cancelled"))
    await rounds()
    assert not abort.done()
    gate.open.set()
    await asyncio.gather(push, abort)
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancelled_push_ends_only_when_nothing_more_is_written(
    decode, prefill, gate, times
):
    transfer = await prefill.begin(decode.ticket(2))
    push = asyncio.ensure_future(transfer.push([0]))
    await gate.entered.wait()
    for _ in range(times):
        push.cancel()
        await rounds()
        assert not push.done(), "it may still write"
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await push
    await transfer.abort("cancelled")
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])
    await hand_over(decode, prefill)


async def test_a_link_ends_only_when_no_copy_into_the_peers_pool_is_under_way(monkeypatch):
    async with decode_end(transport="shm") as end, prefill_end(transport="shm") as writers:
        transfer = await writers.begin(end.ticket(1))
        began, go_on = threading.Event(), threading.Event()
        written = shm.ShmSender._write

        def held(self, *args):
            began.set()
            assert go_on.wait(REPLY_S)
            return written(self, *args)

        monkeypatch.setattr(shm.ShmSender, "_write", held)
        push = asyncio.ensure_future(transfer.push([0]))
        await asyncio.to_thread(began.wait, REPLY_S)
        closing = asyncio.ensure_future(link_of(writers).close())
        await asyncio.sleep(0)
        assert end.book.lost_transfers() == []
        go_on.set()
        with pytest.raises(LinkError):
            await push
        await closing
        await end.book.until(lambda: end.book.lost_transfers() == [1])
        end.check_all_free()
