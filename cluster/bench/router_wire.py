"""The little of gRPC over HTTP/2 that `kvrelay bench router` needs to ask and to read cheaply.

Used by router_load.py. gRPC's own Python client takes as long to read a message as the router to
write it; this one a small part of that. No TLS, no compression.
"""

import asyncio
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

RESOURCE_EXHAUSTED = 8
_WINDOW_MAX = (1 << 31) - 1
_WINDOW_FIRST = 65_535  # of either end, until it says more
_HEADER_BYTES = 9
_PREFIX = struct.Struct(">BI")  # of a gRPC message: compressed, length
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK = _END_STREAM = 1
_END_HEADERS = 4
_TABLE_BYTES, _PUSH, _WINDOW = 1, 2, 4  # settings
_CANCEL = 8
_STATUS = b"grpc-status\x01"  # a header that is neither indexed nor compressed, of one digit


@dataclass
class _Call:
    on_message: Callable[[bytes], None]
    on_end: Callable[[int | None], None]
    received: bytearray = field(default_factory=bytearray)
    status: int | None = None


class Connection(asyncio.Protocol):
    """One connection. Nothing that a server sends is held back: all windows are wide open."""

    def __init__(self, authority: str, path: str) -> None:
        self._headers = _request_headers(authority, path)
        self._calls: dict[int, _Call] = {}
        self._next_id = 1
        self._received = bytearray()
        self._window = _WINDOW_FIRST  # bytes of requests that the server takes
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._transport: asyncio.Transport

    @classmethod
    async def open(cls, address: str, path: str) -> "Connection":
        host, port = address.rsplit(":", 1)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: cls(address, path), host, int(port))
        return connection

    def call(
        self,
        request: bytes,
        on_message: Callable[[bytes], None],
        on_end: Callable[[int | None], None],
    ) -> int:
        """Sends one request. on_end gets the status, None when the server says none. Returns an id
        for `cancel`."""
        call_id, self._next_id = self._next_id, self._next_id + 2
        self._calls[call_id] = _Call(on_message, on_end)
        self._waiting.append((call_id, _PREFIX.pack(0, len(request)) + request))
        self._send_waiting()
        return call_id

    def cancel(self, call_id: int) -> None:
        """Nothing more is heard of the call."""
        if self._calls.pop(call_id, None) is not None:
            self._transport.write(_frame(_RST_STREAM, 0, call_id, struct.pack(">I", _CANCEL)))

    def close(self) -> None:
        self._transport.close()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # Without a table for headers the server spells all of them out.
        wanted = ((_TABLE_BYTES, 0), (_PUSH, 0), (_WINDOW, _WINDOW_MAX))
        settings = b"".join(struct.pack(">HI", *setting) for setting in wanted)
        more = struct.pack(">I", _WINDOW_MAX - _WINDOW_FIRST)
        transport.write(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_WINDOW_UPDATE, 0, 0, more)
        )

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        at = 0
        while len(received) - at >= _HEADER_BYTES:
            end = at + _HEADER_BYTES + int.from_bytes(received[at : at + 3], "big")
            if end > len(received):
                break
            kind, flags = received[at + 3], received[at + 4]
            call_id = int.from_bytes(received[at + 5 : at + 9], "big")
            self._on_frame(kind, flags, call_id, bytes(received[at + _HEADER_BYTES : end]))
            at = end
        del received[:at]

    def connection_lost(self, error: Exception | None) -> None:
        for call_id in list(self._calls):
            self._end(call_id)

    # ---- frames

    def _on_frame(self, kind: int, flags: int, call_id: int, payload: bytes) -> None:
        call = self._calls.get(call_id)
        if kind == _DATA and call is not None:
            _take(call, payload)
        elif kind == _HEADERS and call is not None and _STATUS in payload:
            call.status = int(payload[payload.index(_STATUS) + len(_STATUS) :][:1])
        elif kind == _SETTINGS and not flags & _ACK:
            self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE and call_id == 0:
            self._window += int.from_bytes(payload, "big")
            self._send_waiting()
        if kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
            self._end(call_id)

    def _end(self, call_id: int) -> None:
        call = self._calls.pop(call_id, None)
        if call is not None:
            call.on_end(call.status)

    def _send_waiting(self) -> None:
        """Requests, as far as the server's window goes; each is far smaller than a stream's own."""
        while self._waiting and len(self._waiting[0][1]) <= self._window:
            call_id, body = self._waiting.popleft()
            self._window -= len(body)
            self._transport.write(
                _frame(_HEADERS, _END_HEADERS, call_id, self._headers)
                + _frame(_DATA, _END_STREAM, call_id, body)
            )


def _take(call: _Call, payload: bytes) -> None:
    """Hands over the messages that are whole."""
    received = call.received
    received += payload
    at = 0
    while len(received) - at >= _PREFIX.size:
        begin = at + _PREFIX.size
        end = begin + _PREFIX.unpack_from(received, at)[1]
        if end > len(received):
            break
        call.on_message(bytes(received[begin:end]))
        at = end
    del received[:at]


def _frame(kind: int, flags: int, call_id: int, payload: bytes) -> bytes:
    return (
        struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 255, kind, flags, call_id) + payload
    )


def _request_headers(authority: str, path: str) -> bytes:
    """Headers as HPACK (RFC 7541), each by its number in the static table where it has one."""

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    return (
        b"\x83\x86"  # :method POST, :scheme http
        + b"\x04"
        + text(path)
        + b"\x01"
        + text(authority)
        + b"\x0f\x10"
        + text("application/grpc")  # content-type
        + b"\x00"
        + text("te")
        + text("trailers")
    )
