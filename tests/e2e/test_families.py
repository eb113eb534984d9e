"""Every family of models answers through kvrelay, token for token, as in transformers alone."""

import asyncio
import random
from pathlib import Path

import pytest
import reference
from local_cluster import local_cluster
from tiny_models import FAMILIES, SLIDING_WINDOW_TOKENS, make_tiny
from transformers import AutoTokenizer

BLOCK_SIZE = 16
CHUNK_TOKENS = 32
LENGTHS = (1, 15, 16, 17, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 100)
ANSWER_TOKENS = 24  # over at least one end of a block, whatever the prompt
CANDIDATES = 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a family's model, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


def cases(folder: Path) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Answers by prompt: of each length the first prompt whose answer is no matter of rounding."""
    vocab_size = len(AutoTokenizer.from_pretrained(folder))
    found = {}
    for length in LENGTHS:
        for seed in range(CANDIDATES):
            prompt = tuple(random.Random(seed).choices(range(vocab_size), k=length))
            [answer] = reference.greedy(folder, [prompt], [ANSWER_TOKENS])
            if answer.margin_min > reference.MARGIN_MIN:
                found[prompt] = answer.token_ids
                break
    assert [len(prompt) for prompt in found] == list(LENGTHS)
    return found


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_tokens_are_transformers_own(tiny, family, transport):
    model = tiny(family)
    expected = cases(model)
    worker = {"block_size": BLOCK_SIZE, "chunk_tokens": CHUNK_TOKENS, "transport": transport}
    async with local_cluster(model, worker=worker) as cluster, cluster.client() as client:

        async def ask(prompt):
            return await client.generate(prompt, max_tokens=ANSWER_TOKENS).result()

        alone = [await ask(prompt) for prompt in expected]
        together = await asyncio.gather(*map(ask, expected))

    for answers in (alone, together):
        got = {p: answer.token_ids for p, answer in zip(expected, answers, strict=True)}
        assert got == expected
        assert {answer.timings.transport for answer in answers} == {transport}


def test_prompts_and_answers_reach_over_the_sliding_window():
    assert sum(length > SLIDING_WINDOW_TOKENS for length in LENGTHS) >= 4
