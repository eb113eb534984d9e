"""Router processes as they are started, told, started again and ended; short programs stand in for
them."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from cluster import place, router_process, routers
from cluster.options import ServeError
from cluster.router_process import RouterAddress
from cluster.routers import Routers
from kvrelay.config import RouterConfig
from kvrelay.wire import control_pb2, control_pb2_grpc

WORKERS = control_pb2.WorkerSet(decode_addresses=["127.0.0.1:1"])
OTHERS = control_pb2.WorkerSet(decode_addresses=["127.0.0.1:2"])
WAIT_S = 20.0  # only a broken test waits so long
HURRY = threading.Event()
HURRY.set()
# Says where it listens, and ends when it is told to.
QUIET = "import signal; print('router grpc=h:1 http=h:2', flush=True); signal.pause()"
# Says which signal came, when it may: then it has its handler.
POLITE = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print('router grpc=h:1 http=h:2', flush=True)
signal.pause()
"""
STUBBORN = QUIET.replace("signal;", "signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);")
# Says the ports that it was given.
ECHO = """
import json, signal
config = json.loads(input())
print(f"router grpc=h:{config['port'] or 71} http=h:{config['http_port'] or 72}", flush=True)
signal.pause()
"""
FAILS = "print('failed port 1 is taken')"


def several(count: int, folder: Path = Path("none"), **options: object) -> Routers:
    configs = [
        RouterConfig(
            model_path=Path("none"),
            model_name="tiny",
            cluster_key="k" * 16,
            control_socket=folder / f"{number}.sock",
            **options,
        )
        for number in range(count)
    ]
    return Routers(configs, "router")


@pytest.fixture
def programs(monkeypatch):
    """What is run instead of routers, in turn."""
    chosen: list[str] = []
    popen = subprocess.Popen

    def run(command, **how):
        return popen([sys.executable, "-c", chosen.pop(0)], **how)

    monkeypatch.setattr(router_process.subprocess, "Popen", run)
    return chosen


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(place, "RESTART_BACKOFF_S", (0.0,))


def process(these: Routers, at: int) -> "subprocess.Popen[str]":
    router = these._seats[at].process
    assert router is not None
    return router._process


