"""The other process of `kvrelay bench transport`: a decode worker's links, without its engine.

Started by links.py as `python -m cluster.bench.link_peer SOCKET_DIR BLOCKS CORE`. It reads one
command a line from stdin and answers with one line on stdout:

  ticket COUNT [CASE]     leave to write COUNT blocks: a Ticket in base64
  socket BYTES            a port; who connects there sends BYTES and gets a byte back, and again
  gloo FILE BYTES         rank 1 of a gloo group over FILE: takes a length and so much, BYTES at
                          most, and sends a byte back, and again
"""

import asyncio
import base64
import contextlib
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from cluster.bench.link_cases import CASES, LAYOUT, PEER, end_config
from decode_worker.handoff import HandOff
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.kv.ledger import BlockLedger
from kvrelay.kv.pool import KVPool
from kvrelay.transport.listener import Listener
from kvrelay.wire.transfer_pb2 import Ticket

_SAMPLING = SamplingParams(
    temperature=0, top_k=0, top_p=1, seed=0, max_tokens=1, eos_token_ids=frozenset()
)
_LEASE_MS = 60_000


class _Book:
    """The hand-off of one listener; blocks are free again as soon as they are committed."""

    def __init__(self, blocks: int) -> None:
        self.ledger = BlockLedger(blocks)
        self.handoff = HandOff(
            LAYOUT, self.ledger, lease_ms=_LEASE_MS, reservations_max=8, resends_max=2
        )
        self.listener: Listener
        self.awaits_again = self.handoff.awaits_again
        self.expect = self.handoff.expect
        self._transfers = 0

    def ticket(self, count: int) -> Ticket:
        self._transfers += 1
        key = ("bench", self._transfers)
        reservation = self.handoff.reserve(key, count * LAYOUT.block_size, _SAMPLING, 0)
        ticket = Ticket(
            decode_instance_id=PEER,
            endpoints=self.listener.endpoints,
            layout=LAYOUT.to_wire(),
            lease_ms=_LEASE_MS,
        )
        return self.handoff.sign(reservation, ticket)

    def begin(self, ticket: Ticket) -> None:
        self.handoff.begin(ticket, 0)

    def received(self, transfer_id: int, first_index: int, count: int, bad: Sequence[int]) -> None:
        self.handoff.received(transfer_id, first_index, count, bad, 0)

    def commit(self, transfer_id: int, blocks: int, first_token_id: int) -> None:
        reservation = self.handoff.commit(transfer_id, blocks)
        if reservation is not None:
            self.listener.committed(transfer_id)
            self.handoff.finish(reservation.key)

    def lost(self, transfer_id: int, reason: str) -> None:
        self.handoff.writer_lost(transfer_id)


async def _serve(socket_dir: Path, blocks: int) -> None:
    pool = KVPool(LAYOUT, blocks, shared=True)
    pool.bytes[:] = 0  # every page is there
    books = {}
    for case in CASES:
        book = books[case] = _Book(blocks)
        config = end_config(socket_dir, case)
        config.socket_dir.mkdir()
        book.listener = Listener(config, PEER, pool, book)
        await book.listener.start()
    loop = asyncio.get_running_loop()
    print("ready", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command, *words = line.split()
        if command == "ticket":
            ticket = books["".join(words[1:])].ticket(int(words[0]))
            print(base64.b64encode(ticket.SerializeToString()).decode(), flush=True)
        elif command == "socket":
            server = socket.create_server(("127.0.0.1", 0))
            threading.Thread(
                target=_drain_socket, args=[server, int(words[0])], daemon=True
            ).start()
            print(server.getsockname()[1], flush=True)
        else:
            threading.Thread(
                target=_drain_gloo, args=[words[0], int(words[1])], daemon=True
            ).start()
            print("started", flush=True)


def _drain_socket(server: socket.socket, count: int) -> None:
    peer, _ = server.accept()
    target = memoryview(bytearray(count))
    while True:
        left = target
        while left:
            taken = peer.recv_into(left)
            if not taken:
                return
            left = left[taken:]
        peer.sendall(b"k")


def _drain_gloo(path: str, count: int) -> None:
    import torch
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=1, world_size=2)
    target, answer = torch.zeros(count, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    length = torch.zeros(1, dtype=torch.int64)
    with contextlib.suppress(RuntimeError):  # the other process has ended
        while True:
            distributed.recv(length, 0)
            distributed.recv(target[: int(length)], 0)
            distributed.send(answer, 0)


if __name__ == "__main__":
    folder, count, core = sys.argv[1:]
    if core != "-":
        os.sched_setaffinity(0, {int(core)})
    asyncio.run(_serve(Path(folder), int(count)))
