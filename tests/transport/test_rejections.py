"""Every reason for which something is not accepted can occur, and is counted once."""

from collections import Counter
from dataclasses import replace

import pytest
from kv_fixtures import LAYOUT
from links import begun_by_hand, by_hand, greeting, is_closed, raw

from kvrelay.config import PROTOCOL_VERSION
from kvrelay.transport.errors import Rejection
from kvrelay.transport.frames import FRAME_BYTES_MAX
from kvrelay.wire.transfer_pb2 import Begin, Blocks, Commit, Committed, Frame, Hello, Ticket

BLOCK = bytes(LAYOUT.block_bytes)  # zeros, as the pool is
WRONG = [1]  # a checksum it does not have


def hello(**changes):
    return greeting(LAYOUT, **changes)


def begin(ticket, **changes):
    for field, value in changes.items():
        ticket.ClearField(field)
        ticket.MergeFrom(Ticket(**{field: value}))
    return Frame(begin=Begin(ticket=ticket))


def begin_late(decode):
    ticket = decode.ticket(1)
    decode.book.now_ms = ticket.expires_ms
    return begin(ticket)


def aborted(decode):
    ticket = decode.ticket(1)
    decode.abort(3)
    return ticket


# What a peer says before its Hello.
BEFORE = [
    (Rejection.HANDSHAKE, "no Hello", Frame(begin=Begin())),
    (Rejection.HANDSHAKE, "an empty frame", raw(0)),
    (Rejection.HANDSHAKE, "version", hello(protocol_version=PROTOCOL_VERSION + 1)),
    (Rejection.HANDSHAKE, "shapes", hello(layout=replace(LAYOUT, layers=3).to_wire())),
    (
        Rejection.HANDSHAKE,
        "model",
        hello(layout=replace(LAYOUT, model_fingerprint="huge").to_wire()),
    ),
    (Rejection.HANDSHAKE, "dtype", hello(layout=replace(LAYOUT, dtype="int4").to_wire())),
    (Rejection.HANDSHAKE, "codec", hello(codec="zip")),
    (Rejection.HANDSHAKE, "no codec", hello(codec="")),
    (Rejection.MALFORMED, "no protobuf", raw(4, b"\xff\xff\xff\xff")),
    (Rejection.OVERSIZED, "length", raw(FRAME_BYTES_MAX + 1)),
    (Rejection.TRUNCATED, "body", raw(8, b"1234567")),
    (Rejection.TRUNCATED, "head", raw(8)[:3]),
]

# What it says with leave to write the two blocks of transfer 1; transfer 2 awaits its Begin. A
# function makes it of the decode end.
AFTER = [
    (Rejection.MALFORMED, "no protobuf", raw(4, b"\xff\xff\xff\xff")),
    (Rejection.MALFORMED, "an empty frame", raw(0)),
    (Rejection.MALFORMED, "committed", Frame(committed=Committed(transfer_id=1))),
    (Rejection.MALFORMED, "Hello again", Frame(hello=Hello())),
    (Rejection.MALFORMED, "sums", Frame(blocks=Blocks(transfer_id=1, count=1))),
    (Rejection.OVERSIZED, "length", raw(2**32 - 1)),
    (
        Rejection.OVERSIZED,
        "blocks",
        Frame(blocks=Blocks(transfer_id=1, count=3, checksums=WRONG * 3)),
    ),
    (
        Rejection.OVERSIZED,
        "index",
        Frame(blocks=Blocks(transfer_id=1, first_index=2**32 - 1, count=1, checksums=WRONG)),
    ),
    (Rejection.TRUNCATED, "body", raw(100, b"\x0a")),
    (Rejection.TRUNCATED, "head", raw(100)[:1]),
    (Rejection.FORGED, "wrong", lambda decode: begin(decode.ticket(1, signature=b"x" * 32))),
    (Rejection.FORGED, "none", Frame(begin=Begin())),
    (Rejection.FORGED, "unknown", Frame(begin=Begin(ticket={"transfer_id": 77}))),
    (Rejection.ALTERED, "blocks", lambda decode: begin(decode.ticket(1), block_ids=[0])),
    (Rejection.ALTERED, "time", lambda decode: begin(decode.ticket(1), expires_ms=2**63)),
    (Rejection.ALTERED, "address", lambda decode: begin(decode.ticket(1), endpoints=[])),
    (Rejection.EXPIRED, "begin", lambda decode: begin_late(decode)),
    (Rejection.STALE, "begin", lambda decode: begin(aborted(decode))),
    (Rejection.STALE, "commit", Frame(commit=Commit(transfer_id=77))),
    (Rejection.STALE, "not begun", Frame(commit=Commit(transfer_id=2, blocks=1))),
    (
        Rejection.STALE,
        "blocks",
        Frame(blocks=Blocks(transfer_id=77, count=1, checksums=WRONG)),
    ),
    (Rejection.DUPLICATE, "begin", Frame(begin=Begin(ticket={"transfer_id": 1}))),
    (
        Rejection.DUPLICATE,
        "nobody asked",
        Frame(blocks=Blocks(transfer_id=1, count=1, checksums=WRONG, again=True)),
    ),
    (
        Rejection.REORDERED,
        "blocks",
        Frame(blocks=Blocks(transfer_id=1, first_index=1, count=1, checksums=WRONG)),
    ),
    (Rejection.INCOMPLETE, "no block", Frame(commit=Commit(transfer_id=1, blocks=2))),
    (Rejection.CHECKSUM, "one", Frame(blocks=Blocks(transfer_id=1, count=1, checksums=WRONG))),
]


