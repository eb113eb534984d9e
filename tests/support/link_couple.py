"""One P and one D in processes of their own, with a proxy between them: made, made anew, ended."""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from link_process import End, Nursery
from link_proxy import Proxy
from link_settings import layout

T = TypeVar("T")

SLACK_S = 1.0  # beyond a deadline
NCCL_ABORT_S = 0.5  # of a pair, in link_ends.py
CONTROL_S = 10.0  # a command of the test's own; only a broken test waits this long
_TICK_S = 0.05
_THREADS_MAX, _FDS_MAX = 40, 40  # of an end that closes, whatever it has been through


@dataclass(frozen=True)
class Deadlines:
    lease_ms: int = 400
    connect_ms: int = 600
    reply_ms: int = 500


class Witness:
    """Knows how long the machine has kept this process waiting for its turn: whatever is timed here
    may take so much longer. While every core is taken, seconds are not the links' fault."""

    def __init__(self) -> None:
        self.late_s = 0.0

    async def watch(self) -> None:
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(_TICK_S)
            self.late_s += time.monotonic() - before_s - _TICK_S


class Couple:
    """`decode` may be another's, which then is neither killed nor stopped."""

    def __init__(
        self,
        nursery: Nursery,
        link: str,
        name: str,
        folder: Path,
        deadlines: Deadlines,
        witness: Witness,
        settings: dict[str, Any],
        decode: End | None = None,
    ) -> None:
        self._nursery = nursery
        self.link = link
        self._name = name
        self.deadlines = deadlines
        self.witness = witness
        self.reply_s = deadlines.reply_ms / 1000
        self.lent = decode is not None
        self._forks: list[End] = []
        self._settings = {
            "link": link,
            "socket_dir": str(folder),
            "lease_ms": deadlines.lease_ms,
            "connect_ms": deadlines.connect_ms,
            "reply_ms": deadlines.reply_ms,
            "blocks": 32,
            **settings,
        }
        block_bytes = layout(self._settings["head_dim"]).block_bytes
        self.proxy = Proxy(link, block_bytes, folder)
        if decode is not None:
            self.decode = decode
        self.prefill: End

    async def start(self) -> None:
        await self.proxy.start()
        if self.lent:
            self.proxy.target = await self._address(self.decode)
        else:
            self.decode = await self.fork("decode")
        self.prefill = await self.fork("prefill")

    async def close(self) -> None:
        """Both ends in good order, with nothing left."""
        await self.proxy.cut()
        await self.end(self.prefill)
        if not self.lent:
            await self.end(self.decode)

    async def kill(self) -> None:
        """After `close`, or instead of it."""
        for end in self._forks:
            await end.kill()
        await self.proxy.close()

    async def end(self, end: End) -> None:
        """In good order, with nothing left."""
        state = await self.within(end.ask("close"), 2 * self.reply_s + 2, "close")
        assert state["threads"] < _THREADS_MAX, state
        assert state["fds"] < _FDS_MAX, state
        await end.kill()

    async def fork(self, role: str) -> End:
        name = f"{self._name}-{role[0]}{len(self._forks)}"
        end = await self._nursery.fork(role, name, **self._settings)
        self._forks.append(end)
        if role == "decode":
            self.proxy.target = await self._address(end)
        return end

    async def _address(self, decode: End) -> str:
        return (await decode.ask("address"))["address"]

    async def unlink(self) -> None:
        await self.proxy.cut()
        if self.prefill.alive:
            await self.within(self.prefill.ask("unlinked"), self.reply_s + NCCL_ABORT_S, "unlinked")

    @property
    def proxy_endpoint(self) -> tuple[str, str]:
        """What D's tickets are to name, signed as they are: transport and address."""
        return "tcp" if self.link == "tls" else self.link, self.proxy.address

    async def within(self, work: Awaitable[T], deadline_s: float, what: str) -> T:
        """Its result; AssertionError when it does not come within the deadline and a second."""
        task, started, late_s = asyncio.ensure_future(work), time.monotonic(), self.witness.late_s
        try:
            while not task.done():
                taken_s = time.monotonic() - started
                left_s = deadline_s + SLACK_S + self.witness.late_s - late_s - taken_s
                assert left_s > 0, f"{what} has not come within {taken_s:.2f} s"
                await asyncio.wait({task}, timeout=left_s)
        finally:
            task.cancel()
        return task.result()
