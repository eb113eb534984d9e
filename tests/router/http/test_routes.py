"""The routes over a real socket: what comes back for what is sent."""

import asyncio
import json

import pytest
from http_router import http_router, says, tiny_files

from router.commands import (
    DuplicateRequestError,
    ExhaustedTrouble,
    InvalidTrouble,
    QueueFullError,
    UnavailableTrouble,
)
from router.frontdoor import SHUTTING_DOWN
from router.request import Ending

DEADLINE_S = 10.0  # only a broken test waits this long


def events(text: str) -> list[dict | str]:
    """The data of each server-sent event."""
    parts = text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    datas = [part.removeprefix("data: ") for part in parts]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


# ---- whole answers


async def test_a_chat():
    async with http_router(lambda _: says("hello", Ending.EOS)) as router:
        reply = await router.chat(model="tiny")
        assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
        body = reply.json()
        assert body["id"] == f"chatcmpl-{reply.headers['x-request-id']}"
        assert (body["object"], body["model"]) == ("chat.completion", "tiny")
        [choice] = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": "hello", "refusal": None}
        assert choice["finish_reason"] == "stop"
        assert body["usage"] == {
            "prompt_tokens": 2,
            "completion_tokens": 5,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


async def test_a_completion_that_ends_by_length():
    async with http_router(lambda _: says("hello")) as router:
        body = (await router.complete()).json()
        assert body["object"] == "text_completion"
        [choice] = body["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("hello", "length")


async def test_a_stop_string_is_not_part_of_the_answer():
    async with http_router(lambda _: says("hello")) as router:
        body = (await router.complete(stop=["ll"])).json()
        assert body["choices"][0]["text"] == "he"
        assert body["choices"][0]["finish_reason"] == "stop"


# ---- streams


async def test_a_chat_as_a_stream():
    async with http_router(lambda _: says("hé", Ending.EOS)) as router:
        reply = await router.chat(stream=True, stream_options={"include_usage": True})
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert reply.text.isascii()
        *chunks, usage, done = events(reply.text)
        assert done == "[DONE]"
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        choices = [chunk["choices"][0] for chunk in chunks]
        deltas = [choice["delta"] for choice in choices]
        # The first byte of é has no text of its own: no empty delta is sent for it.
        assert deltas == [
            {"role": "assistant", "content": ""},
            {"content": "h"},
            {"content": "é"},
            {},
        ]
        assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
        assert [chunk["usage"] for chunk in chunks] == [None] * 4
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 3


async def test_a_completion_as_a_stream_without_usage():
    async with http_router(lambda _: says("ab")) as router:
        *chunks, done = events((await router.complete(stream=True)).text)
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", ""]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert not any("usage" in chunk for chunk in chunks)
        assert done == "[DONE]"


async def test_usage_in_every_chunk():
    async with http_router(lambda _: says("ab")) as router:
        options = {"continuous_usage_stats": True}
        *chunks, _ = events((await router.complete(stream=True, stream_options=options)).text)
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 2]


async def test_a_stream_that_fails_before_its_first_token_has_a_status():
    async with http_router(lambda _: [UnavailableTrouble("failed 3 times")]) as router:
        reply = await router.complete(stream=True)
        assert reply.status_code == 503
        assert reply.json()["error"]["message"] == "failed 3 times"


async def test_a_stream_that_fails_later_ends_with_an_error_event():
    async with http_router(lambda _: [[65], UnavailableTrouble("failed 3 times")]) as router:
        reply = await router.complete(stream=True)
        assert reply.status_code == 200
        first, error = events(reply.text)
        assert first["choices"][0]["text"] == "A"
        assert error["error"]["message"] == "failed 3 times"
        assert error["error"]["code"] == "unavailable"


# ---- clients that go away


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
async def test_a_client_that_goes_away_takes_its_request_back(stream, begun):
    async with http_router() as router, asyncio.timeout(DEADLINE_S):
        call = asyncio.create_task(router.complete(stream=stream))
        asked, answer = await router.fleet.asked.get()
        if begun:
            answer.put([65])
        call.cancel()
        assert await router.fleet.let_go_of.get() is asked
        await router.door.drain()
        assert b'outcome="cancelled",protocol="http"} 1.0' in router.fleet.metrics.text()


# ---- errors


@pytest.mark.parametrize(
    ("trouble", "status", "code"),
    [
        (DuplicateRequestError("it runs"), 409, "duplicate_request_id"),
        (QueueFullError("9 are waiting"), 429, "rate_limit_exceeded"),
        (ExhaustedTrouble("no room"), 429, "rate_limit_exceeded"),
        (InvalidTrouble("too long"), 400, None),
        (UnavailableTrouble("failed"), 503, "unavailable"),
        (RuntimeError("a bug"), 500, "internal"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_what_the_fleet_refuses(trouble, status, code, stream, caplog):
    async with http_router() as router:
        router.fleet.refuse_with = trouble
        reply = await router.complete(stream=stream)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (status, code)
        assert "a bug" not in reply.text
        assert ("a bug" in caplog.text) == (status == 500)
        assert reply.headers["x-request-id"]
        if status == 429:
            assert reply.headers["retry-after"] == "1"
            assert reply.headers["retry-after-ms"] == "1000"


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"temperature": 3}, "temperature: 3.0, allowed are 0 to 2", "temperature"),
        ({"stop": ["a", ""]}, "stop[1]: empty, needs at least one character", "stop[1]"),
        ({"prompt": ""}, "prompt: empty, needs at least one character", "prompt"),
        (
            {"prompt": [1, 999]},
            "prompt[1]: 999, allowed are 0 to 260 (vocabulary of 261)",
            "prompt[1]",
        ),
        (
            {"prompt": [7] * 1000},
            "prompt: 1000 tokens leave no room for an answer, prompt and answer together may have"
            " 1000",
            "prompt",
        ),
        (
            {"prompt": [[1], [999]]},
            "prompt[1][0]: 999, allowed are 0 to 260 (vocabulary of 261)",
            "prompt[1][0]",
        ),
        (
            {"prompt": ["a", ""]},
            "prompt[1]: empty, needs at least one character",
            "prompt[1]",
        ),
    ],
)
async def test_a_value_that_is_not_allowed(body, message, param):
    async with http_router() as router:
        reply = await router.complete(**body)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert (error["message"], error["param"]) == (message, param)
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [{"max_tokens": 999}, {"prompt": [7] * 1000}, {"prompt": "a" * 100_001}]
)
async def test_what_is_too_long_for_the_model_has_openais_code(body):
    async with http_router() as router:
        reply = await router.complete(**body)
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "context_length_exceeded"


