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
import json
import random
import sys
import time
from collections.abc import AsyncIterator
from statistics import fmean
from typing import Any

import grpc
import psutil

from cluster.bench.router_clock import late_ms
from kvrelay.rpc import dial
from kvrelay.wire import inference_pb2 as pb

PROMPT_TOKENS = 128
_MANY_TOKENS = 100_000  # more than any stream gets while it is measured
_SETTLE_S = 0.3
_ANSWER_S = 60.0
_METHOD = "/kvrelay.v1.Inference/Generate"


class Load:
    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._held: list[Any] = []
        self._random = random.Random(0)

    async def first_tokens(self, address: str, rate: float, seconds: float) -> dict[str, Any]:
        tasks = []
        due = start = time.perf_counter()
        while due < start + seconds:
            due += self._random.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self._first_token(address)))
        took = time.perf_counter() - start
        outcomes = await asyncio.gather(*tasks)
        return {
            "token_ms": [ms for ms, refused in outcomes if not refused],
            "refused_ms": [ms for ms, refused in outcomes if refused],
            "rate_kept": (due - start) / took,  # 1: the client was never behind
        }

    async def stream(self, address: str, streams: int, seconds: float, pid: int) -> dict[str, Any]:
        """Counts from when every stream has begun."""
        count = _Count(streams)
        calls = [self._call(address, _MANY_TOKENS) for _ in range(streams)]
        readers = [asyncio.create_task(_read(call, count)) for call in calls]
        try:
            async with asyncio.timeout(_ANSWER_S):
                await count.all_begun.wait()
            await asyncio.sleep(_SETTLE_S)
            start, cpu_s = time.perf_counter(), _cpu_s(pid)
            count.restart()
            await asyncio.sleep(seconds)
            took, cpu_s = time.perf_counter() - start, _cpu_s(pid) - cpu_s
            return {"seconds": took, "cpu_s": cpu_s, **count.figures()}
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def hold(self, address: str, streams: int, until: str) -> dict[str, Any]:
        calls = [self._call(address, _MANY_TOKENS) for _ in range(streams)]
        self._held += calls
        async with asyncio.timeout(_ANSWER_S):
            await asyncio.gather(*(_read_to(call, until) for call in calls))
        return {}

    async def release(self) -> dict[str, Any]:
        for call in self._held:
            call.cancel()
        self._held.clear()
        return {}

    async def _first_token(self, address: str) -> tuple[float, bool]:
        """Milliseconds, and whether it was refused."""
        start = time.perf_counter()
        call = self._call(address, max_tokens=1)
        try:
            await _read_to(call, "delta")
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            return (time.perf_counter() - start) * 1000, True
        taken_ms = (time.perf_counter() - start) * 1000
        while await call.read() is not grpc.aio.EOF:
            pass  # to its end: a cancel would be work for the next one's time
        return taken_ms, False

    def _call(self, address: str, max_tokens: int) -> Any:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = dial(address)
        ids = pb.TokenIds(ids=[self._random.randrange(256) for _ in range(PROMPT_TOKENS)])
        sampling = pb.SamplingParams(max_tokens=max_tokens, seed=1)
        method = channel.unary_stream(
            _METHOD, pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
        )
        return method(pb.GenerateRequest(token_ids=ids, sampling=sampling))


class _Count:
    """What all streams together have read since the last `restart`."""

    def __init__(self, streams: int) -> None:
        self.all_begun = asyncio.Event()
        self._to_begin = streams
        self.restart()

    def restart(self) -> None:
        self.tokens = self.messages = 0
        self.late_ms: list[float] = []  # of the oldest token of each message

    def began(self) -> None:
        self._to_begin -= 1
        if not self._to_begin:
            self.all_begun.set()

    def add(self, token_ids: Any) -> None:
        self.messages += 1
        self.tokens += len(token_ids)
        self.late_ms.append(late_ms(token_ids[0]))

    def figures(self) -> dict[str, Any]:
        late = sorted(self.late_ms)
        return {
            "tokens": self.tokens,
            "messages": self.messages,
            "late_mean_ms": fmean(late) if late else 0.0,
            "late_p50_ms": late[len(late) // 2] if late else 0.0,
            "late_p99_ms": late[len(late) * 99 // 100] if late else 0.0,
        }


async def _read(call: AsyncIterator[pb.GenerateResponse], count: _Count) -> None:
    begun = False
    async for message in call:
        token_ids = message.delta.token_ids
        if token_ids:
            if not begun:
                count.began()
            begun = True
            count.add(token_ids)


async def _read_to(call: Any, kind: str) -> None:
    """Raises AioRpcError when the call fails before."""
    while (message := await call.read()) is not grpc.aio.EOF:
        if message.WhichOneof("event") == kind:
            return
    raise EOFError(f"a stream ended before {kind}")


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def _serve() -> None:
    load = Load()
    loop = asyncio.get_running_loop()
    print("{}", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        try:
            result = await getattr(load, command.pop("do"))(**command)
        except (grpc.aio.AioRpcError, EOFError, TimeoutError, psutil.Error) as error:
            result = {"error": " ".join(str(error).split())}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve())
