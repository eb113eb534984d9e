"""Several prompts and answers in one call: when they are asked for, and that all end together."""

import asyncio

import pytest
from http_router import http_router, says

from router.ask import choice_seed
from router.callers import Caller
from router.commands import UnavailableTrouble
from router.quotas import Quota
from router.request import Ending

DEADLINE_S = 10.0  # only a broken test waits this long


async def test_later_choices_are_asked_for_when_the_first_has_a_token():
    async with http_router() as router, asyncio.timeout(DEADLINE_S):
        call = asyncio.create_task(router.complete(n=3, seed=7))
        first, answer = await router.fleet.asked.get()
        for _ in range(5):
            await asyncio.sleep(0)
        assert router.fleet.asked.empty()
        answer.put([65])
        others = [await router.fleet.asked.get() for _ in range(2)]
        assert first.sampling.seed == 7
        assert [r.sampling.seed for r, _ in others] == [choice_seed(7, at) for at in (1, 2)]
        assert {tuple(r.prompt) for r, _ in others} == {tuple(first.prompt)}
        for letter, (_, other) in zip(b"BC", others, strict=True):
            other.put([letter])
            other.put(Ending.EOS)
        answer.put(Ending.LENGTH)
        body = (await call).json()
        answered = [(c["index"], c["text"], c["finish_reason"]) for c in body["choices"]]
        assert answered == [(0, "A", "length"), (1, "B", "stop"), (2, "C", "stop")]
        assert body["usage"]["prompt_tokens"] == len(first.prompt)
        assert body["usage"]["completion_tokens"] == 3


async def test_choices_are_numbered_prompt_by_prompt():
    async with http_router(lambda request: says(chr(request.prompt[0]).upper())) as router:
        body = (await router.complete(prompt=["a", "b"], n=2)).json()
        assert [(c["index"], c["text"]) for c in body["choices"]] == list(enumerate("AABB"))
        assert body["usage"]["prompt_tokens"] == 2


async def test_one_that_fails_ends_the_others():
    async with http_router() as router, asyncio.timeout(DEADLINE_S):
        call = asyncio.create_task(router.complete(n=2))
        first, answer = await router.fleet.asked.get()
        answer.put([65])
        second, other = await router.fleet.asked.get()
        other.put(UnavailableTrouble("failed"))
        reply = await call
        assert (reply.status_code, reply.json()["error"]["message"]) == (503, "failed")
        assert {await router.fleet.let_go_of.get() for _ in range(2)} == {first, second}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_takes_all_of_them_back(stream):
    async with http_router() as router, asyncio.timeout(DEADLINE_S):
        call = asyncio.create_task(router.complete(prompt=["a", "b"], n=2, stream=stream))
        asked = [await router.fleet.asked.get() for _ in range(2)]
        asked[0][1].put([65])
        asked.append(await router.fleet.asked.get())
        call.cancel()
        let_go = {await router.fleet.let_go_of.get() for _ in range(3)}
        assert let_go == {request for request, _ in asked}


@pytest.mark.parametrize(
    ("quota", "fields", "words"),
    [
        (Quota(requests_at_once=2), {"n": 4}, "4 answers in one call are 4 requests, more than 2"),
        (Quota(requests_at_once=3), {"prompt": ["a", "b"], "n": 2}, "more than 3 at once"),
        (Quota(requests_per_minute=2), {"n": 3}, "more than 2 a minute"),
        (Quota(kv_tokens_at_once=30), {"n": 4, "max_tokens": 8}, "4 answers with prompts and max_"),
        (Quota(tokens_per_minute=30), {"n": 4, "max_tokens": 8}, "more than 30, the quota"),
    ],
)
async def test_a_call_beyond_its_whole_quota_is_the_clients_mistake(
    quota, fields, words, monkeypatch
):
    async with http_router(lambda _: says("a")) as router, asyncio.timeout(DEADLINE_S):
        monkeypatch.setattr(router.door.callers, "identify", lambda _: Caller("key", "", quota))
        for stream in (False, True):
            reply = await router.complete(**fields, stream=stream)
            assert reply.status_code == 400
            assert words in reply.json()["error"]["message"]
        assert router.fleet.asked.empty()
        assert (await router.complete(max_tokens=8)).status_code == 200, "nothing was kept of it"


async def test_no_answer_has_begun_when_a_choice_has_no_room_in_the_quota(monkeypatch):
    async with http_router() as router, asyncio.timeout(DEADLINE_S):
        caller = Caller("key", "", Quota(requests_at_once=4))
        monkeypatch.setattr(router.door.callers, "identify", lambda _: caller)
        running = asyncio.create_task(router.complete(n=2))
        _, answer = await router.fleet.asked.get()
        reply = await router.complete(n=3, stream=True)
        assert reply.status_code == 429
        assert "its quota is 4 at once" in reply.json()["error"]["message"]
        assert router.fleet.asked.empty()
        answer.put([65])
        answer.put(Ending.EOS)
        _, other = await router.fleet.asked.get()
        other.put(Ending.EOS)
        assert (await running).status_code == 200


async def test_a_prompt_that_is_wrong_keeps_those_before_it_from_being_asked_for():
    async with http_router() as router, asyncio.timeout(DEADLINE_S):
        reply = await router.complete(prompt=["a", ""])
        assert reply.status_code == 400
        assert router.fleet.asked.empty()
