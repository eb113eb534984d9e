"""The nccl link from end to end, over a double of NCCL at each end: blocks follow their frame on
the socket until a pair is open, and go through the pair from then on; whatever happens to NCCL, a
transfer ends within its deadlines, its blocks come back when the device has let go, and the next
one finds a way."""

import asyncio
import contextlib
import functools
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from kv_fixtures import LAYOUT, same_bytes
from links import greeting, is_closed, link_of, until
from nccl_ends import longest_stall
from nccl_links import (
    NcclDecode,
    NcclWriters,
    back_off,
    nccl_decode,
    nccl_prefill,
    open_pair,
    peer_state,
)

from kvrelay.transport import nccl_link
from kvrelay.transport.errors import LinkError, Rejection
from kvrelay.transport.frames import FrameSocket
from kvrelay.transport.nccl_book import NcclLimits, PeerState
from kvrelay.transport.nccl_pair import PairState
from kvrelay.transport.writer import Transfer
from kvrelay.wire.transfer_pb2 import Blocks, Frame, PairOpen

REPLY_S, ABORT_S, BACKOFF_S, SLACK_S = 0.3, 0.3, 0.3, 1.0
STALL_MAX_S = 0.25  # of a loop that shares its cores with others; every hang lasts longer
TEST_S = 20.0  # only a broken test takes so long
SHORT = {
    "link_reply_ms": int(REPLY_S * 1000),
    "link_connect_ms": 500,
    "nccl_operation_ms": int(REPLY_S * 1000),
}


@pytest.fixture(autouse=True)
async def limits(monkeypatch) -> AsyncIterator[None]:
    """Pairs that give up, and are tried again, within the length of a test."""
    quick = functools.partial(
        NcclLimits, close_s=0.3, abort_s=ABORT_S, backoff_s=BACKOFF_S, backoff_max_s=BACKOFF_S
    )
    monkeypatch.setattr(nccl_link, "NcclLimits", quick)
    async with asyncio.timeout(TEST_S):
        yield


@pytest.fixture
async def decode() -> AsyncIterator[NcclDecode]:
    async with nccl_decode(**SHORT) as end:
        yield end


@pytest.fixture
async def prefill() -> AsyncIterator[NcclWriters]:
    async with nccl_prefill(**SHORT) as writers:
        yield writers


async def hand_over(writers: NcclWriters, decode: NcclDecode, *, paired: bool = False) -> str:
    """One whole transfer, bit for bit; what carried its last blocks."""
    ticket = decode.ticket(3)
    transfer = await writers.begin(ticket)
    if paired:
        await open_pair(writers, decode, transfer)
    await transfer.push([5, 0, 9])
    await transfer.commit(1, REPLY_S)
    transfer.close()
    assert same_bytes(decode.pool, ticket.block_ids, writers.pool, [5, 0, 9])
    decode.handoff.finish(decode.key_of(ticket))
    return transfer.transport


async def paired_transfer(
    writers: NcclWriters, decode: NcclDecode, blocks: int = 4
) -> tuple[Transfer, Any]:
    ticket = decode.ticket(blocks)
    transfer = await writers.begin(ticket)
    await open_pair(writers, decode, transfer)
    return transfer, ticket


async def push_and_commit(transfer: Transfer) -> None:
    try:
        await transfer.push([0, 1, 2, 3])
        await transfer.commit(1, REPLY_S)
    finally:
        transfer.close()


def cut_wire(decode: NcclDecode) -> None:
    """NCCL's own, between the two devices: the control link lives."""
    decode.nccl.newest(1)._socket.shutdown(socket.SHUT_RDWR)


# ---- as it should be


async def test_blocks_go_over_the_socket_until_the_pair_is_open(prefill, decode):
    ticket = decode.ticket(4)
    transfer = await prefill.begin(ticket)
    await transfer.push([0, 1])
    assert transfer.transport == "tcp"
    await open_pair(prefill, decode, transfer)
    await transfer.push([2, 3])
    assert transfer.transport == "nccl"
    await transfer.commit(1, REPLY_S)
    transfer.close()
    assert same_bytes(decode.pool, ticket.block_ids, prefill.pool, [0, 1, 2, 3])
    size_bytes = 2 * LAYOUT.block_bytes
    assert prefill.nccl.groups == [("send", 2, size_bytes)]
    assert decode.nccl.groups == [("receive", 2, size_bytes)]


async def test_the_next_transfers_use_the_same_pair(prefill, decode):
    assert await hand_over(prefill, decode, paired=True) == "nccl"
    for _ in range(5):
        assert await hand_over(prefill, decode) == "nccl"
    assert len(prefill.nccl.communicators) == 1


async def test_transfers_side_by_side_share_the_pair(prefill, decode):
    await hand_over(prefill, decode, paired=True)
    assert set(await asyncio.gather(*(hand_over(prefill, decode) for _ in range(4)))) == {"nccl"}


