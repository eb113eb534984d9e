"""Blocks that arrive otherwise than they were sent are asked for again, each by itself."""

import asyncio
from collections import Counter

import pytest
from kv_fixtures import LAYOUT, decode_end, prefill_end, same_bytes
from links import (
    REPLY_S,
    Wire,
    begun_by_hand,
    by_hand,
    hand_over,
    is_closed,
    link_of,
    send_by_hand,
)

from kvrelay.transport.errors import LinkError, Rejection
from kvrelay.wire.transfer_pb2 import Commit, Frame

GOOD = [bytes([n]) * LAYOUT.block_bytes for n in range(1, 5)]
BAD = [block[:7] + b"\xff" + block[8:] for block in GOOD]


async def begun(decode, prefill, blocks, bad=()):
    """A transfer, and its wire that will spoil each of these indexes once."""
    transfer = await prefill.begin(decode.ticket(blocks))
    wire = Wire(link_of(prefill), decode)
    wire.spoil.update((transfer.ticket.transfer_id, index) for index in bad)
    return transfer, wire


# ---- one block at a time


async def test_a_bad_block_costs_one_sending_of_that_block(decode, prefill):
    transfer, wire = await begun(decode, prefill, 4, bad=[1])
    await transfer.push([9, 2, 4])
    await transfer.push([7])
    await transfer.commit(1, REPLY_S)
    assert sorted(wire.sent()) == [(0, 3, False), (1, 1, True), (3, 1, False)]
    assert same_bytes(decode.pool, transfer.ticket.block_ids, prefill.pool, [9, 2, 4, 7])
    assert decode.listener.rejected == {Rejection.CHECKSUM: 1}
    assert decode.book.lost_transfers() == []
    decode.finish(1)
    decode.check_all_free()


async def test_several_bad_blocks_come_again_and_the_good_ones_do_not(decode, prefill):
    transfer, wire = await begun(decode, prefill, 6, bad=[0, 2, 5])
    await transfer.push([0, 1, 2, 3])
    await transfer.push([4, 5])
    await transfer.commit(1, REPLY_S)
    assert sorted(index for index, _, again in wire.sent() if again) == [0, 2, 5]
    assert all(count == 1 for _, count, again in wire.sent() if again)
    assert same_bytes(decode.pool, transfer.ticket.block_ids, prefill.pool, range(6))
    assert decode.listener.rejected == {Rejection.CHECKSUM: 3}


async def test_a_block_may_be_bad_resends_max_times(decode, prefill):
    transfer, wire = await begun(decode, prefill, 2, bad=[1, 1])
    await transfer.push([0, 1])
    await transfer.commit(1, REPLY_S)
    assert wire.sent() == [(0, 2, False), (1, 1, True), (1, 1, True)]
    assert same_bytes(decode.pool, transfer.ticket.block_ids, prefill.pool, [0, 1])


async def test_a_commit_that_came_before_the_bad_blocks_waits_for_all_of_them(decode, transport):
    async with by_hand(decode, transport) as frames:
        ticket = decode.ticket(3)
        await begun_by_hand(frames, ticket)
        wrong = [BAD[0], GOOD[1], BAD[2]]
        await send_by_hand(frames, decode, transport, ticket, 0, wrong, announced=GOOD[:3])
        await frames.send(Frame(commit=Commit(transfer_id=1, blocks=3, first_token_id=5)))
        assert (await frames.receive()).resend.indexes == [0, 2]
        await send_by_hand(frames, decode, transport, ticket, 2, [GOOD[2]], again=True)
        await decode.book.until(lambda: decode.book.events[-1] == ("received", 1, 1))
        assert not any(event[0] == "commit" for event in decode.book.events)
        await send_by_hand(frames, decode, transport, ticket, 0, [GOOD[0]], again=True)
        assert (await frames.receive()).committed.transfer_id == 1
    assert decode.book.events[-1] == ("commit", 1, 5)
    assert [bytes(decode.pool.bytes[block]) for block in ticket.block_ids] == GOOD[:3]


