"""Penalties, min_p and what ends an answer: the same tokens wherever they are sampled, a worker's
death included, and those that transformers' logits and a few plain lines give."""

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import reference
import torch
from local_cluster import LocalCluster, local_cluster
from tiny_models import EOS_ID, make_tiny
from transformers import (
    AutoTokenizer,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
)
from waiting import until

from decode_worker.service import DecodeService
from kvrelay.client import AsyncClient, Completion
from kvrelay.engine.sampling import sample
from kvrelay.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.asyncio(loop_scope="module")

WAIT_S = 60
DIES_AT_STEP = 10
WORKER = {"transport": "shm", "chunk_tokens": 32}
ENDS = (EOS_ID, *range(40, 70))
EXTRAS: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 1.3, "temperature": 1.0},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"presence_penalty": -0.4, "frequency_penalty": 0.7, "temperature": 0.8, "top_k": 40},
    {"min_p": 0.1, "temperature": 1.3},
    {"min_tokens": 25, "stop_token_ids": ENDS[1:], "temperature": 1.5},
    {"min_tokens": 25, "stop_token_ids": ENDS[1:], "ignore_eos": True},
    {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "min_p": 0.02,
        "min_tokens": 20,
        "stop_token_ids": ENDS[1:],
        "temperature": 1.0,
        "top_p": 0.95,
    },
)
REQUESTS: tuple[dict[str, Any], ...] = tuple(
    {
        "prompt": tuple(random.Random(number).choices(range(5, 256), k=20 + 11 * number)),
        "seed": 50 + number,
        "max_tokens": 50,
        "ignore_eos": "min_tokens" not in extra,  # long enough for a worker to die meanwhile
        **extra,
    }
    for number, extra in enumerate(EXTRAS)
)
LONG = {"prompt": REQUESTS[0]["prompt"], "temperature": 1.0, "max_tokens": 60, "seed": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tokenizer(model) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(model):
    async with local_cluster(model, worker=WORKER) as cluster:
        async with cluster.client() as connected:
            yield connected
        await until(cluster.all_free, within_s=WAIT_S)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(client) -> list[Completion]:
    """The answers to REQUESTS, one after another."""
    return [await ask(client, request) for request in REQUESTS]


async def ask(client: AsyncClient, request: Mapping[str, Any], **more: Any) -> Completion:
    return await client.generate(**{**request, **more}, timeout_s=WAIT_S).result()


def token_ids(answers: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


# ---- the right tokens


@pytest.mark.parametrize("number", range(len(REQUESTS)), ids=lambda n: "-".join(EXTRAS[n]))
async def test_tokens_are_those_of_the_reference(model, alone, number):
    request, answer = REQUESTS[number], alone[number].token_ids
    prompt = request["prompt"]
    with torch.inference_mode():
        logits = reference.load(model)(input_ids=torch.tensor([[*prompt, *answer[:-1]]])).logits[0]
    for index, token in enumerate(answer):
        scores = logits[len(prompt) - 1 + index][None].double()
        assert chosen(scores, request, answer[:index]) == token, index
    ended = answer[-1] in ends_of(request)
    assert alone[number].finish_reason == ("stop" if ended else "length")
    assert ended or len(answer) == request["max_tokens"]
    assert not set(answer[:-1]) & set(ends_of(request))


def ends_of(request: Mapping[str, Any]) -> tuple[int, ...]:
    own = () if request.get("ignore_eos") else (EOS_ID,)
    return (*own, *request.get("stop_token_ids", ()))


def chosen(scores: torch.Tensor, request: Mapping[str, Any], answer: Sequence[int]) -> int:
    """The token after `answer`; scores `[1, vocab]` are the model's."""
    tokens = [*request["prompt"], *answer]
    repetition = RepetitionPenaltyLogitsProcessor(request.get("repetition_penalty", 1.0))
    scores = repetition(torch.tensor([tokens]), scores)
    for token, count in Counter(answer).items():
        scores[0, token] -= request.get("frequency_penalty", 0) * count
        scores[0, token] -= request.get("presence_penalty", 0)
    if len(answer) < request.get("min_tokens", 0):
        scores[0, list(ends_of(request))] = -torch.inf
    if not request.get("temperature"):
        return int(scores.argmax())
    scores = scores / request["temperature"]
    scores = MinPLogitsWarper(request.get("min_p", 0.0))(torch.tensor([tokens]), scores)
    plain = SamplingParams(
        temperature=1.0,
        top_k=request.get("top_k", 0),
        top_p=request.get("top_p", 1.0),
        seed=request["seed"],
        max_tokens=1,
        eos_token_ids=frozenset(),
    )
    [token] = sample(scores, [plain], [len(tokens)])
    assert token is not None
    return token


async def test_the_extras_make_a_difference(client, alone):
    for request, answer in zip(REQUESTS, alone, strict=True):
        plain = {
            name: request[name]
            for name in (
                "prompt",
                "seed",
                "max_tokens",
                "temperature",
                "top_k",
                "top_p",
                "ignore_eos",
            )
            if name in request
        }
        assert (await ask(client, plain)).token_ids != answer.token_ids


# ---- the same tokens


@pytest.mark.parametrize(
    ("prefill", "decode", "worker"),
    [
        (1, 1, WORKER),
        (1, 1, {**WORKER, "batch_max": 3}),
        (2, 3, {**WORKER, "transport": "tcp"}),
        (1, 1, {**WORKER, "prefix_caching": False}),
    ],
)
async def test_together_as_alone(model, alone, prefill, decode, worker):
    async with (
        local_cluster(model, prefill=prefill, decode=decode, worker=worker) as cluster,
        cluster.client() as client,
    ):
        together = await asyncio.gather(*(ask(client, request) for request in REQUESTS))
    assert token_ids(together) == token_ids(alone)


async def test_a_worker_that_dies_changes_no_token(model, alone):
    """Its requests go on elsewhere: the new prompt ends with the answer so far."""
    async with (
        local_cluster(model, prefill=2, decode=2, worker=WORKER) as cluster,
        cluster.client() as client,
    ):
        dying = _dies_at_step(cluster)
        asked = [asyncio.create_task(ask(client, request)) for request in REQUESTS]
        async with asyncio.timeout(WAIT_S):
            dead = await dying
        moved = cluster.router.fleet.dispatcher._attempts.all()
        moved = [request for request in moved if request.decode_id == dead.instance_id]
        await until(lambda: all(request.answer for request in moved), within_s=WAIT_S)
        await dead.stop()
        answers = await asyncio.gather(*asked)
        cluster.decode.remove(dead)
        assert all(request.attempt == 2 for request in moved)
        await until(cluster.all_free, within_s=WAIT_S)
    assert token_ids(answers) == token_ids(alone)
    assert [a.finish_reason for a in answers] == [a.finish_reason for a in alone]


@pytest.mark.parametrize("number", range(len(REQUESTS)), ids=lambda n: "-".join(EXTRAS[n]))
async def test_a_request_whose_worker_dies_goes_on_as_it_would_have(model, alone, number):
    async with (
        local_cluster(model, decode=2, worker=WORKER) as cluster,
        cluster.client() as client,
    ):
        dying = _dies_at_step(cluster)
        asked = asyncio.create_task(ask(client, REQUESTS[number]))
        async with asyncio.timeout(WAIT_S):
            dead = await dying
        [request] = cluster.router.fleet.dispatcher._attempts.all()
        # The prefill worker's token, and those of the steps that ended.
        await until(lambda: len(request.answer) == DIES_AT_STEP, within_s=WAIT_S)
        await dead.stop()
        answer = await asked
        cluster.decode.remove(dead)
        assert request.attempt == 2
        await until(cluster.all_free, within_s=WAIT_S)
    assert answer.token_ids == alone[number].token_ids
    assert answer.finish_reason == alone[number].finish_reason


def _dies_at_step(cluster: LocalCluster) -> asyncio.Future[DecodeService]:
    """The decode worker that first comes to this step, which it never ends."""
    dying: asyncio.Future[DecodeService] = asyncio.get_running_loop().create_future()

    def watch(worker: DecodeService) -> None:
        step = worker._engine.step
        steps = 0

        async def counted(*args: Any) -> list[int | None]:
            nonlocal steps
            steps += 1
            if steps == DIES_AT_STEP and not dying.done():
                dying.set_result(worker)
                await asyncio.get_running_loop().create_future()
            return await step(*args)

        worker._engine.step = counted

    for worker in cluster.decode:
        watch(worker)
    return dying


# ---- where an answer ends


async def test_a_stop_token_ends_the_answer_and_is_not_shown(client, tokenizer):
    whole = await ask(client, LONG)
    stop = whole.token_ids[20]
    at = whole.token_ids.index(stop)
    answer = await ask(client, LONG, stop_token_ids=[stop])
    assert (answer.token_ids, answer.finish_reason) == (whole.token_ids[: at + 1], "stop")
    assert answer.text == tokenizer.decode(answer.token_ids[:-1])
    assert tokenizer.decode(stop)


async def test_a_stop_token_may_be_the_first_and_the_only_token(client):
    whole = await ask(client, LONG)
    answer = await ask(client, LONG, stop_token_ids=whole.token_ids[:1])
    assert (answer.token_ids, answer.finish_reason) == (whole.token_ids[:1], "stop")
    assert answer.text == ""


async def test_ignore_eos_goes_on_with_the_same_tokens(client, tokenizer):
    for seed in range(20):
        ended = await ask(client, LONG, temperature=2.0, max_tokens=300, seed=seed)
        if ended.finish_reason == "stop":
            break
    more = {"temperature": 2.0, "max_tokens": 300, "seed": seed, "ignore_eos": True}
    answer = await ask(client, LONG, **more)
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 300)
    assert answer.token_ids[: ended.completion_tokens] == ended.token_ids
    assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    # What the client names ends the answer all the same.
    named = await ask(client, LONG, **more, stop_token_ids=[EOS_ID])
    assert (named.token_ids, named.finish_reason) == (ended.token_ids, "stop")


async def test_min_tokens_of_a_whole_answer(client):
    few = {"stop_token_ids": ENDS[1:], "temperature": 1.5, "max_tokens": 30}
    short = await ask(client, LONG, **few)
    assert (short.finish_reason, short.completion_tokens < 30) == ("stop", True)
    answer = await ask(client, LONG, **few, min_tokens=30)
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 30)
    assert not set(answer.token_ids) & set(ENDS)


async def test_a_stop_string_counts_from_min_tokens_on(client, tokenizer):
    # Without end tokens min_tokens bans none, and the tokens are those of the whole answer.
    request = {**LONG, "ignore_eos": True}
    whole = await ask(client, request)

    def text_of(tokens: int) -> str:
        return tokenizer.decode(whole.token_ids[:tokens])

    exempt = next(n for n in range(10, 40) if not text_of(n).endswith("\N{REPLACEMENT CHARACTER}"))
    before, after = text_of(exempt), whole.text[len(text_of(exempt)) :]
    assert whole.text.startswith(before)
    stop = next(char for char in before if char in after and char.isascii())

    at_once = await ask(client, request, stop=stop)
    assert at_once.text == whole.text[: whole.text.index(stop)]
    answer = await ask(client, request, stop=stop, min_tokens=exempt)
    assert answer.text == whole.text[: whole.text.index(stop, len(before))]
    assert answer.finish_reason == "stop"
    assert answer.completion_tokens > exempt
    assert answer.token_ids == whole.token_ids[: answer.completion_tokens]
