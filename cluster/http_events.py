"""One call of an HTTP server whose answer is read as it comes: server-sent events, or a whole body.

Used by chaos/ and load/. One connection a call, so that it is plain which server was lost; its time
to connect is part of what the caller measures. h11 knows the protocol, here are the sockets.
"""

import asyncio
import contextlib
import json
import math
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11

DONE = b"[DONE]"  # the last event, of servers that speak as OpenAI's
_DATA = b"data:"
_READ_BYTES = 1 << 16
_LINE_BYTES_MAX = 1 << 20
_BODY_BYTES_MAX = 1 << 22  # of what is read whole
_TLS_GOODBYE_S = 1.0
_RETRY_S = 0.5  # where a refusal says nothing


class LostError(Exception):
    """The connection broke, or could not be made."""


class StatusError(Exception):
    """The server refused. str() is what it says of it; retry_s: when to come back."""

    def __init__(self, status: int, message: str, retry_s: float) -> None:
        super().__init__(message)
        self.status = status
        self.retry_s = retry_s


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens. `base` comes before every path; tls: None speaks in clear text."""

    host: str
    port: int
    base: str = ""
    tls: ssl.SSLContext | None = None

    @classmethod
    def of(cls, url: str, tls: ssl.SSLContext | None = None) -> "Endpoint":
        """Of http(s)://HOST[:PORT][/BASE]. Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it is not of the form http(s)://HOST[:PORT][/PATH]")
        if parts.scheme == "https" and tls is None:
            tls = ssl.create_default_context()
        port = parts.port or (443 if parts.scheme == "https" else 80)
        secured = tls if parts.scheme == "https" else None
        return cls(parts.hostname, port, parts.path.rstrip("/"), secured)

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class Call:
    """What is asked. A body is JSON, ready to be sent."""

    path: str
    body: bytes | None = None
    headers: Mapping[str, str] | None = None

    def events(self, endpoint: Endpoint) -> Iterator[Any]:
        """As h11 sends them."""
        headers = {"host": endpoint.authority, "connection": "close", **(self.headers or {})}
        if self.body is not None:
            headers |= {"content-type": "application/json", "content-length": str(len(self.body))}
        method = "GET" if self.body is None else "POST"
        yield h11.Request(
            method=method, target=endpoint.base + self.path, headers=list(headers.items())
        )
        if self.body:
            yield h11.Data(data=self.body)
        yield h11.EndOfMessage()


async def events(endpoint: Endpoint, call: Call) -> AsyncGenerator[bytes, None]:
    """The data of each event, of one line; DONE is the last where the server sends it.

    Raises LostError, StatusError.
    """
    rest = b""
    async with contextlib.aclosing(_body(endpoint, call)) as body:
        async for data in body:
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _LINE_BYTES_MAX:
                raise LostError(f"it sent a line of more than {_LINE_BYTES_MAX} bytes")
            for line in lines:
                if line.startswith(_DATA):
                    yield line.removeprefix(_DATA).strip()


async def whole(endpoint: Endpoint, call: Call) -> bytes:
    """The body. Raises LostError, StatusError."""
    content = b""
    async with contextlib.aclosing(_body(endpoint, call)) as body:
        async for data in body:
            content += data
            if len(content) > _BODY_BYTES_MAX:
                raise LostError(f"it sent more than {_BODY_BYTES_MAX} bytes")
    return content


async def _body(endpoint: Endpoint, call: Call) -> AsyncGenerator[bytes, None]:
    try:
        reader, writer = await _connect(endpoint)
    except OSError as error:
        raise LostError(_why(error)) from None
    try:
        connection = h11.Connection(h11.CLIENT)
        for event in call.events(endpoint):
            writer.write(connection.send(event) or b"")
        received = _received(reader, connection)
        response = await anext(received)
        assert isinstance(response, h11.Response)
        if response.status_code != 200:
            raise await _refusal(response, received)
        async for event in received:
            if isinstance(event, h11.Data):
                yield bytes(event.data)
    except (OSError, h11.RemoteProtocolError) as error:
        raise LostError(_why(error)) from None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _connect(endpoint: Endpoint) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    secured: dict[str, Any] = {}
    if endpoint.tls is not None:
        secured = {"ssl": endpoint.tls, "ssl_shutdown_timeout": _TLS_GOODBYE_S}
    return await asyncio.open_connection(endpoint.host, endpoint.port, **secured)


async def _received(reader: asyncio.StreamReader, connection: h11.Connection) -> AsyncIterator[Any]:
    """The Response, Data as it comes, EndOfMessage."""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.ConnectionClosed):
            raise h11.RemoteProtocolError("the server closed the connection without an answer")
        elif not isinstance(event, h11.InformationalResponse):
            yield event
            if isinstance(event, h11.EndOfMessage):
                return


async def _refusal(response: h11.Response, received: AsyncIterator[Any]) -> StatusError:
    content = b""
    async for event in received:
        if isinstance(event, h11.Data) and len(content) <= _BODY_BYTES_MAX:
            content += event.data
    retry = dict(response.headers).get(b"retry-after", b"")
    return StatusError(response.status_code, _told(content), _seconds(retry))


def _told(content: bytes) -> str:
    """What OpenAI's errors, or those of common web servers, say; else how the body begins."""
    text = content.decode(errors="replace")
    with contextlib.suppress(ValueError, TypeError, KeyError):
        told = json.loads(text)
        error = told.get("error", told) if isinstance(told, dict) else told
        message = error if isinstance(error, str) else error.get("message") or error["detail"]
        text = message if isinstance(message, str) else json.dumps(message)
    return " ".join(text.split())[:300]


def _seconds(retry_after: bytes) -> float:
    try:
        seconds = float(retry_after)
    except ValueError:
        return _RETRY_S
    return seconds if math.isfinite(seconds) and seconds >= 0 else _RETRY_S


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
