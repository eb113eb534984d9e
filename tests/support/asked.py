"""Requests drawn from a seed, and the answers that they must have whatever happens to workers.

The right answers come from a cluster that nothing is done to. Sampling depends on the request's own
seed and the position, so sampled answers have a right one as well.
"""

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local_cluster import local_cluster
from waiting import until

from kvrelay.client import AsyncClient, Completion

_FIRST_TOKEN, _END_TOKEN = 5, 270  # no special tokens
_WORDS = ["the", "rain", "in", "spain", "and", "then", "on", "to", "an", "inner", "sea", "again"]


@dataclass(frozen=True)
class Asked:
    """One request: a completion of token ids, or a chat of one text."""

    prompt: tuple[int, ...] | str
    options: dict[str, Any] = field(default_factory=dict)

    def start(self, client: AsyncClient) -> Any:
        """The stream of its answer."""
        ask = client.chat if isinstance(self.prompt, str) else client.generate
        return ask(self.prompt, **self.options)

    def __str__(self) -> str:
        kind = "chat" if isinstance(self.prompt, str) else "generate"
        return f"{kind} of {len(self.prompt)}, {self.options}"


def draw(rng: random.Random, *, tokens: tuple[int, int] = (8, 60)) -> Asked:
    """Any prompt length up to 200, greedy or sampled, now and then a chat or penalties."""
    options: dict[str, Any] = {"max_tokens": rng.randint(*tokens)}
    if rng.random() < 0.6:
        options |= {"temperature": rng.choice([0.7, 1.0, 1.5]), "seed": rng.getrandbits(31)}
        options |= rng.choice([{}, {"top_k": 20}, {"top_p": 0.9}, {"frequency_penalty": 0.5}])
    else:
        options["temperature"] = 0.0
    if rng.random() < 0.25:
        return Asked(" ".join(rng.choices(_WORDS, k=rng.randint(2, 40))), options)
    tokens_of_prompt = rng.choice([rng.randint(1, 40), rng.randint(40, 200)])
    prompt = rng.choices(range(_FIRST_TOKEN, _END_TOKEN), k=tokens_of_prompt)
    return Asked(tuple(prompt), options)


def with_stop(asked: Asked, whole: Completion, rng: random.Random) -> Asked:
    """The same, to be stopped somewhere in its answer; unchanged where there is nothing to stop
    at that a person could have typed."""
    words = re.findall(r"[!-~]{1,3}", whole.text)
    if not words:
        return asked
    return Asked(asked.prompt, {**asked.options, "stop": [rng.choice(words)]})


class Oracle:
    """Knows the right answer to any request."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def answers(self, asked: Sequence[Asked]) -> list[Completion]:
        return await asyncio.gather(*(a.start(self._client).result() for a in asked))

    async def draw(self, rng: random.Random, count: int, **how: Any) -> list[tuple[Asked, Any]]:
        """So many requests, about a third with stop strings, each with its right answer."""
        asked = [draw(rng, **how) for _ in range(count)]
        right = await self.answers(asked)
        for at in range(count):
            if rng.random() < 0.35:
                asked[at] = with_stop(asked[at], right[at], rng)
        stopped = [at for at in range(count) if "stop" in asked[at].options]
        for at, answer in zip(
            stopped, await self.answers([asked[at] for at in stopped]), strict=True
        ):
            right[at] = answer
        return list(zip(asked, right, strict=True))


@contextlib.asynccontextmanager
async def oracle(model: Path) -> AsyncIterator[Oracle]:
    """A cluster of its own: one worker that computes prompts itself, and keeps no KV of any."""
    alone = {"prefix_caching": False}
    async with local_cluster(model, prefill=0, worker=alone) as cluster, cluster.client() as client:
        yield Oracle(client)
        # A stop string ends an answer here before the worker has heard of it.
        await until(cluster.all_free, within_s=5)


async def check(client: AsyncClient, asked: Asked, right: Completion) -> None:
    """Asks, and asserts that every token comes once, in order, and right."""
    stream = asked.start(client)
    tokens: list[int] = []
    text = ""
    async for delta in stream.deltas():
        if delta.token_ids:
            assert delta.offset == len(tokens), f"a gap or a repeat in {asked}"
        tokens += delta.token_ids
        text += delta.text
        assert tuple(tokens) == right.token_ids[: len(tokens)], f"wrong tokens for {asked}"
    whole = await stream.result()
    assert (whole.token_ids, whole.text) == (right.token_ids, right.text), str(asked)
    assert (tuple(tokens), text) == (right.token_ids, right.text), str(asked)
    assert whole.finish_reason == right.finish_reason, str(asked)
