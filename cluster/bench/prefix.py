"""`kvrelay bench prefix`: what it saves that requests share the beginning of their prompts.

Called by commands.py. Two clusters of the same workers, one after the other, get the same requests:
one as `kvrelay serve` has it, the other without prefix caching and with placement at random.
"""

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

from cluster.bench.machine import QuietLooks, describe_machine, unrest
from cluster.bench.report import BenchError, Report, Row
from cluster.model_store import PreparedModel
from cluster.options import ServeError, ServeOptions
from cluster.preparation import Progress
from cluster.serving import Serving
from cluster.weights import pack_weights
from kvrelay.cache import default_cache
from kvrelay.client import AsyncClient, Completion, KvrelayError
from kvrelay.config import Quantize

BASELINE = "no cache"
_RANDOM_ROUTER = "cluster.bench.random_router"
_OWN_TOKENS = 32  # of each prompt, after what all share
_ANSWER_TOKENS = 8
_WARM_UP_TOKENS = 256
_NOTE = (
    "no cache: the same requests to the same workers with --no-prefix-caching, each placed on a"
    " pair chosen at random among those with room."
)


@dataclass(frozen=True)
class PrefixBench:
    """What is measured: `clients` of them ask at any time, each as soon as it has its answer."""

    requests: int
    clients: int
    system_tokens: int
    prefill: int
    decode: int
    quantize: Quantize

    @property
    def prompt_tokens(self) -> int:
        return self.system_tokens + _OWN_TOKENS


@dataclass(frozen=True)
class _Served:
    """What the same requests got from one cluster."""

    ttft_ms: list[float]
    recomputed: float  # share of the prompt tokens that could have been reused


def bench_prefix(model: PreparedModel, asked: PrefixBench, on_progress: Progress) -> Report:
    """Raises BenchError when the model cannot be served, or its context is too short."""
    others = QuietLooks()
    pack_weights(model.path, asked.quantize, default_cache(), on_progress)
    options = ServeOptions(
        port=0, http_port=0, prefill=asked.prefill, decode=asked.decode, quantize=asked.quantize
    )
    ours = _serve(Serving(model, options), asked, options.block_size, "with caching", on_progress)
    theirs = _serve(
        Serving(model, replace(options, prefix_caching=False), router_module=_RANDOM_ROUTER),
        asked,
        options.block_size,
        "without caching",
        on_progress,
    )
    busy = others.cores_busy()
    machine = {
        **describe_machine(options.threads_each),
        "quantize": asked.quantize,
        "workers": f"{asked.prefill} P + {asked.decode} D",
        "requests": asked.requests,
        "clients": asked.clients,
        "shared tokens": asked.system_tokens,
        "others busy": busy,
    }
    return Report(machine, _rows(ours, theirs), (_NOTE, _saving(ours, theirs), *unrest(busy)))


def _rows(ours: _Served, theirs: _Served) -> list[Row]:
    return [
        Row("prefix/recomputed", ours.recomputed * 100, "% of shared", theirs.recomputed * 100),
        Row("prefix/ttft-mean", mean(ours.ttft_ms), "ms", mean(theirs.ttft_ms)),
        Row("prefix/ttft-p50", median(ours.ttft_ms), "ms", median(theirs.ttft_ms)),
        Row("prefix/ttft-max", max(ours.ttft_ms), "ms", max(theirs.ttft_ms)),
    ]


def _saving(ours: _Served, theirs: _Served) -> str:
    times = mean(theirs.ttft_ms) / mean(ours.ttft_ms)
    return (
        f"{100 - ours.recomputed * 100:.1f} % of the tokens that prompts share were not computed"
        f" again; mean TTFT is {times:.1f}x lower."
    )


def _serve(
    serving: Serving, asked: PrefixBench, block_size: int, how: str, on_progress: Progress
) -> _Served:
    try:
        serving.start(on_progress)
        answers = asyncio.run(_load(serving.address, asked, how, on_progress))
    except (ServeError, KvrelayError) as error:
        raise BenchError(f"{how}: {error}") from error
    finally:
        serving.stop()
    ttft_ms = [answer.timings.ttft_ms for answer in answers]
    return _Served(ttft_ms, _recomputed(answers, asked, block_size))


def _recomputed(answers: Sequence[Completion], asked: PrefixBench, block_size: int) -> float:
    """Of the tokens that all but the first request could have found computed already."""
    shareable = asked.system_tokens // block_size * block_size
    reused = sum(min(answer.cached_tokens, shareable) for answer in answers)
    return 1 - reused / (shareable * (len(answers) - 1))


async def _load(
    address: str, asked: PrefixBench, how: str, on_progress: Progress
) -> list[Completion]:
    """All requests, the same ones for every cluster that is asked."""
    dice = random.Random(0)
    answers: list[Completion] = []
    async with AsyncClient(address) as client:
        (served,) = await client.models()
        if served.max_model_tokens < asked.prompt_tokens + _ANSWER_TOKENS:
            raise BenchError(
                f"the model ends at {served.max_model_tokens} tokens: choose fewer than"
                f" {asked.system_tokens} with --system-tokens"
            )

        def text(count: int) -> list[int]:
            return [dice.randrange(served.vocab_size) for _ in range(count)]

        async def ask(prompt: list[int]) -> Completion:
            stream = client.generate(prompt, max_tokens=_ANSWER_TOKENS, temperature=0)
            return await stream.result()

        async def ask_in_turn(prompts: Iterator[list[int]]) -> None:
            for prompt in prompts:
                answers.append(await ask(prompt))
                on_progress(f"measuring {how}", len(answers) / asked.requests)

        # Of no use to anybody afterwards: for new pages and connections.
        await asyncio.gather(
            *(ask(text(_WARM_UP_TOKENS)) for _ in range(asked.prefill + asked.decode))
        )
        system = text(asked.system_tokens)
        prompts = iter([system + text(_OWN_TOKENS) for _ in range(asked.requests)])
        await asyncio.gather(*(ask_in_turn(prompts) for _ in range(asked.clients)))
    return answers
