"""Tells every router which blocks a worker caches, and that the worker lives.

Made by both worker services, one each. A router that connects, or says that it missed something,
gets the whole index; after that all get what changes, gathered for block_changes_ms. Changes are
numbered, for each session by itself, so that a router sees a gap. Touched from the worker's event
loop alone.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from kvrelay.config import WorkerConfig
from kvrelay.kv.block_journal import BlockJournal, Changes
from kvrelay.kv.prefix import join_hashes
from kvrelay.rpc import RouterSession
from kvrelay.wire.worker_pb2 import BlockChanges

# Names of either kind in one message, 64 KiB: a router reads it in about a millisecond, and goes on
# with its other work between two.
MESSAGE_NAMES_MAX = 4096

Event = TypeVar("Event")
_Part = tuple[bool, bytes, bytes]  # everything, added, removed


class Announcer(Generic[Event]):
    """send: gives a session one event that carries these changes (None: none) and the load."""

    def __init__(
        self,
        config: WorkerConfig,
        journal: BlockJournal,
        send: Callable[[RouterSession[Event], BlockChanges | None], None],
    ) -> None:
        self._journal = journal
        self._send = send
        self.silence_s = config.heartbeat_ms / 1000  # the longest
        self.gather_s = min(config.block_changes_ms / 1000, self.silence_s)  # from word to word
        self._numbers: dict[RouterSession[Event], int] = {}  # of the last message to each
        self._news = asyncio.Event()
        journal.on_news = self._news.set

    def open(self, session: RouterSession[Event]) -> None:
        """Says everything to a router that knows nothing yet."""
        self.tell()  # the others: then there is nothing that only some have heard
        self._numbers[session] = 0
        self._say(session, _parts(self._journal.snapshot()))

    def resync(self, session: RouterSession[Event]) -> None:
        """Says everything again; numbers go on."""
        if session in self._numbers:
            self.tell()
            self._say(session, _parts(self._journal.snapshot()))

    def close(self, session: RouterSession[Event]) -> None:
        self._numbers.pop(session, None)

    async def run(self) -> None:
        """Never returns. The first change after a quiet time is told at once."""
        # What comes while changes gather is told after it: the two make up the longest silence.
        wait_s = self.silence_s - self.gather_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            self.speak()
            await asyncio.sleep(self.gather_s)

    def speak(self) -> None:
        """What has changed, or that the worker lives."""
        if not self.tell():
            self.beat()

    def tell(self) -> bool:
        """Tells all routers what has changed; False when there is nothing to tell."""
        self._news.clear()
        changes = self._journal.take()
        if changes is None:
            return False
        parts = _parts(changes)
        for session in self._numbers:
            self._say(session, parts)
        return True

    def beat(self) -> None:
        """An event with nothing but the load, to all."""
        for session in self._numbers:
            self._send(session, None)

    def _say(self, session: RouterSession[Event], parts: Sequence[_Part]) -> None:
        for everything, added, removed in parts:
            self._numbers[session] += 1
            number = self._numbers[session]
            changes = BlockChanges(
                number=number, everything=everything, added=added, removed=removed
            )
            self._send(session, changes)


def _parts(changes: Changes) -> list[_Part]:
    """One for each message, at least one: `everything` of the first, the rest adds to it."""
    added, removed = list(changes.added), list(changes.removed)
    names = max(len(added), len(removed), 1)
    return [
        (
            changes.everything and at == 0,
            join_hashes(added[at : at + MESSAGE_NAMES_MAX]),
            join_hashes(removed[at : at + MESSAGE_NAMES_MAX]),
        )
        for at in range(0, names, MESSAGE_NAMES_MAX)
    ]
