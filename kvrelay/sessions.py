"""The routers that have a session with a worker, and what all of them are told.

Made by both worker services, one each, and touched from the worker's event loop alone. Every event
carries the worker's load as it is at that moment.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from kvrelay.announcer import Announcer
from kvrelay.config import WorkerConfig
from kvrelay.kv.block_journal import BlockJournal
from kvrelay.rpc import RouterSession
from kvrelay.wire.worker_pb2 import BlockChanges, Failed, FailureCode, WorkerInfo

Event = TypeVar("Event")


class Sessions(Generic[Event]):
    """event: the type of the worker's events; load: writes what the worker's load is into one.

    session: makes one of (events_max, router); the simulation's have no stream.
    """

    def __init__(
        self,
        config: WorkerConfig,
        journal: BlockJournal,
        event: Callable[..., Event],
        load: Callable[[Any], None],
        session: Callable[[int, str], RouterSession[Event]] = RouterSession,
    ) -> None:
        self.announcer: Announcer[Event] = Announcer(config, journal, self._announce)
        self._events_max = config.session_events_max
        self._event = event
        self._load = load
        self._session = session
        # In order of coming, and the load that each was told last.
        self._open: dict[RouterSession[Event], Any] = {}
        self._over = False

    def open(self, info: WorkerInfo, router: str = "") -> RouterSession[Event]:
        """A new one, which hears first who we are, then all that is cached. After `end` it has
        ended already."""
        session = self._session(self._events_max, router)
        if self._over:
            session.end()
            return session
        self._open[session] = None
        self.send(session, self._event(info=info))
        self.announcer.open(session)
        return session

    def close(self, session: RouterSession[Event]) -> None:
        self.announcer.close(session)
        self._open.pop(session, None)

    def has(self, router: str) -> bool:
        """This router, which has said who it is, has a session."""
        return router != "" and any(session.router == router for session in self._open)

    def end(self, *_: object) -> None:
        """The worker's loops have ended: its routers learn it at once, and none comes in again."""
        self._over = True
        for session in list(self._open):
            session.end()

    def send(self, session: Any, event: Any) -> None:
        self._load(event.load)
        self._send(session, event)

    def _send(self, session: Any, event: Any) -> None:
        if session in self._open:
            self._open[session] = event.load
        session.send(event)

    def fail(self, key: tuple[Any, int], code: FailureCode, message: str) -> None:
        """Tells the router of this request attempt that it has failed here."""
        session, number = key
        self.send(session, self._event(failed=Failed(key=number, code=code, message=message)))

    def tell_load(self) -> None:
        """An event with nothing but the load, to all who have not just heard the same."""
        for session, told in self._open.items():
            event: Any = self._event()
            self._load(event.load)
            if event.load != told:
                self._send(session, event)

    def _announce(self, session: RouterSession[Event], blocks: BlockChanges | None) -> None:
        self.send(session, self._event(blocks=blocks))
