"""OpenAI's own Python package against a real router and workers, and beside gRPC."""

import asyncio

import httpx2
import openai
import pytest
import pytest_asyncio
from local_cluster import local_cluster
from tiny_models import make_endless
from waiting import until

from kvrelay.client import KvrelayError

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEADLINE_S = 60.0  # only a broken test waits this long
TEXT = "the sin of the king"
MESSAGES = [{"role": "user", "content": TEXT}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    model = make_endless(tmp_path_factory.mktemp("models") / "endless")
    async with local_cluster(model, decode=2) as started:
        yield started


@pytest.fixture(scope="module")
def base_url(cluster) -> str:
    return f"http://{cluster.router.http_address}/v1"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(base_url):
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def greedy(cluster) -> tuple[str, str]:
    """What gRPC answers, greedy, 12 tokens: TEXT as a prompt, and as a message."""
    async with cluster.client() as grpc_client:
        text = await grpc_client.generate(TEXT, max_tokens=12, temperature=0).result()
        chat = await grpc_client.chat(TEXT, max_tokens=12, temperature=0).result()
    return text.text, chat.text


# ---- the same answers as over gRPC


async def test_a_completion(client, greedy):
    answer = await client.completions.create(
        model="endless", prompt=TEXT, max_tokens=12, temperature=0
    )
    assert answer.choices[0].text == greedy[0]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


async def test_a_chat(client, greedy):
    answer = await client.chat.completions.create(
        model="endless", messages=MESSAGES, max_tokens=12, temperature=0
    )
    assert answer.choices[0].message.content == greedy[1]
    assert answer.choices[0].message.role == "assistant"


async def test_content_in_parts(client, greedy):
    content = [{"type": "text", "text": TEXT}]
    answer = await client.chat.completions.create(
        model="endless",
        messages=[{"role": "user", "content": content}],
        max_completion_tokens=12,
        temperature=0,
    )
    assert answer.choices[0].message.content == greedy[1]


async def test_streams(client, greedy):
    stream = await client.chat.completions.create(
        model="endless",
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == greedy[1]
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1].usage.completion_tokens == 12

    stream = await client.completions.create(
        model="endless", prompt=TEXT, max_tokens=12, temperature=0, stream=True
    )
    texts = [chunk.choices[0].text async for chunk in stream]
    assert "".join(texts) == greedy[0]


async def test_the_client_that_does_not_await(base_url, greedy):
    def ask() -> tuple[str, str]:
        with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as made:
            options = {"model": "endless", "max_tokens": 12, "temperature": 0}
            whole = made.completions.create(prompt=TEXT, **options)
            stream = made.chat.completions.create(messages=MESSAGES, stream=True, **options)
            deltas = [chunk.choices[0].delta.content or "" for chunk in stream]
            return whole.choices[0].text, "".join(deltas)

    assert await asyncio.to_thread(ask) == greedy


# ---- several answers


async def test_the_first_of_several_choices_is_the_only_one_of_one(client):
    async def texts(n: int) -> list[str]:
        answer = await client.completions.create(
            model="endless", prompt=TEXT, max_tokens=12, n=n, seed=11
        )
        assert [choice.index for choice in answer.choices] == list(range(n))
        assert answer.usage.completion_tokens == 12 * n
        return [choice.text for choice in answer.choices]

    [alone] = await texts(1)
    several = await texts(3)
    assert several[0] == alone
    assert len(set(several)) == 3
    assert await texts(3) == several


async def test_choices_of_a_stream(client):
    stream = await client.chat.completions.create(
        model="endless", messages=MESSAGES, max_tokens=8, n=2, seed=-3, stream=True
    )
    texts, ended = ["", ""], set()
    async for chunk in stream:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ended.add(choice.index)
    whole = await client.chat.completions.create(
        model="endless", messages=MESSAGES, max_tokens=8, n=2, seed=-3
    )
    assert texts == [choice.message.content for choice in whole.choices]
    assert ended == {0, 1}


async def test_later_choices_find_the_prompt_cached(client, cluster):
    prompt = "and the other of the thing " * 8
    await client.completions.create(model="endless", prompt=prompt, max_tokens=2, n=4)
    page = cluster.router.fleet.metrics.text().decode()
    [cached] = [line for line in page.splitlines() if line.startswith("kvrelay_cached_tokens_t")]
    assert float(cached.split()[1]) >= 3 * 16, cached


async def test_prompts_of_all_forms(client, cluster, greedy):
    async with cluster.client() as grpc_client:
        ids = list((await grpc_client.tokenize(TEXT)).token_ids)
    options = {"model": "endless", "max_tokens": 12, "temperature": 0}
    for prompt, answers in ((ids, 1), ([TEXT, TEXT], 2), ([ids, ids, ids], 3)):
        answer = await client.completions.create(prompt=prompt, **options)
        assert [choice.text for choice in answer.choices] == [greedy[0]] * answers
        assert answer.usage.prompt_tokens == len(ids) * answers


# ---- options


async def test_stop_strings(client, greedy):
    stop = greedy[0][3]
    answer = await client.completions.create(
        model="endless", prompt=TEXT, max_tokens=12, temperature=0, stop=stop
    )
    assert answer.choices[0].text == greedy[0].split(stop)[0]
    assert answer.choices[0].finish_reason == "stop"


async def test_fields_that_change_nothing(client, greedy):
    answer = await client.chat.completions.create(
        model="endless",
        messages=[{"role": "user", "content": TEXT, "name": "somebody"}],
        max_tokens=12,
        temperature=0,
        user="somebody",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        logprobs=False,
        tools=[],
        response_format={"type": "text"},
        extra_body={"top_k": -1, "min_p": 0.0, "ignore_eos": False, "priority": 0},
    )
    assert answer.choices[0].message.content == greedy[1]


async def test_penalties_and_vllms_extras_are_those_of_grpc(client, cluster):
    options = {
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "min_tokens": 4,
        "ignore_eos": True,
        "stop_token_ids": [7],
        "top_k": 40,
    }
    common = {"max_tokens": 24, "seed": 5, "temperature": 0.9}
    async with cluster.client() as grpc_client:
        expected = await grpc_client.generate(TEXT, **common, **options).result()
    answer = await client.completions.create(
        model="endless", prompt=TEXT, **common, extra_body=options
    )
    assert answer.choices[0].text == expected.text
    assert answer.usage.completion_tokens == len(expected.token_ids)


async def test_the_id_that_a_client_gives(client):
    raw = await client.completions.with_raw_response.create(
        model="endless", prompt=TEXT, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().id.startswith("cmpl-req-")  # the request's own


# ---- errors


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"extra_body": {"min_p": 2}}, "min_p"),
        ({"extra_body": {"stop_token_ids": [9999]}}, "stop_token_ids[0]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"logprobs": 0}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
    ],
)
async def test_a_bad_request(client, options, param):
    with pytest.raises(openai.BadRequestError) as raised:
        await client.completions.create(**{"model": "endless", "prompt": TEXT, **options})
    assert raised.value.param == param
    assert raised.value.type == "invalid_request_error"
    assert raised.value.request_id


