"""What one client may take of the router: heads, bodies, connections, time."""

import asyncio
import json

import pytest
from http_router import http_router, says, tiny_files

from router.request import Ending

DEADLINE_S = 20.0  # only a broken test waits this long

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: x\r\n"


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, dict]:
    """Status and JSON body of an answer with a length."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    [length] = [line.split(":")[1] for line in lines if line.startswith("content-length:")]
    return int(lines[0].split()[1]), json.loads(await reader.readexactly(int(length)))


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-type": "application/json"}, b"{", 400),
        ({"content-type": "application/json"}, b"", 400),
        ({"content-type": "application/json"}, b'{"prompt": "\xff"}', 400),
        ({"content-type": "application/json"}, b'{"prompt": "\\ud800"}', 400),
        ({"content-type": "application/json"}, b"[" * 100_000, 400),
        ({"content-type": "application/json"}, b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", 400),
        ({"content-type": "application/json"}, b'{"prompt": "a", "top_p": NaN}', 400),
        ({"content-type": "Application/JSON; charset=utf-8"}, b"{}", 400),
        ({"content-type": "text/plain"}, b"{}", 415),
        ({"content-type": "application/x-www-form-urlencoded"}, b"prompt=a", 415),
        ({}, b"{}", 415),
    ],
)
async def test_bodies_that_are_no_json(headers, body, status):
    async with http_router() as router:
        reply = await router.client.post("/v1/completions", content=body, headers=headers)
        assert reply.status_code == status
        assert reply.json()["error"]["type"] == "invalid_request_error"
        assert len(reply.content) < 1000


@pytest.mark.parametrize("told", [True, False])
async def test_a_body_that_is_too_large_is_not_read_to_its_end(told):
    async with http_router(http_body_bytes_max=1000) as router, asyncio.timeout(DEADLINE_S):
        reader, writer = await router.connect()
        if told:  # and nothing of it sent
            writer.write(HEAD + b"content-length: 1001\r\n\r\n")
        else:
            piece = b"200\r\n" + b"x" * 512 + b"\r\n"
            writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n" + piece * 2)
        status, error = await answer_of(reader)
        assert (status, error["error"]["code"]) == (413, "body_too_large")


async def test_a_body_that_does_not_come():
    async with http_router(http_read_ms=50) as router, asyncio.timeout(DEADLINE_S):
        reader, writer = await router.connect()
        writer.write(HEAD + b"content-length: 10\r\n\r\n{")
        status, error = await answer_of(reader)
        assert (status, error["error"]["code"]) == (408, "body_timeout")


async def test_too_many_headers():
    async with http_router(http_headers_max=20) as router:
        reply = await router.client.get("/health", headers={f"x-{at}": "1" for at in range(20)})
        assert (reply.status_code, reply.json()["error"]["code"]) == (431, "too_many_headers")


async def test_a_head_that_is_too_large_or_no_http():
    async with http_router(http_header_bytes_max=2000) as router, asyncio.timeout(DEADLINE_S):
        for sent in (GET + b"x-a: " + b"a" * 4000, b"hello\r\n\r\n"):
            reader, writer = await router.connect()
            writer.write(sent)
            status, error = await answer_of(reader)
            assert (status, error["error"]["type"]) == (400, "invalid_request_error")
            assert await reader.read() == b""


async def test_more_connections_than_are_allowed():
    async with http_router(http_connections_max=2) as router, asyncio.timeout(DEADLINE_S):
        first, second = [await router.connect() for _ in range(2)]
        for reader, writer in (first, second):
            writer.write(GET + b"\r\n")
            assert (await answer_of(reader))[0] == 200
        reader, _ = await router.connect()
        status, error = await answer_of(reader)
        assert (status, error["error"]["code"]) == (503, "overloaded")
        assert await reader.read() == b""


async def test_more_calls_than_are_allowed():
    async with http_router(http_requests_max=1) as router, asyncio.timeout(DEADLINE_S):
        call = asyncio.create_task(router.complete())
        _, answer = await router.fleet.asked.get()
        reply = await router.client.get("/health")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
        assert reply.headers["retry-after"] == "1"
        answer.put(Ending.LENGTH)
        assert (await call).status_code == 200
        assert (await router.client.get("/health")).status_code == 200


@pytest.mark.parametrize("sent", [b"", GET, GET + b"\r\n" + GET])
async def test_a_connection_without_a_whole_head_is_closed(sent):
    """Before the first request, within it, and after one."""
    async with http_router(http_idle_ms=50) as router, asyncio.timeout(DEADLINE_S):
        reader, writer = await router.connect()
        writer.write(sent)
        with_answer = sent.count(b"\r\n\r\n")
        try:
            assert bool(await reader.read()) == bool(with_answer)
        except ConnectionResetError:
            assert not with_answer


async def test_an_answer_may_take_longer_than_a_head():
    async with http_router(http_idle_ms=20) as router, asyncio.timeout(DEADLINE_S):
        call = asyncio.create_task(router.complete())
        _, answer = await router.fleet.asked.get()
        reader, writer = await router.connect()
        writer.write(GET)
        with_end = await asyncio.gather(reader.read(), return_exceptions=True)
        assert len(with_end) == 1, "the idle one is gone, and the other has been there longer"
        answer.put(Ending.LENGTH)
        assert (await call).status_code == 200


async def test_a_client_that_does_not_read_is_cut_off():
    """And its request ends."""
    # Every event has the model's name: one is more than sockets hold.
    files = tiny_files(name="t" * (12 << 20))
    async with (
        http_router(lambda _: [[65]], files=files, http_write_ms=100) as router,
        asyncio.timeout(DEADLINE_S),
    ):
        body = json.dumps({"prompt": "hi", "stream": True}).encode()
        reader, writer = await router.connect()
        reader._transport.pause_reading()
        writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        asked, _ = await router.fleet.asked.get()
        assert await router.fleet.let_go_of.get() is asked


async def test_pipelined_calls_are_answered_in_order():
    async with http_router(lambda _: says("a")) as router, asyncio.timeout(DEADLINE_S):
        reader, writer = await router.connect()
        body = b'{"prompt": "hi"}'
        call = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
        writer.write(call + GET + b"\r\n")
        status, answer = await answer_of(reader)
        assert (status, answer["object"]) == (200, "text_completion")
        assert await answer_of(reader) == (200, {"status": "ok"})
