"""An end dies, falls silent, or stops in the middle of a frame."""

import asyncio
import contextlib
import socket

import pytest
from kv_fixtures import (
    DEADLINE_S,
    LAYOUT,
    decode_end,
    prefill_end,
)
from links import (
    REPLY_S,
    begun_by_hand,
    by_hand,
    finishes,
    hand_over,
    is_closed,
    link_of,
    raw,
    rounds,
    stalled_peer,
    until,
)

from kvrelay.transport.errors import LinkError, Rejection
from kvrelay.wire.transfer_pb2 import (
    Begin,
    Blocks,
    Endpoint,
    Frame,
)


async def test_a_writer_that_dies_is_lost_to_all_its_transfers_and_to_no_others(
    decode, prefill, transport
):
    async with prefill_end(name="prefill-2", transport=transport) as other:
        doomed = [await other.begin(decode.ticket(2)) for _ in range(3)]
        await doomed[1].push([0])
        living = await prefill.begin(decode.ticket(2))
        link = link_of(other)
        link._frames.channel.sock.shutdown(socket.SHUT_RDWR)
        await decode.book.until(lambda: len(decode.book.lost_transfers()) == 3)
        assert sorted(decode.book.lost_transfers()) == [1, 2, 3]
        await living.push([0, 1])
        await living.commit(1, REPLY_S)
    decode.finish(4)
    decode.check_all_free()


async def test_a_dead_decode_worker_fails_commit_and_the_next_begin_reconnects(prefill, transport):
    async with decode_end(transport=transport) as first:
        transfer = await prefill.begin(first.ticket(1))
        await transfer.push([0])
    with pytest.raises(LinkError):
        await transfer.commit(1, REPLY_S)
    async with decode_end(transport=transport) as second:
        await hand_over(second, prefill)


async def test_a_push_after_the_decode_worker_died_is_a_link_error(prefill, transport):
    async with decode_end(transport=transport) as end:
        transfer = await prefill.begin(end.ticket(2))
    link = link_of(prefill)
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.wait([link._reader])
    with pytest.raises(LinkError):
        await transfer.push([0])


async def test_begin_fails_when_the_decode_worker_dies_before_its_answer(prefill, transport):
    async with decode_end(transport=transport) as end:
        await hand_over(end, prefill)
        ticket = end.ticket(1)
        end.listener.committed = lambda transfer_id: None
        for task in end.listener._tasks:
            task.cancel()
        with pytest.raises(LinkError):
            await prefill.begin(ticket)


async def test_nobody_there_is_a_link_error_that_names_the_address(prefill, transport):
    address = "/nowhere/at-all.sock" if transport == "shm" else "127.0.0.1:1"
    async with decode_end(transport=transport) as end:
        ticket = end.ticket(1, endpoints=[Endpoint(transport=transport, address=address)])
        with pytest.raises(LinkError, match=f"no way to decode-1: {transport}: {address}: .+"):
            await prefill.begin(ticket)


async def test_a_peer_that_says_nothing_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        endpoint = Endpoint(transport="tcp", address=address)
        async with decode_end() as end, prefill_end(link_connect_ms=30) as writers:
            with pytest.raises(LinkError, match="no answer in time"):
                await writers.begin(end.ticket(1, endpoints=[endpoint]))


async def test_a_push_to_a_peer_that_reads_nothing_ends_in_time():
    async with stalled_peer() as (transfer, writers, _):
        push = asyncio.ensure_future(transfer.push(list(range(16))))
        ended = await finishes(push)
        link = link_of(writers)
        link._frames.close()  # or a broken test would hang here
        with contextlib.suppress(asyncio.CancelledError, LinkError):
            await push
        assert ended, "a push waited without a deadline"


async def test_a_push_under_way_ends_when_its_link_is_closed():
    async with stalled_peer() as (transfer, writers, _):
        push = asyncio.ensure_future(transfer.push(list(range(16))))
        await rounds(200)
        link = link_of(writers)
        await until(link._frames._sending.locked)
        await rounds()
        await writers.close()
        assert await finishes(push), "a push on a closed link never ended"
        with pytest.raises(LinkError):
            await push


# ---- an end stops in the middle of a frame

BLOCKS = Frame(blocks=Blocks(transfer_id=1, count=1, checksums=[0])).SerializeToString()
HALVES = {
    "in the head": raw(100)[:2],
    "before the body": raw(100),
    "in the body": raw(len(BLOCKS), BLOCKS[:-3]),
    "in the block bytes": raw(len(BLOCKS), BLOCKS) + bytes(LAYOUT.block_bytes - 1),
}


@pytest.mark.parametrize("words", HALVES.values(), ids=HALVES)
async def test_a_writer_that_stops_inside_a_frame_is_given_up_and_an_idle_one_kept(words):
    async with (
        decode_end(transport="tcp", link_reply_ms=50) as end,
        by_hand(end, "tcp") as idle,
        by_hand(end, "tcp") as frames,
    ):
        await begun_by_hand(frames, end.ticket(1))
        await frames.channel.write([memoryview(words)])
        assert await is_closed(frames)
        reason = "the link ended inside a frame: the peer moved nothing for 0.05 s"
        assert end.book.events[-1] == ("lost", 1, reason)
        end.check_all_free()
        await begun_by_hand(idle, end.ticket(1))  # it was silent for as long


async def test_a_shm_writer_that_stops_inside_a_frame_keeps_its_blocks_until_it_ends():
    """It may be in the middle of a copy: only its end says that it writes no more."""
    async with decode_end(transport="shm", link_reply_ms=50) as end:
        async with by_hand(end, "shm") as frames:
            await begun_by_hand(frames, end.ticket(1))
            await frames.channel.write([memoryview(raw(100))])
            assert await is_closed(frames)
            assert end.book.lost_transfers() == []
            assert end.ledger.free == 15
        await end.book.until(lambda: end.book.lost_transfers() == [1])
        end.check_all_free()


async def test_a_writer_that_moves_a_little_at_a_time_is_kept():
    async with (
        decode_end(transport="tcp", link_reply_ms=150) as end,
        by_hand(end, "tcp") as frames,
    ):
        body = Frame(begin=Begin(ticket={"transfer_id": 77})).SerializeToString()
        for byte in raw(len(body), body):
            await frames.channel.write([memoryview(bytes([byte]))])
            await asyncio.sleep(0.04)  # longer than the deadline in all
        assert (await frames.receive()).abort.transfer_id == 77


async def test_a_decode_worker_that_stops_inside_a_frame_is_given_up():
    async with stalled_peer() as (transfer, writers, peer):
        await peer.channel.write([memoryview(raw(100, b"half"))])
        with pytest.raises(LinkError, match=r"the peer moved nothing for 0\.3 s"):
            await transfer.commit(1, DEADLINE_S)
        assert link_of(writers).closed


# ---- too many


async def test_links_beyond_links_max_are_turned_away_and_one_that_ends_makes_room(transport):
    async with (
        decode_end(transport=transport, links_max=2) as end,
        prefill_end(transport=transport) as writers,
        by_hand(end, transport) as kept,
    ):
        async with by_hand(end, transport, hello=False):
            await until(lambda: end.listener._open == 2)
            async with by_hand(end, transport, hello=False) as one_more:
                assert await is_closed(one_more)
            with pytest.raises(LinkError, match=f"no way to decode-1: {transport}: "):
                await writers.begin(end.ticket(1))
        await until(lambda: end.listener._open == 1)
        await hand_over(end, writers)
        await begun_by_hand(kept, end.ticket(1))
        assert end.listener.rejected == {Rejection.HANDSHAKE: 1}  # the one that said nothing
