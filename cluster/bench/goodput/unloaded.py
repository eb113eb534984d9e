"""How long requests take that are alone on a running cluster."""

import asyncio
import random
import time
from collections.abc import Sequence
from statistics import median

from cluster.bench.goodput.scale import Unloaded
from cluster.bench.report import BenchError
from cluster.preparation import Progress
from cluster.workload.mixes import Range
from kvrelay.client import AsyncClient, KvrelayError

_REQUESTS = 9  # of prompts from the shortest to the longest, so the middle one is the mean's
_WARM_UP = 3  # before them: new pages and connections, and the workers' first measured steps


def measure_unloaded(address: str, prompt: Range, answer: Range, on_progress: Progress) -> Unloaded:
    """Raises BenchError when a request fails, or the model is too short for them."""
    try:
        return asyncio.run(_measure(address, prompt, answer, on_progress))
    except KvrelayError as error:
        raise BenchError(f"a request that was alone has failed: {error}") from error


async def _measure(address: str, prompt: Range, answer: Range, on_progress: Progress) -> Unloaded:
    dice = random.Random(0)
    async with AsyncClient(address, resume_for_s=0) as client:
        (model,) = await client.models()
        if model.max_model_tokens < prompt[1] + answer[1]:
            raise BenchError(
                f"the model ends at {model.max_model_tokens} tokens:"
                f" choose shorter prompts or answers than {prompt[1]} and {answer[1]}"
            )
        ttft_ms, tpot_ms = [], []
        lengths = [prompt[1]] * _WARM_UP + _evenly(prompt, _REQUESTS)
        for number, length in enumerate(lengths):
            on_progress("measuring requests that are alone", number / len(lengths))
            tokens = [dice.randrange(model.vocab_size) for _ in range(length)]
            first_ms, each_ms = await _one(client, tokens, answer[1])
            if number >= _WARM_UP:
                ttft_ms.append(first_ms)
                tpot_ms.append(each_ms)
    return Unloaded(median(ttft_ms), median(tpot_ms))


async def _one(
    client: AsyncClient, prompt: Sequence[int], answer_tokens: int
) -> tuple[float, float]:
    """Milliseconds to the first token, and on the mean for each after it."""
    at_s, tokens = [time.perf_counter()], 0
    async with client.generate(
        prompt, max_tokens=max(2, answer_tokens), temperature=0.0, ignore_eos=True
    ) as stream:
        async for delta in stream.deltas():
            if delta.token_ids:
                at_s.append(time.perf_counter())
                tokens += len(delta.token_ids)
    start_s, first_s, last_s = at_s[0], at_s[1], at_s[-1]
    return (first_s - start_s) * 1000, (last_s - first_s) * 1000 / max(1, tokens - 1)


def _evenly(between: Range, count: int) -> list[int]:
    least, most = between
    return [round(least + (most - least) * place / (count - 1)) for place in range(count)]
