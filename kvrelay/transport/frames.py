"""Frames on a KV link: a 4-byte little-endian length, a Frame message, and block bytes on tcp.

Used by both ends of every transport. Bytes of blocks go between the channel and pool memory
directly, never through a Python bytes object.
"""

import asyncio
import socket
import struct
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from kvrelay.transport.channel import Channel, to_end
from kvrelay.transport.errors import LinkError, ProtocolError, Rejection
from kvrelay.wire import transfer_pb2

FRAME_BYTES_MAX = 256 << 10
_LENGTH = struct.Struct("<I")


class FrameSocket:
    """A connected channel that carries frames. One reader, any number of writers.

    A peer that stands still for `stall_s` with a frame half moved loses the link: no sender waits
    longer, and no receiver once a frame has begun.
    """

    def __init__(self, sock: socket.socket, stall_s: float) -> None:
        self.channel = Channel(sock, stall_s)
        self.close = self.channel.close
        self._sending = asyncio.Lock()
        self._cut = False  # inside a frame that was not sent to its end

    async def send(self, frame: transfer_pb2.Frame, payload: Sequence[memoryview] = ()) -> None:
        """Sends a frame and the block bytes that belong behind it, nothing between them.

        A frame that has begun is sent to its end even when the caller is cancelled: the stream
        would be of no more use to anybody if it stopped in the middle.
        """
        body = frame.SerializeToString()
        head = memoryview(_LENGTH.pack(len(body)) + body)
        await to_end(self._send([head, *payload]))

    async def receive(self) -> transfer_pb2.Frame:
        """The next frame; block bytes behind it are the caller's to take."""
        head = bytearray(_LENGTH.size)
        await self.channel.read_into([memoryview(head)[:1]], bounded=False)
        await self.receive_into([memoryview(head)[1:]])
        (length,) = _LENGTH.unpack(head)
        if length > FRAME_BYTES_MAX:
            text = f"a frame of {length} bytes; the limit is {FRAME_BYTES_MAX}"
            raise ProtocolError(Rejection.OVERSIZED, text)
        body = bytearray(length)
        await self.receive_into([memoryview(body)])
        try:
            return transfer_pb2.Frame.FromString(bytes(body))
        except DecodeError as error:
            raise ProtocolError(Rejection.MALFORMED, "bytes that are not a frame") from error

    async def receive_into(self, buffers: Sequence[memoryview]) -> None:
        """Fills the buffers with what belongs to a frame that has begun."""
        try:
            await self.channel.read_into(buffers)
        except LinkError as error:
            text = f"the link ended inside a frame: {error}"
            raise ProtocolError(Rejection.TRUNCATED, text) from error

    async def _send(self, buffers: Sequence[memoryview]) -> None:
        async with self._sending:
            if self._cut:
                raise LinkError("the link was cut inside a frame")
            try:
                await self.channel.write(buffers)
            except LinkError:
                # The peer sees its end. Closing is for the owner: on shm the peer may be stopped,
                # and only the end of its side says that it writes no more.
                self._cut = True
                self.channel.end_sending()
                raise


def tune_tcp(sock: socket.socket, stall_s: float) -> None:
    """A peer host that vanishes without a word ends the link, whichever side is waiting."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_s * 1000))
