"""Peers that break the protocol lose their link, and nobody else notices."""

import asyncio
import contextlib
import struct

import pytest
from kv_fixtures import (
    LAYOUT,
    decode_end,
)
from links import (
    REPLY_S,
    begun_by_hand,
    by_hand,
    is_closed,
    raw,
)

from kvrelay.transport.errors import LinkError
from kvrelay.transport.frames import FRAME_BYTES_MAX
from kvrelay.wire.transfer_pb2 import (
    Abort,
    Begin,
    Blocks,
    Commit,
    Committed,
    Frame,
    Hello,
)

FIRST_WORDS = {
    "garbage": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a frame too long": raw(FRAME_BYTES_MAX + 1),
    "not protobuf": raw(4, b"\xff\xff\xff\xff"),
    "an empty frame": raw(0),
    "begin before hello": raw(2, b"\x22\x00"),
}


@pytest.mark.parametrize("words", FIRST_WORDS.values(), ids=FIRST_WORDS)
async def test_a_stranger_is_shut_out_and_others_go_on(decode, prefill, transport, words):
    living = await prefill.begin(decode.ticket(1))
    async with by_hand(decode, transport, hello=False) as frames:
        await asyncio.get_running_loop().sock_sendall(frames.channel.sock, words)
        assert await is_closed(frames)
    await living.push([0])
    await living.commit(1, REPLY_S)
    assert decode.book.lost_transfers() == []


async def test_a_stranger_that_says_nothing_is_shut_out_in_time(transport):
    async with (
        decode_end(transport=transport, link_connect_ms=30) as end,
        by_hand(end, transport, hello=False) as frames,
    ):
        assert await is_closed(frames)


async def test_a_link_is_kept_idle_once_it_has_shown_a_ticket_and_no_other(transport):
    async with (
        decode_end(transport=transport, link_connect_ms=50) as end,
        by_hand(end, transport) as frames,
    ):
        await begun_by_hand(frames, end.ticket(1))
        async with (
            by_hand(end, transport, hello=False) as silent,
            by_hand(end, transport) as polite,
            by_hand(end, transport) as busy,
        ):
            await busy.send(Frame(begin=Begin(ticket={"transfer_id": 9})))
            assert (await busy.receive()).abort.reason.startswith("the ticket's signature")
            for stranger in (silent, polite, busy):
                assert await is_closed(stranger)
        await frames.send(Frame(begin=Begin(ticket={"transfer_id": 9})))
        assert (await frames.receive()).abort.reason.startswith("the ticket's signature")


async def test_a_stranger_that_sends_without_end_does_not_keep_the_loop(transport):
    """Nothing it says costs it the link at once, and there is always more to read."""
    abort = Frame(abort=Abort(transfer_id=9)).SerializeToString()
    flood = (struct.pack("<I", len(abort)) + abort) * 10_000
    async with decode_end(transport=transport) as end, by_hand(end, transport) as frames:
        sending = asyncio.ensure_future(frames.channel.write([memoryview(flood)]))
        answer = asyncio.ensure_future(frames.receive())
        await sending
        await frames.send(Frame(begin=Begin(ticket={"transfer_id": 9})))
        turns = 0
        while not answer.done():
            await asyncio.sleep(0)
            turns += 1
        assert (await answer).abort.reason.startswith("the ticket's signature")
        assert turns > 100


BROKEN = {
    "committed": Frame(committed=Committed(transfer_id=1)),
    "hello again": Frame(hello=Hello()),
    "blocks of another link": Frame(blocks=Blocks(transfer_id=1, count=1, checksums=[0])),
    "blocks of nobody": Frame(blocks=Blocks(transfer_id=77, count=1, checksums=[0])),
}


@pytest.mark.parametrize("frame", BROKEN.values(), ids=BROKEN)
async def test_a_peer_that_breaks_the_protocol_loses_its_link_and_no_other(
    decode, prefill, transport, frame
):
    living = await prefill.begin(decode.ticket(1))
    async with by_hand(decode, transport) as frames:
        ticket = decode.ticket(1)
        await frames.send(Frame(begin=Begin(ticket=ticket)))
        assert (await frames.receive()).begun.transfer_id == 2
        await frames.send(frame)
        assert await is_closed(frames)
    await decode.book.until(lambda: decode.book.lost_transfers() == [2])
    await living.push([0])
    await living.commit(1, REPLY_S)


@pytest.mark.parametrize(
    ("first", "count"), [(1, 1), (0, 3)], ids=["out of order", "more than the ticket has"]
)
async def test_blocks_without_leave_never_reach_the_pool(decode, transport, first, count):
    async with by_hand(decode, transport) as frames:
        ticket = decode.ticket(2)
        await frames.send(Frame(begin=Begin(ticket=ticket)))
        await frames.receive()
        header = Blocks(transfer_id=1, first_index=first, count=count, checksums=[0] * count)
        payload = [memoryview(bytes([7]) * LAYOUT.block_bytes)] * (count * (transport == "tcp"))
        with contextlib.suppress(LinkError):
            await frames.send(Frame(blocks=header), payload)
        assert await is_closed(frames)
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])
    assert not decode.pool.bytes.any()
    decode.check_all_free()


async def test_another_links_transfer_can_be_neither_committed_nor_aborted(
    decode, prefill, transport
):
    living = await prefill.begin(decode.ticket(1))
    async with by_hand(decode, transport) as frames:
        await frames.send(Frame(abort=Abort(transfer_id=1, reason="malice")))
        await frames.send(Frame(commit=Commit(transfer_id=1, blocks=1)))
        assert (await frames.receive()).abort.reason == "this link has no such transfer"
    await living.push([0])
    await living.commit(1, REPLY_S)
    assert decode.book.lost_transfers() == []
