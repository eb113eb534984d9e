"""A process that sends generated calls, for tests that measure who is beside them: what it takes
to make and send them is not the tested process's. Run as a script.

On stdin one line {"first": N, "count": N, "per_s": RATE, "only": [N, ...] or null} for a round; on
stdout one line of what came of it: {"statuses": {name: count}, "accepted": [N, ...], "wrong": [what
nobody should get]}. It ends when stdin does.
"""

import asyncio
import base64
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

_ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 60.0  # of one call; nobody should wait so long
_AT_ONCE = 64
_EVENTS_MAX = 10  # of one stream: who asked for more by accident goes away
_WRONG_SHOWN = 20
_ACCEPTED = {"OK", "CANCELLED", "200"}  # workers may have had to do with it
_OPEN_SIZES = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
}


class CallSender:
    """The process, as the test sees it."""

    def __init__(self, kind: str, address: str, *arguments: str) -> None:
        """kind: grpc, with a seed and a key; or http, with a file of calls, one a line of JSON."""
        self._process = subprocess.Popen(
            [sys.executable, __file__, kind, address, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
        )

    async def send(
        self, first: int, count: int, per_s: float, only: list[int] | None = None
    ) -> dict[str, Any]:
        """Sends calls `first` to `first + count - 1`, so many a second; what came of them.

        only: of these, each when it would be its turn.
        """
        asked = {"first": first, "count": count, "per_s": per_s, "only": only}
        return await asyncio.to_thread(self._ask, json.dumps(asked))

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the sender ended with status {self._process.wait()}"
        said: dict[str, Any] = json.loads(answer)
        return said

    def close(self) -> None:
        self._process.communicate()


# ---- in the process


class _Grpc:
    def __init__(self, address: str, seed: str, key: str) -> None:
        from generated_calls import STREAMING, generated_call

        self._make, self._streaming = generated_call, STREAMING
        self._seed = int(seed)
        self._key = key
        self._channel = grpc.aio.insecure_channel(address, options=_OPEN_SIZES)

    def call(self, number: int) -> Any:
        return self._make(self._seed, number)

    async def send(self, call: Any) -> tuple[str, str]:
        """The status, and why it is wrong, if it is."""
        metadata = list(call.metadata)
        if not any(name == "authorization" for name, _ in metadata):
            metadata.append(("authorization", f"Bearer {self._key}"))
        streaming = call.method in self._streaming
        kind = self._channel.unary_stream if streaming else self._channel.unary_unary
        under_way = kind(f"/kvrelay.v1.Inference/{call.method}")(
            call.data, metadata=metadata, timeout=_TIMEOUT_S
        )
        cancelling = None
        if call.cancel_ms is not None:
            loop = asyncio.get_running_loop()
            cancelling = loop.call_later(call.cancel_ms / 1000, under_way.cancel)
        try:
            await (self._read(under_way) if streaming else under_way)
        except grpc.aio.AioRpcError as error:
            return self._judge(call, error)
        except asyncio.CancelledError:
            return "CANCELLED", ""  # by us
        finally:
            if cancelling is not None:
                cancelling.cancel()
        return "OK", ""

    async def _read(self, stream: Any) -> None:
        events = 0
        async for _ in stream:
            events += 1
            if events == _EVENTS_MAX:
                stream.cancel()
                return

    def _judge(self, call: Any, error: grpc.aio.AioRpcError) -> tuple[str, str]:
        code, details = error.code(), error.details() or ""
        allowed = code in _REFUSALS
        if code is grpc.StatusCode.UNIMPLEMENTED:
            allowed = call.method == "Teleport"
        wrong = "" if allowed and "Traceback" not in details else details[:200] or "no details"
        return code.name, wrong

    async def close(self) -> None:
        await self._channel.close()


class _Http:
    """Calls as `written` has them, in turn and again from the first."""

    def __init__(self, address: str, file: str) -> None:
        import httpx2

        self._calls = [json.loads(line) for line in Path(file).read_text().splitlines()]
        self._client = httpx2.AsyncClient(base_url=f"http://{address}", timeout=_TIMEOUT_S)

    def call(self, number: int) -> Any:
        return self._calls[number % len(self._calls)]

    async def send(self, call: Any) -> tuple[str, str]:
        """The status, and the answer where the server failed."""
        answer = await self._client.request(
            call["method"],
            call["path"],
            headers=[(name.encode(), value.encode()) for name, value in call["headers"].items()],
            content=base64.b64decode(call["body"]),
        )
        wrong = answer.text[:200] if answer.status_code >= 500 else ""
        return str(answer.status_code), wrong

    async def close(self) -> None:
        await self._client.aclose()


def written(method: str, path: str, headers: Mapping[str, str], body: bytes) -> str:
    """One line of a file of HTTP calls."""
    encoded = base64.b64encode(body).decode()
    return json.dumps({"method": method, "path": path, "headers": dict(headers), "body": encoded})


_SIDES = {"grpc": _Grpc, "http": _Http}


async def _round(
    side: Any, first: int, count: int, per_s: float, only: list[int] | None
) -> dict[str, Any]:
    statuses: Counter[str] = Counter()
    accepted: list[int] = []
    wrong: list[str] = []
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(number: int, call: Any) -> None:
        async with room:
            name, why = await side.send(call)
        statuses[name] += 1
        if name in _ACCEPTED:
            accepted.append(number)
        if why and len(wrong) < _WRONG_SHOWN:
            wrong.append(f"call {number}: {name}: {why}")

    began_s = time.monotonic()
    sent = set(range(first, first + count) if only is None else only)
    async with asyncio.TaskGroup() as group:
        for number in range(first, first + count):
            call = side.call(number) if number in sent else None
            due_s = began_s + (number - first) / per_s
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            if call is not None:
                group.create_task(one(number, call))
    return {"statuses": statuses, "accepted": accepted, "wrong": wrong}


async def _main() -> None:
    kind, address, *arguments = sys.argv[1:]
    side: Any = _SIDES[kind](address, *arguments)
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await _round(side, **json.loads(line))), flush=True)
    finally:
        await side.close()


if __name__ == "__main__":
    asyncio.run(_main())
