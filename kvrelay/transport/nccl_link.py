"""Sender and receiver of nccl: a tcp link whose blocks go through NCCL while a pair is open.

Made by writer_pool.py and listener.py. The socket carries frames, and with them the invitation to a
pair. While there is no pair (not yet, failed, too many) blocks follow their frame on the socket, as
on tcp: nobody waits for NCCL. When a pair fails in the middle of blocks, the link ends, and with it
the transfers on it; they are placed again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, MutableMapping, Sequence

import torch

from kvrelay.config import WorkerConfig
from kvrelay.kv.pool import KVPool
from kvrelay.transport.codec import transcode
from kvrelay.transport.device_checksum import device_checksums
from kvrelay.transport.errors import LinkError, PairGoneError, ProtocolError, Rejection
from kvrelay.transport.frames import FrameSocket
from kvrelay.transport.movers import Wire, unexpected
from kvrelay.transport.nccl_book import NcclLimits
from kvrelay.transport.nccl_errors import NcclError, NcclUnavailableError
from kvrelay.transport.nccl_library import NcclLibrary, NvidiaNccl, Region
from kvrelay.transport.nccl_pairs import HeldPair, Invitation, NcclPairs
from kvrelay.transport.tcp import TcpReceiver, TcpSender
from kvrelay.wire import transfer_pb2
from kvrelay.wire.transfer_pb2 import Frame

log = logging.getLogger(__name__)

_RANKS = {"prefill": 0, "decode": 1}


def find_nccl(config: WorkerConfig) -> NcclLibrary | None:
    """What carries KV between GPUs; None where there are none, or tcp and shm are asked for.

    Raises NcclUnavailableError when it is asked for by name and cannot be had.
    """
    if config.device != "cuda" or config.transport not in ("auto", "nccl"):
        return None
    try:
        return NvidiaNccl.load()
    except NcclUnavailableError as error:
        if config.transport == "nccl":
            raise
        log.warning("KV between GPUs goes through host memory: %s", error)
        return None


def make_pairs(
    library: NcclLibrary,
    role: str,
    pool: KVPool,
    config: WorkerConfig,
    tell: Callable[[str, int, str], None],
) -> NcclPairs:
    """The pairs of one worker; `tell` gets peer, epoch and reason when one ends here."""
    limits = NcclLimits(pairs_max=config.nccl_pairs_max, open_s=config.link_connect_ms / 1000)
    return NcclPairs(library, _RANKS[role], pool.kv.device.index or 0, limits, tell)


class _NcclEnd:
    """What both ends of a link keep of their peer and its pair."""

    def __init__(
        self,
        pool: KVPool,
        wire: Wire,
        peer: str,
        pairs: NcclPairs,
        frames: FrameSocket,
        deadline_s: float,
    ) -> None:
        """deadline_s: of one group of blocks in NCCL's hands."""
        self.wire = wire
        self._pool = pool
        self._peer = peer
        self._pairs = pairs
        self._frames = frames
        self._deadline_s = deadline_s
        self._epoch = 0
        self._telling: set[asyncio.Task[None]] = set()

    def tell(self, epoch: int, reason: str) -> None:
        """Our end of the pair has ended: the peer shall not wait for it."""
        task = asyncio.ensure_future(self._say_ended(epoch, reason))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _say_ended(self, epoch: int, reason: str) -> None:
        ended = transfer_pb2.PairEnded(epoch=epoch, reason=reason)
        with contextlib.suppress(LinkError):
            await self._frames.send(Frame(pair_ended=ended))