def keep_until(these: Routers, condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        these.keep(WORKERS)
        time.sleep(0.01)


class Control(control_pb2_grpc.RouterControlServicer):
    """What a router has to say on its control socket. `refusing`: that it does not like it."""

    def __init__(self) -> None:
        self.told: list[control_pb2.WorkerSet] = []
        self.refusing = False

    def SetWorkers(self, request, context):
        self.told.append(request)
        if self.refusing:
            context.abort(grpc.StatusCode.INTERNAL, "not\nnow")
        return control_pb2.RouterState()

    def WaitReady(self, request, context):
        return control_pb2.RouterState()


@pytest.fixture
def controls(tmp_path):
    """Those of routers 0 and 1 in `tmp_path`."""
    servers, found = [], []
    for number in range(2):
        server = grpc.server(futures.ThreadPoolExecutor(2))
        found.append(Control())
        control_pb2_grpc.add_RouterControlServicer_to_server(found[-1], server)
        server.add_insecure_port(f"unix:{tmp_path}/{number}.sock")
        server.start()
        servers.append(server)
    yield found
    for server in servers:
        server.stop(None).wait()


# ---- the start


def test_a_router_that_says_nothing(programs, monkeypatch):
    monkeypatch.setattr(routers, "READY_S", 0.1)
    programs.append("import time; time.sleep(60)")
    one = several(1)
    with pytest.raises(ServeError, match="did not start within"):
        one.start()
    started = process(one, 0)
    one.stop(0, threading.Event())
    assert started.returncode in (-signal.SIGTERM, -signal.SIGKILL)


def test_routers_that_started_say_their_addresses(programs):
    programs += [QUIET, QUIET.replace("grpc=h:1 http=h:2", "grpc=h:3 http=h:4")]
    two = several(2)
    try:
        two.start()
        assert two.addresses == [RouterAddress("h:1", "h:2"), RouterAddress("h:3", "h:4")]
        assert str(two.addresses[0]) == "grpc=h:1 http=h:2"
    finally:
        two.stop(0, HURRY)


def test_a_router_that_fails_says_why_and_the_others_end(programs):
    why = "failed HTTP port 127.0.0.1:8000 is taken; choose another with --http-port"
    programs += [QUIET, f"print({why!r})"]
    two = several(2)
    started = None
    try:
        with pytest.raises(ServeError, match=r"did not start: HTTP port .* is taken"):
            two.start()
        started = process(two, 0)
    finally:
        two.stop(10, threading.Event())
    assert started is not None
    assert started.returncode == -signal.SIGTERM


# ---- the workers


def test_every_router_is_told_of_a_change_and_again_and_again(
    programs, controls, tmp_path, monkeypatch
):
    monkeypatch.setattr(router_process, "_BEAT_S", 0.05)
    programs += [QUIET, QUIET]
    two = several(2, tmp_path)
    try:
        two.start()
        two.connect(WORKERS)
        assert [control.told for control in controls] == [[WORKERS], [WORKERS]]
        keep_until(two, lambda: all(len(control.told) > 3 for control in controls))
        assert two.keep(WORKERS)
        assert not two.keep(OTHERS), "they have not answered yet"
        deadline_s = time.monotonic() + WAIT_S
        while not two.keep(OTHERS):
            assert time.monotonic() < deadline_s
        assert [control.told[-1] for control in controls] == [OTHERS, OTHERS]
    finally:
        two.stop(0, HURRY)


def test_a_router_that_does_not_take_the_workers_is_told_again(
    programs, controls, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(router_process, "_BEAT_S", 0.05)
    programs += [QUIET, QUIET]
    two = several(2, tmp_path)
    controls[0].refusing = True
    try:
        two.start()
        with pytest.raises(ServeError, match="a router does not take the workers: not now"):
            two.connect(WORKERS)
        keep_until(two, lambda: len(controls[0].told) > 4)
        assert not two.keep(WORKERS)
        assert WORKERS in controls[1].told, "the others were told"
        controls[0].refusing = False
        keep_until(two, lambda: two.keep(WORKERS))
        again = "a router does not take the workers: not now; trying again"
        assert caplog.messages == [again], "once"
        assert [seat.process.is_hung for seat in two._seats] == [False, False]
    finally:
        two.stop(0, HURRY)


# ---- deaths


def test_a_router_that_died_is_started_at_the_ports_that_it_had(
    programs, controls, tmp_path, caplog
):
    programs += [ECHO, ECHO, ECHO]
    two = several(2, tmp_path, port=0, http_port=0)
    try:
        two.start()
        before = two.addresses
        assert before[0] == RouterAddress("h:71", "h:72")
        other = process(two, 1)
        process(two, 0).kill()
        keep_until(two, lambda: len(caplog.messages) == 2)
        assert caplog.messages == [
            "a router ended with status -9; it will be started again",
            "a router serves again at grpc=h:71 http=h:72",
        ]
        assert two.addresses == before
        controls[0].told.clear()
        keep_until(two, lambda: bool(controls[0].told))
        assert controls[0].told[0] == WORKERS
        assert process(two, 1) is other
        assert other.poll() is None
    finally:
        two.stop(0, HURRY)


def test_a_router_that_cannot_start_now_is_tried_again(programs, at_once, caplog):
    programs += [QUIET, FAILS, FAILS, FAILS, FAILS, QUIET]
    one = several(1)
    try:
        one.start()
        process(one, 0).kill()
        keep_until(one, lambda: not programs and "again at" in caplog.text)
        assert caplog.text.count("port 1 is taken; trying again") == 4
    finally:
        one.stop(0, HURRY)


def test_a_router_that_never_starts_again_is_the_end(programs, at_once):
    programs += [QUIET, *[FAILS] * 5]
    one = several(1)
    try:
        one.start()
        process(one, 0).kill()
        with pytest.raises(ServeError, match="the router did not start: port 1 is taken"):
            keep_until(one, lambda: False)
    finally:
        one.stop(0, HURRY)
    assert programs == []


def test_a_router_that_is_slow_to_start_again_is_waited_for_by_nobody(
    programs, at_once, monkeypatch, caplog
):
    programs += [QUIET, "import time; time.sleep(60)", QUIET]
    one = several(1)
    try:
        one.start()
        process(one, 0).kill()
        keep_until(one, lambda: len(programs) == 1)
        before = time.monotonic()
        one.keep(WORKERS)
        assert time.monotonic() - before < 5
        monkeypatch.setattr(routers, "READY_S", 0.1)
        keep_until(one, lambda: "did not start within" in caplog.text)
        monkeypatch.setattr(routers, "READY_S", WAIT_S)
        keep_until(one, lambda: "again at" in caplog.text)
    finally:
        one.stop(0, HURRY)


def test_a_router_that_hangs_is_killed_and_started_again(programs, tmp_path, monkeypatch, caplog):
    """Nobody answers at the control socket: no server has been made."""
    monkeypatch.setattr(router_process, "HANG_S", 0.2)
    programs += [QUIET, QUIET]
    one = several(1, tmp_path)
    try:
        one.start()
        hung = process(one, 0)
        keep_until(one, lambda: hung.returncode is not None)
        keep_until(one, lambda: "again at" in caplog.text)
        assert hung.returncode == -signal.SIGKILL
        assert "the router gave no sign of life" in caplog.text
    finally:
        one.stop(0, HURRY)


# ---- the end


def test_routers_are_asked_to_end(programs):
    programs += [POLITE, POLITE]
    two = several(2)
    two.start()
    ended = [process(two, 0), process(two, 1)]
    two.stop(60, threading.Event())
    assert [one.returncode for one in ended] == [7, 7]


def test_a_router_that_does_not_end_is_ended(programs, monkeypatch):
    programs += [STUBBORN, POLITE]
    two = several(2)
    two.start()
    ended = [process(two, 0), process(two, 1)]
    monkeypatch.setattr(routers, "READY_S", 2.0)  # on top of the time to drain
    two.stop(0, threading.Event())
    assert [one.returncode for one in ended] == [-signal.SIGKILL, 7]


def test_a_place_without_a_process_is_no_hindrance_to_the_end(programs, monkeypatch):
    monkeypatch.setattr(place, "RESTART_BACKOFF_S", (60.0,))
    programs += [QUIET]
    one = several(1)
    one.start()
    process(one, 0).kill()
    keep_until(one, lambda: one._seats[0].process is None)
    one.keep(WORKERS)
    one.stop(0, threading.Event())


def test_ports_are_read_from_addresses():

    assert RouterAddress("[::1]:1", "127.0.0.1:2").ports == {"port": 1, "http_port": 2}
