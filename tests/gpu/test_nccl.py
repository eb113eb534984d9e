"""NCCL itself on one GPU: `pytest -m gpu`, with the extra `cuda` installed.

The conformance of a pair needs two GPUs, for NCCL refuses two ranks on one: it is in
tests/transport/test_nccl_pair.py, which `-m gpu` runs too.
"""

import asyncio

import pytest
import torch
from nccl_ends import DEADLINE_S, Ends, longest_stall

from kvrelay.transport.device_checksum import device_checksums
from kvrelay.transport.nccl_errors import NcclError
from kvrelay.transport.nccl_library import NvidiaNccl
from kvrelay.transport.nccl_pair import PairState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
async def ends():
    both = Ends(NvidiaNccl.load(), (0, 0))
    yield both
    await both.close()


async def test_an_end_without_its_peer_is_given_up_and_aborted(ends):
    async with longest_stall() as stall:
        alone = ends.end(ends.library.unique_id(), 0)
        with pytest.raises(NcclError, match="did not open within"):
            await alone.opened(0.5)
        await asyncio.wait_for(alone.wait_closed(), DEADLINE_S)
        assert stall() < 0.5
    assert alone.memory_safe


async def test_two_ranks_on_one_gpu_are_refused_not_hung(ends):
    unique_id = ends.library.unique_id()
    pairs = [ends.end(unique_id, rank) for rank in (0, 1)]
    results = await asyncio.gather(
        *(pair.opened(DEADLINE_S) for pair in pairs), return_exceptions=True
    )
    assert [type(result) for result in results] == [NcclError, NcclError]
    assert [pair.state for pair in pairs] != [PairState.READY] * 2


def test_a_device_that_is_not_there_is_refused():
    nccl = NvidiaNccl.load()
    with pytest.raises(NcclError, match="no CUDA device 99"):
        nccl.communicator(nccl.unique_id(), 0, 99)


def test_the_checksum_is_the_same_on_the_gpu():
    blocks = torch.randint(0, 256, (40, 100_003), dtype=torch.uint8)
    assert device_checksums(blocks.cuda()) == device_checksums(blocks)
