"""The prefill end of a process of link_ends.py: the real WriterPool.

It does with it what prefill_worker/service.py does, tells the test each phase of a transfer, and
can be held at any of them.
"""

import asyncio
import base64
import contextlib
import time
from typing import Any

import numpy as np
from link_gate import FaultyNccl, Gate, hold_copies
from link_settings import Say, block_sums, layout, own_state, worker_config

from kvrelay.kv.pool import KVPool
from kvrelay.transport import nccl_link
from kvrelay.transport.errors import LinkError
from kvrelay.transport.writer import Transfer, WriterLink
from kvrelay.transport.writer_pool import WriterPool
from kvrelay.wire.transfer_pb2 import Ticket


class PrefillEnd:
    """Settings as of DecodeEnd."""

    def __init__(self, settings: dict[str, Any], say: Say) -> None:
        self.config = worker_config(settings)
        # The upper half is for what `beside` sends.
        self.pool = KVPool(layout(settings["head_dim"]), 2 * settings["blocks"])
        self.gate = Gate(say)
        self.nccl = FaultyNccl(self.gate) if settings["link"] == "nccl" else None
        self.writers = WriterPool(self.config, settings["name"], self.pool, self.nccl)
        self._say = say
        self._go = asyncio.Event()
        self._given_up = False
        hold_copies(self.gate)

    async def do_start(self) -> dict[str, Any]:
        return {}

    async def do_transfer(
        self,
        ticket: str,
        pieces: list[int],
        content: int,
        pause: str = "",
        hold: int = -1,
        flips: int = 0,
        paired: bool = False,
    ) -> dict[str, Any]:
        """A whole transfer as the prefill service does it: begin, a push for each of `pieces`,
        commit. Tells each phase when it is there, and waits at `pause` for `go`.

        hold: copies of blocks before the one that is held in its middle, -1 for none.
        flips: how many groups of blocks NCCL spoils.
        paired: waits until an NCCL pair is open, or could not be opened.
        """
        self._go.clear()
        self._given_up = False
        self.gate.arm(hold)
        source = self._filled(sum(pieces), content)
        self._say(event="sums", sums=block_sums(self.pool, source))
        run = _Run(self, Ticket.FromString(base64.b64decode(ticket)), source, pieces, pause)
        if self.nccl is not None:
            self.nccl.flips = flips
        return await run.whole(paired)

    async def do_beside(self, ticket: str, pieces: list[int], content: int) -> dict[str, Any]:
        """Another transfer on the same link, which tells nothing and waits for nobody."""
        source = self._filled(sum(pieces), content, above=self.pool.blocks // 2)
        sums = block_sums(self.pool, source)
        run = _Run(self, Ticket.FromString(base64.b64decode(ticket)), source, pieces, None)
        return {"sums": sums, **await run.whole()}

    async def do_go(self, give_up: bool = False) -> dict[str, Any]:
        self._given_up = give_up
        self._go.set()
        return {}

    async def do_open_gate(self) -> dict[str, Any]:
        self.gate.open()
        return {}

    async def do_unlinked(self) -> dict[str, Any]:
        """Answers when its links, which the test has cut, have noticed."""
        await asyncio.gather(*(link._reader for link in self._links()), return_exceptions=True)
        return {}

    async def do_state(self) -> dict[str, Any]:
        return {
            "transfers": sum(len(link._transfers) + len(link._begun) for link in self._links()),
            "links": sum(not link.closed for link in self._links()),
            **own_state(),
        }

    async def do_close(self) -> dict[str, Any]:
        await self.writers.close()
        return await self.do_state()

    def _filled(self, count: int, content: int, above: int = 0) -> list[int]:
        """So many blocks of one half of the pool, with new bytes."""
        rng = np.random.default_rng(content)
        source = (above + rng.permutation(self.pool.blocks // 2)[:count]).tolist()
        for block in source:
            self.pool.bytes[block] = np.frombuffer(rng.bytes(self.pool.bytes.shape[1]), np.uint8)
        return source

    async def at(self, phase: str, pause: str | None) -> None:
        """pause: None says nothing and waits for nobody."""
        if pause is None:
            return
        self._say(event="at", phase=phase)
        if phase == pause:
            await self._go.wait()
            self._go.clear()
            if self._given_up:
                raise LinkError("given up by its own worker")

    def _links(self) -> list[WriterLink]:
        made = [task for task in self.writers._links.values() if task.done()]
        return [task.result() for task in made if not task.cancelled() and not task.exception()]


class _Run:
    """One transfer of PrefillEnd; `waits_s` has how long each of its waits took."""

    def __init__(
        self,
        end: PrefillEnd,
        ticket: Ticket,
        source: list[int],
        pieces: list[int],
        pause: str | None,
    ) -> None:
        self.waits_s: dict[str, float] = {}
        self._end = end
        self._ticket = ticket
        self._source = source
        self._pieces = pieces
        self._pause = pause

    async def whole(self, paired: bool = False) -> dict[str, Any]:
        carried: list[str] = []
        transfer: Transfer | None = None
        ending = "committed"
        started = time.perf_counter()
        try:
            transfer = await self._timed("begin", self._end.writers.begin(self._ticket))
            if paired:
                await _open_pair(transfer)
            await self._end.at("begun", self._pause)
            await self._push(transfer, carried)
            await self._end.at("pushed", self._pause)
            await self._end.at("committing", self._pause)
            reply_s = self._end.config.link_reply_ms / 1000
            await self._timed("commit", transfer.commit(7, reply_s))
        except LinkError as error:
            ending = f"failed: {error}"
        taken_s = time.perf_counter() - started
        if transfer is not None:
            if not transfer.committed:
                with contextlib.suppress(LinkError):
                    await self._timed("abort", transfer.abort("given up"))
            transfer.close()
        return {"ending": ending, "waits_s": self.waits_s, "carried": carried, "taken_s": taken_s}

    async def _push(self, transfer: Transfer, carried: list[str]) -> None:
        at = 0
        for number, piece in enumerate(self._pieces):
            if number == 1:
                await self._end.at("between", self._pause)
            await self._timed("push", transfer.push(self._source[at : at + piece]))
            carried.append(transfer.transport)
            at += piece

    async def _timed(self, what: str, work: Any) -> Any:
        started = time.perf_counter()
        try:
            return await work
        finally:
            taken = time.perf_counter() - started
            self.waits_s[what] = max(taken, self.waits_s.get(what, 0))


async def _open_pair(transfer: Transfer) -> None:
    sender = transfer._link.sender
    if not isinstance(sender, nccl_link.NcclSender):
        return
    with contextlib.suppress(LinkError):
        await transfer.push([])
    if sender._opening is not None:
        await asyncio.wait({sender._opening})
