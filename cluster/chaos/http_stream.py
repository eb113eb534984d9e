"""An answer over OpenAI's API, read as it comes: as much of an HTTP client as that takes.

Called by load.py. One connection a request, so that it is plain which router was lost.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

_LINE_BYTES_MAX = 1 << 20
_DATA = b"data: "
_DONE = b"[DONE]"


class RouterLostError(Exception):
    """The connection broke, or could not be made: the request may be asked again."""


class RefusedError(Exception):
    """Not now. retry_s: when to come back."""

    def __init__(self, message: str, retry_s: float) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class AnswerFailedError(Exception):
    """The router ended the request with an error."""


@dataclass(frozen=True)
class Piece:
    text: str
    finish_reason: str  # "" for all but the last


async def pieces(address: str, path: str, body: Mapping[str, Any]) -> AsyncIterator[Piece]:
    """The answer to one call with one choice; whole when it ends without an error.

    Raises RouterLostError, RefusedError, AnswerFailedError.
    """
    host, _, port = address.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port), limit=_LINE_BYTES_MAX)
    except OSError as error:
        raise RouterLostError(str(error)) from None
    try:
        writer.write(_request(address, path, body))
        async for piece in _read(reader):
            yield piece
    except (OSError, EOFError) as error:  # IncompleteReadError is an EOFError
        raise RouterLostError(str(error)) from None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _request(address: str, path: str, body: Mapping[str, Any]) -> bytes:
    data = json.dumps({**body, "stream": True}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + data


async def _read(reader: asyncio.StreamReader) -> AsyncIterator[Piece]:
    status = int((await _line(reader)).split()[1])
    headers = {}
    while line := await _line(reader):
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip().decode()
    if status != 200:
        content = await reader.readexactly(int(headers.get(b"content-length", "0")))
        _refuse(status, content, headers)
    async for event in _events(_chunks(reader)):
        if event == _DONE:
            return
        if (piece := _piece(json.loads(event))) is not None:
            yield piece
    raise EOFError("the stream ended without [DONE]")


def _refuse(status: int, content: bytes, headers: Mapping[bytes, str]) -> None:
    message = f"status {status}: {content.decode(errors='replace')}"
    if status in (429, 503):
        raise RefusedError(message, float(headers.get(b"retry-after", "0.5")))
    raise AnswerFailedError(message)


def _piece(event: Mapping[str, Any]) -> Piece | None:
    if "error" in event:
        raise AnswerFailedError(event["error"]["message"])
    for choice in event["choices"]:
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        return Piece(text or "", choice["finish_reason"] or "")
    return None


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events of one line each."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(_DATA):
                yield line.removeprefix(_DATA)


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """A body of which nobody knew how long it would be."""
    while size := int(await _line(reader), 16):
        yield await reader.readexactly(size)
        await _line(reader)


async def _line(reader: asyncio.StreamReader) -> bytes:
    line = await reader.readline()
    if not line.endswith(b"\n"):
        raise EOFError("the connection ended within a line")
    return line.rstrip(b"\r\n")