async def test_a_commit_waits_for_what_the_device_has_not_received(prefill, decode):
    transfer, ticket = await paired_transfer(prefill, decode)
    decode.nccl.faults.hang.add("post")
    whole = asyncio.ensure_future(push_and_commit(transfer))
    await until(lambda: prefill.nccl.groups != [])
    assert not any(event[0] == "commit" for event in decode.book.events)
    decode.nccl.recover()
    await whole
    assert decode.book.events[-1] == ("commit", ticket.transfer_id, 1)


async def test_what_is_encoded_travels_smaller_through_the_pair(decode):
    async with nccl_prefill(wire_codec="bf16", **SHORT) as prefill:
        transfer, ticket = await paired_transfer(prefill, decode, 2)
        await transfer.push([3, 7])
        assert transfer.transport == "nccl"
        await transfer.commit(1, REPLY_S)
        transfer.close()
        (_, _, size_bytes) = prefill.nccl.groups[-1]
        assert size_bytes == 2 * LAYOUT.block_bytes // 2
        sent = prefill.pool.kv[[3, 7]].bfloat16().float()
        assert decode.pool.kv[list(ticket.block_ids)].equal(sent)


async def test_both_ends_close_with_nothing_left(decode):
    async with nccl_prefill(**SHORT) as prefill:
        await hand_over(prefill, decode, paired=True)
    await decode.listener.close()
    for pairs in (prefill.pairs, decode.pairs):
        assert not pairs._pairs
        assert not pairs._leaving
        assert pairs.hung == 0
    await until(lambda: not any(t.name.startswith("nccl-pair") for t in threading.enumerate()))
    decode.check_all_free()


# ---- spoiled bytes


async def test_a_flipped_byte_costs_a_resend_of_that_block(prefill, decode):
    transfer, ticket = await paired_transfer(prefill, decode)
    prefill.nccl.flips = 1
    await transfer.push([0, 1, 2, 3])
    await transfer.commit(1, REPLY_S)
    transfer.close()
    assert same_bytes(decode.pool, ticket.block_ids, prefill.pool, [0, 1, 2, 3])
    assert [count for _, count, _ in prefill.nccl.groups] == [4, 1]
    assert decode.listener.rejected == {Rejection.CHECKSUM: 1}


async def test_a_block_that_is_always_wrong_is_given_up(prefill, decode):
    transfer, ticket = await paired_transfer(prefill, decode, 1)
    prefill.nccl.flips = 3
    await transfer.push([0])
    with pytest.raises(LinkError, match="wrong checksum"):
        await transfer.commit(1, REPLY_S)
    transfer.close()
    await decode.book.until(lambda: decode.book.lost_transfers() == [ticket.transfer_id])
    decode.check_all_free()


# ---- NCCL that hangs or fails


def _hang(*calls: str) -> Callable[[Any], None]:
    return lambda double: double.faults.hang.update(calls)


def _stream_hangs(double: Any) -> None:
    double.faults.stream_hangs = True


HANGS = {
    "post": _hang("post"),
    "ready": _hang("ready"),
    "idle": _hang("idle"),
    "post and abort": _hang("post", "abort"),
    "idle and abort": _hang("idle", "abort"),
    "stream": _stream_hangs,
}


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("hang", HANGS)
async def test_when_nccl_hangs_the_transfer_ends_in_time_and_its_blocks_wait(
    prefill, decode, side, hang
):
    """It fails, but where P hangs after D has received every block: then it is as good as any."""
    transfer, ticket = await paired_transfer(prefill, decode)
    double = prefill.nccl if side == "prefill" else decode.nccl
    pair = decode.pairs._pairs["prefill-1"].pair
    HANGS[hang](double)
    async with longest_stall() as stall:
        started = time.monotonic()
        with contextlib.suppress(LinkError):
            await push_and_commit(transfer)
        with contextlib.suppress(LinkError):
            await transfer.abort("given up")
        assert time.monotonic() - started < 2 * REPLY_S + SLACK_S  # the pair's, the answer's
        if transfer.committed:
            assert side == "prefill"
            assert same_bytes(decode.pool, ticket.block_ids, prefill.pool, [0, 1, 2, 3])
            decode.handoff.finish(decode.key_of(ticket))
            decode.check_all_free()
            return
        if side == "decode":
            # D's own device may write still: nothing comes back, however long it takes.
            await until(lambda: pair.state is PairState.HUNG)
            assert not pair.memory_safe
            assert decode.ledger.free == decode.ledger.total - 4
            assert decode.book.lost_transfers() == []
        double.recover()
        await decode.book.until(lambda: decode.book.lost_transfers() == [ticket.transfer_id])
        assert pair.memory_safe
        assert stall() < STALL_MAX_S
    decode.check_all_free()


