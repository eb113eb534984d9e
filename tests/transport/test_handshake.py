"""Who is paired with whom, and what a ticket is good for."""

from dataclasses import replace

import pytest
from kv_fixtures import (
    LAYOUT,
    prefill_end,
)
from links import (
    REPLY_S,
    hand_over,
)

from kvrelay.config import PROTOCOL_VERSION
from kvrelay.transport import writer_pool
from kvrelay.transport.errors import LinkError, Rejection


async def test_layouts_that_differ_are_refused_with_both_sides_told(decode, transport):
    async with prefill_end(replace(LAYOUT, block_size=8), transport=transport) as other:
        with pytest.raises(LinkError, match="KV layouts differ: block_size: 4 here, 8 there"):
            await other.begin(decode.ticket(1))
    assert decode.book.events == []


async def test_protocol_versions_that_differ_are_refused_with_both_told(
    decode, prefill, monkeypatch
):
    monkeypatch.setattr(writer_pool, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    with pytest.raises(
        LinkError, match=f"protocol {PROTOCOL_VERSION} here, {PROTOCOL_VERSION + 1}"
    ):
        await prefill.begin(decode.ticket(1))


async def test_another_worker_at_the_address_is_not_written_to(decode, prefill):
    with pytest.raises(LinkError, match="decode-1 answers there, not decode-0"):
        await prefill.begin(decode.ticket(1, decode_instance_id="decode-0"))
    assert decode.book.events == []


async def test_a_wrong_signature_is_refused_and_the_link_lives(decode, prefill):
    with pytest.raises(LinkError, match="signature is wrong"):
        await prefill.begin(decode.ticket(1, signature=b"x" * 32))
    await hand_over(decode, prefill)


async def test_a_ticket_used_twice_on_one_link_does_not_end_the_first_transfer(decode, prefill):
    ticket = decode.ticket(2)
    transfer = await prefill.begin(ticket)
    with pytest.raises(LinkError):
        await prefill.begin(ticket)
    await transfer.push([0, 1])
    await transfer.commit(1, 0.5)
    assert decode.book.lost_transfers() == []


async def test_a_ticket_used_twice_from_two_workers_is_refused_to_the_second(
    decode, prefill, transport
):
    ticket = decode.ticket(2)
    transfer = await prefill.begin(ticket)
    async with prefill_end(name="prefill-2", transport=transport) as other:
        with pytest.raises(LinkError, match="has been used"):
            await other.begin(ticket)
    assert decode.listener.rejected[Rejection.REPLAYED] == 1
    await transfer.push([0, 1])
    await transfer.commit(1, REPLY_S)
    assert decode.book.lost_transfers() == []
