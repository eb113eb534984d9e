"""The memory of a worker's KV blocks.

A decode worker's pool lies in a memfd, so that a prefill worker on the same host can map it and
write blocks in place, and so that the kernel takes it back however the process ends. Which block
may be used is the ledger's business, not this file's.
"""

import ctypes
import mmap
import os
import threading
from collections.abc import Sequence

import numpy as np
import torch

from kvrelay.kv.layout import KVLayout

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.uint8,  # bytes, among them those of the scales
}
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, of Linux 5.14 and later
_TOUCH_BYTES = 8 << 20
_LEAST_URGENT = 19  # of nice values


class KVPool:
    """`blocks` KV blocks for the engine (`kv`) and the same bytes for the transport (`bytes`).

    kv: `[blocks, layers, 2, block_size, kv_heads, head_dim]` on the engine's device; for int8
        `[blocks, layers, 2, side_bytes]`, raw bytes that only the CPU's kernels read.
    bytes: `[blocks, block_bytes]` uint8 in host memory. On a CPU both are the same memory; else
        the pool is `staged`, and `to_device` and `to_host` copy blocks between them.
    fd: the memfd behind `bytes` when `shared`, else -1.
    """

    def __init__(
        self, layout: KVLayout, blocks: int, *, shared: bool = False, device: str = "cpu"
    ) -> None:
        self.layout = layout
        self.blocks = blocks
        self.fd = -1
        size = blocks * layout.block_bytes
        if shared:
            self.fd = os.memfd_create("kvrelay-kv", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, size)
            flat = torch.frombuffer(mmap.mmap(self.fd, size), dtype=torch.uint8)
        else:
            # Anonymous mmap rather than torch.empty: pages cost nothing until they are written.
            flat = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        self.bytes: np.ndarray = flat.numpy().reshape(blocks, layout.block_bytes)
        host = flat.view(TORCH_DTYPES[layout.dtype]).view(blocks, *layout.block_shape)
        self._host = host
        self.kv = host if device == "cpu" else torch.empty_like(host, device=device)

    @property
    def staged(self) -> bool:
        """Whether engine and transport see different memory, so that blocks must be copied."""
        return self.kv is not self._host

    @property
    def size_bytes(self) -> int:
        return self.blocks * self.layout.block_bytes

    def to_device(self, blocks: Sequence[int]) -> None:
        """Makes what a peer wrote into `blocks` visible to the engine."""
        self._copy(self._host, self.kv, blocks)

    def to_host(self, blocks: Sequence[int]) -> None:
        """Makes what the engine wrote into `blocks` visible to the transport."""
        self._copy(self.kv, self._host, blocks)

    def _copy(self, source: torch.Tensor, target: torch.Tensor, blocks: Sequence[int]) -> None:
        for block in blocks:
            target[block].copy_(source[block])

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def touch_pages(memory: np.ndarray, stop: threading.Event) -> None:
    """Has the kernel make the pages of `memory`, uint8 from a mapping's start, until `stop` is set.
    For a thread of its own.

    The first write to a new page may take ten times as long as the next, and would come in the
    middle of somebody's hand-off. Where the kernel cannot do it, writing will.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_URGENT)
    madvise = ctypes.CDLL(None, use_errno=True).madvise  # ctypes lets other threads run
    for offset in range(0, memory.nbytes, _TOUCH_BYTES):
        address = ctypes.c_void_p(memory.ctypes.data + offset)
        length = ctypes.c_size_t(min(_TOUCH_BYTES, memory.nbytes - offset))
        if stop.is_set() or madvise(address, length, _POPULATE_WRITE):
            return
