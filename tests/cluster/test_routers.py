"""Router processes as they are started, told and ended; programs of a line stand in for them."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest

from cluster import routers
from cluster.model_store import PreparedModel
from cluster.options import ServeError, ServeOptions
from cluster.routers import RouterAddress, Routers
from cluster.serving import Serving
from kvrelay.config import RouterConfig
from kvrelay.wire import control_pb2

WORKERS = control_pb2.WorkerSet(decode_addresses=["127.0.0.1:1"])
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


def several(count: int) -> Routers:
    configs = [
        RouterConfig(
            model_path=Path("none"),
            model_name="tiny",
            cluster_key="k" * 16,
            control_socket=Path(f"none-{number}"),
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

    monkeypatch.setattr(routers.subprocess, "Popen", run)
    return chosen


@pytest.fixture
def told(monkeypatch):
    """(router, what came of it) of each that was told; `refusing` says who does not take it."""
    calls: list[Path] = []
    refusing: set[Path] = set()

    class Refusal(grpc.RpcError):
        def details(self) -> str:
            return "not\nnow"

    def tell(config, workers, timeout_s, ready_s):
        calls.append(config.control_socket)
        if config.control_socket in refusing:
            raise Refusal

    monkeypatch.setattr(routers, "_tell", tell)
    return calls, refusing


# ---- the start


def test_a_router_that_says_nothing(programs, monkeypatch):
    monkeypatch.setattr(routers, "READY_S", 0.1)
    programs.append("import time; time.sleep(60)")
    one = several(1)
    with pytest.raises(ServeError, match="did not start within"):
        one.start()
    one.stop(0, threading.Event())
    assert one._processes[0].returncode == -signal.SIGKILL


def test_routers_that_started_say_their_addresses(programs):
    programs += [QUIET, QUIET.replace("grpc=h:1 http=h:2", "grpc=h:3 http=h:4")]
    two = several(2)
    try:
        two.start()
        assert two.addresses == [RouterAddress("h:1", "h:2"), RouterAddress("h:3", "h:4")]
        assert str(two.addresses[0]) == "grpc=h:1 http=h:2"
        two.check()
    finally:
        two.stop(0, HURRY)


def test_a_router_that_fails_says_why_and_the_others_end(programs):
    why = "failed HTTP port 127.0.0.1:8000 is taken; choose another with --http-port"
    programs += [QUIET, f"print({why!r})"]
    two = several(2)
    try:
        with pytest.raises(ServeError, match=r"did not start: HTTP port .* is taken"):
            two.start()
    finally:
        two.stop(10, threading.Event())
    assert [process.returncode for process in two._processes] == [-signal.SIGTERM, 0]


# ---- the workers


def test_every_router_is_told_even_if_one_cannot_be(told):
    calls, refusing = told
    refusing.add(Path("none-0"))
    with pytest.raises(ServeError, match="a router does not take the workers: not now"):
        several(3).tell(WORKERS, 1.0)
    assert calls == [Path("none-0"), Path("none-1"), Path("none-2")]


def test_a_router_that_cannot_be_told_is_told_again(told, programs, monkeypatch, caplog):
    calls, refusing = told
    cluster = Serving(PreparedModel("tiny", Path("/nowhere")), ServeOptions())
    [config] = cluster.routers._configs
    refusing.add(config.control_socket)
    programs.append(POLITE)
    stopping = threading.Event()
    deaths = iter([True])

    def no_more_deaths(wait_s):
        if len(calls) == 2:
            refusing.clear()
        if len(calls) == 3:
            stopping.set()
        return next(deaths, False)

    monkeypatch.setattr(cluster._pools, "replace_dead", no_more_deaths)
    monkeypatch.setattr(cluster._pools, "addresses", lambda role: [])
    try:
        cluster.routers.start()
        cluster.watch(stopping)
        assert len(calls) == 3
        again = "the router does not take the workers: not now; trying again"
        assert caplog.messages == [again] * 2
    finally:
        cluster.routers.stop(10, threading.Event())


# ---- the end


def test_one_that_has_ended_is_told(programs):
    programs += [QUIET, "print('router grpc=h:1 http=h:2', flush=True); raise SystemExit(3)"]
    two = several(2)
    try:
        two.start()
        two._processes[1].wait(10)
        with pytest.raises(ServeError, match="a router ended with status 3"):
            two.check()
    finally:
        two.stop(0, HURRY)


def test_routers_are_asked_to_end(programs):
    programs += [POLITE, POLITE]
    two = several(2)
    two.start()
    two.stop(60, threading.Event())
    assert [process.returncode for process in two._processes] == [7, 7]


def test_a_router_that_does_not_end_is_ended(programs, monkeypatch):
    programs += [STUBBORN, POLITE]
    two = several(2)
    two.start()
    monkeypatch.setattr(routers, "READY_S", 2.0)  # on top of the time to drain
    two.stop(0, threading.Event())
    assert [process.returncode for process in two._processes] == [-signal.SIGKILL, 7]
