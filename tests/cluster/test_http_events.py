"""Answers of HTTP servers of several kinds, byte by byte as they come."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cluster.http_events import Call, Endpoint, LostError, StatusError, events, whole

OK = b"HTTP/1.1 200 OK\r\n"


@asynccontextmanager
async def answering(sent: bytes) -> AsyncIterator[tuple[Endpoint, list[bytes]]]:
    """A server that answers every request with these bytes, and keeps what it was asked."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(sent)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield Endpoint.of(f"http://127.0.0.1:{port}/app/"), heads


async def read(sent: bytes) -> list[bytes]:
    async with answering(sent) as (endpoint, _):
        return [data async for data in events(endpoint, Call("/v1", b"{}"))]


@pytest.mark.parametrize(
    "head",
    [
        OK + b"\r\n",  # until the end of the connection
        OK + b"content-length: 30\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK + b"\r\n",
    ],
)
async def test_events_of_any_body(head: bytes) -> None:
    assert await read(head + b"event: x\r\ndata: a\r\n\r\ndata:b\n\n\n") == [b"a", b"b"]


async def test_a_request_goes_below_the_base_with_its_headers() -> None:
    async with answering(OK + b"content-length: 2\r\n\r\nhi") as (endpoint, heads):
        assert await whole(endpoint, Call("/v1/models", headers={"authorization": "x"})) == b"hi"
    (head,) = heads
    assert head.startswith(b"GET /app/v1/models HTTP/1.1\r\n")
    assert b"authorization: x\r\n" in head.lower()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"error": {"message": "no such model"}}', "no such model"),
        (b'{"error": "no"}', "no"),
        (b'{"object": "error", "message": "too\\nlong"}', "too long"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"detail": [{"loc": 1}]}', '[{"loc": 1}]'),
        (b"<html>\n gone </html>", "<html> gone </html>"),
        (b"[1]", "[1]"),
        (b"", ""),
    ],
)
async def test_what_a_refusal_says(body: bytes, told: str) -> None:
    head = b"HTTP/1.1 429 No\r\nretry-after: 3\r\ncontent-length: %d\r\n\r\n" % len(body)
    with pytest.raises(StatusError) as raised:
        await read(head + body)
    assert (raised.value.status, str(raised.value), raised.value.retry_s) == (429, told, 3.0)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"hello\r\n\r\n",
        OK + b"content-length: 9\r\n\r\ndata: a\n",
        OK + b"\r\ndata: " + b"a" * ((1 << 20) + 10),
    ],
)
async def test_what_breaks_is_lost(sent: bytes) -> None:
    with pytest.raises(LostError):
        await read(sent)


def test_addresses() -> None:
    assert Endpoint.of("http://[::1]:80/x/").authority == "[::1]:80"
    assert Endpoint.of("https://example.org").port == 443
    assert Endpoint.of("https://example.org").tls is not None
    for wrong in ("example.org", "ftp://x", "http://", "http://x:port"):
        with pytest.raises(ValueError, match=r"\w"):
            Endpoint.of(wrong)
