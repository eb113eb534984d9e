"""The cluster's processes are found by who listens where; nobody else's are."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import psutil
import pytest
from waiting import until

from cluster.chaos.leaks import left_behind
from cluster.chaos.processes import Processes, router_gauges

LISTEN = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1]); "
WAIT = "import sys; sys.stdout.flush(); sys.stdin.read()"
PAGE = """\
kvrelay_requests_running 3.0
kvrelay_requests_queued 1.0
kvrelay_workers{role="prefill"} 1.0
kvrelay_workers{role="decode"} %s
kvrelay_worker_running{instance="a",role="decode"} 7.0
"""


class Worker:
    """A process below this one that listens."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LISTEN + WAIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.address = f"127.0.0.1:{int(self.process.stdout.readline())}"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class Metrics:
    """A router's page, which says how many decode workers it has."""

    decode = 1

    def __init__(self) -> None:
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write((PAGE % page.decode).encode())

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def end(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    one = Metrics()
    yield one
    one.end()


@pytest.fixture
def workers() -> Iterator[dict[str, Worker]]:
    """One of each role."""
    made = {role: Worker() for role in ("prefill", "decode", "router")}
    yield made
    for worker in made.values():
        worker.end()


def processes_of(workers: dict[str, Worker], metrics: Metrics | None = None) -> Processes:
    http = metrics.address if metrics else "127.0.0.1:1"
    routers = [SimpleNamespace(grpc=workers["router"].address, http=http)]
    serving = SimpleNamespace(
        routers=SimpleNamespace(addresses=routers),
        worker_addresses=lambda role: [workers[role].address],
    )
    processes = Processes(serving, dict.fromkeys(workers, 1))
    for child in psutil.Process().children():
        if child.pid not in {worker.process.pid for worker in workers.values()}:
            processes.leave_out(child.pid)  # another test's that lives on: multiprocessing has one
    return processes


def test_members_are_those_who_listen(workers, metrics):
    processes = processes_of(workers, metrics)
    for role, worker in workers.items():
        (member,) = processes.members(role)
        assert (member.role, member.process.pid) == (role, worker.process.pid)
    assert processes.are_whole()
    assert {processes.names()[w.process.pid] for w in workers.values()} == set(workers)


async def test_who_is_stopped_is_found_and_does_not_run(workers, metrics):
    processes = processes_of(workers, metrics)
    (member,) = processes.members("decode")
    member.process.suspend()
    stopped = {"prefill": 1, "decode": 0, "router": 1}
    await until(lambda: processes.alive() == stopped, within_s=5)
    assert len(processes.members("decode")) == 1
    assert not processes.are_whole()
    member.process.resume()
    await until(processes.are_whole, within_s=5)


def test_who_is_dead_is_not_found_and_who_takes_its_place_is(workers, metrics):
    processes = processes_of(workers, metrics)
    assert processes.are_whole()
    workers["prefill"].end()
    assert processes.members("prefill") == []
    assert not processes.are_whole()
    workers["prefill"] = Worker()
    assert processes.members("prefill")[0].process.pid == workers["prefill"].process.pid
    assert processes.are_whole()


def test_a_router_that_lacks_a_worker_is_seen(workers, metrics):
    metrics.decode = 0
    assert not processes_of(workers, metrics).are_whole()
    assert not processes_of(workers).are_whole()  # it does not answer


def test_nobody_elses_processes_are_found(workers, metrics):
    processes = processes_of(workers, metrics)
    processes.leave_out(workers["decode"].process.pid)
    assert processes.members("decode") == []


def test_who_lives_is_told_by_role_until_he_ends(workers):
    processes = processes_of(workers)
    assert processes.living() == {w.process.pid: role for role, w in workers.items()}
    workers["decode"].end()
    assert set(processes.living().values()) == {"prefill", "router"}


# One that starts another and ends: init, or whoever reaps, has that then.
ORPHAN = """\
import subprocess, sys
apart = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
print(apart.pid, flush=True)
sys.stdin.read()
"""


def test_a_process_whose_parent_has_ended_is_still_found(workers):
    processes = processes_of(workers)
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout
    orphan = psutil.Process(int(parent.stdout.readline()))
    try:
        assert orphan.pid in {each.pid for each in processes.descendants()}
        assert processes.orphans() == []
        parent.communicate("")
        assert processes.orphans() == [f"sleep {orphan.pid}"]
        for worker in workers.values():
            worker.end()
        assert left_behind(processes) == [f"sleep {orphan.pid} after the end"]
    finally:
        orphan.kill()
    psutil.wait_procs([orphan], 5)
    assert processes.survivors() == []


def test_rays_worker_is_told_from_its_idle_processes(workers):
    processes = processes_of(workers)
    titles = ("ray::IDLE", "ray::WorkerActor.start", "ray::WorkerActor")
    started = [subprocess.Popen([title, "60"], executable="/bin/sleep") for title in titles]
    try:
        names = processes.names()
        assert [names[each.pid] for each in started] == [
            "ray::IDLE",
            "ray::WorkerActor",
            "ray::WorkerActor",
        ]
    finally:
        for each in started:
            each.kill()
            each.wait()


def test_gauges_of_a_router(metrics):
    gauges = router_gauges(metrics.address)
    assert gauges["kvrelay_requests_running"] == 3
    assert gauges["kvrelay_workers/prefill"] == 1
    assert "kvrelay_worker_running" not in gauges
    assert router_gauges("127.0.0.1:1") == {}
