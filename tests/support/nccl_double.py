"""A double of NCCL in host memory, with the behaviour of NCCL that the nccl link must live with.

It is no NCCL: no GPU, no kernel, one stream. What it keeps of NCCL's rules:
- a communicator is in progress until both ranks of one id have come;
- a send is done only after the peer has posted the receive, and with another size never;
- once the peer is dead or stopped nothing is ever done, and no error is reported, unless told to;
- calls from another thread, or out of turn, are refused as invalid use;
- told to, any call hangs, abort included, and the stream never becomes idle.

The ranks meet on an abstract unix socket named in the id, so they may be threads or processes; run
as a program (`python nccl_double.py RANK ID`) it is a peer that obeys lines on its stdin.
Nothing moves unless somebody calls `ready` or `idle`, or `progress` of a communicator.
"""

import ctypes
import os
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvrelay.transport.nccl_errors import error_of
from kvrelay.transport.nccl_library import UNIQUE_ID_BYTES, Direction, Region

_FRAME = struct.Struct("<cQ")  # kind, bytes
_WANT, _DATA = b"W", b"D"
_INVALID_USAGE, _REMOTE_ERROR = 5, 6


@dataclass
class Faults:
    """What goes wrong from now on. `hang` names calls that do not return until `release`."""

    hang: set[str] = field(default_factory=set)
    stream_hangs: bool = False
    remote_error: bool = False  # the death of a peer is reported
    fail: dict[str, int] = field(default_factory=dict)  # results by call
    release: threading.Event = field(default_factory=threading.Event)