async def test_the_list_of_models_may_end_with_a_slash():
    async with http_router() as router:
        lists = [await router.client.get(path) for path in ("/v1/models", "/v1/models/")]
        assert lists[0].json() == lists[1].json()


async def test_every_503_says_when_to_try_again():
    async with http_router() as router:
        router.fleet.refuse_with = UnavailableTrouble("failed 3 times")
        for reply in (await router.complete(), await router.complete(stream=True)):
            assert reply.status_code == 503
            assert reply.headers["retry-after"] == "1"
        await router.door.drain()
        reply = await router.complete()
        assert (reply.status_code, reply.headers["retry-after-ms"]) == (503, "1000")


async def test_a_model_that_is_not_served():
    async with http_router() as router:
        for reply in (
            await router.complete(model="other"),
            await router.client.get("/v1/models/some/other"),
        ):
            assert reply.status_code == 404
            assert reply.json()["error"]["code"] == "model_not_found"
            assert reply.json()["error"]["param"] == "model"


async def test_a_model_without_a_chat_template():
    async with http_router(files=tiny_files(chat_template=None)) as router:
        reply = await router.chat()
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported")


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/chat/completions/", "/docs", "/v1/embeddings"])
async def test_a_route_that_there_is_not(path):
    async with http_router() as router:
        reply = await router.client.post(path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "unknown_url")


async def test_a_method_that_a_route_does_not_take():
    async with http_router() as router:
        reply = await router.client.get("/v1/completions")
        assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
        assert (
            reply.json()["error"]["message"] == "/v1/completions does not take GET; it takes POST"
        )


# ---- the other routes


async def test_models():
    async with http_router(files=tiny_files(name="org/tiny")) as router:
        [model] = (await router.client.get("/v1/models")).json()["data"]
        assert (model["id"], model["object"], model["max_model_len"]) == ("org/tiny", "model", 1000)
        assert (await router.client.get("/v1/models/org/tiny")).json() == model


async def test_ready_is_not_health():
    async with http_router() as router:
        assert (await router.client.get("/ready")).status_code == 200
        router.fleet.not_ready = "no decode worker is connected"
        reply = await router.client.get("/ready")
        assert reply.status_code == 503
        assert reply.json()["error"]["message"] == "no decode worker is connected"
        assert (await router.client.get("/health")).json() == {"status": "ok"}
        await router.door.drain()
        reply = await router.client.get("/ready")
        assert reply.json()["error"]["message"] == SHUTTING_DOWN
        assert (await router.complete()).status_code == 503


async def test_metrics_are_for_prometheus():
    async with http_router(lambda _: says("ab")) as router:
        await router.complete()
        reply = await router.client.get("/metrics")
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert 'kvrelay_requests_total{outcome="length",protocol="http"} 1.0' in reply.text
        route = 'route="/v1/completions",status="200"'
        assert f"kvrelay_http_responses_total{{{route}}} 1.0" in reply.text
