"""What the tests of the KV links share: whole transfers, peers played by hand, and ways to hold
or to spoil what is under way."""

import asyncio
import contextlib
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from kv_fixtures import DEADLINE_S, LAYOUT, DecodeEnd, decode_end, prefill_end, same_bytes

from kvrelay.config import PROTOCOL_VERSION
from kvrelay.kv.layout import KVLayout
from kvrelay.transport import movers, shm
from kvrelay.transport.errors import LinkError
from kvrelay.transport.frames import FrameSocket
from kvrelay.transport.writer import Transfer, WriterLink
from kvrelay.transport.writer_pool import WriterPool
from kvrelay.wire.transfer_pb2 import Begin, Blocks, Endpoint, Frame, Hello, Ticket

REPLY_S = 2.0
LARGE = replace(LAYOUT, head_dim=1 << 14)  # 1 MiB a block: more than a socket buffers


async def hand_over(decode: DecodeEnd, writers: WriterPool, blocks: int = 2) -> None:
    """One whole transfer, as proof that a link works."""
    ticket = decode.ticket(blocks)
    transfer = await writers.begin(ticket)
    source = list(range(blocks))
    await transfer.push(source)
    await transfer.commit(1, REPLY_S)
    transfer.close()
    assert same_bytes(decode.pool, ticket.block_ids, writers.pool, source)


def link_of(writers: WriterPool) -> WriterLink:
    """The one link it has."""
    (connecting,) = writers._links.values()
    return connecting.result()


async def rounds(count: int = 20) -> None:
    """Lets everything run that can run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0)


async def finishes(task: "asyncio.Future[None]") -> bool:
    """Whether it ends by itself within five times the reply deadline of `stalled_peer`."""
    done, _ = await asyncio.wait([task], timeout=1.5)
    task.cancel()
    return bool(done)


# ---- peers played by hand


def connected(end: DecodeEnd, transport: str) -> socket.socket:
    if transport == "tcp":
        host, port = end.address("tcp").split(":")
        return socket.create_connection((host, int(port)))
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(end.address("shm"))
    return sock


def greeting(layout: KVLayout, /, **changes: Any) -> Frame:
    """A Hello that is accepted, unless changed."""
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "instance_id": "by-hand",
        "layout": layout.to_wire(),
        "codec": "asis",
        "checksums": True,
    }
    return Frame(hello=Hello(**{**fields, **changes}))


@contextlib.asynccontextmanager
async def by_hand(
    end: DecodeEnd, transport: str, hello: bool = True, **changes: Any
) -> AsyncIterator[FrameSocket]:
    """A connection to the decode end; with `hello`, hands are shaken already."""
    with connected(end, transport) as sock:
        frames = FrameSocket(sock, 10)
        if hello:
            await frames.send(greeting(end.pool.layout, **changes))
            welcome = (await frames.receive()).welcome
            assert welcome.pool_bytes == end.pool.size_bytes
            if transport == "shm":
                async with asyncio.timeout(DEADLINE_S):
                    os.close(await shm.receive_fd(sock))
        yield frames
        frames.close()


async def begun_by_hand(frames: FrameSocket, ticket: Ticket) -> None:
    await frames.send(Frame(begin=Begin(ticket=ticket)))
    assert (await frames.receive()).begun.transfer_id == ticket.transfer_id


async def send_by_hand(
    frames: FrameSocket,
    end: DecodeEnd,
    transport: str,
    ticket: Ticket,
    first: int,
    blocks: Sequence[bytes],
    *,
    announced: Sequence[bytes] = (),
    again: bool = False,
) -> None:
    """Blocks first, first + 1 ... of the ticket, with the checksums of `announced` if given."""
    header = Blocks(
        transfer_id=ticket.transfer_id,
        first_index=first,
        count=len(blocks),
        checksums=[sum_of(block) for block in announced or blocks],
        again=again,
    )
    if transport == "tcp":
        await frames.send(Frame(blocks=header), [memoryview(block) for block in blocks])
        return
    for position, block in enumerate(blocks, first):
        end.pool.bytes[ticket.block_ids[position]] = np.frombuffer(block, np.uint8)
    await frames.send(Frame(blocks=header))


async def is_closed(frames: FrameSocket) -> bool:
    """Reads whatever the other end still says; True once it has closed."""
    async with asyncio.timeout(DEADLINE_S):
        try:
            while True:
                await frames.receive()
        except LinkError:
            return True


def raw(length: int, body: bytes = b"") -> bytes:
    """A frame of `body` that says it has this length."""
    return struct.pack("<I", length) + body


def sum_of(block: bytes) -> int:
    return movers.checksum(np.frombuffer(block, np.uint8))


@contextlib.asynccontextmanager
async def stalled_peer(
    layout: KVLayout = LARGE,
) -> AsyncIterator[tuple[Transfer, WriterPool, FrameSocket]]:
    """A transfer over tcp to a decode worker that gives leave to write and then reads nothing;
    the frames are that worker's."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        async with (
            decode_end(layout, blocks=32) as end,
            prefill_end(layout, 32, transport="tcp", link_reply_ms=300) as writers,
        ):
            endpoint = Endpoint(transport="tcp", address=address)
            ticket = end.ticket(16, endpoints=[endpoint])
            begin = asyncio.ensure_future(writers.begin(ticket))
            peer, _ = await loop.sock_accept(server)
            with peer:
                frames = FrameSocket(peer, 10)
                await frames.receive()
                welcome = Frame()
                welcome.welcome.instance_id = end.instance_id
                welcome.welcome.wire_dtype = layout.dtype
                await frames.send(welcome)
                await frames.receive()
                begun = Frame()
                begun.begun.transfer_id = ticket.transfer_id
                await frames.send(begun)
                yield await begin, writers, frames


