"""Which dtype KV travels in, and blocks of one dtype made into blocks of another.

A wire format is nothing new: it is the layout of a block with another dtype. Senders encode from
their pool into it, receivers decode from it into theirs. Where both are the same, nothing happens.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import torch

from kvrelay.config import WireCodec
from kvrelay.engine.kernels.int8_head import INT8_MAX, OFFSET, SCALE_MAX, SCALE_MIN, SPREAD
from kvrelay.engine.shapes import GROUP
from kvrelay.kv.layout import INT8, KVLayout
from kvrelay.kv.pool import TORCH_DTYPES

CODECS: tuple[str, ...] = get_args(WireCodec)
_DTYPES = {"bf16": "bfloat16", "int8": "int8"}


def wire_dtype(codec: str, prefill: KVLayout, decode: KVLayout, transport: str) -> str:
    """What travels between two pools.

    As is: the smaller of their dtypes, since nothing is won by sending what one end drops. A codec
    is used where it makes blocks smaller. Over shm there is no wire: D's dtype is written in place.
    """
    if transport == "shm":
        return decode.dtype
    smaller = min((decode, prefill), key=lambda layout: layout.block_bytes)
    wished = replace(smaller, dtype=_DTYPES.get(codec, smaller.dtype))
    return min((smaller, wished), key=lambda layout: layout.block_bytes).dtype


def encode(source: Sequence[np.ndarray], layout: KVLayout, wire: KVLayout) -> Sequence[np.ndarray]:
    """Blocks in host memory as they travel: the very same memory, or copies `[block_bytes]`."""
    if layout.dtype == wire.dtype:
        return source
    blocks = np.empty((len(source), wire.block_bytes), np.uint8)
    for block, target in zip(source, blocks, strict=True):
        transcode(torch.from_numpy(block), layout, torch.from_numpy(target), wire)
    return list(blocks)


def transcode(
    source: torch.Tensor, source_layout: KVLayout, target: torch.Tensor, target_layout: KVLayout
) -> None:
    """One block `[block_bytes]` uint8 into another, on any device."""
    if source_layout.dtype == target_layout.dtype:
        target.copy_(source)
        return
    _write(_read(source, source_layout), target, target_layout)


def _read(block: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """Any block as `[layers, 2, block_size, kv_heads, head_dim]` float32."""
    if layout.dtype != INT8:
        return block.view(TORCH_DTYPES[layout.dtype]).view(layout.block_shape).float()
    vectors, scales = _int8_parts(block, layout)
    keys = _spread_out(vectors[:, 0].float() - OFFSET) * SPREAD
    values = vectors[:, 1].view(torch.int8).float()
    both = torch.stack([keys, values], 1) * scales.unsqueeze(-1)  # [layers, 2, heads, size, bytes]
    return both[..., : layout.head_dim].transpose(2, 3)


def _write(values: torch.Tensor, block: torch.Tensor, layout: KVLayout) -> None:
    """What the dtype cannot hold becomes its largest: an infinity would spoil the scores of all
    that looks at it."""
    kind = TORCH_DTYPES[layout.dtype]
    if layout.dtype != INT8:
        if kind is not torch.float32:
            largest = torch.finfo(kind).max
            values = values.clamp(-largest, largest)
        block.view(kind).view(layout.block_shape).copy_(values)
        return
    pad = layout.head_bytes - layout.head_dim
    both = torch.nn.functional.pad(values.transpose(2, 3), (0, pad))
    both = torch.stack([_spread_out(both[:, 0]), both[:, 1]], 1)
    own = (both.abs().amax(-1) / INT8_MAX).clamp_min(SCALE_MIN)
    # As the kernel does: a vector with a number that is not finite becomes all zeros.
    finite = own < SCALE_MAX
    own = torch.where(finite, own, SCALE_MIN)
    whole = torch.where(finite.unsqueeze(-1), both / own.unsqueeze(-1), 0.0).round()
    whole = whole.to(torch.int16)
    vectors, scales = _int8_parts(block, layout)
    vectors[:, 0] = (whole[:, 0] + OFFSET).to(torch.uint8)
    vectors[:, 1] = whole[:, 1].to(torch.int8).view(torch.uint8)
    scales.copy_(own)


def _int8_parts(block: torch.Tensor, layout: KVLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Views: bytes `[layers, 2, kv_heads, block_size, head_bytes]`, scales without the last."""
    heads, size = layout.kv_heads, layout.block_size
    sides = block.view(layout.layers, 2, layout.side_bytes)
    vectors = sides[..., : layout.vectors_bytes].unflatten(-1, (heads, size, layout.head_bytes))
    end = layout.vectors_bytes + heads * size * 4
    scales = sides[..., layout.vectors_bytes : end].view(torch.float32)
    return vectors, scales.unflatten(-1, (heads, size))


def _spread_out(vectors: torch.Tensor) -> torch.Tensor:
    """The transform that keys have in an int8 pool (kernels/int8_head.py), per 64; its own inverse
    but for a factor."""
    groups = vectors.unflatten(-1, (-1, GROUP))
    return (groups @ _walsh_hadamard().to(groups.device)).flatten(-2)


@functools.cache
def _walsh_hadamard() -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < GROUP:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
