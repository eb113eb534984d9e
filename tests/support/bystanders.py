"""Well-behaved streams beside a test that is not: their tokens, and the gaps between them.

Gaps are measured in turns: a window without what the test does, a window with it. So both have seen
the same weather, on a machine that others use as well.
"""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from call_sender import CallSender

from kvrelay.client import AsyncClient

_PROMPT = "once upon a time"
_WINDOW_S = 4.0
_WARM_S = 1.0  # until the first window: batches fill, prompts are cached
_ANSWER_S = 60.0  # only a broken test waits so long


@dataclass
class Gaps:
    """In ms, a list for each window: without hostile calls, and with them."""

    alone: list[list[float]] = field(default_factory=list)
    beside: list[list[float]] = field(default_factory=list)

    @property
    def p99_ratio(self) -> float:
        """What hostile calls make of it."""
        return _p99_ms(self.beside) / _p99_ms(self.alone)

    @property
    def noise_ratio(self) -> float:
        """What the machine makes of it: between windows that do not differ, at least 1."""
        if len(self.alone) < 2:
            return math.inf
        even, odd = _p99_ms(self.alone[::2]), _p99_ms(self.alone[1::2])
        return max(even, odd) / min(even, odd)

    def __str__(self) -> str:
        rows = []
        for name, windows in (("alone", self.alone), ("beside", self.beside)):
            gaps = np.concatenate(windows)
            p50, p95, p99 = (float(np.percentile(gaps, p)) for p in (50, 95, 99))
            rows.append(f"{name}: {len(gaps)} gaps, p50 {p50:.2f}, p95 {p95:.2f}, p99 {p99:.2f} ms")
        ratios = (
            f"median p99 x {self.p99_ratio:.2f}, between windows alone x {self.noise_ratio:.2f}"
        )
        return f"{'; '.join(rows)}; {ratios}"

    def check(self, p99_ratio_max: float) -> None:
        """Skips the test where the machine's own noise is too large to tell."""
        if self.p99_ratio <= p99_ratio_max:
            return
        if self.noise_ratio > p99_ratio_max:
            pytest.skip(f"the machine is too busy to tell: {self}")
        pytest.fail(f"bystanders wait for others' calls: {self}")


def _p99_ms(windows: list[list[float]]) -> float:
    """Of the windows' p99s the median: a burst of somebody else's work is in few of them."""
    return float(np.median([np.percentile(gaps, 99) for gaps in windows if gaps]))


class Bystanders:
    """`count` streams, each begun again when it ends; answers of `tokens` tokens."""

    def __init__(self, client: AsyncClient, *, count: int = 4, tokens: int = 300) -> None:
        self.gaps = Gaps()
        self.answers = 0
        self._client = client
        self._count = count
        self._tokens = tokens
        self._window: list[float] | None = None  # where gaps go now
        self._window_began_s = 0.0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Bystanders"]:
        """Raises what went wrong with them, wrong tokens included."""
        right = [await self._ask(number) for number in range(self._count)]
        async with asyncio.TaskGroup() as group:
            streams = [
                group.create_task(self._stream(number, right[number]))
                for number in range(self._count)
            ]
            await asyncio.sleep(_WARM_S)
            yield self
            for stream in streams:
                stream.cancel()
        assert self.answers >= self._count, "they have seen nothing"

    @contextlib.contextmanager
    def alone(self) -> Any:
        with self._measured(self.gaps.alone):
            yield

    @contextlib.contextmanager
    def beside(self) -> Any:
        with self._measured(self.gaps.beside):
            yield

    @contextlib.contextmanager
    def _measured(self, windows: list[list[float]]) -> Any:
        windows.append([])
        self._window, self._window_began_s = windows[-1], time.monotonic()
        try:
            yield
        finally:
            self._window = None

    async def _ask(self, number: int) -> tuple[int, ...]:
        return (await self._generate(number).result()).token_ids

    def _generate(self, number: int) -> Any:
        options = {"max_tokens": self._tokens, "temperature": 1.0, "seed": number}
        return self._client.generate(f"{_PROMPT} {number}", timeout_s=_ANSWER_S, **options)

    async def _stream(self, number: int, right: tuple[int, ...]) -> None:
        while True:
            got: list[int] = []
            last_s: float | None = None
            async for delta in self._generate(number).deltas():
                if not delta.token_ids:
                    continue
                now_s = time.monotonic()
                if (
                    last_s is not None
                    and self._window is not None
                    and last_s >= self._window_began_s
                ):
                    self._window.append((now_s - last_s) * 1000)
                last_s = now_s
                got += delta.token_ids
                assert tuple(got) == right[: len(got)], f"bystander {number} got other tokens"
            assert len(got) == len(right), f"bystander {number} got {len(got)} tokens"
            self.answers += 1


async def sent_in_turns(
    bystanders: Bystanders, sender: CallSender, calls: int, per_s: float
) -> tuple[Counter[str], list[str]]:
    """Sends so many, in windows; after each comes one with those of its calls that were accepted.

    Returns the statuses that came back, and what nobody should have got.
    """
    statuses: Counter[str] = Counter()
    wrong: list[str] = []
    window_calls = round(per_s * _WINDOW_S)
    await sender.send(0, 0, per_s)  # its start is over
    for first in range(0, calls, window_calls):
        count = min(window_calls, calls - first)
        with bystanders.beside():
            said = await sender.send(first, count, per_s)
        with bystanders.alone():
            usual = await sender.send(first, count, per_s, said["accepted"])
        statuses.update(said["statuses"])
        wrong += usual["wrong"] + said["wrong"]
    return statuses, wrong
