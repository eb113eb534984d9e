"""What the hand-off costs a request: a served model beside the same prefill with no hand-off.

Called by transport.py. The served side is `kvrelay serve`, one worker of each kind, each on its own
core; the other is our engine alone, in this process, on the prefill worker's core.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from statistics import mean, median

from cluster.bench.loading import BLOCK_SIZE, EngineChoice, attached_pool, loaded_runner
from cluster.bench.report import BenchError, Row
from cluster.cores import slots
from cluster.model_store import PreparedModel
from cluster.options import ServeError, ServeOptions
from cluster.preparation import Progress
from cluster.serving import Serving
from kvrelay.client import Client, Completion
from kvrelay.config import Quantize, Transport
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.step import Slice

PROMPT_TOKENS = 1024
_ANSWER_TOKENS = 17
_CHUNK_TOKENS = 256


def bench_hand_off(
    model: PreparedModel,
    link: Transport,
    quantize: Quantize,
    rounds: int,
    on_progress: Progress,
) -> list[Row]:
    """Exposed transfer, TTFT, and the gap after the first token, for prompts of 1,024 tokens.

    Raises:
        BenchError: the model cannot be served.
    """
    options = ServeOptions(
        port=0,
        http_port=0,
        transport=link,
        quantize=quantize,
        chunk_tokens=_CHUNK_TOKENS,
        local_prefill="never",
        lend_cores=False,  # as the runner beside it
    )
    choice = EngineChoice(quantize, "auto", options.threads_each)
    serving = Serving(model, options)
    try:
        serving.start(on_progress)
        with (
            loaded_runner(model.path, choice, on_progress) as runner,
            attached_pool(runner, PROMPT_TOKENS // BLOCK_SIZE),
            Client(serving.address) as client,
            _on_cores_of_prefill(options),
        ):
            return _measure(client, runner, link, rounds, on_progress)
    except ServeError as error:
        raise BenchError(str(error)) from error
    finally:
        serving.stop()


def _measure(
    client: Client, runner: ModelRunner, link: str, rounds: int, on_progress: Progress
) -> list[Row]:
    """Times to the first token in turns with the engine alone; then gaps, of requests that follow
    each other: what runs in between leaves a decode worker, idle for seconds, with cold caches."""
    alone_ms: list[float] = []
    answers: list[Completion] = []
    gaps: list[list[float]] = []
    for number in range(-1, 2 * rounds):  # the first is for caches and new pages
        on_progress(f"measuring the hand-off over {link}", max(0, number) / (2 * rounds))
        prompt = [(7 * number + 3 * i) % 1000 + 100 for i in range(PROMPT_TOKENS)]
        in_turns = number < rounds
        taken = _prefill_alone_ms(runner, prompt) if in_turns else 0.0
        completion, times = _ask(client, prompt)
        if number < 0 or len(times) <= 2:  # an answer may end at once
            continue
        if in_turns:
            alone_ms.append(taken)
            answers.append(completion)
        else:
            gaps.append([(b - a) * 1000 for a, b in pairwise(times)])
    return _rows(link, alone_ms, answers, gaps)


def _rows(
    link: str, alone_ms: list[float], answers: list[Completion], gaps: list[list[float]]
) -> list[Row]:
    if not answers or not gaps:
        raise BenchError(f"no answer over {link} had more than two tokens: no gaps to measure")
    timings = [answer.timings for answer in answers]
    alone = median(alone_ms)
    name = f"{link}/prompt-{PROMPT_TOKENS}"
    exposed = median(t.kv_exposed_ms / t.prefill_ms for t in timings)
    return [
        Row(f"{name}/prefill", median(t.prefill_ms for t in timings), "ms", alone),
        Row(f"{name}/ttft", median(t.ttft_ms for t in timings), "ms", alone),
        Row(f"{name}/exposed", median(t.kv_exposed_ms for t in timings), "ms"),
        Row(f"{name}/exposed-share", exposed * 100, "% of prefill"),
        Row(
            f"{name}/gap-1-2",
            median(own[0] for own in gaps),
            "ms",
            median(mean(own[1:]) for own in gaps),
        ),
    ]


def _prefill_alone_ms(runner: ModelRunner, prompt: list[int]) -> float:
    blocks = list(range(PROMPT_TOKENS // BLOCK_SIZE))
    started = time.perf_counter()
    for start in range(0, PROMPT_TOKENS, _CHUNK_TOKENS):
        end = start + _CHUNK_TOKENS
        runner.step([Slice(prompt[start:end], start, blocks)], [end == PROMPT_TOKENS])
    return (time.perf_counter() - started) * 1000


def _ask(client: Client, prompt: list[int]) -> tuple[Completion, list[float]]:
    """The answer, and when each of its tokens came."""
    times: list[float] = []
    with client.generate(prompt, max_tokens=_ANSWER_TOKENS, temperature=0) as stream:
        for delta in stream.deltas():
            times += [time.perf_counter()] * len(delta.token_ids)
        return stream.result(), times


@contextlib.contextmanager
def _on_cores_of_prefill(options: ServeOptions) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    cores = slots(options)[0].cores
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
