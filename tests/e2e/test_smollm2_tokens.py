"""A real model answers through kvrelay, token for token, as it does in transformers alone."""

import asyncio
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio
import reference
from local_cluster import local_cluster
from transformers import AutoTokenizer

from cluster.model_store import prepare
from kvrelay.config import WorkerConfig

pytestmark = pytest.mark.asyncio(loop_scope="module")

LICENSE = Path(__file__).parents[2] / "LICENSE"

# On and around the ends of blocks (16 tokens) and of prefill chunks (256), and some between.
LENGTHS = (
    *(1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100, 127, 128, 129),
    *(200, 239, 240, 241, 255, 256, 257, 300, 400, 511, 512, 513, 700, 1000, 2000),
)


class Case(NamedTuple):
    prompt: tuple[int, ...]
    max_tokens: int
    answer: tuple[int, ...]
    text: str


@pytest.fixture(scope="module")
def model() -> Path:
    return prepare("smollm2").path


@pytest.fixture(scope="module")
def cases(model: Path) -> dict[int, Case]:
    """By length of the prompt: slices of the licence, each from another place in it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(LICENSE.read_text()).input_ids
    assert len(ids) > max(LENGTHS)
    starts = [97 * at % (len(ids) - length) for at, length in enumerate(LENGTHS)]
    prompts = [ids[start : start + n] for start, n in zip(starts, LENGTHS, strict=True)]
    max_tokens = [12 if n <= 129 else 8 if n <= 257 else 4 for n in LENGTHS]
    answers = reference.greedy(model, prompts, max_tokens)
    margins = {n: answer.margin_min for n, answer in zip(LENGTHS, answers, strict=True)}
    assert min(margins.values()) > reference.MARGIN_MIN, margins
    return {
        len(prompt): Case(
            tuple(prompt),
            limit,
            answer.token_ids,
            tokenizer.decode(answer.token_ids, skip_special_tokens=True),
        )
        for prompt, limit, answer in zip(prompts, max_tokens, answers, strict=True)
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["shm", "tcp"])
async def cluster(request, model, cases):
    settings = {"threads": 2, "kv_bytes": 1 << 29, "transport": request.param}
    async with local_cluster(model, worker=settings) as started:
        yield started


@pytest.mark.parametrize("at_once", [1, 8])
async def test_tokens_and_text_are_transformers_own(cluster, cases, at_once, request):
    transport = request.node.callspec.params["cluster"]
    room = asyncio.Semaphore(at_once)

    async with cluster.client() as client:

        async def ask(case):
            async with room:
                return await client.generate(case.prompt, max_tokens=case.max_tokens).result()

        answers = await asyncio.gather(*map(ask, cases.values()))

    got = {length: answer.token_ids for length, answer in zip(cases, answers, strict=True)}
    assert got == {length: case.answer for length, case in cases.items()}
    assert [answer.text for answer in answers] == [case.text for case in cases.values()]
    assert [answer.prompt_tokens for answer in answers] == list(cases)
    assert {answer.timings.transport for answer in answers} == {transport}


async def test_the_prompts_are_many_and_reach_over_chunks(cases):
    assert len(cases) == len(LENGTHS) >= 32
    assert max(cases) > 2 * WorkerConfig.model_fields["chunk_tokens"].default