async def test_a_commit_that_waited_is_checked_like_any_other(decode, transport):
    async with by_hand(decode, transport) as frames:
        ticket = decode.ticket(3)
        await begun_by_hand(frames, ticket)
        await send_by_hand(frames, decode, transport, ticket, 0, BAD[:1], announced=GOOD[:1])
        await frames.send(Frame(commit=Commit(transfer_id=1, blocks=3)))
        assert (await frames.receive()).resend.indexes == [0]
        await send_by_hand(frames, decode, transport, ticket, 0, GOOD[:1], again=True)
        assert (await frames.receive()).abort.reason == "Commit of 3 blocks while 2 are missing"


async def test_a_transfer_given_up_while_blocks_are_awaited_forgets_its_commit(decode, prefill):
    transfer, _ = await begun(decode, prefill, 2, bad=[0] * 3)
    kept = link_of(prefill)
    await transfer.push([0, 1])
    with pytest.raises(LinkError):
        await transfer.commit(1, REPLY_S)
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])
    await hand_over(decode, prefill)
    assert link_of(prefill) is kept
    assert [event[1] for event in decode.book.events if event[0] == "commit"] == [2]


# ---- again and again


async def test_a_block_that_is_bad_too_often_ends_that_transfer_and_no_other(decode, prefill):
    good = await prefill.begin(decode.ticket(2))
    bad, wire = await begun(decode, prefill, 2, bad=[0] * 3)
    await bad.push([0])
    await decode.book.until(lambda: 2 in decode.book.lost_transfers())
    assert wire.sent() == [(0, 1, False), (0, 1, True), (0, 1, True)]
    with pytest.raises(LinkError, match="block 0 has a wrong checksum for the 3"):
        await bad.push([1])
    await good.push([0, 1])
    await good.commit(1, REPLY_S)
    assert decode.book.lost_transfers() == [2]
    assert [e[1] for e in decode.book.events if e[0] == "commit"] == [1]
    assert set(decode.listener.rejected) == {Rejection.CHECKSUM}
    decode.finish(1)
    decode.check_all_free()


async def test_blocks_that_follow_the_refused_one_do_not_cost_the_link(transport):
    """They are on the wire before the writer hears of the refusal, however many they are."""
    async with (
        decode_end(transport=transport, resends_max=0) as end,
        by_hand(end, transport) as frames,
    ):
        good, bad = end.ticket(1), end.ticket(4)
        await begun_by_hand(frames, good)
        await begun_by_hand(frames, bad)
        await send_by_hand(frames, end, transport, bad, 0, BAD[:1], announced=GOOD[:1])
        for index in (1, 2, 3):
            await send_by_hand(frames, end, transport, bad, index, [GOOD[index]])
        await frames.send(Frame(commit=Commit(transfer_id=2, blocks=4)))
        await send_by_hand(frames, end, transport, good, 0, GOOD[:1])
        await frames.send(Frame(commit=Commit(transfer_id=1, blocks=1)))
        assert (await frames.receive()).abort.transfer_id == 2
        assert (await frames.receive()).committed.transfer_id == 1
        assert end.handoff.is_aborting(("router", 2)) is False
        assert end.ledger.free == 16 - 5, "blocks are free before their writer let go"
        await frames.send(Frame(abort={"transfer_id": 2}))
        await end.book.until(lambda: end.book.lost_transfers() == [2])
        end.finish(1)
        end.check_all_free()


async def test_a_refused_transfer_may_be_refused_for_one_block_only_once(transport):
    async with (
        decode_end(transport=transport, resends_max=0) as end,
        by_hand(end, transport) as frames,
    ):
        ticket = end.ticket(2)
        await begun_by_hand(frames, ticket)
        for index in (0, 1):
            await send_by_hand(
                frames, end, transport, ticket, index, [BAD[index]], announced=[GOOD[index]]
            )
        await frames.send(Frame(begin={"ticket": {"transfer_id": 77}}))
        assert (await frames.receive()).abort.transfer_id == 1
        assert (await frames.receive()).abort.transfer_id == 77


# ---- nobody asked


@pytest.mark.parametrize("index", [0, 1, 2], ids=["came well", "comes next", "beyond the ticket"])
async def test_a_block_sent_again_that_nobody_asked_for_ends_the_link(decode, transport, index):
    async with by_hand(decode, transport) as frames:
        ticket = decode.ticket(2)
        await begun_by_hand(frames, ticket)
        await send_by_hand(frames, decode, transport, ticket, 0, GOOD[:1])
        header = {"transfer_id": 1, "first_index": index, "count": 1, "checksums": [0]}
        await frames.send(Frame(blocks={**header, "again": True}))
        assert await is_closed(frames)
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])
    expected = Rejection.OVERSIZED if index == 2 else Rejection.DUPLICATE
    assert decode.listener.rejected == Counter([expected])
    decode.check_all_free()


