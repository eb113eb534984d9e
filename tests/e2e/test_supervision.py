"""What `kvrelay serve` does about processes that die or hang, its own Ray's included, and that
requests notice nothing of it. One cluster for all: each test leaves it whole.
"""

import itertools
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest
from serve_process import ANSWER_S, SAMPLED, Answering, Server, name_of, serving, soon
from tiny_models import make_endless

from kvrelay.client import Client, KvrelayError

LONG_TOKENS = 2_000  # not over before the test has done something to a process
TOKENS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "endless"
    return make_endless(folder, max_position_embeddings=1 << 16)


@pytest.fixture(scope="module")
def two(model) -> Iterator[Server]:
    """A worker of each role and two routers; stopped at the end as a person does it."""
    with serving(model, "--routers", "2", "--drain-s", "5") as server:
        server.further = server.further_routers(1)[0]
        yield server
        server.family()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_end() == 0, server.stderr
        assert "Traceback" not in server.stderr
        assert len(server.printed) == 2
        server.assert_nothing_left()


@pytest.fixture(scope="module")
def expected(two) -> tuple[int, ...]:
    return answer(two.address)


@pytest.fixture(scope="module")
def long_answer(two) -> tuple[int, ...]:
    return answer(two.address, LONG_TOKENS)


def answer(address: str, tokens: int = TOKENS) -> tuple[int, ...]:
    with Client(address, timeout_s=ANSWER_S) as client:
        return client.generate("hello", max_tokens=tokens, **SAMPLED).result().token_ids


def serves(address: str) -> bool:
    try:
        return len(answer(address, 3)) == 3
    except KvrelayError:
        return False


def router_at(server: Server, address: str) -> psutil.Process:
    port = int(address.rsplit(":", 1)[1])
    [found] = [p for p in server.routers() if port in listening(p)]
    return found


def listening(process: psutil.Process) -> set[int]:
    connections = process.net_connections("inet")
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


def ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def head(server: Server) -> psutil.Process:
    [found] = [p for p in server.family() if name_of(p).endswith("gcs_server") and not ended(p)]
    return found


def whole(server: Server, before: set[psutil.Process]) -> bool:
    """A worker for each role again, and of those `before` none that has ended."""
    now = {p for p in server.workers() if not ended(p)}
    return len(now) == 2 and now != before and serves(server.address)


# ---- routers


def test_either_router_serves(two, expected):
    second, second_http = two.further
    assert len(two.routers()) == 2
    with Client(second, timeout_s=ANSWER_S) as client:
        again = client.generate("hello", max_tokens=TOKENS, **SAMPLED).result()
    assert again.token_ids == expected
    assert httpx2.get(f"http://{second_http}/ready").json() == {"status": "ok"}


def test_a_router_that_dies_comes_back_at_its_ports(two, expected):
    address, http_address = two.further
    router_at(two, address).kill()
    assert answer(two.address) == expected, "the other one serves"
    assert soon(lambda: f"serves again at grpc={address} http={http_address}" in two.stderr)
    assert "a router ended with status -9" in two.stderr
    assert soon(lambda: serves(address)), "it has been told of the workers"
    assert answer(address) == expected
    assert httpx2.get(f"http://{http_address}/ready").json() == {"status": "ok"}


# ---- hangs


def test_a_worker_and_a_router_that_hang_are_killed_and_replaced(two, expected, long_answer):
    address, _ = two.further
    [worker] = two.decode_workers()
    router = router_at(two, address)
    before = two.workers()
    said = two.stderr.count("serves again")
    answering = Answering(two, "hello", LONG_TOKENS)
    answering.wait(answering.begun)
    for process in (worker, router):
        process.suspend()
    assert answering.is_running
    assert tuple(answering.whole_answer()) == long_answer
    assert soon(lambda: ended(worker) and ended(router)), two.stderr
    assert soon(lambda: whole(two, before))
    assert soon(lambda: two.stderr.count("serves again") == said + 1)
    assert soon(lambda: serves(address))
    assert "a decode worker gave no sign of life for 10 s" in two.stderr
    assert "a router gave no sign of life for 10 s" in two.stderr
    assert len(before & two.workers()) == 1, "the other worker was left alone"
    assert answer(address) == expected


# ---- restarts


def test_every_worker_is_restarted_under_load_and_no_request_fails(two, expected):
    before = two.workers()
    said = len(two.stderr)
    stopping = threading.Event()
    answers: list[tuple[int, ...]] = []
    wrong: list[object] = []

    def load(address: str) -> None:
        while not stopping.is_set():
            try:
                answers.append(answer(address))
            except KvrelayError as error:
                wrong.append(error)

    addresses = itertools.cycle((two.address, two.further[0]))
    threads = [threading.Thread(target=load, args=(next(addresses),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        two.process.send_signal(signal.SIGUSR1)
        assert soon(lambda: "all workers have been restarted" in two.stderr[said:]), two.stderr
    finally:
        stopping.set()
        for thread in threads:
            thread.join(ANSWER_S)
    assert wrong == []
    assert set(answers) == {expected}
    assert len(two.workers()) == 2
    assert not before & two.workers()
    assert "it will be replaced" not in two.stderr[said:]


# ---- Ray


def test_streams_and_workers_outlive_the_head_of_ray(two, expected, long_answer):
    before = two.workers()
    lost = head(two)
    answering = Answering(two, "hello", LONG_TOKENS)
    answering.wait(answering.begun)
    lost.kill()
    assert answering.is_running
    assert tuple(answering.whole_answer()) == long_answer
    assert soon(lambda: "Ray's head is back" in two.stderr), two.stderr
    assert head(two) != lost
    assert two.workers() == before, "adopted, not duplicated"

    [victim] = two.decode_workers()
    victim.kill()
    assert soon(lambda: whole(two, before))
    assert len(before & two.workers()) == 1
    assert answer(two.address) == expected
