"""The decode end of a process of link_ends.py: the real Listener over the real HandOff and ledger.

It does with them what decode_worker/service.py does, and tells the test what happened.
"""

import asyncio
import base64
import os
import signal
from collections import Counter
from collections.abc import Sequence
from typing import Any

from link_settings import REAP_EVERY_S, Say, block_sums, layout, now_ms, own_state, worker_config
from nccl_double import DoubleNccl

from decode_worker.handoff import HandOff
from decode_worker.reservation import ReservationEvent
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.kv.ledger import BlockLedger, BlockState
from kvrelay.kv.pool import KVPool
from kvrelay.transport.listener import Listener
from kvrelay.wire.transfer_pb2 import Endpoint, Ticket

_ROUTER = "router"


class DecodeEnd:
    """Settings: name, link, socket_dir, certificates, head_dim, blocks and the three deadlines."""

    def __init__(self, settings: dict[str, Any], say: Say) -> None:
        self.config = worker_config(settings)
        self.name = settings["name"]
        self.layout = layout(settings["head_dim"])
        self.pool = KVPool(self.layout, settings["blocks"], shared=True)
        self.ledger = BlockLedger(settings["blocks"])
        self.handoff = HandOff(
            self.layout,
            self.ledger,
            lease_ms=self.config.lease_ms,
            reservations_max=64,
            resends_max=self.config.resends_max,
        )
        self.awaits_again = self.handoff.awaits_again
        self._say = say
        self._nccl = DoubleNccl() if settings["link"] == "nccl" else None
        self.listener = Listener(self.config, self.name, self.pool, self, self._nccl)
        self._endings: dict[int, asyncio.Future[str]] = {}  # by transfer
        self._keys: dict[int, tuple[str, int]] = {}
        self._numbers = 0
        self._flips: Counter[tuple[int, int]] = Counter()
        self._stops_at = -1
        self._reaping: asyncio.Task[None]

    # ---- TransferBook

    def begin(self, ticket: Ticket) -> None:
        self.handoff.begin(ticket, now_ms())

    def expect(
        self, transfer_id: int, first_index: int, count: int, *, again: bool
    ) -> Sequence[int]:
        targets = self.handoff.expect(transfer_id, first_index, count, again=again)
        if self._stops_at == first_index:
            self._stops_at = -1
            self._say(event="in a push", transfer=transfer_id)
            os.kill(os.getpid(), signal.SIGSTOP)
        for index, block in enumerate(targets, first_index):
            if self._flips[transfer_id, index] > 0:  # in memory: the writer has written
                self._flips[transfer_id, index] -= 1
                self.pool.bytes[block, 11] ^= 4
        return targets

    def received(self, transfer_id: int, first_index: int, count: int, bad: Sequence[int]) -> None:
        self.handoff.received(transfer_id, first_index, count, bad, now_ms())

    def commit(self, transfer_id: int, blocks: int, first_token_id: int) -> None:
        if self.handoff.commit(transfer_id, blocks) is not None:
            self.listener.committed(transfer_id)
            self._end(transfer_id, "committed")

    def lost(self, transfer_id: int, reason: str) -> None:
        self.handoff.writer_lost(transfer_id)
        self._end(transfer_id, f"lost: {reason}")

    # ---- commands

    async def do_start(self) -> dict[str, Any]:
        await self.listener.start()
        self._reaping = asyncio.create_task(self._reap())
        return {}

    async def do_address(self) -> dict[str, Any]:
        return {"address": self.listener.endpoints[0].address}

    async def do_reserve(self, count: int, at: Sequence[str] = ()) -> dict[str, Any]:
        """at: transport and address of the one endpoint that the ticket names; else D's own."""
        self._numbers += 1
        key = (_ROUTER, self._numbers)
        room = SamplingParams(
            temperature=0,
            top_k=0,
            top_p=1,
            seed=0,
            max_tokens=self.layout.block_size + 2,
            eos_token_ids=frozenset(),
        )
        made = self.handoff.reserve(key, count * self.layout.block_size, room, now_ms())
        own = self.listener.endpoints
        ticket = Ticket(
            request_id=f"r{self._numbers}",
            attempt=1,
            decode_instance_id=self.name,
            endpoints=[Endpoint(transport=at[0], address=at[1])] if at else own,
            layout=self.layout.to_wire(),
            lease_ms=self.config.lease_ms,
        )
        self.handoff.sign(made, ticket)
        self._endings[made.transfer_id] = asyncio.get_running_loop().create_future()
        self._keys[made.transfer_id] = key
        text = base64.b64encode(ticket.SerializeToString()).decode()
        return {"ticket": text, "transfer": made.transfer_id}

    async def do_settled(self, transfer: int) -> dict[str, Any]:
        """Answers when nobody writes for the transfer any more: how it ended."""
        return {"ending": await asyncio.shield(self._endings[transfer])}

    async def do_finish(self, transfer: int) -> dict[str, Any]:
        """Sums of a committed transfer's blocks, which are free from here on."""
        key = self._keys[transfer]
        sums = block_sums(self.pool, self.handoff._by_key[key].prompt_blocks)
        self.handoff.finish(key)
        return {"sums": sums}

    async def do_cancel(self, transfer: int) -> dict[str, Any]:
        self._abort(self._keys[transfer], ReservationEvent.CANCEL, "cancelled")
        return {}

    async def do_flip(self, transfer: int, index: int, times: int) -> dict[str, Any]:
        """In shared memory, before the block is checked, so many times."""
        self._flips[transfer, index] = times
        return {}

    async def do_stop_at(self, index: int) -> dict[str, Any]:
        """Stops this process when a push from that block on has begun to come."""
        self._stops_at = index
        return {}

    async def do_state(self) -> dict[str, Any]:
        self.handoff.cache.check()  # and the ledger
        held = [r.blocks for r in self.handoff._by_key.values()]
        return {
            "free": self.ledger.free,
            "total": self.ledger.total,
            "quarantined": self.ledger.counts()[BlockState.QUARANTINED],
            "open": [transfer for transfer, key in self._keys.items() if self._is_open(key)],
            "reserved": sum(map(len, held)),
            "rejected": {reason.value: n for reason, n in self.listener.rejected.items()},
            **own_state(),
        }

    async def do_close(self) -> dict[str, Any]:
        self._reaping.cancel()
        await self.listener.close()
        return await self.do_state()

    # ----

    def _is_open(self, key: tuple[str, int]) -> bool:
        return key in self.handoff._by_key

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(REAP_EVERY_S)
            for key in self.handoff.expired(now_ms()):
                self._abort(key, ReservationEvent.TIMEOUT, "its lease ran out")

    def _abort(self, key: Any, why: ReservationEvent, reason: str) -> None:
        known = self.handoff._by_key.get(key)
        transfer_id = self.handoff.abort(key, why)
        if transfer_id is not None:
            self._say(event="aborting", transfer=transfer_id)
            self.listener.abort(transfer_id, reason)
        elif known is not None and not self._is_open(key):
            self._end(known.transfer_id, reason)

    def _end(self, transfer_id: int, how: str) -> None:
        ending = self._endings[transfer_id]
        if not ending.done():
            ending.set_result(how)
