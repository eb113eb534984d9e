"""What all routers of a worker are told, and what none is told twice."""

from pathlib import Path
from typing import Any

from kvrelay.config import WorkerConfig
from kvrelay.kv.block_journal import BlockJournal
from kvrelay.rpc import RouterSession
from kvrelay.sessions import Sessions
from kvrelay.wire import worker_pb2
from kvrelay.wire.worker_pb2 import DecodeEvent


class Heard(RouterSession[Any]):
    """A session that is a list."""

    def __init__(self, events_max: int, router: str) -> None:
        self.open = True
        self.router = router
        self.events: list[DecodeEvent] = []

    def send(self, event: DecodeEvent) -> None:
        self.events.append(event)


class Worker:
    def __init__(self) -> None:
        self.free = 10
        config = WorkerConfig(
            model_path=Path("none"), cluster_key="k" * 16, socket_dir=Path("none")
        )
        self.sessions: Sessions[DecodeEvent] = Sessions(
            config, BlockJournal(()), DecodeEvent, self._load, Heard
        )

    def _load(self, load: worker_pb2.DecodeLoad) -> None:
        load.blocks_free = self.free

    def router(self, name: str) -> Heard:
        session = self.sessions.open(worker_pb2.WorkerInfo(instance_id="d1"), name)
        assert isinstance(session, Heard)
        session.events.clear()
        return session


def test_a_load_that_has_changed_is_told_to_all_once():
    worker = Worker()
    first, second = worker.router("a"), worker.router("b")
    worker.free = 12
    worker.sessions.tell_load()
    worker.sessions.tell_load()
    for router in (first, second):
        assert [event.load.blocks_free for event in router.events] == [12]


def test_who_has_just_heard_the_load_with_an_event_is_not_told_again():
    worker = Worker()
    first, second = worker.router("a"), worker.router("b")
    worker.free = 12
    worker.sessions.send(first, DecodeEvent(step=worker_pb2.StepOutput()))
    worker.sessions.tell_load()
    assert [event.HasField("step") for event in first.events] == [True]
    assert [event.load.blocks_free for event in second.events] == [12]


def test_a_beat_is_a_sign_of_life_and_is_always_told():
    worker = Worker()
    router = worker.router("a")
    for _ in range(2):
        worker.sessions.announcer.beat()
    assert len(router.events) == 2
