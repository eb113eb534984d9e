"""A small HTTP server that answers as OpenAI's do, with what a test tells it to lack or do wrong.

For tests of the load generator. Each request's body is kept in `asked`, in the order of coming.
"""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

Headers = dict[str, str]


@dataclass
class OpenAIDouble:
    """`pause_s`: before each token. usage: "always", "end", "passed over" (at the
    end, whatever is asked for) or "never". `status`: what it answers
    requests with, but for those of one token, which come before the load. hold: a request of more
    tokens waits for it before its first token."""

    pause_s: float = 0.0
    takes_ids: bool = True
    vocab_size: int = 50_000
    takes_ignore_eos: bool = True
    usage: str = "always"
    tokens_a_message: int = 1
    cached_tokens: int = 0
    status: int = 200
    api_key: str = ""
    breaks_after: int | None = None  # tokens
    ends_without_done: bool = False
    hold: asyncio.Event | None = None
    on_ask: Callable[[int], None] = lambda number: None
    asked: list[dict[str, Any]] = field(default_factory=list)
    address: str = ""
    _running: int = 0
    running_most: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            await self._answer(head[0].split()[1], headers, body, writer)
            await writer.drain()
        writer.close()

    async def _answer(
        self, path: str, headers: Headers, body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        if self.api_key and headers.get("authorization") != f"bearer {self.api_key}":
            _refuse(writer, 401, "a key, please")
        elif path == "/v1/models":
            models = {"data": [{"id": "double", "max_model_len": 4096}]}
            _whole(writer, 200, json.dumps(models).encode())
        elif path != "/v1/completions":
            _whole(writer, 404, b"<html>no such page</html>")
        else:
            asked = json.loads(body)
            if refusal := self._refusal(asked):
                _refuse(writer, 400, refusal)
                return
            self.asked.append(asked)
            self.on_ask(len(self.asked))
            self._running += 1
            self.running_most = max(self.running_most, self._running)
            try:
                await self._stream(asked, writer)
            finally:
                self._running -= 1

    def _refusal(self, asked: dict[str, Any]) -> str:
        options = asked.get("stream_options", {})
        if isinstance(asked["prompt"], list):
            if not self.takes_ids:
                return "prompt must be a string"
            if max(asked["prompt"]) >= self.vocab_size:
                return "a token id is out of range"
        if "ignore_eos" in asked and not self.takes_ignore_eos:
            return "there is no field ignore_eos"
        if "continuous_usage_stats" in options and self.usage in ("end", "never"):
            return "there is no option continuous_usage_stats"
        return "there are no stream_options" if options and self.usage == "never" else ""

    async def _stream(self, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        count = asked["max_tokens"]
        if count > 1:
            if self.status != 200:
                _refuse(writer, self.status, "not today")
                return
            if self.hold is not None:
                await self.hold.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
        writer.write(b"connection: close\r\n\r\n")
        for sent in range(0, count, self.tokens_a_message):
            if self.breaks_after is not None and sent >= self.breaks_after and count > 1:
                writer.transport.abort()
                return
            await asyncio.sleep(self.pause_s)
            tokens = min(count, sent + self.tokens_a_message)
            last = "length" if tokens == count else None
            choice = {"index": 0, "text": "la", "finish_reason": last}
            usage = {"usage": self._usage(asked, tokens)} if self.usage == "always" else {}
            _event(writer, {"choices": [choice], **usage})
            await writer.drain()
        if self.usage != "never":
            _event(writer, {"choices": [], "usage": self._usage(asked, count)})
        if not self.ends_without_done:
            writer.write(b"data: [DONE]\n\n")

    def _usage(self, asked: dict[str, Any], tokens: int) -> dict[str, Any]:
        return {
            "prompt_tokens": len(asked["prompt"]),
            "completion_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@contextlib.asynccontextmanager
async def openai_double(
    *, tls: ssl.SSLContext | None = None, **behaviour: Any
) -> AsyncIterator[OpenAIDouble]:
    double = OpenAIDouble(**behaviour)
    server = await asyncio.start_server(double.serve, "127.0.0.1", 0, ssl=tls)
    async with server:
        port = server.sockets[0].getsockname()[1]
        double.address = f"http{'s' if tls else ''}://127.0.0.1:{port}"
        yield double


def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")


def _refuse(writer: asyncio.StreamWriter, status: int, message: str) -> None:
    _whole(writer, status, json.dumps({"error": {"message": message}}).encode())


def _whole(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    writer.write(f"HTTP/1.1 {status} -\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
