"""The checksum of blocks in device memory: it shows every small accident, on every device."""

import struct

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kvrelay.transport import device_checksum as module
from kvrelay.transport.device_checksum import device_checksum, device_checksums

WRAP = 2**64
BYTES = st.binary(min_size=1, max_size=200)


def block(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@given(BYTES, st.data())
@settings(deadline=None)
def test_any_changed_byte_changes_it(data, draw):
    at = draw.draw(st.integers(0, len(data) - 1))
    flip = draw.draw(st.integers(1, 255))
    changed = bytearray(data)
    changed[at] ^= flip
    assert device_checksum(block(data)) != device_checksum(block(bytes(changed)))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=30), st.data())
@settings(deadline=None)
def test_any_two_words_in_each_others_place_change_it(words, draw):
    a, b = (draw.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    swapped = words.copy()
    swapped[a], swapped[b] = swapped[b], swapped[a]
    sums = [device_checksum(torch.tensor(each, dtype=torch.int64)) for each in (words, swapped)]
    assert (sums[0] == sums[1]) == (words == swapped)


def test_words_that_differ_in_the_sign_only_may_not_change_places():
    """What a plain sum of products by place does not see."""
    words = torch.zeros(64, dtype=torch.int64)
    words[0] = -(2**63)
    sums = {device_checksum(words.roll(shift)) for shift in range(64)}
    assert len(sums) == 64


@given(BYTES, st.integers(1, 20))
@settings(deadline=None)
def test_zeros_at_the_end_count(data, count):
    assert device_checksum(block(data)) != device_checksum(block(data + bytes(count)))


def test_blocks_have_the_checksums_they_have_alone_whatever_the_chunks(monkeypatch):
    blocks = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (37, 520), np.uint8))
    alone = [device_checksum(row) for row in blocks]
    assert len(set(alone)) == 37
    for chunk_bytes in (1, 520, 5000, 1 << 20):
        monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
        assert device_checksums(blocks) == alone


def test_no_blocks():
    assert device_checksums(torch.empty((0, 64), dtype=torch.uint8)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_bytes_of_any_dtype_and_shape(dtype):
    values = torch.randn(2, 2, 4, 1, 8).to(dtype)
    assert device_checksum(values) == device_checksum(values.view(torch.uint8).flatten())


def test_rows_need_not_be_next_to_each_other():
    wide = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (5, 64), np.uint8))
    assert device_checksums(wide[:, :40]) == device_checksums(wide[:, :40].contiguous())


def by_hand(data: bytes) -> int:
    """The same in plain integers."""

    def fold(value: int, bits: int) -> int:
        return value ^ (value >> bits)

    words = struct.unpack(f"<{-(-len(data) // 8)}Q", data.ljust(-(-len(data) // 8) * 8, b"\0"))
    total = len(data) * 2 + 1
    for place, word in enumerate(words, start=1):
        mixed = (word ^ (place * module._STEP % WRAP)) * module._SPREAD % WRAP
        total += fold(fold(mixed, 29) * module._MIX % WRAP, 32)
    return fold(total * module._SPREAD % WRAP, 32)


@given(BYTES)
@settings(deadline=None)
def test_the_value_is_what_plain_integers_give(data):
    assert device_checksum(block(data)) == by_hand(data)


def test_the_value_is_fixed():
    """Two workers of different versions must agree."""
    assert device_checksum(block(bytes(range(100)))) == 2586435353207694051
