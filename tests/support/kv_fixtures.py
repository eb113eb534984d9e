"""Small layouts, samplings, tickets and both ends of a KV link, for the tests of kv, the hand-off,
the schedule and the links.

The decode end is the real Listener over the real HandOff; `Book` only puts a clock in front of it
and notes what the links said.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decode_worker.handoff import HandOff
from decode_worker.reservation import Key, ReservationEvent
from kvrelay.config import WorkerConfig
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.ledger import BlockLedger
from kvrelay.kv.pool import KVPool
from kvrelay.transport.listener import Listener
from kvrelay.transport.writer_pool import WriterPool
from kvrelay.wire.transfer_pb2 import Ticket

LAYOUT = KVLayout("tiny", "float32", layers=2, block_size=4, kv_heads=1, head_dim=2)

# Only a broken test waits this long.
DEADLINE_S = 5.0


def sampling(max_tokens: int = 1, **changes: Any) -> SamplingParams:
    """Greedy, without end-of-sequence tokens, unless told otherwise."""
    defaults: dict[str, Any] = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 0,
        "eos_token_ids": frozenset(),
    }
    return SamplingParams(max_tokens=max_tokens, **{**defaults, **changes})


def worker_config(socket_dir: Path, **changes: Any) -> WorkerConfig:
    return WorkerConfig(
        model_path=Path("none"), cluster_key="k" * 16, socket_dir=socket_dir, **changes
    )


class Book:
    """HandOff behind the links' TransferBook; `events` holds what the links told it."""

    def __init__(self, handoff: HandOff) -> None:
        self.handoff = handoff
        self.events: list[tuple[Any, ...]] = []
        self.now_ms = 0
        self.expect = handoff.expect
        self.awaits_again = handoff.awaits_again
        self.committed: Callable[[int], None]
        self._changed = asyncio.Event()

    def begin(self, ticket: Ticket) -> None:
        self.handoff.begin(ticket, self.now_ms)
        self._note("begin", ticket.transfer_id)

    def received(self, transfer_id: int, first_index: int, count: int, bad: Sequence[int]) -> None:
        self.handoff.received(transfer_id, first_index, count, bad, 0)
        self._note("received", transfer_id, count)

    def commit(self, transfer_id: int, blocks: int, first_token_id: int) -> None:
        if self.handoff.commit(transfer_id, blocks) is not None:
            self.committed(transfer_id)
            self._note("commit", transfer_id, first_token_id)

    def lost(self, transfer_id: int, reason: str) -> None:
        self.handoff.writer_lost(transfer_id)
        self._note("lost", transfer_id, reason)

    def lost_transfers(self) -> list[int]:
        return [event[1] for event in self.events if event[0] == "lost"]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns when the links have told enough for `condition`."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def _note(self, *event: Any) -> None:
        self.events.append(event)
        self._changed.set()


@dataclass
class DecodeEnd:
    """A decode worker as the links see it."""

    pool: KVPool
    ledger: BlockLedger
    handoff: HandOff
    book: Book
    listener: Listener
    instance_id: str
    _keys: int = 0

    def ticket(self, blocks: int, **changes: Any) -> Ticket:
        """Reserves so many blocks under a new key ("router", 1), ("router", 2) ...

        changes: of what is signed; but a `signature` takes the right one's place.
        """
        self._keys += 1
        key = ("router", self._keys)
        reservation = self.handoff.reserve(
            key, blocks * self.pool.layout.block_size, sampling(max_tokens=1), 0
        )
        fields: dict[str, Any] = {
            "decode_instance_id": self.instance_id,
            "endpoints": self.listener.endpoints,
        }
        signature = changes.pop("signature", None)
        ticket = self.handoff.sign(reservation, Ticket(**{**fields, **changes}))
        if signature is not None:
            ticket.signature = signature
        return ticket

    def address(self, transport: str) -> str:
        return next(e.address for e in self.listener.endpoints if e.transport == transport)

    def abort(self, number: int) -> None:
        """Gives up what the number-th ticket reserved."""
        transfer_id = self.handoff.abort(key(number), ReservationEvent.CANCEL)
        if transfer_id is not None:
            self.listener.abort(transfer_id, "not wanted")

    def finish(self, number: int) -> None:
        self.handoff.finish(key(number))

    def check_all_free(self) -> None:
        self.handoff.cache.check()
        assert self.ledger.free == self.ledger.total, self.ledger


def key(number: int) -> Key:
    return ("router", number)


@contextlib.asynccontextmanager
async def decode_end(
    layout: KVLayout = LAYOUT, blocks: int = 16, name: str = "decode-1", **config: Any
) -> AsyncIterator[DecodeEnd]:
    with tempfile.TemporaryDirectory(prefix="kvl-") as folder:
        pool = KVPool(layout, blocks, shared=True)
        ledger = BlockLedger(blocks)
        settings = worker_config(Path(folder), **config)
        handoff = HandOff(
            layout,
            ledger,
            lease_ms=1000,
            reservations_max=100,
            resends_max=settings.resends_max,
        )
        book = Book(handoff)
        listener = Listener(settings, name, pool, book)
        book.committed = listener.committed
        await listener.start()
        await asyncio.sleep(0)  # it accepts from here on
        try:
            yield DecodeEnd(pool, ledger, handoff, book, listener, name)
        finally:
            await listener.close()
            pool.close()
    ledger.check()


@contextlib.asynccontextmanager
async def prefill_end(
    layout: KVLayout = LAYOUT, blocks: int = 16, name: str = "prefill-1", **config: Any
) -> AsyncIterator[WriterPool]:
    """A pool of random bytes, and the links out of it; the pool is `writers.pool`."""
    pool = KVPool(layout, blocks)
    pool.bytes[:] = np.random.default_rng(1).integers(0, 256, pool.bytes.shape, np.uint8)
    writers = WriterPool(worker_config(Path("/nowhere"), **config), name, pool)
    writers.pool = pool  # type: ignore[attr-defined]
    try:
        yield writers
    finally:
        async with asyncio.timeout(DEADLINE_S):
            await writers.close()


def same_bytes(there: KVPool, target: Sequence[int], here: KVPool, source: Sequence[int]) -> bool:
    return bool((there.bytes[list(target)] == here.bytes[list(source)]).all())
