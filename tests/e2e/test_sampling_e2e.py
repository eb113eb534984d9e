"""Which tokens an answer has, and where it ends, depends on the request alone."""

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import reference
import torch
from local_cluster import LocalCluster, local_cluster
from tiny_models import EOS_ID, make_tiny
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from waiting import until

from kvrelay.client import AsyncClient, Completion
from kvrelay.engine.sampling import sample
from kvrelay.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.asyncio(loop_scope="module")

WAIT_S = 30
PROMPT = tuple(random.Random(0).choices(range(5, 256), k=40))
PROMPT_LENGTHS = (1, 16, 17, 33, 40, 64, 100, 150)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.8},
)
REQUESTS = tuple(
    {
        "prompt": tuple(random.Random(length).choices(range(5, 256), k=length)),
        "seed": 1000 + length,
        "max_tokens": 20 + index,
        **SAMPLINGS[index % len(SAMPLINGS)],
    }
    for index, length in enumerate(PROMPT_LENGTHS)
)
# Cut short by nothing: long enough to hold an EOS at high temperature, or a stop string.
LONG = {"prompt": PROMPT, "temperature": 1.0, "max_tokens": 60}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tokenizer(model) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(model):
    async with local_cluster(model, worker={"transport": "shm", "chunk_tokens": 32}) as started:
        yield started
        # A request that ends at a stop string is taken back from the workers after its answer.
        await until(started.all_free, within_s=WAIT_S)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(cluster):
    async with cluster.client() as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(client) -> list[Completion]:
    """The answers to REQUESTS, one after another."""
    return [await ask(client, request) for request in REQUESTS]


async def ask(client: AsyncClient, request: Mapping[str, Any], **more: Any) -> Completion:
    return await client.generate(**{**request, **more}, timeout_s=WAIT_S).result()