class DoubleNccl:
    """Implements NcclLibrary."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.communicators: list[DoubleCommunicator] = []
        self._ids = 0

    def version(self) -> str:
        return "0.0.0 (double)"

    def unique_id(self) -> bytes:
        self.enter("unique_id")
        self._ids += 1
        name = f"kvrelay-nccl-double-{os.getpid()}-{id(self)}-{self._ids}-{os.urandom(4).hex()}"
        return name.encode().ljust(UNIQUE_ID_BYTES, b"\0")

    def communicator(self, unique_id: bytes, rank: int, device: int) -> "DoubleCommunicator":
        self.enter("communicator")
        communicator = DoubleCommunicator(self, b"\0" + unique_id.rstrip(b"\0"), rank)
        self.communicators.append(communicator)
        return communicator

    def newest(self, rank: int) -> "DoubleCommunicator":
        return [each for each in self.communicators if each.rank == rank][-1]

    def enter(self, call: str) -> None:
        if call in self.faults.hang:
            self.faults.release.wait()
        if call in self.faults.fail:
            raise error_of(call, self.faults.fail[call], "told to")


class DoubleCommunicator:
    """Implements Communicator. Its socket stands for the wire, `progress` for the device."""

    def __init__(self, library: DoubleNccl, address: bytes, rank: int) -> None:
        self.rank = rank
        self._library = library
        self._address = address
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._listening: socket.socket | None = None
        self._wire: socket.socket | None = None
        self._in_progress = True
        self._peer_gone = False
        self._over = False
        self._sends: deque[Region] = deque()
        self._receives: deque[Region] = deque()
        self._incoming, self._outgoing = bytearray(), bytearray()
        if rank == 0:
            self._listening = socket.socket(socket.AF_UNIX)
            self._listening.bind(address)
            self._listening.listen(1)
            self._listening.setblocking(False)

    # ---- Communicator

    def ready(self) -> bool:
        self._check("ready")
        self.progress()
        if self._peer_gone and self._library.faults.remote_error:
            raise error_of("async error", _REMOTE_ERROR)
        if self._wire is None:
            return False
        # What was begun is ready at the second time of asking, so that nobody relies on the first.
        ready, self._in_progress = not self._in_progress, False
        return ready

    def post(self, direction: Direction, regions: Sequence[Region]) -> None:
        self._check("post", only_when_ready=True)
        self._in_progress = True
        if direction is Direction.SEND:
            self._sends.extend(regions)
            return
        self._receives.extend(regions)
        for region in regions:
            self._outgoing += _FRAME.pack(_WANT, region.size_bytes)

    def idle(self) -> bool:
        self._check("idle", only_when_ready=not self._over)
        self.progress()
        if self._library.faults.stream_hangs and not self._library.faults.release.is_set():
            return False
        return self._over or not (self._sends or self._receives or self._outgoing)

    def finalize(self) -> None:
        self._check("finalize", only_when_ready=True)
        self._in_progress = True

    def destroy(self) -> None:
        self._check("destroy", only_when_ready=True)
        self.end()

    def abort(self) -> None:
        self._check("abort")
        self.end()

    # ---- the device and the wire

    def progress(self) -> None:
        """Moves what can be moved. A test may call it for a device that goes on by itself."""
        with self._lock:
            if self._over or not self._meet() or self._peer_gone:
                return
            try:
                self._read()
                self._take_frames()
                if self._outgoing:
                    sent = self._socket.send(self._outgoing)
                    del self._outgoing[:sent]
            except BlockingIOError:
                pass
            except OSError:
                self._peer_gone = True

    @property
    def _socket(self) -> socket.socket:
        assert self._wire is not None
        return self._wire

    def _meet(self) -> bool:
        if self._wire is not None:
            return True
        try:
            if self._listening is not None:
                self._wire, _ = self._listening.accept()
            else:
                wire = socket.socket(socket.AF_UNIX)
                try:
                    wire.connect(self._address)
                except OSError:
                    wire.close()
                    raise
                self._wire = wire
            self._wire.setblocking(False)
        except OSError:  # nobody there yet
            return False
        return True

    def _read(self) -> None:
        try:
            while piece := self._socket.recv(1 << 20):
                self._incoming += piece
                self._take_frames()
            self._peer_gone = True
        except BlockingIOError:
            pass

    def _take_frames(self) -> None:
        while len(self._incoming) >= _FRAME.size:
            kind, size_bytes = _FRAME.unpack_from(self._incoming)
            if kind == _WANT:
                # Of another size, or not posted yet: it waits, for ever it may be.
                if not self._sends or self._sends[0].size_bytes != size_bytes:
                    return
                region = self._sends.popleft()
                self._outgoing += _FRAME.pack(_DATA, size_bytes)
                self._outgoing += ctypes.string_at(region.address, size_bytes)
                del self._incoming[: _FRAME.size]
            else:
                if len(self._incoming) < _FRAME.size + size_bytes:
                    return
                region = self._receives.popleft()
                data = bytes(self._incoming[_FRAME.size : _FRAME.size + size_bytes])
                ctypes.memmove(region.address, data, size_bytes)
                del self._incoming[: _FRAME.size + size_bytes]

    def end(self) -> None:
        """Its sockets are closed; nothing moves any more."""
        with self._lock:
            self._over = True
            for sock in (self._wire, self._listening):
                if sock is not None:
                    sock.close()

    def _check(self, call: str, only_when_ready: bool = False) -> None:
        if threading.get_ident() != self._thread:
            raise error_of(call, _INVALID_USAGE, "from another thread")
        if self._over and call not in ("idle",):
            raise error_of(call, _INVALID_USAGE, "after the end")
        if only_when_ready and self._in_progress:
            raise error_of(call, _INVALID_USAGE, "while in progress")
        self._library.enter(call)


def main(rank: int, unique_id: bytes) -> None:
    """A peer process. Says "open"; then for each line "send N" or "receive N" posts, says
    "posted", and says "done" with a sum of the bytes when it is done."""
    communicator = DoubleNccl().communicator(unique_id, rank, device=0)

    def until(condition) -> None:  # type: ignore[no-untyped-def]
        while not condition():
            time.sleep(0.0005)

    until(communicator.ready)
    print("open", flush=True)
    for line in sys.stdin:
        word, size = line.split()
        memory = ctypes.create_string_buffer(b"\x01" * int(size), int(size))
        region = Region(ctypes.addressof(memory), int(size))
        communicator.post(Direction[word.upper()], [region])
        print("posted", flush=True)
        until(lambda: communicator.ready() and communicator.idle())
        print("done", sum(memory.raw), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), bytes.fromhex(sys.argv[2]))
