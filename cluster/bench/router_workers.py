"""The stand-in workers of `kvrelay bench router`: they speak Session and compute nothing.

Started by router_processes.py as `python -m cluster.bench.router_workers`, with the cluster key on
the first line of stdin. Says where one prefill and one decode worker listen. Then each line of
stdin is a command, a JSON object, which is answered with one:

  {"do": "pace", "step_ms": X}   a decode step every X ms, a token for each sequence; 0: none
  {"do": "room", "blocks": N}    so many blocks are free from now on
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from cluster.bench.router_clock import stamp
from kvrelay.config import PROTOCOL_VERSION
from kvrelay.kv.layout import KVLayout
from kvrelay.membership import MembershipDoor
from kvrelay.rpc import RouterSession, make_server, serve_session
from kvrelay.wire import transfer_pb2, worker_pb2, worker_pb2_grpc
from kvrelay.wire.worker_pb2 import DecodeCommand, DecodeEvent, PrefillCommand, PrefillEvent

BLOCKS = 1 << 30
MODEL_TOKENS = 1 << 20
_LAYOUT = KVLayout("bench", "float32", layers=1, block_size=16, kv_heads=1, head_dim=64)
_EVENTS_MAX = 65_536
_BEAT_S = 0.4


class Sequence:
    """An answer that the decode worker writes."""

    def __init__(self, key: int, max_tokens: int) -> None:
        self.key = key
        self.max_tokens = max_tokens
        self.first_token: int | None = None  # none yet: it is not in the batch
        self.length = 0

    def next(self) -> worker_pb2.SequenceOutput:
        """A decode worker's first output repeats the token that the prefill worker has sampled."""
        token = stamp() if self.length or self.first_token is None else self.first_token
        offset, self.length = self.length, self.length + 1
        ended = self.length >= self.max_tokens
        return worker_pb2.SequenceOutput(
            key=self.key,
            offset=offset,
            token_ids=[token],
            ending=worker_pb2.ENDING_LENGTH if ended else worker_pb2.ENDING_NONE,
        )


