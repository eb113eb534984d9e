"""A man between P and D on a KV link's socket, tcp or unix, who cuts, holds and spoils what passes.

He knows frames, and the bytes of blocks behind them, so that he can spoil the third Blocks frame or
hold it in its middle; what he parses is what was sent, never what he made of it. Of TLS he sees
records only, and takes whatever he reads as one piece.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from kvrelay.wire.transfer_pb2 import Frame

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 18


@dataclass
class Trick:
    """What is done, once, to the `skip`-th piece from now on that is a `match` and goes `toward`.

    action: hold, flip, duplicate, reorder, truncate.
    at: how far into the piece, of 1.
    times: so many such pieces, one after the other.
    """

    action: str
    toward: str = "decode"
    match: str = ""  # of frames; any if empty
    skip: int = 0
    at: float = 0.5
    times: int = 1
    done: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    def takes(self, toward: str, kind: str) -> bool:
        if toward != self.toward or (self.match and kind != self.match) or not self.times:
            return False
        self.skip -= 1
        if self.skip >= 0:
            return False
        self.times -= 1
        return True


class Proxy:
    """Listens on one address all its life; `target` may change."""

    def __init__(self, link: str, block_bytes: int, folder: Path) -> None:
        self.target = ""
        self._unix = link == "shm"
        self._frames = link != "tls"
        self._block_bytes = block_bytes if link in ("tcp", "nccl") else 0
        self._folder = folder
        self._trick: Trick | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        family = socket.AF_UNIX if self._unix else socket.AF_INET
        self._sock = socket.socket(family)
        self._sock.bind(str(self._folder / "proxy.sock") if self._unix else ("127.0.0.1", 0))
        self._sock.listen()
        self._sock.setblocking(False)
        self._accepting = asyncio.ensure_future(self._accept())

    @property
    def address(self) -> str:
        name = self._sock.getsockname()
        return str(name) if self._unix else f"{name[0]}:{name[1]}"

    def arm(self, trick: Trick | None) -> None:
        self._trick = trick

    async def cut(self) -> None:
        """Ends every connection."""
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def close(self) -> None:
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)
        await self.cut()
        self._sock.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            near, _ = await loop.sock_accept(self._sock)
            task = asyncio.ensure_future(self._carry(near))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _carry(self, near: socket.socket) -> None:
        with near, socket.socket(near.family) as far:
            near.setblocking(False)
            far.setblocking(False)
            loop = asyncio.get_running_loop()
            with contextlib.suppress(OSError):
                if self._unix:
                    await loop.sock_connect(far, self.target)
                else:
                    host, _, port = self.target.rpartition(":")
                    await loop.sock_connect(far, (host, int(port)))
                    for sock in (near, far):
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                pumps = [
                    asyncio.ensure_future(self._pump(near, far, "decode")),
                    asyncio.ensure_future(self._pump(far, near, "prefill")),
                ]
                try:
                    # Both, or one that broke: the end of one alone is passed on.
                    await asyncio.gather(*pumps)
                finally:
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, source: socket.socket, sink: socket.socket, toward: str) -> None:
        loop = asyncio.get_running_loop()
        fds: list[int] = []
        kept: bytes | None = None  # until the next has gone
        try:
            async for kind, piece in self._pieces(source, toward, fds):
                trick = self._trick
                if kind == "fd":
                    socket.send_fds(sink, [piece], fds)
                    _close_all(fds)
                    continue
                data = piece
                if trick is not None and trick.takes(toward, kind):
                    trick.done.set()
                    if trick.action == "reorder":
                        kept = piece
                        continue
                    data = await self._played(trick, piece, sink)
                await loop.sock_sendall(sink, data)
                if kept is not None:
                    await loop.sock_sendall(sink, kept)
                    kept = None
            sink.shutdown(socket.SHUT_WR)
        finally:
            _close_all(fds)

    async def _played(self, trick: Trick, piece: bytes, sink: socket.socket) -> bytes:
        """What is to be sent in the piece's place."""
        loop = asyncio.get_running_loop()
        at = min(int(trick.at * len(piece)), len(piece) - 1)
        if trick.action == "hold":
            await loop.sock_sendall(sink, piece[:at])
            await trick.release.wait()
            return piece[at:]
        if trick.action == "flip":
            return piece[:at] + bytes([piece[at] ^ (1 << at % 8)]) + piece[at + 1 :]
        if trick.action == "duplicate":
            return piece + piece
        assert trick.action == "truncate", trick
        await loop.sock_sendall(sink, piece[:at])
        raise ConnectionAbortedError  # ends both directions

    async def _pieces(
        self, source: socket.socket, toward: str, fds: list[int]
    ) -> AsyncIterator[tuple[str, bytes]]:
        """Frames with what is behind them, by kind; or whatever is read."""
        buffer = b""
        expects_fd = False
        while data := await self._read(source, fds):
            if not self._frames:
                yield "", data
                continue
            buffer += data
            while buffer:
                if expects_fd:
                    expects_fd = False
                    piece, buffer = buffer[:1], buffer[1:]
                    yield "fd", piece
                    continue
                kind, size = self._first(buffer)
                if not kind or len(buffer) < size:
                    break
                piece, buffer = buffer[:size], buffer[size:]
                expects_fd = self._unix and kind == "welcome"
                yield kind, piece

    def _first(self, buffer: bytes) -> tuple[str, int]:
        """Kind and size of the frame that begins here; no kind while too little is known."""
        if len(buffer) < _LENGTH.size:
            return "", 0
        end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
        if len(buffer) < end:
            return "", 0
        frame = Frame.FromString(buffer[_LENGTH.size : end])
        kind = frame.WhichOneof("body") or "none"
        if kind == "blocks" and not frame.blocks.pair_epoch:
            end += frame.blocks.count * self._block_bytes
        return kind, end

    async def _read(self, source: socket.socket, fds: list[int]) -> bytes:
        loop = asyncio.get_running_loop()
        if not self._unix:
            return await loop.sock_recv(source, _READ_BYTES)
        while True:
            with contextlib.suppress(BlockingIOError):
                data, more, _, _ = socket.recv_fds(source, _READ_BYTES, 1)
                fds.extend(more)
                return data
            ready = asyncio.Event()
            loop.add_reader(source.fileno(), ready.set)
            try:
                await ready.wait()
            finally:
                loop.remove_reader(source.fileno())


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