def token_ids(answers: list[Completion]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


# ---- the same request, the same tokens


@pytest.mark.parametrize(
    ("prefill", "decode", "worker"),
    [
        (1, 1, {"transport": "shm", "chunk_tokens": 32}),
        (1, 1, {"transport": "tcp", "chunk_tokens": 32}),
        (1, 1, {"transport": "shm", "chunk_tokens": 256}),
        (1, 1, {"transport": "tcp", "chunk_tokens": 48, "batch_max": 3}),
        (2, 3, {"transport": "shm", "chunk_tokens": 32}),
        (2, 3, {"transport": "tcp", "chunk_tokens": 256}),
    ],
)
async def test_together_as_alone(model, alone, prefill, decode, worker):
    async with (
        local_cluster(model, prefill=prefill, decode=decode, worker=worker) as cluster,
        cluster.client() as client,
    ):
        worked = _note_who_works(cluster)
        together = await asyncio.gather(*(ask(client, request) for request in REQUESTS))

    assert token_ids(together) == token_ids(alone)
    assert {answer.timings.transport for answer in together} == {worker["transport"]}
    assert len(worked) == prefill + decode


def _note_who_works(cluster: LocalCluster) -> set[str]:
    worked: set[str] = set()

    def watch(worker: Any) -> None:
        step = worker._engine.step

        async def noted(*args: Any) -> list[int]:
            worked.add(worker.instance_id)
            return await step(*args)

        worker._engine.step = noted

    for worker in (*cluster.prefill, *cluster.decode):
        watch(worker)
    return worked


async def test_tokens_are_what_the_logits_of_transformers_draw(model, alone):
    """Token for token, from transformers' own logits, the seed and the position alone."""
    own = reference.load(model)
    for request, answer in zip(REQUESTS, alone, strict=True):
        prompt, tokens = request["prompt"], answer.token_ids
        with torch.inference_mode():
            logits = own(input_ids=torch.tensor([[*prompt, *tokens[:-1]]])).logits[0]
        positions = range(len(prompt), len(prompt) + len(tokens))
        params = [params_of(request)] * len(tokens)
        assert sample(logits[len(prompt) - 1 :], params, positions) == list(tokens)


def params_of(request: Mapping[str, Any]) -> SamplingParams:
    top_p = torch.tensor(request.get("top_p", 1.0)).item()  # a float32, as on the wire
    temperature = torch.tensor(request["temperature"]).item()
    return SamplingParams(
        temperature=temperature,
        top_k=request.get("top_k", 0),
        top_p=top_p,
        seed=request["seed"],
        max_tokens=request["max_tokens"],
        eos_token_ids=frozenset({EOS_ID}),
    )


async def test_another_seed_gives_another_answer(client, alone):
    others = [await ask(client, request, seed=request["seed"] + 1) for request in REQUESTS]
    assert all(
        other.token_ids != answer.token_ids for other, answer in zip(others, alone, strict=True)
    )


async def test_without_a_seed_answers_differ_and_tell_the_seed_they_had(client):
    drawn = [await ask(client, LONG) for _ in range(3)]
    assert len({answer.seed for answer in drawn}) == 3
    assert len({answer.token_ids for answer in drawn}) == 3
    again = [await ask(client, LONG, seed=answer.seed) for answer in drawn]
    assert token_ids(again) == token_ids(drawn)
    assert [answer.seed for answer in again] == [answer.seed for answer in drawn]


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
async def test_the_ends_of_the_range_of_seeds(client, seed):
    first, second = await ask(client, LONG, seed=seed), await ask(client, LONG, seed=seed)
    assert first.seed == second.seed == seed
    assert first.token_ids == second.token_ids


async def test_greedy_does_not_depend_on_the_seed(client):
    greedy = [await ask(client, LONG, temperature=0, seed=seed) for seed in (1, 2)]
    top_one = await ask(client, LONG, temperature=1.5, top_k=1)
    assert greedy[0].token_ids == greedy[1].token_ids == top_one.token_ids


# ---- where an answer ends


async def test_eos_is_the_last_token_and_no_part_of_the_text(client, tokenizer):
    for seed in range(20):
        answer = await ask(client, LONG, temperature=2.0, max_tokens=300, seed=seed)
        if answer.finish_reason == "stop":
            break
    assert answer.finish_reason == "stop"
    assert 1 < answer.completion_tokens == len(answer.token_ids) < 300
    assert answer.token_ids.index(EOS_ID) == len(answer.token_ids) - 1
    assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert "</s>" not in answer.text


async def test_eos_may_be_the_first_token(model, client):
    """The prefill worker draws it, and the decode worker has nothing to do."""
    with torch.inference_mode():
        logits = reference.load(model)(input_ids=torch.tensor([PROMPT])).logits[0, -1:]
    request = {**LONG, "temperature": 2.0}
    seeds = (
        seed
        for seed in range(100_000)
        if sample(logits, [params_of({**request, "seed": seed})], [len(PROMPT)]) == [EOS_ID]
    )
    answer = await ask(client, request, seed=next(seeds))
    assert (answer.token_ids, answer.finish_reason, answer.text) == ((EOS_ID,), "stop", "")


async def test_eos_as_the_last_token_allowed_is_a_stop(client):
    """Both endings at once: the model had finished."""
    for seed in range(20):
        whole = await ask(client, LONG, temperature=2.0, max_tokens=300, seed=seed)
        if whole.finish_reason == "stop":
            break
    limited = await ask(
        client, LONG, temperature=2.0, max_tokens=whole.completion_tokens, seed=seed
    )
    assert (limited.token_ids, limited.finish_reason) == (whole.token_ids, "stop")


@pytest.mark.parametrize("max_tokens", [1, 2, 15, 16, 17, 33])
async def test_max_tokens_cuts_the_answer_and_changes_nothing_before(client, max_tokens):
    whole = await ask(client, LONG, seed=3)
    cut = await ask(client, LONG, seed=3, max_tokens=max_tokens)
    assert whole.completion_tokens == 60
    assert cut.token_ids == whole.token_ids[:max_tokens]
    assert (cut.finish_reason, cut.completion_tokens) == ("length", max_tokens)


# ---- text and stop strings


async def unstopped(client: AsyncClient, tokenizer: Any) -> tuple[Completion, list[str]]:
    """An answer with strings in it that end one token and begin the next."""
    for seed in range(50):
        answer = await ask(client, LONG, seed=seed)
        stops = _spanning_stops(answer, tokenizer)
        if len(stops) >= 2:
            return answer, stops
    raise AssertionError("no such answer")


def _spanning_stops(answer: Completion, tokenizer: Any) -> list[str]:
    """The strings of two characters around the end of a token, where they first occur there."""
    ends = [len(tokenizer.decode(answer.token_ids[:at])) for at in range(1, 40)]
    stops = [(end, answer.text[end - 1 : end + 1]) for end in ends if end > 4]
    return [
        stop
        for end, stop in stops
        if stop.isascii() and stop.isprintable() and answer.text.find(stop) == end - 1
    ]


async def stopped_by(client: AsyncClient, whole: Completion, *stop: str) -> Completion:
    """The answer to the request of `whole` with stop strings, its stream checked piece by piece."""
    expected = whole.text[: min(whole.text.find(s) for s in stop if s in whole.text)]
    stream = client.generate(**LONG, seed=whole.seed, stop=stop, timeout_s=WAIT_S)
    shown = ""
    async for delta in stream.deltas():
        shown += delta.text
        assert expected.startswith(shown)  # not even for a moment
    answer = await stream.result()
    assert answer.text == shown == expected
    assert answer.finish_reason == "stop"
    assert answer.token_ids == whole.token_ids[: answer.completion_tokens]
    return answer


async def test_a_stop_string_over_two_tokens_cuts_the_text_before_it(client, tokenizer):
    whole, stops = await unstopped(client, tokenizer)
    for stop in stops:
        answer = await stopped_by(client, whole, stop)
        assert 0 < answer.completion_tokens < whole.completion_tokens


async def test_the_stop_string_that_comes_first_counts(client, tokenizer):
    whole, _ = await unstopped(client, tokenizer)
    early, late = whole.text[5:8], whole.text[20:24]
    answer = await stopped_by(client, whole, late, early, "not in the text at all")
    assert len(answer.text) <= 5


@pytest.mark.parametrize("length", [1, 2, 7])
async def test_a_stop_string_may_begin_anywhere(client, tokenizer, length):
    whole, _ = await unstopped(client, tokenizer)
    for at in (0, 1, 9, 17):
        await stopped_by(client, whole, whole.text[at : at + length])


async def test_a_stop_string_that_does_not_come_changes_nothing(client, tokenizer):
    whole, _ = await unstopped(client, tokenizer)
    only_begun = whole.text[-3:] + "\N{SNOWMAN}"
    answer = await ask(client, LONG, seed=whole.seed, stop=[only_begun, "\N{COMET}"])
    assert (answer.text, answer.token_ids) == (whole.text, whole.token_ids)
    assert answer.finish_reason == "length"


async def test_text_is_what_the_tokenizer_decodes(client, tokenizer):
    """Random bytes: whole characters of two bytes and broken ones, cut anywhere by the tokens."""
    answers = await asyncio.gather(*(ask(client, LONG, seed=seed) for seed in range(16)))
    for answer in answers:
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    text = "".join(answer.text for answer in answers)
    assert any(not char.isascii() and char != "\N{REPLACEMENT CHARACTER}" for char in text)
    assert "\N{REPLACEMENT CHARACTER}" in text