async def test_an_error_that_nccl_reports_ends_the_transfer_before_its_deadline(decode):
    async with nccl_prefill(link_reply_ms=5000) as prefill:
        transfer, ticket = await paired_transfer(prefill, decode)
        prefill.nccl.faults.remote_error = True
        cut_wire(decode)
        started = time.monotonic()
        with pytest.raises(LinkError):
            await push_and_commit(transfer)
        assert time.monotonic() - started < 1
        await decode.book.until(lambda: decode.book.lost_transfers() == [ticket.transfer_id])
    decode.check_all_free()


async def test_after_a_failure_tcp_then_a_new_epoch(prefill, decode):
    transfer, _ = await paired_transfer(prefill, decode)
    cut_wire(decode)
    with pytest.raises(LinkError):
        await push_and_commit(transfer)
    await until(lambda: peer_state(prefill.pairs, "decode-1") is PeerState.APART)

    assert await hand_over(prefill, decode) == "tcp"
    assert len(prefill.nccl.communicators) == 1, "not before the back-off has ended"
    await back_off(prefill.pairs, "decode-1")
    await back_off(decode.pairs, "prefill-1")
    assert await hand_over(prefill, decode, paired=True) == "nccl"
    assert prefill.pairs._book.epoch("decode-1") == 2


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_pair_that_cannot_be_made_costs_no_transfer(prefill, decode, side):
    double = prefill.nccl if side == "prefill" else decode.nccl
    double.faults.fail["communicator"] = 5
    for _ in range(3):
        assert await hand_over(prefill, decode) == "tcp"
    await until(lambda: peer_state(prefill.pairs, "decode-1") is PeerState.APART)
    double.faults.fail.clear()
    await back_off(prefill.pairs, "decode-1")
    assert await hand_over(prefill, decode, paired=True) == "nccl"


async def test_another_pair_and_the_loop_go_on_while_one_hangs(prefill, decode):
    async with nccl_decode("decode-2", **SHORT) as other:
        await hand_over(prefill, other, paired=True)
        transfer, _ = await paired_transfer(prefill, decode)
        decode.nccl.faults.hang |= {"post", "abort"}
        async with longest_stall() as stall:
            failing = asyncio.ensure_future(push_and_commit(transfer))
            while not failing.done():
                assert await hand_over(prefill, other) == "nccl"
            assert stall() < STALL_MAX_S
        with pytest.raises(LinkError):
            await failing
        assert await hand_over(prefill, other) == "nccl"


# ---- who may use a pair


async def test_blocks_by_an_old_epoch_are_refused(prefill, decode):
    await hand_over(prefill, decode, paired=True)
    prefill.pairs.fail("decode-1", 1, "to have a second epoch")
    await until(lambda: peer_state(decode.pairs, "prefill-1") is PeerState.APART)
    await back_off(prefill.pairs, "decode-1")
    await back_off(decode.pairs, "prefill-1")
    assert await hand_over(prefill, decode, paired=True) == "nccl"

    ticket = decode.ticket(1)
    transfer = await prefill.begin(ticket)
    header = Blocks(transfer_id=ticket.transfer_id, count=1, checksums=[1], pair_epoch=1)
    link = link_of(prefill)
    await link.send(Frame(blocks=header))
    await decode.book.until(lambda: ticket.transfer_id in decode.book.lost_transfers())
    with pytest.raises(LinkError):
        await transfer.commit(1, REPLY_S)
    decode.check_all_free()


async def test_an_invitation_before_a_ticket_is_refused(decode):
    host, port = decode.address("nccl").split(":")
    with socket.create_connection((host, int(port))) as sock:
        frames = FrameSocket(sock, 10)
        await frames.send(greeting(decode.pool.layout))
        await frames.receive()
        await frames.send(Frame(pair_open=PairOpen(epoch=1, unique_id=b"x" * 128)))
        assert await is_closed(frames)
        frames.close()
    assert decode.listener.rejected == {Rejection.FORGED: 1}
    assert decode.nccl.communicators == []


async def test_at_the_cap_the_least_used_pair_makes_room():
    async with (
        nccl_decode("decode-1", **SHORT) as first,
        nccl_decode("decode-2", **SHORT) as second,
        nccl_decode("decode-3", **SHORT) as third,
        nccl_prefill(nccl_pairs_max=2, **SHORT) as prefill,
    ):
        await hand_over(prefill, first, paired=True)
        await hand_over(prefill, second, paired=True)
        assert await hand_over(prefill, first) == "nccl"
        assert await hand_over(prefill, third, paired=True) == "nccl"
        assert set(prefill.pairs._pairs) == {"decode-1", "decode-3"}
        await until(lambda: peer_state(second.pairs, "prefill-1") is PeerState.APART)
        # A pair that was closed in good order is not backed off from.
        assert await hand_over(prefill, second) == "tcp"
        assert await hand_over(prefill, second, paired=True) == "nccl"
        assert set(prefill.pairs._pairs) == {"decode-2", "decode-3"}
