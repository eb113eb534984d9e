"""A 64-bit checksum of KV blocks where they lie: no copy from a GPU to the host.

The nccl link compares it at both ends. It guards against accidents, not against an adversary, and
has the same value for the same bytes on any device. It waits for the device, so not on an event
loop.
"""

import torch

_CHUNK_BYTES = 64 << 20  # at a time: the working copies take a few times as much
_STEP, _SPREAD, _MIX = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # all odd


def device_checksum(block: torch.Tensor) -> int:
    """Of one contiguous block of any shape and dtype."""
    return device_checksums(block.reshape(1, -1).view(torch.uint8))[0]


def device_checksums(blocks: torch.Tensor) -> list[int]:
    """Of each row of `[blocks, block_bytes]` uint8, in 0 .. 2**64 - 1."""
    count, block_bytes = blocks.shape
    rows = max(1, _CHUNK_BYTES // max(1, block_bytes))
    sums = [_sums(blocks[at : at + rows]) for at in range(0, count, rows)]
    return [value % 2**64 for part in sums for value in part.tolist()]


def _sums(blocks: torch.Tensor) -> torch.Tensor:  # [rows, block_bytes] -> [rows] int64
    """Each word goes through a bijection that depends on its place, so that a change to one word
    always shows; the products make words in each other's place show, too."""
    block_bytes = blocks.shape[1]
    blocks = torch.nn.functional.pad(blocks, (0, -block_bytes % 8))
    words = blocks.contiguous().view(torch.int64)  # [rows, words]
    places = torch.arange(1, words.shape[1] + 1, dtype=torch.int64, device=words.device)
    mixed = (words ^ (places * _STEP)) * _SPREAD
    mixed = _fold(mixed, 29) * _MIX
    total = _fold(mixed, 32).sum(dim=1) + block_bytes * 2 + 1  # all sums wrap at 2**64
    return _fold(total * _SPREAD, 32)


def _fold(value: torch.Tensor, bits: int) -> torch.Tensor:
    """value ^ (value >>> bits), which can be undone; torch's own shift keeps the sign."""
    return value ^ ((value >> bits) & ((1 << (64 - bits)) - 1))
