"""A router that the test plays itself: sessions with workers, and an index of what these cache,
kept from their BlockChanges. Used by tests of the announcer, both services and whole clusters."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from kvrelay.kv.prefix import split_hashes
from kvrelay.membership import prove
from kvrelay.rpc import dial, named
from kvrelay.wire import worker_pb2, worker_pb2_grpc


class BlockListener:
    """Asserts that numbers go up by one and that nothing is added or removed twice."""

    def __init__(self) -> None:
        self.names: set[bytes] = set()
        self.messages: list[worker_pb2.BlockChanges] = []

    def hear(self, changes: worker_pb2.BlockChanges) -> None:
        assert changes.number == len(self.messages) + 1
        assert changes.everything or changes.number > 1, "the first message is not everything"
        self.messages.append(changes)
        added, removed = split_hashes(changes.added), split_hashes(changes.removed)
        if changes.everything:
            assert not removed
            self.names.clear()
        assert not set(added) & self.names
        assert set(removed) <= self.names
        self.names.update(added)
        self.names.difference_update(removed)


class Session:
    """A session of ours with one worker; `events` has all but the changes of blocks."""

    def __init__(self, commands: "asyncio.Queue[Any]", command_type: Callable[..., Any]) -> None:
        self.blocks = BlockListener()
        self.events: list[Any] = []
        self.over = asyncio.Event()  # the worker has ended it
        self._commands = commands
        self._command_type = command_type
        self._changed = asyncio.Event()

    def send(self, **command: Any) -> None:
        self._commands.put_nowait(self._command_type(**command))

    async def event(self, kind: str, key: int, *, within_s: float = 30.0) -> Any:
        """What the worker says of this kind and request; AssertionError if it says `failed`."""

        def found(kind: str) -> list[Any]:
            said = [getattr(e, kind) for e in self.events if e.WhichOneof("event") == kind]
            return [message for message in said if message.key == key]

        await self.until(lambda: bool(found(kind) or found("failed")), within_s=within_s)
        assert not found("failed"), found("failed")
        return found(kind)[0]

    async def until(self, condition: Callable[[], bool], *, within_s: float = 30.0) -> None:
        """Looks again after every event."""
        async with asyncio.timeout(within_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def read(self, call: Any) -> None:
        async for event in call:
            if event.HasField("blocks"):
                assert event.HasField("load")
                self.blocks.hear(event.blocks)
            else:
                self.events.append(event)
            self._changed.set()
        self.over.set()


@contextlib.asynccontextmanager
async def session_with(
    service: Any, router: str = "", *, ends: bool = False
) -> AsyncIterator[Session]:
    """A session with a PrefillService or DecodeService, until the context is left.

    router: who we say that we are; ends: the worker is to end it before.
    """
    prefill = service.instance_id.startswith("prefill")
    stub = worker_pb2_grpc.PrefillWorkerStub if prefill else worker_pb2_grpc.DecodeWorkerStub
    queue: asyncio.Queue[Any] = asyncio.Queue()
    session = Session(queue, worker_pb2.PrefillCommand if prefill else worker_pb2.DecodeCommand)

    async def commands() -> AsyncIterator[Any]:
        while True:
            yield await queue.get()

    async with dial(service.address) as channel:
        dialed = stub(channel).Session
        proof = await prove(dialed, service.address, service._config.cluster_key, 30)
        call = dialed(commands(), metadata=[*proof, named(router)])
        reader = asyncio.create_task(session.read(call))
        try:
            yield session
        finally:
            call.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            failed = not reader.cancelled() and reader.exception() is not None
        assert not failed, reader.exception()
        assert session.over.is_set() == ends
