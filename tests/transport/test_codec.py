"""Which dtype travels between which pools, and what arrives."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from kv_fixtures import LAYOUT, decode_end, prefill_end
from links import REPLY_S, Wire, by_hand, greeting, link_of

from kvrelay.kv.pool import TORCH_DTYPES
from kvrelay.transport.codec import transcode
from kvrelay.transport.errors import LinkError, Rejection

F32, F16, BF16 = "float32", "float16", "bfloat16"
DTYPES = [F32, F16, BF16]
HALF_LARGEST = 65504.0

# What travels over tcp from P's dtype to D's, as is. Over shm it is D's own.
AS_IS = {
    (F32, F32): F32,
    (F32, F16): F16,
    (F32, BF16): BF16,
    (F16, F32): F16,
    (F16, F16): F16,
    (F16, BF16): BF16,
    (BF16, F32): BF16,
    (BF16, F16): F16,
    (BF16, BF16): BF16,
}
AS_BF16 = {**AS_IS, (F32, F32): BF16}  # it makes no other pair's blocks smaller
ROUNDING = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}  # relative, of a normal number


def layout_of(dtype):
    return replace(LAYOUT, dtype=dtype)


def fill(pool, seed=1, scale=1.0):
    """Normal numbers; none so small that a half would lose more than its rounding."""
    values = np.random.default_rng(seed).uniform(0.1, 4, pool.kv.shape) * scale
    signs = np.random.default_rng(seed + 1).choice([-1.0, 1.0], pool.kv.shape)
    pool.kv.copy_(torch.from_numpy(values * signs))


async def moved(transport, codec, here, there, prepare, blocks=4):
    """KV of P's blocks and of D's after a transfer, `[blocks, ...]` float64, and what travelled."""
    async with (
        decode_end(layout_of(there), transport=transport) as end,
        prefill_end(layout_of(here), transport=transport, wire_codec=codec) as writers,
    ):
        prepare(writers.pool)
        ticket = end.ticket(blocks)
        transfer = await writers.begin(ticket)
        source = [7, 3, 9, 5][:blocks]
        await transfer.push(source)
        await transfer.commit(1, REPLY_S)
        wire = link_of(writers).sender.wire.layout
        assert transfer.bytes_sent == blocks * wire.block_bytes
        untouched = [b for b in range(end.pool.blocks) if b not in set(ticket.block_ids)]
        assert not end.pool.bytes[untouched].any()
        sent, got = writers.pool.kv[source], end.pool.kv[list(ticket.block_ids)]
        return sent.clone(), got.clone(), wire.dtype


@pytest.mark.parametrize("codec", ["asis", "bf16"])
@pytest.mark.parametrize(("here", "there"), list(itertools.product(DTYPES, DTYPES)))
async def test_values_arrive_within_the_rounding_of_the_narrowest_dtype(
    transport, codec, here, there
):
    sent, got, travelled = await moved(transport, codec, here, there, fill)
    over_tcp = AS_IS if codec == "asis" else AS_BF16
    assert travelled == (there if transport == "shm" else over_tcp[here, there])
    narrowest = max(ROUNDING[dtype] for dtype in (there, travelled))
    if here == there == travelled:
        assert torch.equal(sent.view(torch.uint8), got.view(torch.uint8))
    error = ((got.double() - sent.double()) / sent.double()).abs().max()
    assert error <= narrowest
    # Rounded once and no more: exactly what torch makes of it.
    expected = sent.to(TORCH_DTYPES[travelled]).to(TORCH_DTYPES[there])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
async def test_equal_pools_get_equal_bits_whatever_they_are(transport, dtype):
    def noise(pool):  # NaNs, infinities and subnormal numbers among them
        pool.bytes[:] = np.random.default_rng(2).integers(0, 256, pool.bytes.shape, np.uint8)

    sent, got, _ = await moved(transport, "asis", dtype, dtype, noise)
    assert torch.equal(sent.view(torch.uint8), got.view(torch.uint8))


@pytest.mark.parametrize("here", [F32, BF16])
async def test_what_a_half_cannot_hold_becomes_its_largest(transport, here):
    def huge(pool):
        fill(pool, scale=1e6)
        pool.kv[..., 0] = float("inf")
        pool.kv[..., 1] = torch.sign(pool.kv[..., 1]) * 3e38

    sent, got, travelled = await moved(transport, "asis", here, F16, huge)
    assert travelled == F16
    assert torch.equal(got.double(), torch.sign(sent).double() * HALF_LARGEST)


async def test_a_block_that_is_bad_on_the_way_comes_again_in_the_dtype_that_travels():
    async with (
        decode_end(layout_of(F32), transport="tcp") as end,
        prefill_end(layout_of(F16), transport="tcp") as writers,
    ):
        fill(writers.pool)
        ticket = end.ticket(3)
        transfer = await writers.begin(ticket)
        wire = Wire(link_of(writers), end)
        wire.spoil[1, 1] = 2
        await transfer.push([0, 1, 2])
        await transfer.commit(1, REPLY_S)
        assert wire.sent() == [(0, 3, False), (1, 1, True), (1, 1, True)]
        assert torch.equal(end.pool.kv[list(ticket.block_ids)], writers.pool.kv[:3].float())


@pytest.mark.parametrize(("source", "target"), list(itertools.product(DTYPES, DTYPES)))
def test_a_not_a_number_stays_one(source, target):
    one, other = layout_of(source), layout_of(target)
    block = torch.full(one.block_shape, float("nan"), dtype=TORCH_DTYPES[source])
    got = torch.zeros(other.block_bytes, dtype=torch.uint8)
    transcode(block.flatten().view(torch.uint8), one, got, other)
    assert got.view(TORCH_DTYPES[target]).isnan().all()


# ---- unknown ones


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"codec": "zip"}, r"wire codecs asis, bf16.* here, 'zip' there"),
        ({"codec": ""}, r"wire codecs asis, bf16.* here, '' there"),
        (
            {"layout": layout_of("int4").to_wire()},
            "KV layouts differ: dtype: float32 here, int4 there",
        ),
    ],
    ids=["codec", "no codec", "dtype"],
)
async def test_an_unknown_codec_or_dtype_is_refused_with_both_sides_named(
    decode, transport, changes, reason
):
    async with by_hand(decode, transport, hello=False) as frames:
        await frames.send(greeting(LAYOUT, **changes))
        refused = (await frames.receive()).refused
    assert re.fullmatch(reason, refused.reason), refused.reason
    assert decode.listener.rejected[Rejection.HANDSHAKE] == 1


async def test_a_decode_worker_that_wants_an_unknown_dtype_gets_no_blocks(
    decode, prefill, monkeypatch
):
    monkeypatch.setattr("kvrelay.transport.listener.wire_dtype", lambda *_: "int4")
    monkeypatch.setattr("kvrelay.transport.listener.replace", lambda layout, **_: layout)
    with pytest.raises(LinkError, match="KV blocks as 'int4' are asked for, unknown here"):
        await prefill.begin(decode.ticket(1))
