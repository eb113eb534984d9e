"""A router's session at a worker ends from either side, at once, and always tells the worker."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvrelay.rpc import RouterSession, serve_session

BOUND_S = 10.0


class Context:
    """Stands in for gRPC's context: takes events, or stops taking them."""

    def __init__(self) -> None:
        self.written: list[Any] = []
        self.wrote = asyncio.Event()
        self.taking = asyncio.Event()
        self.taking.set()

    async def write(self, event: Any) -> None:
        await self.taking.wait()
        self.written.append(event)
        self.wrote.set()


class Serving:
    def __init__(self, events_max: int = 8) -> None:
        self.context = Context()
        self.session: RouterSession[str] = RouterSession(events_max)
        self.commands: asyncio.Queue[str | None] = asyncio.Queue()
        self.seen: list[str] = []
        self.closed: list[Any] = []
        self.task = asyncio.create_task(
            serve_session(
                self.session, self._commands(), self.context, self._command, self.closed.append
            )
        )

    async def _commands(self) -> AsyncIterator[str]:
        while (command := await self.commands.get()) is not None:
            yield command

    def _command(self, session: RouterSession[str], command: str) -> None:
        if command == "break":
            raise ValueError("a bug")
        self.seen.append(command)
        session.send(f"did {command}")

    async def ended(self) -> None:
        async with asyncio.timeout(BOUND_S):
            await self.task
        assert self.closed == [self.session]
        assert not self.session.open


async def test_commands_are_answered_until_the_router_ends_its_side():
    serving = Serving()
    serving.commands.put_nowait("a")
    await serving.context.wrote.wait()
    assert serving.context.written == ["did a"]
    serving.commands.put_nowait(None)
    await serving.ended()


async def test_a_router_that_does_not_read_loses_its_session():
    serving = Serving(events_max=4)
    serving.context.taking.clear()
    await asyncio.sleep(0)
    for number in range(10):
        serving.session.send(str(number))
    await serving.ended()
    serving.session.send("too late")  # is no error


async def test_a_command_that_fails_ends_the_session_and_is_logged(caplog):
    serving = Serving()
    with caplog.at_level(logging.ERROR):
        serving.commands.put_nowait("break")
        await serving.ended()
    assert "a bug" in caplog.text


async def test_a_cancelled_call_closes_the_session():
    serving = Serving()
    await asyncio.sleep(0)
    serving.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving.task
    assert serving.closed == [serving.session]
