"""KV in int8 goes from prefill to decode as it is: an answer is what one engine alone gives."""

import asyncio
import random
from pathlib import Path

import pytest
import torch
from local_cluster import local_cluster
from tiny_models import make_endless

from kvrelay.engine.kernels.tiles import HAS_VNNI
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.step import Slice
from kvrelay.kv.pool import KVPool

pytestmark = pytest.mark.skipif(not HAS_VNNI, reason="KV is int8 by itself with VNNI alone")

HEAD_DIM = 64  # int8 KV is smaller than any other from here on
# Around the ends of blocks (16), of chunks (32, 256), of tiles (64) and segments (256).
LENGTHS = (1, 16, 31, 33, 64, 65, 100, 255, 257, 300)
ANSWER_TOKENS = 12
POOL_BLOCKS = 32

Answers = dict[int, tuple[int, ...]]  # by length of the prompt


def prompt_of(length: int) -> list[int]:
    return random.Random(length).choices(range(5, 250), k=length)


def colocated(runner: ModelRunner, prompt: list[int]) -> tuple[int, ...]:
    """Greedy: the prompt in one step, then a step a token."""
    blocks = random.Random(0).sample(range(POOL_BLOCKS), POOL_BLOCKS)
    tokens = list(prompt)
    start = 0
    while len(tokens) < len(prompt) + ANSWER_TOKENS:
        logits = runner.step([Slice(tokens[start:], start, blocks)], [True])
        start = len(tokens)
        tokens.append(int(torch.argmax(logits[0])))
    return tuple(tokens[len(prompt) :])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_endless(tmp_path_factory.mktemp("tiny"), head_dim=HEAD_DIM)


@pytest.fixture(scope="module")
def expected(model: Path) -> Answers:
    runner = ModelRunner.load(model, quantize="int8")
    assert runner.layout.dtype == "int8"
    runner.attach(KVPool(runner.layout, POOL_BLOCKS))
    answers = {n: colocated(runner, prompt_of(n)) for n in LENGTHS}
    runner.close()
    assert len({token for answer in answers.values() for token in answer}) > len(LENGTHS)
    return answers


@pytest.mark.parametrize("chunk_tokens", [32, 256])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_tokens_are_those_of_one_engine_alone(
    model: Path, expected: Answers, transport: str, chunk_tokens: int
) -> None:
    # Without a cache of prefixes: what was computed alone is not what neighbours are given.
    worker = {"quantize": "int8", "transport": transport, "chunk_tokens": chunk_tokens}
    async with (
        local_cluster(model, worker={**worker, "prefix_caching": False}) as cluster,
        cluster.client() as client,
    ):
        layouts = cluster.prefill[0]._layout, cluster.decode[0]._layout
        assert [layout.dtype for layout in layouts] == ["int8", "int8"]

        async def ask(length: int) -> tuple[int, ...]:
            asked = client.generate(prompt_of(length), max_tokens=ANSWER_TOKENS, temperature=0)
            answer = await asked.result()
            assert answer.timings.transport == transport
            blocks = layouts[0].blocks_for(length)
            assert answer.timings.kv_bytes == blocks * layouts[0].block_bytes
            return answer.token_ids

        alone = {length: await ask(length) for length in LENGTHS}
        assert alone == expected
        beside = await asyncio.gather(*map(ask, LENGTHS))
        assert dict(zip(LENGTHS, beside, strict=True)) == expected
