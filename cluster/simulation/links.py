"""KV links over the simulated network: the transport's own code, but for sockets and bytes.

WriterPool, WriterLink, Transfer, Listener and ReaderLink are the production's. Simulated are the
FrameSocket, which carries whole frames over a stream, and the two movers: over "tcp" the contents
of blocks follow their frame, over "shm" the sender writes them into the peer's pool before it.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from cluster.simulation.memory import SimBlock, SimPool, spoilt
from cluster.simulation.network import End, Network, Place
from decode_worker.handoff import HandOff
from kvrelay.config import WorkerConfig
from kvrelay.transport.errors import LinkError, ProtocolError, Rejection
from kvrelay.transport.frames import FrameSocket
from kvrelay.transport.listener import Listener
from kvrelay.transport.movers import Receiver, Sender, Wire, unexpected
from kvrelay.transport.reader import TransferBook
from kvrelay.transport.writer_pool import WriterPool
from kvrelay.wire import transfer_pb2
from kvrelay.wire.transfer_pb2 import Endpoint, Frame

_BLOCK_S = 0.001  # to move one block


@dataclass
class LinkFaults:
    """What is wrong with the wires of one prefill worker now, in frames or blocks from now on."""

    spoilt_blocks: int = 0
    doubled_frames: int = 0


@dataclass(frozen=True)
class Target:
    """Where shm writes to: a decode worker's memory, which its peers have mapped."""

    place: Place
    pool: SimPool
    handoff: HandOff


class SimFrames:
    """A FrameSocket over a stream. The contents of blocks travel with their frame."""

    def __init__(self, end: End | None = None, faults: LinkFaults | None = None) -> None:
        self.end = end
        self._faults = faults or LinkFaults()
        self._payload: Sequence[SimBlock] = ()
        self._sending = asyncio.Lock()
        self._closed = False

    async def send(self, frame: Frame, payload: Sequence[SimBlock] = ()) -> None:
        async with self._sending:
            self._put(frame, payload)
            if frame.HasField("blocks") and self._faults.doubled_frames:
                self._faults.doubled_frames -= 1
                self._put(frame, payload)

    def _put(self, frame: Frame, payload: Sequence[SimBlock]) -> None:
        if self._closed or self.end is None:
            raise LinkError("the link is closed")
        try:
            self.end.send((frame, payload))
        except ConnectionError as error:
            raise LinkError(f"link broke while sending: {error}") from error

    async def receive(self) -> Frame:
        if self._closed or self.end is None:
            raise LinkError("the link is closed")
        try:
            frame, self._payload = await self.end.receive()
        except ConnectionError as error:
            raise LinkError(str(error)) from error
        return frame

    def take_payload(self) -> Sequence[SimBlock]:
        payload, self._payload = self._payload, ()
        return payload

    async def drain(self) -> None:
        """Says that no more comes from here, and returns when the peer has ended its side."""
        if self.end is None:
            return
        self.end.end_sending()
        with contextlib.suppress(ConnectionError):
            while True:
                await self.end.receive()

    def close(self) -> None:
        self._closed = True
        if self.end is not None:
            self.end.close()