# ---- by hand, without the writer's own code


async def test_a_byte_flipped_on_the_wire_is_found():
    async with decode_end(transport="tcp") as end, by_hand(end, "tcp") as frames:
        ticket = end.ticket(2)
        await begun_by_hand(frames, ticket)
        good = bytes(range(LAYOUT.block_bytes))
        bad = bytes([good[0] ^ 1]) + good[1:]
        await send_by_hand(frames, end, "tcp", ticket, 0, [good, bad], announced=[good, good])
        assert (await frames.receive()).resend.indexes == [1]


async def test_a_byte_flipped_in_shared_memory_is_found():
    async with decode_end(transport="shm") as end, prefill_end(transport="shm") as writers:
        transfer, wire = await begun(end, writers, 1, bad=[0] * 3)
        await transfer.push([0])
        with pytest.raises(LinkError, match="wrong checksum"):
            await transfer.commit(1, REPLY_S)
        await end.book.until(lambda: end.book.lost_transfers() == [1])
        assert len(wire.headers) == 3
        end.check_all_free()


# ---- with and without checksums


@pytest.mark.parametrize(
    ("there", "here"), [(True, True), (True, False), (False, True), (False, False)]
)
async def test_blocks_carry_checksums_as_soon_as_one_end_wants_them(transport, there, here):
    async with (
        decode_end(transport=transport, checksums=there) as end,
        prefill_end(transport=transport, checksums=here) as writers,
    ):
        transfer, wire = await begun(end, writers, 3)
        await transfer.push([0, 1])
        await transfer.push([2])
        await transfer.commit(1, REPLY_S)
        assert same_bytes(end.pool, transfer.ticket.block_ids, writers.pool, range(3))
        expected = [2, 1] if there or here else [0, 0]
        assert [len(header.checksums) for header in wire.headers] == expected


@pytest.mark.parametrize(("there", "here"), [(True, False), (False, True)])
async def test_one_end_that_wants_checksums_is_enough_to_find_a_bad_block(transport, there, here):
    async with (
        decode_end(transport=transport, checksums=there) as end,
        prefill_end(transport=transport, checksums=here) as writers,
    ):
        transfer, wire = await begun(end, writers, 2, bad=[1])
        await transfer.push([0, 1])
        await transfer.commit(1, REPLY_S)
        assert wire.sent() == [(0, 2, False), (1, 1, True)]
        assert same_bytes(end.pool, transfer.ticket.block_ids, writers.pool, [0, 1])


@pytest.mark.parametrize("sums", [[], [1], [1, 2, 3]], ids=["none", "too few", "too many"])
async def test_blocks_without_a_checksum_each_end_a_link_that_has_them(decode, transport, sums):
    async with by_hand(decode, transport) as frames:
        await begun_by_hand(frames, decode.ticket(2))
        await frames.send(Frame(blocks={"transfer_id": 1, "count": 2, "checksums": sums}))
        assert await is_closed(frames)
    assert decode.listener.rejected == {Rejection.MALFORMED: 1}
    assert not decode.pool.bytes.any()


# ---- many at once


async def test_bad_blocks_of_many_transfers_on_one_link_come_right(decode, prefill):
    transfers = [await prefill.begin(decode.ticket(3)) for _ in range(5)]
    wire = Wire(link_of(prefill), decode)
    for number, transfer in enumerate(transfers):
        wire.spoil[transfer.ticket.transfer_id, number % 3] = 1 + number % 2

    async def run(number: int) -> None:
        for step in range(3):
            await transfers[number].push([number * 3 + step])
        await transfers[number].commit(1, REPLY_S)

    await asyncio.gather(*(run(number) for number in range(5)))
    for number, transfer in enumerate(transfers):
        source = [number * 3 + step for step in range(3)]
        assert same_bytes(decode.pool, transfer.ticket.block_ids, prefill.pool, source)
    assert sum(again for _, _, again in wire.sent()) == 7
    assert decode.book.lost_transfers() == []
