"""Frames on a KV link: a 4-byte little-endian length, a Frame message, and block bytes on tcp.

Used by both ends of every transport. Bytes of blocks go between the socket and pool memory
directly, never through a Python bytes object.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from kvrelay.wire import transfer_pb2

FRAME_BYTES_MAX = 256 << 10
_LENGTH = struct.Struct("<I")

T = TypeVar("T")


class LinkError(Exception):
    """The link is of no more use: closed, broken, timed out, or the peer broke the protocol."""


class FrameSocket:
    """A connected non-blocking socket that carries frames. One reader, any number of writers.

    A peer that does not take a frame within `stall_s` loses the link: no sender waits longer.
    """

    def __init__(self, sock: socket.socket, stall_s: float) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._stall_s = stall_s
        self._sending = asyncio.Lock()
        self._closing = False
        self._operations = 0  # on the socket, under way

    async def send(self, frame: transfer_pb2.Frame, payload: Iterable[memoryview] = ()) -> None:
        """Sends a frame and the block bytes that belong behind it, nothing between them.

        A frame that has begun is sent to its end even when the caller is cancelled: the stream
        would be of no more use to anybody if it stopped in the middle.
        """
        body = frame.SerializeToString()
        await to_end(self._send(_LENGTH.pack(len(body)) + body, payload))

    async def receive(self) -> transfer_pb2.Frame:
        head = bytearray(_LENGTH.size)
        await self.receive_into(memoryview(head))
        (length,) = _LENGTH.unpack(head)
        if length > FRAME_BYTES_MAX:
            raise LinkError(f"a frame of {length} bytes; the limit is {FRAME_BYTES_MAX}")
        body = bytearray(length)
        await self.receive_into(memoryview(body))
        try:
            return transfer_pb2.Frame.FromString(bytes(body))
        except DecodeError as error:
            raise LinkError("bytes that are not a frame") from error

    async def receive_into(self, target: memoryview) -> None:
        """Fills `target` from the socket."""
        loop = asyncio.get_running_loop()
        while target:
            with self._operation("receiving"):
                count = await loop.sock_recv_into(self.sock, target)
            if count == 0:
                raise LinkError("the peer closed the link")
            target = target[count:]

    async def drain(self) -> None:
        """Says that no more comes from here, and returns when the peer has ended its side."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        rest = memoryview(bytearray(1 << 16))
        with contextlib.suppress(LinkError):
            while True:
                with self._operation("receiving"):
                    if not await asyncio.get_running_loop().sock_recv_into(self.sock, rest):
                        return

    def close(self) -> None:
        """Ends every operation under way with a LinkError, and closes when they have ended:
        the event loop would not notice that a socket it waits for was closed."""
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        if not self._operations:
            self.sock.close()

    async def _send(self, head: bytes, payload: Iterable[memoryview]) -> None:
        loop = asyncio.get_running_loop()
        async with self._sending:
            try:
                async with asyncio.timeout(self._stall_s):
                    for part in (memoryview(head), *payload):
                        with self._operation("sending"):
                            await loop.sock_sendall(self.sock, part)
            except TimeoutError:
                self.close()
                raise LinkError(f"a frame was not taken within {self._stall_s:g} s") from None

    @contextlib.contextmanager
    def _operation(self, what: str) -> Iterator[None]:
        if self._closing:
            raise LinkError("the link is closed")
        self._operations += 1
        try:
            yield
        except OSError as error:
            raise LinkError(f"link broke while {what}: {error}") from error
        finally:
            self._operations -= 1
            if self._closing and not self._operations:
                self.sock.close()


async def to_end(work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work` to its end; a cancel of the caller takes effect only then."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        task.exception()  # seen: the cancel is what the caller gets
        raise asyncio.CancelledError
    return task.result()


def tune_tcp(sock: socket.socket, stall_s: float) -> None:
    """A peer host that vanishes without a word ends the link, whichever side is waiting."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_s * 1000))