class NcclSender(_NcclEnd):
    """P's half, on a link to one peer."""

    def __init__(
        self,
        pool: KVPool,
        wire: Wire,
        peer: str,
        pairs: NcclPairs,
        frames: FrameSocket,
        deadline_s: float,
    ) -> None:
        super().__init__(pool, wire, peer, pairs, frames, deadline_s)
        self.name = "tcp"  # what carried the last blocks
        self._inline = TcpSender(pool, wire)
        self._opening: asyncio.Task[None] | None = None
        self._in_order = asyncio.Lock()  # frames and what the pair sends, on both ends

    async def send(
        self,
        frames: FrameSocket,
        header: transfer_pb2.Blocks,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        held = self._pairs.hold(self._peer) if source else None
        if held is None:
            self._open_soon()
            self.name = self._inline.name
            await self._inline.send(frames, header, source, target)
            return
        self.name = "nccl"
        try:
            rows, sums = await asyncio.to_thread(self._prepare, source)
            header.pair_epoch = held.epoch
            header.checksums.extend(sums)
            async with self._in_order:
                await frames.send(Frame(blocks=header))
                await held.pair.send(_regions(rows), self._deadline_s)
        except NcclError as error:
            # D knows better: it asks for the blocks again, or its own end has failed, too, and it
            # ends the link.
            log.info("the NCCL pair with %s has ended: %s", self._peer, error)
        finally:
            self._pairs.release(held)

    async def on_frame(self, frame: Frame) -> None:
        if frame.WhichOneof("body") != "pair_ended":
            raise LinkError(unexpected(frame))
        self._pairs.fail(self._peer, frame.pair_ended.epoch, frame.pair_ended.reason)

    async def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        self._pairs.fail(self._peer, self._epoch, "its control link has ended")

    def _open_soon(self) -> None:
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        try:
            invitation = await self._pairs.invite(self._peer)
            self._epoch = invitation.epoch
            pair_open = transfer_pb2.PairOpen(
                epoch=invitation.epoch, unique_id=invitation.unique_id
            )
            try:
                await self._frames.send(Frame(pair_open=pair_open))
            except BaseException:
                self._pairs.fail(self._peer, invitation.epoch, "the invitation was not sent")
                raise
            await self._pairs.open(self._peer, invitation)
        except LinkError as error:
            log.info("no NCCL pair with %s, its blocks go over tcp: %s", self._peer, error)

    def _prepare(self, source: Sequence[int]) -> tuple[list[torch.Tensor], list[int]]:
        """The blocks as they travel, on the device, and their checksums."""
        rows = [_row(self._pool, block) for block in source]
        layout = self._pool.layout
        if self.wire.layout.dtype != layout.dtype:
            encoded = _buffer(self._pool, self.wire, len(rows))
            for row, out in zip(rows, encoded, strict=True):
                transcode(row, layout, out, self.wire.layout)
            rows = list(encoded)
        sums = device_checksums(torch.stack(rows)) if self.wire.checksums else []
        _finish_device_work(self._pool)
        return rows, sums


class NcclReceiver(_NcclEnd):
    """D's half, on the link of one writer."""

    peer_writes = False

    def __init__(
        self,
        pool: KVPool,
        wire: Wire,
        peer: str,
        pairs: NcclPairs,
        frames: FrameSocket,
        deadline_s: float,
        of_peers: "MutableMapping[str, NcclReceiver]",
    ) -> None:
        """of_peers: where this one stands as soon as its peer has a pair."""
        super().__init__(pool, wire, peer, pairs, frames, deadline_s)
        self._of_peers = of_peers
        self._inline = TcpReceiver(pool, wire)
        self._accepting: asyncio.Task[None] | None = None
        self._used: HeldPair | None = None
        self._rows: torch.Tensor | None = None  # still encoded

    async def receive(
        self, frames: FrameSocket, header: transfer_pb2.Blocks, target: Sequence[int]
    ) -> list[int]:
        if not header.pair_epoch:
            return await self._inline.receive(frames, header, target)
        held = await self._hold(header.pair_epoch)
        try:
            own = [_row(self._pool, block) for block in target]
            rows = own
            same = self.wire.layout.dtype == self._pool.layout.dtype
            if not same:
                self._rows = _buffer(self._pool, self.wire, len(own))
                rows = list(self._rows)
            await held.pair.receive(_regions(rows), self._deadline_s)
        finally:
            self._pairs.release(held)
        return await asyncio.to_thread(self._check, header, rows, None if same else own)

    async def on_frame(self, frame: Frame) -> None:
        kind = frame.WhichOneof("body")
        if kind == "pair_open":
            await self._stop_accepting()
            self._of_peers[self._peer] = self
            self._epoch = frame.pair_open.epoch
            invitation = Invitation(self._epoch, frame.pair_open.unique_id)
            self._accepting = asyncio.create_task(self._accept(invitation))
        elif kind == "pair_ended":
            self._pairs.fail(self._peer, frame.pair_ended.epoch, frame.pair_ended.reason)
        else:
            raise ProtocolError(Rejection.MALFORMED, unexpected(frame))

    async def quiet(self, frames: FrameSocket) -> None:
        """Returns when neither NCCL nor the device writes to the pool for this link. Never, it may
        be, when its abort hangs: then the blocks stay in quarantine."""
        frames.close()  # P need not wait for that: it writes nothing here itself
        await self._stop_accepting()
        self._pairs.fail(self._peer, self._epoch, "its control link has ended")
        if self._used is not None and not self._used.pair.memory_safe:
            await self._used.pair.wait_closed()

    async def _accept(self, invitation: Invitation) -> None:
        try:
            await self._pairs.accept(self._peer, invitation)
        except LinkError as error:
            log.info("no NCCL pair with %s, its blocks come over tcp: %s", self._peer, error)
            self.tell(invitation.epoch, str(error))

    async def _stop_accepting(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)

    async def _hold(self, epoch: int) -> HeldPair:
        """P may know before us that the pair is open."""
        if self._accepting is not None and epoch == self._epoch:
            await asyncio.gather(self._accepting, return_exceptions=True)
        held = self._pairs.hold(self._peer)
        if held is None or held.epoch != epoch:
            if held is not None:
                self._pairs.release(held)
            raise PairGoneError(f"blocks by a pair of epoch {epoch}, which is not open here")
        self._used = held
        return held

    def _check(
        self,
        header: transfer_pb2.Blocks,
        rows: Sequence[torch.Tensor],
        own: Sequence[torch.Tensor] | None,
    ) -> list[int]:
        """Positions of wrong blocks; and decodes all into `own`, where they travelled otherwise."""
        wrong: list[int] = []
        if self.wire.checksums:
            sums = zip(device_checksums(torch.stack(list(rows))), header.checksums, strict=True)
            wrong = [at for at, (here, there) in enumerate(sums) if here != there]
        for row, out in zip(rows, own or (), strict=False):
            transcode(row, self.wire.layout, out, self._pool.layout)
        _finish_device_work(self._pool)
        return wrong


def _finish_device_work(pool: KVPool) -> None:
    """What torch has been given is done: NCCL's streams do not wait for torch's."""
    if pool.kv.is_cuda:
        torch.cuda.current_stream(pool.kv.device).synchronize()


def _row(pool: KVPool, block: int) -> torch.Tensor:
    """One block's bytes on the engine's device, `[block_bytes]` uint8."""
    return pool.kv[block].view(-1).view(torch.uint8)


def _buffer(pool: KVPool, wire: Wire, count: int) -> torch.Tensor:
    size = (count, wire.layout.block_bytes)
    return torch.empty(size, dtype=torch.uint8, device=pool.kv.device)


def _regions(rows: Sequence[torch.Tensor]) -> list[Region]:
    return [Region(row.data_ptr(), row.numel()) for row in rows]