# ---- holding and spoiling


class Gate:
    """Holds a push until opened: on shm in its thread, in the middle of a copy; on tcp before the
    bytes of its blocks."""

    def __init__(self, monkeypatch: Any) -> None:
        self.entered = asyncio.Event()
        self.open = threading.Event()
        loop, copy, send = asyncio.get_running_loop(), shm._copy_and_sum, FrameSocket.send

        def held_copy(block: np.ndarray, target: np.ndarray) -> int:
            loop.call_soon_threadsafe(self.entered.set)
            assert self.open.wait(DEADLINE_S)
            return copy(block, target)

        async def held_send(
            frames: FrameSocket, frame: Frame, payload: Sequence[memoryview] = ()
        ) -> None:
            if payload:
                self.entered.set()
                assert await asyncio.to_thread(self.open.wait, DEADLINE_S)
            await send(frames, frame, payload)

        monkeypatch.setattr(shm, "_copy_and_sum", held_copy)
        monkeypatch.setattr(FrameSocket, "send", held_send)


class Wire:
    """The way of one link's blocks from P to D, on which bytes may be flipped.

    spoil: how often still to flip a byte of a block, by transfer and index of the ticket.
    headers: every Blocks message sent, in order.
    """

    def __init__(self, link: WriterLink, end: DecodeEnd) -> None:
        self.spoil: Counter[tuple[int, int]] = Counter()
        self.headers: list[Blocks] = []
        self._sender: Any = link.sender
        self._end = end
        if link.sender.name == "tcp":
            self._right = self._sender._prepare
            self._sender._prepare = self._prepare
        else:
            self._right = self._sender._write
            self._sender._write = self._write

    def sent(self) -> list[tuple[int, int, bool]]:
        """First index, count and whether again, of each message."""
        return [(h.first_index, h.count, h.again) for h in self.headers]

    def _spoiled(self, header: Blocks) -> list[int]:
        """Positions in the message."""
        self.headers.append(header)
        keys = [(header.transfer_id, header.first_index + n) for n in range(header.count)]
        bad = [position for position, key in enumerate(keys) if self.spoil[key] > 0]
        self.spoil.subtract(keys[position] for position in bad)
        return bad

    def _prepare(self, header: Blocks, source: Sequence[int]) -> Sequence[np.ndarray]:
        blocks = [block.copy() for block in self._right(header, source)]
        for position in self._spoiled(header):
            blocks[position][5] ^= 1
        return blocks

    def _write(
        self, peer: np.ndarray, header: Blocks, source: Sequence[int], target: Sequence[int]
    ) -> None:
        self._right(peer, header, source, target)
        for position in self._spoiled(header):
            self._end.pool.bytes[target[position], 5] ^= 1
