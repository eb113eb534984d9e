"""What routers are told of cached blocks, and that a worker is never silent for long."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from router_double import BlockListener

from kvrelay.announcer import MESSAGE_NAMES_MAX, Announcer
from kvrelay.config import WorkerConfig
from kvrelay.kv.block_journal import NAMES_MAX, BlockJournal
from kvrelay.rpc import MESSAGE_BYTES_MAX, RouterSession

BOUND_S = 10.0  # only a broken test waits this long


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Telling:
    """An announcer of an index that tests change, and what its sessions hear."""

    def __init__(self, **config: Any) -> None:
        self.index: set[bytes] = set()
        self.journal = BlockJournal(self.index)
        settings = WorkerConfig(
            model_path=Path("none"), cluster_key="k" * 16, socket_dir=Path("none"), **config
        )
        self.announcer: Announcer[Any] = Announcer(settings, self.journal, self._send)
        self.heard: dict[RouterSession[Any], BlockListener] = {}
        self.beats: dict[RouterSession[Any], asyncio.Semaphore] = {}
        self.said = asyncio.Event()

    def opened(self) -> tuple[RouterSession[Any], BlockListener]:
        session: RouterSession[Any] = RouterSession(8)
        self.heard[session] = BlockListener()
        self.beats[session] = asyncio.Semaphore(0)
        self.announcer.open(session)
        return session, self.heard[session]

    def put(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.index.add(name(number))
            self.journal.add([name(number)])

    def drop(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.index.remove(name(number))
            self.journal.remove([name(number)])

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.announcer.run())
        try:
            async with asyncio.timeout(BOUND_S):
                yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _send(self, session: RouterSession[Any], changes: Any) -> None:
        if changes is None:
            self.beats[session].release()
        else:
            assert changes.ByteSize() < MESSAGE_BYTES_MAX / 64
            self.heard[session].hear(changes)
            self.said.set()


def test_a_session_begins_with_everything_even_when_that_is_nothing():
    telling = Telling()
    _, empty = telling.opened()
    assert [message.everything for message in empty.messages] == [True]
    telling.put(range(3))
    _, full = telling.opened()
    assert full.names == telling.index
    assert len(full.messages) == 1


def test_two_sessions_have_their_own_numbers_and_hear_the_same():
    telling = Telling()
    _, first = telling.opened()
    telling.put(range(3))
    assert telling.announcer.tell()
    _, second = telling.opened()
    telling.drop(range(2))
    assert telling.announcer.tell()
    assert [m.number for m in first.messages] == [1, 2, 3]
    assert [m.number for m in second.messages] == [1, 2]
    assert first.names == second.names == telling.index


def test_nothing_to_tell_is_not_told():
    telling = Telling()
    _, listener = telling.opened()
    telling.put([1])
    telling.drop([1])
    assert not telling.announcer.tell()
    assert len(listener.messages) == 1


def test_a_resync_is_everything_again_for_the_one_that_asked():
    telling = Telling()
    asked, one = telling.opened()
    _, other = telling.opened()
    telling.put(range(5))
    telling.announcer.resync(asked)
    assert [m.everything for m in one.messages] == [True, False, True]
    assert [m.everything for m in other.messages] == [True, False]
    assert one.names == other.names == telling.index


def test_a_session_that_ended_hears_no_more():
    telling = Telling()
    session, listener = telling.opened()
    telling.announcer.close(session)
    telling.announcer.close(session)
    telling.put([1])
    telling.announcer.tell()
    telling.announcer.resync(session)
    assert len(listener.messages) == 1


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_much_is_told_in_several_messages(more):
    telling = Telling()
    telling.put(range(2 * MESSAGE_NAMES_MAX + more))
    _, listener = telling.opened()
    assert listener.names == telling.index
    assert len(listener.messages) == 2 + (more > 0)
    assert [m.everything for m in listener.messages[:2]] == [True, False]
    telling.drop(range(MESSAGE_NAMES_MAX + 1))
    telling.announcer.tell()
    assert listener.names == telling.index
    assert not any(m.everything for m in listener.messages[1:])


def test_more_than_the_journal_holds_is_everything_again():
    telling = Telling()
    _, listener = telling.opened()
    telling.put(range(NAMES_MAX + 1))
    telling.announcer.tell()
    assert listener.names == telling.index
    assert [m.everything for m in listener.messages[:3]] == [True, True, False]


async def test_what_changes_is_told_without_being_asked():
    telling = Telling(heartbeat_ms=3_600_000, block_changes_ms=1)
    async with telling.running():
        _, listener = telling.opened()
        for number in range(5):
            telling.said.clear()
            telling.put([number])
            await telling.said.wait()
            assert listener.names == telling.index


async def test_what_changes_soon_after_is_gathered():
    telling = Telling(heartbeat_ms=3_600_000, block_changes_ms=3_000_000)
    async with telling.running():
        _, listener = telling.opened()
        telling.said.clear()
        telling.put([1])
        await telling.said.wait()
        telling.put([2])
        for _ in range(10):
            await asyncio.sleep(0)
        assert listener.names == {name(1)}


async def test_a_worker_with_nothing_to_say_says_so():
    telling = Telling(heartbeat_ms=5)
    async with telling.running():
        session, listener = telling.opened()
        for _ in range(3):
            await telling.beats[session].acquire()
        assert len(listener.messages) == 1


async def test_the_longest_silence_holds_for_what_is_gathered_too():
    telling = Telling(heartbeat_ms=5, block_changes_ms=3_600_000)
    async with telling.running():
        session, listener = telling.opened()
        telling.put([1])
        await telling.beats[session].acquire()
        assert listener.names == telling.index
