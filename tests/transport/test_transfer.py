"""When all goes well, and a sender that is cancelled on the way."""

import asyncio

import pytest
from kv_fixtures import (
    LAYOUT,
    decode_end,
    key,
    prefill_end,
    same_bytes,
)
from links import (
    LARGE,
    REPLY_S,
    hand_over,
    link_of,
    rounds,
    until,
)

from kvrelay.transport.channel import _Wants


async def test_blocks_arrive_bit_equal_in_the_right_places(decode, prefill):
    decode.ticket(3)  # so that blocks differ from their index
    before = decode.pool.bytes.copy()
    ticket = decode.ticket(5)
    transfer = await prefill.begin(ticket)
    await transfer.push([9, 2])
    await transfer.push([4])
    await transfer.push([7, 15])
    await transfer.commit(11, REPLY_S)
    assert same_bytes(decode.pool, ticket.block_ids, prefill.pool, [9, 2, 4, 7, 15])
    untouched = [b for b in range(16) if b not in set(ticket.block_ids)]
    assert (decode.pool.bytes[untouched] == before[untouched]).all()


async def test_the_book_hears_begin_blocks_and_commit_in_order(decode, prefill, transport):
    transfer = await prefill.begin(decode.ticket(3))
    await transfer.push([0, 1])
    await transfer.push([2])
    await transfer.commit(42, REPLY_S)
    assert decode.book.events == [
        ("begin", 1),
        ("received", 1, 2),
        ("received", 1, 1),
        ("commit", 1, 42),
    ]
    assert transfer.committed
    assert transfer.transport == transport
    assert transfer.bytes_sent == 3 * LAYOUT.block_bytes
    assert transfer.busy_s > 0
    decode.finish(1)
    decode.check_all_free()


async def test_a_link_that_ends_after_commit_is_no_loss(decode, prefill):
    await hand_over(decode, prefill)
    await prefill.close()
    async with prefill_end(name="prefill-2", transport="auto") as other:
        await hand_over(decode, other)
    assert decode.book.lost_transfers() == []


async def test_transfers_interleave_on_one_link(decode, prefill):
    tickets = [decode.ticket(3) for _ in range(5)]

    async def run(number: int) -> None:
        transfer = await prefill.begin(tickets[number])
        for step in range(3):
            await transfer.push([number * 3 + step])
        await transfer.commit(number, REPLY_S)

    await asyncio.gather(*(run(number) for number in range(5)))
    for number, ticket in enumerate(tickets):
        source = [number * 3 + step for step in range(3)]
        assert same_bytes(decode.pool, ticket.block_ids, prefill.pool, source)
        decode.finish(number + 1)
    assert len(prefill._links) == 1
    decode.check_all_free()


async def test_a_push_cancelled_in_the_middle_of_its_bytes_leaves_the_stream_whole():
    async with (
        decode_end(LARGE, blocks=24, transport="tcp") as end,
        prefill_end(LARGE, blocks=24, transport="tcp") as writers,
    ):
        big = await writers.begin(end.ticket(16))
        small_ticket = end.ticket(1)
        small = await writers.begin(small_ticket)
        push = asyncio.ensure_future(big.push(list(range(16))))
        link = link_of(writers)
        await until(link._frames._sending.locked)  # bytes are on their way
        await rounds(3)
        push.cancel()
        with pytest.raises(asyncio.CancelledError):
            await push
        await big.abort("cancelled")
        await small.push([20])
        await small.commit(1, REPLY_S)
        assert same_bytes(end.pool, small_ticket.block_ids, writers.pool, [20])
        await end.book.until(lambda: end.book.lost_transfers() == [1])
        assert not end.handoff.is_aborting(key(1))


async def test_a_commit_cancelled_in_the_middle_of_its_bytes_leaves_the_stream_whole():
    """The Commit frame is cut by a socket that takes three bytes and then no more for a while."""
    async with decode_end(transport="tcp") as end, prefill_end(transport="tcp") as writers:
        transfer = await writers.begin(end.ticket(1))
        await transfer.push([0])
        channel = link_of(writers)._frames.channel
        cut, go_on, whole = asyncio.Event(), asyncio.Event(), channel._send

        def three_bytes_first(buffers, wait):
            if go_on.is_set():
                return whole(buffers, wait)
            if cut.is_set():
                return _Wants.WRITE
            cut.set()
            return whole([buffers[0][:3]], wait)

        channel._send = three_bytes_first
        commit = asyncio.ensure_future(transfer.commit(1, REPLY_S))
        await cut.wait()
        commit.cancel()
        await rounds()
        assert not commit.done(), "the rest of its frame is still to come"
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await commit
        await hand_over(end, writers)