async def test_what_chat_does_not_support(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for options in (
        {"tools": [tool]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"modalities": ["audio"]},
    ):
        with pytest.raises(openai.BadRequestError, match="not supported here"):
            await client.chat.completions.create(model="endless", messages=MESSAGES, **options)


async def test_a_model_that_is_not_here(client):
    with pytest.raises(openai.NotFoundError) as raised:
        await client.completions.create(model="gpt-0", prompt=TEXT)
    assert raised.value.code == "model_not_found"
    assert (await client.models.retrieve("endless")).id == "endless"
    assert [model.id async for model in client.models.list()] == ["endless"]


async def test_an_id_that_is_running_may_come_again(client, cluster):
    headers = {"X-Request-Id": "a-trace"}
    stream = await client.completions.create(
        model="endless", prompt=TEXT, max_tokens=3000, stream=True, extra_headers=headers
    )
    async with stream:
        other = await client.completions.create(
            model="endless", prompt=TEXT, max_tokens=1, extra_headers=headers
        )
        assert other.usage.completion_tokens == 1


async def test_a_full_queue(tmp_path):
    """Nobody is there to serve: one request waits, and the next is refused with a hint."""
    model = make_endless(tmp_path / "endless")
    async with local_cluster(model, router={"queue_max": 1}) as small:
        small.router.fleet.set_workers([], [])
        fleet = small.router.fleet
        await until(lambda: fleet.connected("decode") == 0, within_s=DEADLINE_S)
        async with openai.AsyncOpenAI(
            base_url=f"http://{small.router.http_address}/v1", api_key="none", max_retries=0
        ) as client:
            first = asyncio.create_task(client.completions.create(model="endless", prompt=TEXT))
            await until(lambda: fleet.requests[1] == 1, within_s=DEADLINE_S)
            with pytest.raises(openai.RateLimitError) as raised:
                await client.completions.create(model="endless", prompt=TEXT)
            assert raised.value.response.headers["retry-after"] == "1"
            first.cancel()
            await until(lambda: fleet.requests[1] == 0, within_s=DEADLINE_S)


# ---- clients that go away


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_goes_away_frees_the_workers(cluster, client, stream, n):
    call = asyncio.create_task(
        client.completions.create(model="endless", prompt=TEXT, max_tokens=3000, n=n, stream=stream)
    )
    dispatcher = cluster.router.fleet.dispatcher
    await until(lambda: len(dispatcher) == n, within_s=DEADLINE_S)
    if stream:
        await (await call).close()
    else:
        call.cancel()
    await until(lambda: len(dispatcher) == 0, within_s=DEADLINE_S)
    await until(cluster.all_free, within_s=DEADLINE_S)


# ---- the end


async def test_a_stream_is_finished_before_the_router_ends(tmp_path):
    model = make_endless(tmp_path / "endless")
    async with local_cluster(model, router={"drain_ms": 60_000}) as small:
        url = f"http://{small.router.http_address}"
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            stream = await client.completions.create(
                model="endless", prompt=TEXT, max_tokens=40, temperature=0, stream=True
            )
            chunks = [await anext(stream)]
            door = small.router._door
            stopping = asyncio.create_task(door.drain())
            async with httpx2.AsyncClient(base_url=url) as plain:
                assert (await plain.get("/ready")).status_code == 503
                assert (await plain.get("/health")).status_code == 200
                refused = await plain.post("/v1/completions", json={"prompt": TEXT})
                assert refused.status_code == 503
            chunks += [chunk async for chunk in stream]
            await stopping
        assert chunks[-1].choices[0].finish_reason == "length"


async def test_what_runs_when_the_drain_is_over_is_told_so(cluster, caplog):
    model = cluster.router._config.model_path
    settings = {"router": {"drain_ms": 50}, "decode_worker": {"kept_ms": 2000}}
    async with local_cluster(model, **settings) as small:
        url = f"http://{small.router.http_address}/v1"
        async with (
            asyncio.timeout(DEADLINE_S),
            openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as asking,
            small.client(timeout_s=DEADLINE_S, resume_for_s=0) as grpc_client,
        ):
            options = {"model": "endless", "prompt": TEXT, "max_tokens": 2000}
            stream = await asking.completions.create(stream=True, **options)
            await anext(stream)
            whole = asyncio.create_task(asking.completions.create(**options))
            by_grpc = grpc_client.generate(TEXT, max_tokens=2000)
            await anext(by_grpc)
            await until(lambda: small.router.fleet.requests[0] == 3, within_s=DEADLINE_S)
            stopping = asyncio.create_task(small.router.stop())
            with pytest.raises(openai.APIError, match="the router is shutting down"):
                async for _ in stream:
                    pass
            with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
                await whole
            assert caught.value.response.headers["retry-after"] == "1"
            with pytest.raises(KvrelayError, match="the router is shutting down"):
                await by_grpc.result()
            await stopping
            [worker] = small.decode
            await until(lambda: len(worker._kept) == 1, within_s=DEADLINE_S)  # gRPC's alone
            await until(small.all_free, within_s=DEADLINE_S)
    assert "Traceback" not in caplog.text
