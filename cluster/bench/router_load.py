"""The client of `kvrelay bench router`: asks for answers over gRPC, and notes when they come.

Started by router_processes.py as `python -m cluster.bench.router_load`, in a process of its own:
what it costs is not the router's. Each line of stdin is a command, a JSON object, which is answered
with one; `address` is a server's:

  {"do": "first_tokens", "address": A, "rate": R, "seconds": S}
      open loop, Poisson: ms until the first token of each request, or until it was refused
  {"do": "stream", "address": A, "streams": N, "seconds": S, "pid": P}
      what came, and the processor time that P used meanwhile
  {"do": "hold", "address": A, "streams": N, "until": EVENT}
      N more streams, each read up to its `accepted` or `delta`, and left open
  {"do": "release"}
      cancels those
"""

import asyncio
import random
import time
from collections.abc import Callable
from statistics import fmean
from typing import Any

import psutil

from cluster.bench.answering import answer_lines
from cluster.bench.router_clock import late_ms
from cluster.bench.router_wire import RESOURCE_EXHAUSTED, Connection
from kvrelay.wire import inference_pb2 as pb

PROMPT_TOKENS = 128
_MANY_TOKENS = 100_000  # more than any stream gets while it is measured
_SETTLE_S = 0.3
_ANSWER_S = 60.0
_METHOD = "/kvrelay.v1.Inference/Generate"


class LoadError(Exception):
    """An answer was not what it should be."""


class Load:
    def __init__(self) -> None:
        self._connections: dict[str, Connection] = {}
        self._held: list[tuple[Connection, int]] = []
        self._random = random.Random(0)

    async def first_tokens(self, address: str, rate: float, seconds: float) -> dict[str, Any]:
        connection = await self._connection(address)
        asked = []
        due = start = time.perf_counter()
        while due < start + seconds:
            due += self._random.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            asked.append(_First())
            self._call(connection, 1, asked[-1].on_message, asked[-1].on_end)
        await _within(_ANSWER_S, *(first.ended for first in asked))
        return {
            "token_ms": [first.token_ms for first in asked if first.token_ms is not None],
            "refused_ms": [first.refused_ms for first in asked if first.refused_ms is not None],
        }

    async def stream(self, address: str, streams: int, seconds: float, pid: int) -> dict[str, Any]:
        """Counts from when every stream has begun."""
        connection = await self._connection(address)
        count = _Count()
        begun = [asyncio.get_running_loop().create_future() for _ in range(streams)]
        calls = [
            self._call(connection, _MANY_TOKENS, count.reader(one), _failing(one)) for one in begun
        ]
        try:
            await _within(_ANSWER_S, *begun)
            await asyncio.sleep(_SETTLE_S)
            start, cpu_s = time.perf_counter(), _cpu_s(pid)
            count.restart()
            await asyncio.sleep(seconds)
            took, cpu_s = time.perf_counter() - start, _cpu_s(pid) - cpu_s
            return {"seconds": took, "cpu_s": cpu_s, **count.figures()}
        finally:
            for call in calls:
                connection.cancel(call)

    async def hold(self, address: str, streams: int, until: str) -> dict[str, Any]:
        connection = await self._connection(address)
        begun = [asyncio.get_running_loop().create_future() for _ in range(streams)]
        for one in begun:
            call = self._call(connection, _MANY_TOKENS, _waiting_for(until, one), _failing(one))
            self._held.append((connection, call))
        await _within(_ANSWER_S, *begun)
        return {}

    async def release(self) -> dict[str, Any]:
        for connection, call in self._held:
            connection.cancel(call)
        self._held.clear()
        return {}

    async def _connection(self, address: str) -> Connection:
        if address not in self._connections:
            self._connections[address] = await Connection.open(address, _METHOD)
        return self._connections[address]

    def _call(
        self,
        connection: Connection,
        max_tokens: int,
        on_message: Callable[[bytes], None],
        on_end: Callable[[int | None], None],
    ) -> int:
        ids = pb.TokenIds(ids=[self._random.randrange(256) for _ in range(PROMPT_TOKENS)])
        sampling = pb.SamplingParams(max_tokens=max_tokens, seed=1)
        request = pb.GenerateRequest(token_ids=ids, sampling=sampling)
        return connection.call(request.SerializeToString(), on_message, on_end)


class _First:
    """One request, up to its first token or its refusal."""

    def __init__(self) -> None:
        self.token_ms: float | None = None
        self.refused_ms: float | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._start = time.perf_counter()

    def on_message(self, data: bytes) -> None:
        if self.token_ms is None and pb.GenerateResponse.FromString(data).HasField("delta"):
            self.token_ms = (time.perf_counter() - self._start) * 1000

    def on_end(self, status: int | None) -> None:
        if status == RESOURCE_EXHAUSTED:
            self.refused_ms = (time.perf_counter() - self._start) * 1000
        elif status or self.token_ms is None:
            self.ended.set_exception(LoadError(f"a request ended with status {status}"))
            return
        self.ended.set_result(None)


class _Count:
    """What all streams together have read since the last `restart`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.tokens = self.messages = 0
        self.late_ms: list[float] = []  # of the oldest token of each message

    def reader(self, begun: "asyncio.Future[None]") -> Callable[[bytes], None]:
        def on_message(data: bytes) -> None:
            token_ids = pb.GenerateResponse.FromString(data).delta.token_ids
            if token_ids:
                self.messages += 1
                self.tokens += len(token_ids)
                self.late_ms.append(late_ms(token_ids[0]))
                _resolve(begun)

        return on_message

    def figures(self) -> dict[str, Any]:
        late = sorted(self.late_ms) or [0.0]
        return {
            "tokens": self.tokens,
            "messages": self.messages,
            "late_mean_ms": fmean(late),
            "late_p50_ms": late[len(late) // 2],
            "late_p99_ms": late[len(late) * 99 // 100],
        }


def _waiting_for(kind: str, begun: "asyncio.Future[None]") -> Callable[[bytes], None]:
    def on_message(data: bytes) -> None:
        if pb.GenerateResponse.FromString(data).WhichOneof("event") == kind:
            _resolve(begun)

    return on_message


def _failing(begun: "asyncio.Future[None]") -> Callable[[int | None], None]:
    """For a call that is not to end before it is cancelled."""

    def on_end(status: int | None) -> None:
        if not begun.done():
            begun.set_exception(LoadError(f"a stream ended with status {status}"))

    return on_end


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


async def _within(timeout_s: float, *futures: "asyncio.Future[None]") -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*futures)
    except TimeoutError:
        raise LoadError(f"answers did not come within {timeout_s:g} s") from None


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    asyncio.run(answer_lines(Load, (LoadError, OSError, psutil.Error)))