class Decode(worker_pb2_grpc.DecodeWorkerServicer):
    """Grants every Reserve at once while it has room; a token a step for every sequence."""

    def __init__(self, door: MembershipDoor) -> None:
        self.step_s = 0.0
        self.paced = asyncio.Event()
        self._door = door
        self._blocks_free = BLOCKS
        self._sessions: dict[RouterSession[DecodeEvent], dict[int, Sequence]] = {}
        self._transfers: dict[int, Sequence] = {}

    async def Session(self, request_iterator: AsyncIterator[DecodeCommand], context: Any) -> None:
        await self._door.admit(context)
        session: RouterSession[DecodeEvent] = RouterSession(_EVENTS_MAX)
        self._sessions[session] = {}
        self._send(session, DecodeEvent(info=_info("decode")))
        await serve_session(session, request_iterator, context, self._command, self._closed)

    def computed(self, transfer_id: int, first_token: int) -> None:
        """A prefill worker has handed over: the sequence joins the batch."""
        sequence = self._transfers.pop(transfer_id, None)
        if sequence is not None:
            sequence.first_token = first_token

    def set_room(self, blocks: int) -> None:
        self._blocks_free = blocks
        self.beat()

    def beat(self) -> None:
        for session in self._sessions:
            self._send(session, DecodeEvent())

    async def run(self) -> None:
        """Steps for as long as there is a pace. A step that is late does not delay the next."""
        while True:
            await self.paced.wait()
            due = time.monotonic() + self.step_s
            while self.paced.is_set():
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                due = max(due + self.step_s, time.monotonic() - self.step_s)
                self._step()

    def _step(self) -> None:
        for session, sequences in self._sessions.items():
            batch = [s for s in sequences.values() if s.first_token is not None]
            if not batch:
                continue
            outputs = [sequence.next() for sequence in batch]
            for sequence in batch:
                if sequence.length >= sequence.max_tokens:
                    del sequences[sequence.key]
            self._send(session, DecodeEvent(step=worker_pb2.StepOutput(outputs=outputs)))

    def _command(self, session: RouterSession[DecodeEvent], command: DecodeCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "reserve":
            self._reserve(session, command.reserve)
        elif kind == "cancel":
            self._sessions[session].pop(command.cancel.key, None)

    def _reserve(self, session: RouterSession[DecodeEvent], reserve: worker_pb2.Reserve) -> None:
        if not self._blocks_free:
            code = worker_pb2.FAILURE_CODE_EXHAUSTED
            failed = worker_pb2.Failed(key=reserve.key, code=code, message="no room")
            self._send(session, DecodeEvent(failed=failed))
            return
        sequence = Sequence(reserve.key, reserve.sampling.max_tokens)
        self._sessions[session][reserve.key] = sequence
        reserved = worker_pb2.Reserved(key=reserve.key)
        if reserve.prefill_here:
            self._send(session, DecodeEvent(reserved=reserved))
            started = worker_pb2.PrefillStarted(key=reserve.key)
            self._send(session, DecodeEvent(started=started))
            sequence.first_token = stamp()
            first = worker_pb2.FirstToken(key=reserve.key, token_id=sequence.first_token)
            self._send(session, DecodeEvent(first_token=first))
            return
        self._transfers[reserve.key] = sequence  # one router: its key names the transfer
        reserved.ticket.CopyFrom(_ticket(reserve))
        self._send(session, DecodeEvent(reserved=reserved))

    def _closed(self, session: RouterSession[DecodeEvent]) -> None:
        del self._sessions[session]

    def _send(self, session: RouterSession[DecodeEvent], event: DecodeEvent) -> None:
        event.load.blocks_free = self._blocks_free
        event.load.running = len(self._sessions[session])
        session.send(event)


class Prefill(worker_pb2_grpc.PrefillWorkerServicer):
    """Answers every Prefill at once with all that a request hears of a prefill worker."""

    def __init__(self, door: MembershipDoor, decode: Decode) -> None:
        self._door = door
        self._decode = decode
        self._sessions: set[RouterSession[PrefillEvent]] = set()

    async def Session(self, request_iterator: AsyncIterator[PrefillCommand], context: Any) -> None:
        await self._door.admit(context)
        session: RouterSession[PrefillEvent] = RouterSession(_EVENTS_MAX)
        self._sessions.add(session)
        session.send(PrefillEvent(info=_info("prefill")))
        closed = self._sessions.discard
        await serve_session(session, request_iterator, context, self._command, closed)

    def beat(self) -> None:
        for session in self._sessions:
            session.send(PrefillEvent())

    def _command(self, session: RouterSession[PrefillEvent], command: PrefillCommand) -> None:
        if command.WhichOneof("command") != "prefill":
            return  # what could be cancelled is done
        asked, token = command.prefill, stamp()
        session.send(PrefillEvent(started=worker_pb2.PrefillStarted(key=asked.key)))
        first = worker_pb2.FirstToken(key=asked.key, token_id=token)
        session.send(PrefillEvent(first_token=first))
        handed_off = worker_pb2.HandedOff(key=asked.key, transport="shm")
        session.send(PrefillEvent(handed_off=handed_off))
        self._decode.computed(asked.ticket.transfer_id, token)


def _info(role: str) -> worker_pb2.WorkerInfo:
    return worker_pb2.WorkerInfo(
        protocol_version=PROTOCOL_VERSION,
        instance_id=f"bench-{role}",
        layout=_LAYOUT.to_wire(),
        blocks_total=BLOCKS,
        max_model_tokens=MODEL_TOKENS,
    )


def _ticket(reserve: worker_pb2.Reserve) -> transfer_pb2.Ticket:
    """As large as a real one, good for nothing."""
    return transfer_pb2.Ticket(
        request_id=reserve.request_id,
        attempt=reserve.attempt,
        decode_instance_id="bench-decode",
        transfer_id=reserve.key,
        signature=bytes(32),
        block_ids=range(-(-reserve.prompt_tokens // _LAYOUT.block_size)),
        endpoints=[transfer_pb2.Endpoint(transport="shm", address="bench")],
        layout=_LAYOUT.to_wire(),
        lease_ms=60_000,
    )


async def _beat(decode: Decode, prefill: Prefill) -> None:
    """A worker that says nothing is lost."""
    while True:
        await asyncio.sleep(_BEAT_S)
        decode.beat()
        prefill.beat()


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    cluster_key = (await loop.run_in_executor(None, sys.stdin.readline)).strip()
    server = make_server()
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    door = MembershipDoor(cluster_key, address)
    decode = Decode(door)
    prefill = Prefill(door, decode)
    tasks = [asyncio.create_task(decode.run()), asyncio.create_task(_beat(decode, prefill))]
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(decode, server)
    worker_pb2_grpc.add_PrefillWorkerServicer_to_server(prefill, server)
    await server.start()
    print(f"grpc={address}", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        if command["do"] == "pace":
            decode.step_s = command["step_ms"] / 1000
            (decode.paced.set if decode.step_s else decode.paced.clear)()
        else:
            decode.set_room(command["blocks"])
        print("{}", flush=True)
    for task in tasks:
        task.cancel()
    await server.stop(grace=None)


if __name__ == "__main__":
    asyncio.run(_serve())
