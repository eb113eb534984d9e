"""What RayHead does when the head has ended, with doubles in the place of Ray, and about signals
during its start."""

import os
import signal
from types import SimpleNamespace

import pytest

from cluster import ray_head
from cluster.options import ServeError
from cluster.place import RESTART_BACKOFF_S, PlaceEvent, PlaceState
from cluster.ray_head import RayHead


class FakeNode:
    """Ray's own record of the processes that it has started."""

    def __init__(self) -> None:
        self.gcs_address = "127.0.0.1:1"
        self.starts = 0
        self.broken = False
        self.raylet_status: int | None = None
        raylet = SimpleNamespace(poll=lambda: self.raylet_status)
        self.all_processes = {"raylet": [SimpleNamespace(process=raylet)]}
        self.start_gcs_server()

    def start_gcs_server(self) -> None:
        if self.broken:
            raise OSError("no more processes")
        self.starts += 1
        self.status: int | None = None
        process = SimpleNamespace(poll=lambda: self.status)
        self.all_processes["gcs_server"] = [SimpleNamespace(process=process)]

    def kill_gcs_server(self, check_alive: bool) -> None:
        assert not check_alive, "it raises for one that is dead"
        self.all_processes.pop("gcs_server", None)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    fake = SimpleNamespace(now_s=100.0)
    fake.monotonic = lambda: fake.now_s
    monkeypatch.setattr(ray_head, "time", fake)
    return fake


@pytest.fixture
def answers(monkeypatch) -> list[bool]:
    """Whether the head answers, in turn; empty: it does."""
    given: list[bool] = []
    monkeypatch.setattr(ray_head, "_answers", lambda: given.pop(0) if given else True)
    return given


@pytest.fixture
def node(monkeypatch) -> FakeNode:
    fake = FakeNode()
    worker = SimpleNamespace(_global_node=fake)
    monkeypatch.setattr(ray_head.ray._private, "worker", worker)
    return fake


@pytest.fixture
def head(tmp_path, node, clock, answers) -> RayHead:
    """One that runs."""
    made = RayHead(tmp_path)
    made._place.on(PlaceEvent.LAUNCH, clock.now_s)
    made._place.on(PlaceEvent.STARTED, clock.now_s)
    made.keep()
    assert node.starts == 1
    return made


def test_a_start_that_fails_is_told_in_one_line(tmp_path, monkeypatch):
    def fail(**options: object) -> None:
        raise Exception("The current node\ntimed out")  # as Ray does it

    monkeypatch.setattr(ray_head.ray, "init", fail)
    monkeypatch.setattr(ray_head, "_MEMORY", tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # what the start sets is gone afterwards
    with pytest.raises(ServeError, match="Ray did not start: The current node timed out"):
        RayHead(tmp_path).start(2)


def test_a_head_that_has_ended_is_started_again_at_once(head, node, answers, caplog):
    node.status = -9
    answers += [False, True]
    head.keep()
    head.keep()
    assert node.starts == 2
    assert head._place.state is PlaceState.STARTING
    head.keep()
    assert "is back" not in caplog.text, "it says nothing yet"
    head.keep()
    assert caplog.messages == [
        "Ray's head ended with status -9; it will be started again",
        "Ray's head is back",
    ]


def test_a_head_that_keeps_ending_is_started_again_later_and_later(head, node, clock, answers):
    for started, backoff_s in enumerate(RESTART_BACKOFF_S, 1):
        node.status = 1
        head.keep()
        clock.now_s += max(backoff_s - 0.5, 0)
        if backoff_s:
            head.keep()
        assert node.starts == started
        clock.now_s += 1
        head.keep()
        assert node.starts == started + 1
        head.keep()


def test_one_that_cannot_be_started_now_is_tried_again(head, node, clock, caplog):
    node.status, node.broken = -9, True
    head.keep()
    head.keep()
    assert "Ray's head does not start: no more processes" in caplog.text
    node.broken = False
    clock.now_s += RESTART_BACKOFF_S[1]
    head.keep()
    head.keep()
    assert caplog.messages[-1] == "Ray's head is back"


def test_a_head_that_hangs_is_started_again(head, node, clock, answers, caplog):
    answers += [False] * 10 + [True] + [False] * 11
    for _ in range(22):
        assert node.starts == 1
        clock.now_s += 1
        head.keep()
    head.keep()
    assert "Ray's head gave no answer for 10 s" in caplog.text
    assert node.starts == 2


def test_the_end_of_the_raylet_is_the_end(head, node):
    node.raylet_status = -9
    with pytest.raises(ServeError, match="Ray's raylet ended with status -9"):
        head.keep()


def test_a_way_out_that_does_not_end_is_not_waited_for(head, monkeypatch):
    never = ray_head.threading.Event()
    monkeypatch.setattr(ray_head, "_STOP_S", 0.05)
    monkeypatch.setattr(ray_head.ray, "shutdown", lambda: never.wait(60))
    head.stop()
    never.set()


def test_a_signal_waits_until_ray_has_started():
    arrived = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: arrived.append(number))
    try:
        with ray_head._signals_deferred():
            os.kill(os.getpid(), signal.SIGHUP)
            assert arrived == []
        assert arrived == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)
