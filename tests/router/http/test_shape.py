"""How much there may be in a body, and that no body keeps others waiting."""

import asyncio
import json

import pytest
from http_router import http_router, says
from loop_gap import loop_gap

from router.admission import DEFAULT_LIMITS
from router.http.bodies import ChatBody
from router.http.reading import parse
from router.http.shape import Shape, ShapeError, ShapeLimits

DEADLINE_S = 60.0  # only a broken test waits this long
GAP_S = 0.5  # of a loaded machine; what these bodies took before they were counted is seconds
SMALL = ShapeLimits(strings_max=4, containers_max=3, values_max=6)
BODY_BYTES = 8_000_000


def shape_of(data: bytes, piece_bytes: int, limits: ShapeLimits = SMALL) -> None:
    shape = Shape(limits)
    for at in range(0, len(data), piece_bytes):
        shape.add(data[at : at + piece_bytes])


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"a": ["b", 1, 2, 3, 4], "c": "d"}', None),
        (rb'{"a": "\\", "b": "[[[[[\"{{{{\\\",,,,,,,,\\\\"}', None),
        (rb'{"a\\": [[["\\\""]]]}', "more than 3 lists and objects"),
        (rb'["\\", [], [], []]', "more than 3 lists and objects"),
        (b'["a", "b", "c", "d", "e"]', "more than 4 strings"),
        (b'["a", "b", "c", "d", "', "more than 4 strings"),
        (b"[1, 2, 3, 4, 5, 6, 7]", "more than 6 values"),
    ],
)
def test_what_is_in_strings_does_not_count_wherever_pieces_end(piece_bytes, data, why):
    if why is None:
        shape_of(data, piece_bytes)
        return
    with pytest.raises(ShapeError, match=why):
        shape_of(data, piece_bytes)


def test_the_longest_chat_has_room():
    parts = [{"type": "text", "text": '{[,"'}] * 3
    messages = [{"role": "user", "content": parts}] * DEFAULT_LIMITS.messages_max
    data = json.dumps({"messages": messages, "stop": ["a"] * 16, "model": "tiny"}).encode()
    shape_of(data, 1000, ShapeLimits())
    assert len(parse(ChatBody, data).messages) == DEFAULT_LIMITS.messages_max


def repeated(before: bytes, piece: bytes, after: bytes) -> bytes:
    return before + piece * (BODY_BYTES // len(piece)) + after


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        ("chat/completions", repeated(b'{"messages": [', b'{"role":"u"},', b"1]}"), "complex"),
        ("completions", repeated(b'{"prompt": [', b"[1],", b"[1]]}"), "complex"),
        ("completions", repeated(b'{"prompt": [', b"1,", b"1]}"), "complex"),
        ("completions", repeated(b"{", b'"a":1,', b'"prompt":"a"}'), "complex"),
        ("completions", b'{"prompt": [[%b1]]}' % (b"1," * 200_000), "context_length"),
        ("chat/completions", b'{"messages": [{"role": [%b1]}]}' % (b"1," * 200_000), "role"),
        ("completions", repeated(b'{"prompt": "', rb"\n", b'"}'), "context_length"),
    ],
    ids=["messages", "lists", "ids", "fields", "ids within", "a wrong value", "a text"],
)
async def test_no_body_keeps_others_waiting(path, body, why):
    async with http_router(lambda _: says("a")) as router, asyncio.timeout(DEADLINE_S):
        headers = {"content-type": "application/json"}
        async with loop_gap() as gap:
            reply = await router.client.post(f"/v1/{path}", content=body, headers=headers)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert why in (error["code"] or error["message"])
        assert len(reply.content) < 1000
        assert gap.longest_s < GAP_S
