"""What a served cluster adds to the steps of its engines: hand-off, router, and between two steps.

Called by profile.py with the address of 1P + 1D that nobody else asks anything.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from cluster.capacity.device import SLOWED_MAX, BusyNeighbour, HandOffTime, StepTime, attended
from cluster.preparation import Progress
from cluster.profiling.fit import least_squares
from kvrelay.client import AsyncClient, Completion

_STREAMS = (1, 4, 8)
_STREAM_PROMPT = 32  # so short that all answers are soon under way
_STREAM_ANSWER = 96
_LEAST_MS = 1e-6
_BUSY_STREAMS = 4  # beside prompts
_BUSY_ANSWERS = 4  # one after another, in each of the streams


@dataclass(frozen=True)
class ServedAsk:
    """prompts: the lengths that are handed off, each of one chunk. streams: answers at once, whose
    gaps are measured."""

    prompts: tuple[int, ...]
    rounds: int = 12
    streams: tuple[int, ...] = _STREAMS
    answer_tokens: int = _STREAM_ANSWER

    @classmethod
    def of(cls, block_tokens: int, chunk_tokens: int, *, quick: bool) -> "ServedAsk":
        prompts = tuple(sorted({min(block_tokens, chunk_tokens), chunk_tokens}))
        return cls(prompts, 2, _STREAMS[:2], 16) if quick else cls(prompts)


@dataclass(frozen=True)
class Gaps:
    """Of `streams` answers at once, each of about `context` tokens: what is between two tokens."""

    streams: int
    context: int
    gap_ms: float


@dataclass(frozen=True)
class BothBusy:
    """Prompts one after another, of a full chunk each, beside answers: what each of the two took,
    and what it takes alone. router_ms: of a first token, meanwhile."""

    router_ms: float
    prefill_ms: float
    prefill_alone_ms: float
    gap_ms: float
    gap_alone_ms: float


@dataclass
class ServedTimes:
    """By the tokens of a prompt: what of its hand-off its request waits for, and the time from the
    call to the first token, in ms."""

    link: str
    exposed_ms: dict[int, list[float]] = field(default_factory=dict)
    first_token_ms: dict[int, list[float]] = field(default_factory=dict)
    gaps: list[Gaps] = field(default_factory=list)
    both: BothBusy | None = None

    def neighbour(self) -> BusyNeighbour | None:
        """How much longer each phase takes beside the other: the workers share memory, and the
        router and its clients take their time from both. None where it was not measured."""
        if self.both is None:
            return None
        return BusyNeighbour(
            prefill=min(SLOWED_MAX, max(1.0, self.both.prefill_ms / self.both.prefill_alone_ms)),
            decode=min(SLOWED_MAX, max(1.0, self.both.gap_ms / self.both.gap_alone_ms)),
        )

    def hand_off(self, block_tokens: int) -> HandOffTime:
        """By the shortest and the longest prompt."""
        least, most = min(self.exposed_ms), max(self.exposed_ms)
        least_ms, most_ms = (median(self.exposed_ms[tokens]) for tokens in (least, most))
        blocks, more = (-(-tokens // block_tokens) for tokens in (least, most))
        per_block = max(0.0, most_ms - least_ms) / (more - blocks) if more > blocks else 0.0
        return HandOffTime(
            link=self.link,
            fixed_ms=max(0.0, least_ms - per_block * blocks),
            ms_per_block=per_block,
        )

    def with_turns(self, step: StepTime) -> StepTime:
        """`step` with what passes between two steps: a part for each, and one for each sequence,
        whose token has to be sent."""
        if not self.gaps:
            return step
        parts = np.array([(1.0, gap.streams) for gap in self.gaps])
        predicted = [step.ms(0, 0, gap.streams, gap.streams * gap.context) for gap in self.gaps]
        times = np.array([gap.gap_ms for gap in self.gaps])
        each, per_sequence = least_squares(
            parts / times[:, None], np.maximum(0.0, 1 - np.array(predicted) / times)
        )
        return step.model_copy(
            update={
                "base_ms": step.base_ms + float(each),
                "ms_per_sequence": step.ms_per_sequence + float(per_sequence),
            }
        )

    def router_ms(self, step: StepTime) -> float:
        """What first tokens take beyond the step that makes them: half of them of an idle cluster,
        half of a busy one, where messages wait for a core."""
        idle_ms = [
            taken - step.ms(tokens, attended(tokens, 0), 0, 0)
            for tokens, times in self.first_token_ms.items()
            for taken in times
        ]
        found_ms = max(0.0, median(idle_ms))
        return found_ms if self.both is None else (found_ms + self.both.router_ms) / 2


async def measure_served(
    address: str, link: str, asked: ServedAsk, on_progress: Progress
) -> ServedTimes:
    """Raises KvrelayError when a request fails."""
    times = ServedTimes(link)
    async with AsyncClient(address) as client:
        (served,) = await client.models()
        load = _Load(client, served.vocab_size)
        for tokens in asked.prompts * 2:  # of no use to anybody: for new pages and connections
            await load.ask(tokens, 2)
        for number in range(asked.rounds):
            on_progress(f"measuring the hand-off over {link}", number / asked.rounds)
            for tokens in asked.prompts:
                completion, arrived_ms = await load.ask(tokens, 2)
                times.exposed_ms.setdefault(tokens, []).append(completion.timings.kv_exposed_ms)
                times.first_token_ms.setdefault(tokens, []).append(arrived_ms[0])
        for number, streams in enumerate(asked.streams):
            on_progress("measuring between steps", number / len(asked.streams))
            times.gaps.append(await load.gaps(streams, asked.answer_tokens))
        on_progress("measuring both workers at once", None)
        times.both = await load.both_busy(max(asked.prompts), asked.answer_tokens)
    return times


class _Load:
    """Asks for answers to prompts that nobody has asked before."""

    def __init__(self, client: AsyncClient, vocab: int) -> None:
        self._client = client
        self._vocab = vocab
        self._dice = random.Random(0)

    async def ask(self, prompt_tokens: int, answer_tokens: int) -> tuple[Completion, list[float]]:
        """The answer, and when each of its tokens came, in ms since the call."""
        prompt = [self._dice.randrange(self._vocab) for _ in range(prompt_tokens)]
        arrived_ms: list[float] = []
        began_s = time.perf_counter()
        async with self._client.generate(
            prompt, max_tokens=answer_tokens, temperature=0, ignore_eos=True
        ) as stream:
            async for delta in stream.deltas():
                now_ms = (time.perf_counter() - began_s) * 1000
                arrived_ms += [now_ms] * len(delta.token_ids)
            return await stream.result(), arrived_ms

    async def both_busy(self, prompt_tokens: int, answer_tokens: int) -> BothBusy:
        """Answers in several streams, alone and beside prompts; and prompts alone."""
        alone = [await self.gaps(_BUSY_STREAMS, answer_tokens) for _ in range(_BUSY_ANSWERS)]
        alone_ms = [(await self._prompt_ms(prompt_tokens))[0] for _ in range(_BUSY_ANSWERS)]
        beside: list[tuple[float, float]] = []
        under_way, over = asyncio.Event(), asyncio.Event()

        async def prompts() -> None:
            while not over.is_set():
                beside.append(await self._prompt_ms(prompt_tokens))
                under_way.set()

        async def answers() -> list[Gaps]:
            try:
                await under_way.wait()
                return [await self.gaps(_BUSY_STREAMS, answer_tokens) for _ in range(_BUSY_ANSWERS)]
            finally:
                over.set()

        _, busy = await asyncio.gather(prompts(), answers())
        return BothBusy(
            prefill_ms=median(prefill_ms for prefill_ms, _ in beside),
            router_ms=median(router_ms for _, router_ms in beside),
            prefill_alone_ms=median(alone_ms),
            gap_ms=median(found.gap_ms for found in busy),
            gap_alone_ms=median(found.gap_ms for found in alone),
        )

    async def _prompt_ms(self, prompt_tokens: int) -> tuple[float, float]:
        """What the prefill worker took, as it says, and what the first token took beyond that."""
        completion, arrived_ms = await self.ask(prompt_tokens, 1)
        prefill_ms = max(_LEAST_MS, completion.timings.prefill_ms)
        return prefill_ms, max(0.0, arrived_ms[0] - prefill_ms)

    async def gaps(self, streams: int, answer_tokens: int) -> Gaps:
        """While all of them are under way."""
        asks = [self._timed_answer(answer_tokens) for _ in range(streams)]
        arrivals_ms = await asyncio.gather(*asks)
        begin_ms = max(times[0] for times in arrivals_ms)
        end_ms = min(times[-1] for times in arrivals_ms)
        gaps, places = [], []
        for times in arrivals_ms:
            inside = [i for i, ms in enumerate(times) if begin_ms <= ms <= end_ms] or [0, 1]
            first, last = inside[0], inside[-1]
            gaps.append((times[last] - times[first]) / max(1, last - first))
            places.append((first + last) / 2)
        context = _STREAM_PROMPT + round(sum(places) / len(places))
        return Gaps(streams, context, max(_LEAST_MS, median(gaps)))

    async def _timed_answer(self, answer_tokens: int) -> Sequence[float]:
        began_ms = time.perf_counter() * 1000
        _, arrived_ms = await self.ask(_STREAM_PROMPT, answer_tokens)
        return [began_ms + ms for ms in arrived_ms]
