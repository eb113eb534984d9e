"""Both ends of nccl links in one process, each over a double of NCCL of its own."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kv_fixtures import DEADLINE_S, LAYOUT, Book, DecodeEnd, worker_config
from links import until
from nccl_double import DoubleCommunicator, DoubleNccl

from decode_worker.handoff import HandOff
from decode_worker.reservation import Key
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.ledger import BlockLedger
from kvrelay.kv.pool import KVPool
from kvrelay.transport.listener import Listener
from kvrelay.transport.nccl_book import PeerState
from kvrelay.transport.nccl_library import Direction, Region
from kvrelay.transport.nccl_pairs import NcclPairs
from kvrelay.transport.writer import Transfer
from kvrelay.transport.writer_pool import WriterPool
from kvrelay.wire.transfer_pb2 import Ticket


class CountingNccl(DoubleNccl):
    """Notes how many regions each group had, and spoils the first region of the next `flips`
    groups it sends."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[tuple[str, int, int]] = []  # direction, regions, bytes
        self.flips = 0

    def communicator(self, unique_id: bytes, rank: int, device: int) -> DoubleCommunicator:
        self.enter("communicator")
        made = _Counting(self, b"\0" + unique_id.rstrip(b"\0"), rank)
        self.communicators.append(made)
        return made

    def recover(self) -> None:
        """Every call that hangs returns, and the device lets go."""
        self.faults.hang.clear()
        self.faults.stream_hangs = False
        self.faults.release.set()


class _Counting(DoubleCommunicator):
    def post(self, direction: Direction, regions: Sequence[Region]) -> None:
        library: Any = self._library
        size_bytes = sum(region.size_bytes for region in regions)
        super().post(direction, regions)
        library.groups.append((direction.name.lower(), len(regions), size_bytes))

    def _take_frames(self) -> None:
        library: Any = self._library
        before = len(self._outgoing)
        super()._take_frames()
        if library.flips and len(self._outgoing) > before:
            library.flips -= 1
            self._outgoing[-1] ^= 1  # on the way: the source is as it was


class NcclDecode(DecodeEnd):
    """`nccl` is its double."""

    nccl: CountingNccl

    @property
    def pairs(self) -> NcclPairs:
        assert self.listener._pairs is not None
        return self.listener._pairs

    def key_of(self, ticket: Ticket) -> Key:
        return next(
            key
            for key, reservation in self.handoff._by_key.items()
            if reservation.transfer_id == ticket.transfer_id
        )


@contextlib.asynccontextmanager
async def nccl_decode(
    name: str = "decode-1", layout: KVLayout = LAYOUT, blocks: int = 16, **config: Any
) -> AsyncIterator[NcclDecode]:
    double = CountingNccl()
    with tempfile.TemporaryDirectory(prefix="kvl-") as folder:
        pool = KVPool(layout, blocks, shared=True)
        ledger = BlockLedger(blocks)
        settings = worker_config(Path(folder), **{"transport": "nccl", **config})
        handoff = HandOff(
            layout, ledger, lease_ms=1000, reservations_max=100, resends_max=settings.resends_max
        )
        book = Book(handoff)
        listener = Listener(settings, name, pool, book, nccl=double)
        book.committed = listener.committed
        await listener.start()
        await asyncio.sleep(0)
        end = NcclDecode(pool, ledger, handoff, book, listener, name)
        end.nccl = double
        try:
            yield end
        finally:
            double.recover()
            async with asyncio.timeout(DEADLINE_S):
                await listener.close()
            pool.close()
    handoff.cache.check()


class NcclWriters(WriterPool):
    """`pool` has random bytes; `nccl` is its double."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.pool: KVPool = arguments[2]
        self.nccl: CountingNccl = options["nccl"]

    @property
    def pairs(self) -> NcclPairs:
        assert self._pairs is not None
        return self._pairs


@contextlib.asynccontextmanager
async def nccl_prefill(
    name: str = "prefill-1", layout: KVLayout = LAYOUT, blocks: int = 16, **config: Any
) -> AsyncIterator[NcclWriters]:
    pool = KVPool(layout, blocks)
    values = np.random.default_rng(1).standard_normal(pool.size_bytes // 4, np.float32)
    pool.bytes[:] = values.view(np.uint8).reshape(pool.bytes.shape)
    settings = worker_config(Path("/nowhere"), **{"transport": "nccl", **config})
    writers = NcclWriters(settings, name, pool, nccl=CountingNccl())
    try:
        yield writers
    finally:
        writers.nccl.recover()
        async with asyncio.timeout(DEADLINE_S):
            await writers.close()


def peer_state(pairs: NcclPairs, peer: str) -> PeerState:
    found = pairs._book._peers.get(peer)
    return found.state if found is not None else PeerState.APART


async def open_pair(
    writers: NcclWriters, decode: NcclDecode, transfer: Transfer, name: str = "prefill-1"
) -> None:
    """Returns when both ends have a pair, which the transfer's first push asks for."""
    await transfer.push([])
    await until(
        lambda: (
            peer_state(writers.pairs, decode.instance_id) is PeerState.OPEN
            and peer_state(decode.pairs, name) is PeerState.OPEN
        )
    )


async def back_off(pairs: NcclPairs, peer: str) -> None:
    """Returns when the peer may be tried again."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(max(0.0, pairs._book._peers[peer].retry_s - loop.time()))
