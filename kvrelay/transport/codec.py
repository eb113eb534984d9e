"""Which dtype KV travels in, and blocks of one dtype made into blocks of another.

A wire format is nothing new: it is the layout of a block with another dtype. Senders encode from
their pool into it, receivers decode from it into theirs. Where both are the same, nothing happens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import torch

from kvrelay.config import WireCodec
from kvrelay.kv.layout import KVLayout
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
    """One block `[block_bytes]` uint8 into another, on any device. What float16 cannot hold becomes
    its largest: an infinity would spoil the scores of all that looks at it."""
    values = source.view(TORCH_DTYPES[source_layout.dtype])
    kind = TORCH_DTYPES[target_layout.dtype]
    if kind is torch.float16:
        largest = torch.finfo(kind).max
        values = values.float().clamp(-largest, largest)
    target.view(kind).copy_(values)