def names(value):
    return value.value if isinstance(value, Rejection) else None


def test_the_tables_have_every_reason():
    elsewhere = {Rejection.LATE, Rejection.REPLAYED}  # in test_nccl_link.py, test_handshake.py
    assert {row[0] for row in BEFORE + AFTER} == set(Rejection) - elsewhere


async def say(frames, words, payload=()):
    """And nothing more: a link that lives ends without a reason of its own."""
    if isinstance(words, Frame):
        body = words.SerializeToString()
        words = raw(len(body), body)
    await frames.channel.write([memoryview(words), *map(memoryview, payload)])
    frames.channel.sock.shutdown(1)
    assert await is_closed(frames)


@pytest.mark.parametrize(("rejection", "what", "words"), BEFORE, ids=names)
async def test_what_is_rejected_before_the_handshake_is_counted(
    decode, transport, rejection, what, words
):
    async with by_hand(decode, transport, hello=False) as frames:
        await say(frames, words)
    assert decode.listener.rejected == Counter([rejection])
    assert decode.book.events == []


@pytest.mark.parametrize(("rejection", "what", "words"), AFTER, ids=names)
async def test_what_is_rejected_on_a_link_is_counted(decode, transport, rejection, what, words):
    async with by_hand(decode, transport) as frames:
        await begun_by_hand(frames, decode.ticket(2))
        decode.ticket(1)
        if callable(words):
            words = words(decode)  # a ticket, which is the third
        sends_bytes = rejection is Rejection.CHECKSUM and transport == "tcp"
        await say(frames, words, [BLOCK] * sends_bytes)
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])
    assert decode.listener.rejected == Counter([rejection])
    for number in (2, 3):
        decode.abort(number)
    decode.check_all_free()


async def test_a_link_that_ends_between_two_frames_is_nothing_to_count(decode, transport):
    async with by_hand(decode, transport) as frames:
        await begun_by_hand(frames, decode.ticket(2))
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])
    assert not decode.listener.rejected


async def test_the_log_has_the_counts_when_there_are_more(decode, transport, caplog):
    caplog.set_level("INFO", logger="kvrelay.transport.listener")
    decode.listener.log_rejected()
    assert not caplog.messages
    for words in (hello(codec="zip"), Frame(begin=Begin()), raw(FRAME_BYTES_MAX + 1)):
        async with by_hand(decode, transport, hello=False) as frames:
            await say(frames, words)
    caplog.clear()
    for _ in range(2):
        decode.listener.log_rejected()
    assert caplog.messages == ["rejected on KV links so far: handshake 2, oversized 1"]
