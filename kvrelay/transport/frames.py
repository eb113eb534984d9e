"""Frames on a KV link: a 4-byte little-endian length, a Frame message, and block bytes on tcp.

Used by both ends of every transport. Bytes of blocks go between the socket and pool memory
directly, never through a Python bytes object.
"""

import asyncio
import socket
import struct
from collections.abc import Iterable

from google.protobuf.message import DecodeError

from kvrelay.wire import transfer_pb2

FRAME_BYTES_MAX = 256 << 10
_LENGTH = struct.Struct("<I")


class LinkError(Exception):
    """The link is of no more use: closed, broken, timed out, or the peer broke the protocol."""


class FrameSocket:
    """A connected non-blocking socket that carries frames. One reader, any number of writers."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._sending = asyncio.Lock()

    async def send(self, frame: transfer_pb2.Frame, payload: Iterable[memoryview] = ()) -> None:
        """Sends a frame and the block bytes that belong behind it, nothing between them."""
        body = frame.SerializeToString()
        loop = asyncio.get_running_loop()
        try:
            async with self._sending:
                await loop.sock_sendall(self.sock, _LENGTH.pack(len(body)) + body)
                for part in payload:
                    await loop.sock_sendall(self.sock, part)
        except OSError as error:
            raise LinkError(f"link broke while sending: {error}") from error

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
            try:
                count = await loop.sock_recv_into(self.sock, target)
            except OSError as error:
                raise LinkError(f"link broke while receiving: {error}") from error
            if count == 0:
                raise LinkError("the peer closed the link")
            target = target[count:]

    def close(self) -> None:
        self.sock.close()
