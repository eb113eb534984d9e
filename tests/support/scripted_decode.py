"""A decode worker that says what a test tells it to, over real sessions."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from kvrelay.config import PROTOCOL_VERSION
from kvrelay.membership import MembershipDoor
from kvrelay.rpc import RouterSession, listen, make_server, serve_session
from kvrelay.wire import transfer_pb2, worker_pb2, worker_pb2_grpc
from kvrelay.wire.worker_pb2 import DecodeCommand, DecodeEvent

BLOCKS = 100
Session = RouterSession[DecodeEvent]


class ScriptedDecode(worker_pb2_grpc.DecodeWorkerServicer):
    """Beats while `alive` is set; what routers command is in `commands`, with its session."""

    def __init__(self, instance_id: str, beat_s: float) -> None:
        self.address = ""
        self.door: MembershipDoor | None = None
        self.commands: asyncio.Queue[tuple[Session, DecodeCommand]] = asyncio.Queue()
        self.opened: asyncio.Queue[Session] = asyncio.Queue()
        self.closed: asyncio.Queue[Session] = asyncio.Queue()
        self.alive = asyncio.Event()
        self.alive.set()
        self._instance_id = instance_id
        self._beat_s = beat_s
        self._sessions: list[Session] = []

    async def Session(self, commands: Any, context: Any) -> None:
        assert self.door is not None
        await self.door.admit(context)
        session: Session = RouterSession(1024)
        self._sessions.append(session)
        info = worker_pb2.WorkerInfo(
            protocol_version=PROTOCOL_VERSION,
            instance_id=self._instance_id,
            layout=transfer_pb2.KvLayout(model_fingerprint="m", block_size=4),
            blocks_total=BLOCKS,
            max_model_tokens=4 * BLOCKS,
        )
        session.send(DecodeEvent(info=info))
        self.opened.put_nowait(session)
        await serve_session(session, commands, context, self._command, self._close)

    def _command(self, session: Session, command: DecodeCommand) -> None:
        self.commands.put_nowait((session, command))

    def _close(self, session: Session) -> None:
        self._sessions.remove(session)
        self.closed.put_nowait(session)

    async def beat(self) -> None:
        while True:
            await self.alive.wait()
            for session in self._sessions:
                self.say(session)
            await asyncio.sleep(self._beat_s)

    def say(self, session: Session, **event: Any) -> None:
        load = worker_pb2.DecodeLoad(blocks_free=BLOCKS)
        session.send(DecodeEvent(load=load, **event))

    async def reserve(self) -> tuple[Session, worker_pb2.Reserve]:
        """The next Reserve; what comes before it is read and forgotten."""
        while True:
            session, command = await self.commands.get()
            if command.WhichOneof("command") == "reserve":
                return session, command.reserve


@contextlib.asynccontextmanager
async def serving(worker: ScriptedDecode, cluster_key: str) -> AsyncIterator[ScriptedDecode]:
    server = make_server()
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(worker, server)
    worker.address = f"127.0.0.1:{listen(server, '127.0.0.1:0', None)}"
    worker.door = MembershipDoor(cluster_key, worker.address)
    await server.start()
    beating = asyncio.create_task(worker.beat())
    try:
        yield worker
    finally:
        beating.cancel()
        await server.stop(None)
