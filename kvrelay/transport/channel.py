"""A connected socket, plain or TLS, that moves whole buffers between memory and the wire.

Used by frames.py. Small pieces move on the event loop. Large ones move on a thread in bursts, for
a wake-up of the loop takes as long as sending a hundred KB; a burst that finds nothing to do gives
its thread back after a moment, so a peer that stands still holds none.
"""

import asyncio
import contextlib
import os
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from enum import Enum
from typing import Any, TypeVar

from kvrelay.transport.errors import LinkError

_LARGE_BYTES = 64 << 10
_PATIENCE_MS = 5  # of a burst that has nothing to do
_GATHERED_BYTES = 512 << 10
_BUFFERS_MAX = min(os.sysconf("SC_IOV_MAX"), 256)  # of one system call

T = TypeVar("T")


class _Wants(Enum):
    READ = select.POLLIN
    WRITE = select.POLLOUT


# Moves some of the buffers' bytes and says how many, or what it waits for when it could not; may
# wait for a moment itself when told to.
_Attempt = Callable[[Sequence[memoryview], bool], int | _Wants]


class Channel:
    """One reader and one writer at a time; `stall_s` without a byte moved ends the operation."""

    def __init__(self, sock: socket.socket, stall_s: float) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._stall_s = stall_s
        self._tls_lock = threading.Lock()  # OpenSSL has one state for both directions
        self._blocks = False
        self._closing = False
        self._operations = 0  # on the socket, under way

    async def start_tls(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        """Raises LinkError when the peer does not show a certificate that `context` accepts."""
        with self._operation("starting TLS"):
            self.sock = context.wrap_socket(
                self.sock, server_side=server_side, do_handshake_on_connect=False
            )
            while isinstance(wants := self._shake_hands(), _Wants):
                await self._until(wants, bounded=True)

    async def write(self, buffers: Sequence[memoryview]) -> None:
        """Sends all of them."""
        await self._move("sending", self._send, buffers, bounded=True)

    async def read_into(self, buffers: Sequence[memoryview], *, bounded: bool = True) -> None:
        """Fills all of them. Not bounded: the peer may be silent before the first byte."""
        await self._move("receiving", self._receive, buffers, bounded=bounded)

    def end_sending(self) -> None:
        """The peer reads an end after what was sent."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_WR)

    async def drain(self) -> None:
        """Says that no more comes from here, and returns when the peer has ended its side."""
        self.end_sending()
        rest = [memoryview(bytearray(_LARGE_BYTES))]
        with contextlib.suppress(LinkError), self._operation("receiving"):
            while True:
                wants = self._receive(rest, wait=False)
                if isinstance(wants, _Wants):
                    await self._until(wants, bounded=False)
                await asyncio.sleep(0)

    def close(self) -> None:
        """Ends every operation under way with a LinkError, and closes when they have ended:
        the event loop would not notice that a socket it waits for was closed."""
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(OSError):
            # Not SSLSocket's own: it turns TLS off first, and a thread might then send in plain.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
        if not self._operations:
            self.sock.close()

    # ---- moving

    async def _move(
        self, what: str, attempt: _Attempt, buffers: Sequence[memoryview], *, bounded: bool
    ) -> None:
        left = [buffer for buffer in buffers if buffer.nbytes]
        with self._operation(what):
            while left:
                if sum(map(len, left)) < _LARGE_BYTES:
                    wants = _advance(attempt, left)
                else:  # a cancel waits for it: nothing may move once this has returned
                    wants = await to_end(asyncio.to_thread(self._burst, attempt, left))
                if wants is not None:
                    await self._until(wants, bounded=bounded)
                bounded = bounded or wants is None  # it has begun

    def _burst(self, attempt: _Attempt, left: list[memoryview]) -> _Wants | None:
        """Moves on until all is moved or nothing can be for a moment."""
        if isinstance(self.sock, ssl.SSLSocket):
            return self._burst_by_poll(attempt, left)
        self._block_briefly()
        try:
            while left:
                if attempt == self._receive:
                    self._gather(sum(map(len, left)))
                wants = _advance(attempt, left, wait=True)
                if wants is not None:
                    return wants
        finally:
            if attempt == self._receive:
                self._gather(0)
        return None

    def _gather(self, expected: int) -> None:
        """Has the kernel wake us for a good piece of what is expected, not for every packet."""
        count = _GATHERED_BYTES if expected >= 2 * _GATHERED_BYTES else 1
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    def _burst_by_poll(self, attempt: _Attempt, left: list[memoryview]) -> _Wants | None:
        ready = select.poll()
        while left:
            wants = _advance(attempt, left)
            if wants is not None:
                ready.register(self.sock, wants.value)
                if not ready.poll(_PATIENCE_MS):
                    return wants
        return None

    def _block_briefly(self) -> None:
        """From now on calls wait in the kernel, for a moment at most, unless told not to: that
        costs a tenth less than coming back for every piece."""
        if not self._blocks:
            patience = struct.pack("ll", 0, _PATIENCE_MS * 1000)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
            self.sock.setblocking(True)
            self._blocks = True

    def _send(self, buffers: Sequence[memoryview], wait: bool) -> int | _Wants:
        try:
            if isinstance(self.sock, ssl.SSLSocket):
                with self._tls_lock:
                    return self.sock.send(buffers[0])
            flags = 0 if wait else socket.MSG_DONTWAIT
            return self.sock.sendmsg(buffers[:_BUFFERS_MAX], (), flags)
        except (BlockingIOError, ssl.SSLWantWriteError):
            return _Wants.WRITE
        except ssl.SSLWantReadError:
            return _Wants.READ

    def _receive(self, buffers: Sequence[memoryview], wait: bool) -> int | _Wants:
        try:
            if isinstance(self.sock, ssl.SSLSocket):
                with self._tls_lock:
                    count = self.sock.recv_into(buffers[0])
            else:
                flags = 0 if wait else socket.MSG_DONTWAIT
                count = self.sock.recvmsg_into(buffers[:_BUFFERS_MAX], 0, flags)[0]
        except (BlockingIOError, ssl.SSLWantReadError):
            return _Wants.READ
        except ssl.SSLWantWriteError:
            return _Wants.WRITE
        if count == 0:
            raise LinkError("the peer closed the link")
        return count

    def _shake_hands(self) -> _Wants | None:
        assert isinstance(self.sock, ssl.SSLSocket)
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            return _Wants.READ
        except ssl.SSLWantWriteError:
            return _Wants.WRITE
        return None

    async def _until(self, wants: _Wants, *, bounded: bool) -> None:
        loop = asyncio.get_running_loop()
        ready, fd = asyncio.Event(), self.sock.fileno()
        if wants is _Wants.READ:
            loop.add_reader(fd, ready.set)
        else:
            loop.add_writer(fd, ready.set)
        try:
            async with asyncio.timeout(self._stall_s if bounded else None):
                await ready.wait()
        except TimeoutError:
            raise LinkError(f"the peer moved nothing for {self._stall_s:g} s") from None
        finally:
            if wants is _Wants.READ:
                loop.remove_reader(fd)
            else:
                loop.remove_writer(fd)

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


def _advance(attempt: _Attempt, left: list[memoryview], *, wait: bool = False) -> _Wants | None:
    """One attempt; takes what it moved off `left`."""
    moved = attempt(left, wait)
    if isinstance(moved, _Wants):
        return moved
    while moved:
        if moved < left[0].nbytes:
            left[0] = left[0][moved:]
            break
        moved -= left.pop(0).nbytes
    return None


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