class SimSender:
    """A Sender. target: the peer's memory for shm, None for tcp."""

    def __init__(
        self, name: str, wire: Wire, pool: SimPool, faults: LinkFaults, target: Target | None
    ) -> None:
        self.name = name
        self.wire = wire
        self._pool = pool
        self._faults = faults
        self._target = target
        self._writes = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._closed = False

    async def send(
        self,
        frames: FrameSocket,
        header: transfer_pb2.Blocks,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        if self._closed:
            raise LinkError("the link is closed")
        self._writes += 1
        self._quiet.clear()
        try:
            contents = await self._move(header, source, target)
        finally:
            self._writes -= 1
            if not self._writes:
                self._quiet.set()
        if self.wire.checksums:
            header.checksums.extend([1] * len(source))  # the contents say what is wrong
        await frames.send(Frame(blocks=header), cast(Any, contents))

    async def _move(
        self, header: transfer_pb2.Blocks, source: Sequence[int], target: Sequence[int]
    ) -> list[SimBlock]:
        before = [self._pool.content[block].version for block in source]
        self._check_target(header, target)
        await asyncio.sleep(_BLOCK_S * len(source))
        if [self._pool.content[block].version for block in source] != before:
            self._pool._violated(f"{self._pool._name}: blocks {source} changed while being sent")
        contents = [self._pool.content[block].content() for block in source]
        for place in range(min(self._faults.spoilt_blocks, len(contents))):
            contents[place] = spoilt(contents[place])
            self._faults.spoilt_blocks -= 1
        if self._target is None:
            return contents
        self._check_target(header, target)
        if self._target.place.alive:
            for block, content in zip(target, contents, strict=True):
                self._target.pool.put(block, content)
        return []

    def _check_target(self, header: transfer_pb2.Blocks, target: Sequence[int]) -> None:
        if self._target is not None and self._target.place.alive:
            check_peer(self._target, header.transfer_id, target)

    async def on_frame(self, frame: Frame) -> None:
        raise LinkError(unexpected(frame))

    async def close(self) -> None:
        self._closed = True
        await self._quiet.wait()


class SimReceiver:
    """A Receiver."""

    def __init__(self, wire: Wire, target: Target, *, peer_writes: bool) -> None:
        self.wire = wire
        self.peer_writes = peer_writes
        self._target = target

    async def receive(
        self, frames: FrameSocket, header: transfer_pb2.Blocks, target: Sequence[int]
    ) -> list[int]:
        pool = self._target.pool
        if not self.peer_writes:
            contents = cast(SimFrames, frames).take_payload()
            await asyncio.sleep(_BLOCK_S * len(contents))
            check_peer(self._target, header.transfer_id, target)
            for block, content in zip(target, contents, strict=True):
                pool.put(block, content)
        return [place for place, block in enumerate(target) if pool.content[block].first == -2]

    async def on_frame(self, frame: Frame) -> None:
        raise ProtocolError(Rejection.MALFORMED, unexpected(frame))

    async def quiet(self, frames: FrameSocket) -> None:
        if self.peer_writes:
            await cast(SimFrames, frames).drain()


def check_peer(target: Target, transfer_id: int, blocks: Sequence[int]) -> None:
    """A violation unless that transfer may write these blocks now."""
    reservation = target.handoff._transfers.find(transfer_id)
    if reservation is None:
        target.pool._violated(f"{target.pool._name}: transfer {transfer_id} writes after its end")
        return
    for block in blocks:
        target.pool.check_leave(block, reservation.key, "peer")


class SimListener(Listener):
    """`target` is set before `start`."""

    def __init__(
        self,
        config: WorkerConfig,
        instance_id: str,
        pool: SimPool,
        book: TransferBook,
        network: Network,
        place: Place,
        transports: Sequence[str],
    ) -> None:
        super().__init__(config, instance_id, pool, book)
        self.target: Target
        self._network, self._place, self._transports = network, place, transports

    async def start(self) -> None:
        for transport in self._transports:
            address = f"{self._place.name}:{transport}"
            self.endpoints.append(Endpoint(transport=transport, address=address))
            accept = self._accepting(transport)
            self._network.listen(self._place, address, accept)

    def _accepting(self, transport: str) -> Callable[[End], None]:
        def accept(end: End) -> None:
            if self._open >= self._config.links_max:
                end.close()
                return
            self._open += 1
            self._spawn(self._serve(cast(FrameSocket, SimFrames(end)), transport))

        return accept

    async def _secure(self, frames: FrameSocket, transport: str) -> None:
        """Nobody listens in."""

    def _receiver(self, transport: str, wire: Wire, peer: str, frames: FrameSocket) -> Receiver:
        return SimReceiver(wire, self.target, peer_writes=transport == "shm")


class SimWriterPool(WriterPool):
    """targets: the memory of decode workers, by the name of their process."""

    def __init__(
        self,
        config: WorkerConfig,
        instance_id: str,
        pool: SimPool,
        network: Network,
        place: Place,
        targets: dict[str, Target],
        faults: LinkFaults,
    ) -> None:
        super().__init__(config, instance_id, pool)
        self._memory, self._network, self._place = pool, network, place
        self._targets, self._faults = targets, faults

    def _frames_for(self, endpoint: Endpoint) -> FrameSocket:
        return cast(FrameSocket, SimFrames(faults=self._faults))

    async def _open(self, frames: FrameSocket, endpoint: Endpoint) -> None:
        cast(SimFrames, frames).end = await self._network.dial(
            self._place, endpoint.address, endpoint.transport
        )

    async def _sender(
        self, transport: str, wire: Wire, frames: FrameSocket, welcome: transfer_pb2.Welcome
    ) -> Sender:
        target = self._targets[welcome.instance_id] if transport == "shm" else None
        return SimSender(transport, wire, self._memory, self._faults, target)
