import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from kv_fixtures import LAYOUT

from kvrelay.kv.pool import TORCH_DTYPES, KVPool, touch_pages


@pytest.fixture
def shared() -> Iterator[KVPool]:
    pool = KVPool(LAYOUT, 3, shared=True)
    yield pool
    pool.close()


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_shapes_and_sizes_follow_the_layout(dtype):
    layout = replace(LAYOUT, dtype=dtype)
    pool = KVPool(layout, 3)
    assert pool.kv.shape == (3, *layout.block_shape)
    assert pool.kv.dtype == TORCH_DTYPES[dtype]
    assert pool.bytes.shape == (3, layout.block_bytes)
    assert pool.size_bytes == pool.bytes.nbytes == pool.kv.nbytes == 3 * layout.block_bytes


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_new_pool_is_all_zeros(is_shared):
    pool = KVPool(LAYOUT, 3, shared=is_shared)
    assert not pool.bytes.any()
    pool.close()


def test_kv_and_bytes_are_the_same_memory():
    pool = KVPool(LAYOUT, 3)
    assert not pool.staged
    pool.kv[1] = 1.5
    assert (pool.bytes[1].view(np.float32) == 1.5).all()
    assert not pool.bytes[[0, 2]].any()
    pool.bytes[2] = np.full(pool.layout.block_bytes // 4, 2.5, np.float32).view(np.uint8)
    assert (pool.kv[2] == 2.5).all()


def test_one_block_is_one_contiguous_region():
    pool = KVPool(LAYOUT, 3)
    assert pool.kv[1].is_contiguous()
    assert pool.bytes[1].flags["C_CONTIGUOUS"]


def test_a_second_mapping_of_the_fd_sees_and_writes_the_pool(shared):
    with mmap.mmap(shared.fd, shared.size_bytes) as other:
        shared.kv[2] = 3.0
        start = 2 * LAYOUT.block_bytes
        there = np.frombuffer(other[start : start + LAYOUT.block_bytes], np.float32)
        assert (there == 3.0).all()
        other[0:4] = np.float32(7.0).tobytes()
        assert shared.kv[0].flatten()[0] == 7.0


def test_a_pool_that_is_not_shared_has_no_fd():
    assert KVPool(LAYOUT, 1).fd == -1


def test_close_gives_the_fd_back_once(shared):
    fd = shared.fd
    shared.close()
    shared.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.fixture
def staged() -> KVPool:
    """As on a GPU: the engine's tensor is another one."""
    pool = KVPool(LAYOUT, 4)
    pool.kv = torch.zeros_like(pool.kv)
    return pool


def test_to_host_copies_exactly_the_named_blocks(staged):
    assert staged.staged
    staged.kv[:] = 5.0
    staged.to_host([1, 3])
    assert [bool(staged.bytes[block].any()) for block in range(4)] == [False, True, False, True]
    assert (staged.bytes[1].view(np.float32) == 5.0).all()


def test_to_device_copies_exactly_the_named_blocks(staged):
    staged.bytes[:] = 1
    staged.to_device([0, 2])
    assert [bool(staged.kv[block].any()) for block in range(4)] == [True, False, True, False]
    assert (staged.kv[0].flatten().view(torch.uint8) == 1).all()


def resident_pages(pool: KVPool) -> int:
    """Of a shared pool's file: pages that exist."""
    return os.fstat(pool.fd).st_blocks * 512 // mmap.PAGESIZE


def test_touched_pages_exist_and_keep_what_was_written():
    pool = KVPool(replace(LAYOUT, head_dim=1 << 12), 4, shared=True)
    pool.bytes[1] = 7
    before = resident_pages(pool)
    assert before < pool.size_bytes // mmap.PAGESIZE
    touch = threading.Thread(target=touch_pages, args=[pool.bytes, threading.Event()])
    touch.start()
    touch.join()
    assert resident_pages(pool) == pool.size_bytes // mmap.PAGESIZE
    assert (pool.bytes[1] == 7).all()
    assert not pool.bytes[2:].any()
    pool.close()


def test_touching_pages_stops_when_told():
    pool = KVPool(replace(LAYOUT, head_dim=1 << 12), 4, shared=True)
    stop = threading.Event()
    stop.set()
    touch = threading.Thread(target=touch_pages, args=[pool.bytes, stop])
    touch.start()
    touch.join()
    assert resident_pages(pool) == 0
    pool.close()
