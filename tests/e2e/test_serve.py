"""`kvrelay serve` as a process: what it prints, how it runs, and that nothing outlives it."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path

import grpc
import httpx2
import psutil
import pytest
from serve_process import (
    ANSWER_S,
    END_S,
    KVRELAY,
    SAMPLED,
    Answering,
    Server,
    name_of,
    serving,
    soon,
    starting,
)
from tiny_models import make_endless, make_not_decoder_only

from kvrelay.client import Client, Completion, KvrelayError

INTERRUPTED_S = 20.0
DRAINED_TOKENS = 4000
# Days of decoding: an answer of so many tokens never ends by itself.
MODEL_TOKENS = 1 << 16
ENDLESS_TOKENS = 50_000


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "endless"
    return make_endless(folder, max_position_embeddings=MODEL_TOKENS)


@pytest.fixture(scope="module")
def server(model) -> Iterator[Server]:
    """Shared by the tests that leave it running."""
    with serving(model) as started:
        yield started


# ---- running


def test_it_prints_one_line(server):
    assert server.printed == [f"ready grpc={server.address} http={server.http_address}\n"]
    # On stderr the stages alone: no bar of a library, no chatter of Ray's.
    stages = ("reading ", "packing ", "comparing ", "writing ")  # of weights, the first time
    stages += ("starting ", "loading ", "connecting ")
    assert [line for line in server.stderr.splitlines() if not line.startswith(stages)] == []


def test_generate_json(server):
    command = [KVRELAY, "generate", "--address", server.address, "--json", "--max-tokens", "9"]
    done = subprocess.run(
        [*command, "hello"], capture_output=True, text=True, timeout=ANSWER_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    [line] = done.stdout.splitlines()
    answer = json.loads(line)
    wanted = {"text", "token_ids", "finish_reason", "prompt_tokens", "ttft_ms", "tpot_ms"}
    assert answer.keys() >= wanted | {"kv_bytes", "transport"}
    assert len(answer["token_ids"]) == 9
    assert answer["finish_reason"] == "length"
    assert answer["transport"] == "shm"
    assert answer["kv_bytes"] > 0
    assert answer["ttft_ms"] > 0


def test_http(server):
    url = f"http://{server.http_address}"
    assert httpx2.get(f"{url}/ready").json() == {"status": "ok"}
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9}
    answer = httpx2.post(f"{url}/v1/chat/completions", json=chat, timeout=ANSWER_S).json()
    assert answer["usage"]["completion_tokens"] == 9


def test_the_router_has_neither_torch_nor_ray(server):
    maps = Path(f"/proc/{server.router().pid}/maps").read_text()
    assert "cygrpc" in maps, "these are the files it has loaded"
    assert not [name for name in ("libtorch", "_raylet", "libnccl") if name in maps]


def test_it_listens_on_loopback_alone(server):
    listening = {
        connection.laddr.ip
        for process in server.family()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
    }
    assert listening
    assert [ip for ip in listening if not _is_loopback(ip)] == []


def _is_loopback(ip: str) -> bool:
    address = ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def test_its_folder_is_for_its_user_alone(server):
    [folder] = server.temp_dir.glob("kvr-*")
    assert folder.stat().st_mode & 0o077 == 0
    sockets = [path for path in folder.glob("*.sock") if path.is_socket()]
    assert "control.sock" in {path.name for path in sockets}


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_worker_that_is_killed(server, role):
    """The request that ran is finished with the same tokens, and the worker is replaced."""
    # The prompt is long so that the prefill worker can be met at it.
    prompt = "word " * 1500 if role == "prefill" else "word "
    with server.client() as client:
        unfaulted = client.generate(prompt, max_tokens=600, **SAMPLED).result()
    before = server.workers()
    decoding = server.decode_workers()
    assert (len(before), len(decoding)) == (2, 1)
    [victim] = decoding if role == "decode" else before - decoding

    answering = Answering(server, prompt, 600)
    answering.wait(answering.begun if role == "decode" else answering.accepted)
    victim.kill()
    assert answering.whole_answer() == list(unfaulted.token_ids)

    with server.client() as client:
        again = client.generate(prompt, max_tokens=600, **SAMPLED).result()
    assert again.token_ids == unfaulted.token_ids
    after = server.workers()
    assert len(after - before) == 1
    assert victim not in after
    assert server.printed == [f"ready grpc={server.address} http={server.http_address}\n"]


# ---- several workers, and the end


def test_many_workers_over_tcp_until_sigterm(server, model):
    prompts = [[5 + at] * (1 + 37 * at) for at in range(12)]

    def ask(client: Client, prompt: list[int]) -> Completion:
        return client.generate(prompt, max_tokens=60, **SAMPLED).result()

    with server.client() as client:
        expected = [ask(client, prompt).token_ids for prompt in prompts]
    options = ("--prefill", "2", "--decode", "3", "--transport", "tcp")
    with serving(model, *options) as many:
        assert len(many.workers()) == 5
        with many.client() as client, ThreadPoolExecutor(len(prompts)) as threads:
            answers = list(threads.map(lambda prompt: ask(client, prompt), prompts))
        assert [answer.token_ids for answer in answers] == expected
        assert {answer.timings.transport for answer in answers} == {"tcp"}
        end_politely(many, lambda: many.process.send_signal(signal.SIGTERM))


def test_decode_workers_alone_until_sigterm(server, model):
    prompts = [[5 + at] * (1 + 37 * at) for at in range(6)]

    def ask(client: Client, prompt: list[int]) -> Completion:
        return client.generate(prompt, max_tokens=60, **SAMPLED).result()

    with server.client() as client:
        expected = [ask(client, prompt).token_ids for prompt in prompts]
    with serving(model, "--prefill", "0", "--decode", "2", "--itl-target-ms", "20") as alone:
        assert len(alone.workers()) == 2
        with alone.client() as client, ThreadPoolExecutor(len(prompts)) as threads:
            answers = list(threads.map(lambda prompt: ask(client, prompt), prompts))
        assert [answer.token_ids for answer in answers] == expected
        assert {answer.timings.transport for answer in answers} == {"local"}
        end_politely(alone, lambda: alone.process.send_signal(signal.SIGTERM))


def test_sigint_to_the_process_group(model):
    """Ctrl-C in a terminal reaches every process of the group."""
    with serving(model, "--transport", "shm") as server:
        end_politely(server, lambda: os.killpg(server.process.pid, signal.SIGINT))


def end_politely(server: Server, send_signal: Callable[[], object]) -> None:
    """What runs is finished, what is new is refused, and nothing is left."""
    answering = Answering(server, "once", DRAINED_TOKENS)
    answering.wait(answering.begun)
    server.family()
    send_signal()
    assert soon(lambda: "finishing what is running" in server.stderr)
    # Written just before the router is told: a moment later nothing new gets in.
    assert soon(lambda: _refuses(server))
    assert answering.is_running, "the answer was too short for this test"
    assert server.process.poll() is None
    assert len(answering.whole_answer()) == DRAINED_TOKENS
    assert server.wait_end() == 0, server.stderr
    assert len(server.printed) == 1
    assert "Traceback" not in server.stderr
    server.assert_nothing_left()


def _refuses(server: Server) -> bool:
    try:
        with server.client() as client:
            client.generate("hi", max_tokens=1).result()
    except KvrelayError as error:
        return error.code is grpc.StatusCode.UNAVAILABLE
    return False


def test_a_second_signal_does_not_wait(model):
    with serving(model, "--drain-s", "600") as server:
        answering = Answering(server, "once", ENDLESS_TOKENS)
        answering.wait(answering.begun)
        server.process.send_signal(signal.SIGINT)
        assert soon(lambda: "finishing what is running" in server.stderr)
        server.process.send_signal(signal.SIGINT)
        assert server.wait_end() == 0, server.stderr
        assert answering.status() is grpc.StatusCode.UNAVAILABLE
        assert "Traceback" not in server.stderr
        server.assert_nothing_left()


def test_sigkill_leaves_no_router_and_no_worker(model):
    with serving(model, "--drain-s", "1") as server:
        answering = Answering(server, "once", ENDLESS_TOKENS)
        answering.wait(answering.begun)
        server.family()
        server.process.kill()
        server.process.wait(END_S)
        # Ray's two agents, small and of no use by then, take a minute to find out.
        agents = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
        assert soon(lambda: {name_of(p) for p in server.alive()} <= agents, 30), server.alive()
        assert answering.status() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("stage", ["starting Ray", "loading the model"])
def test_ctrl_c_while_starting(model, stage):
    with starting(model) as server:
        assert soon(lambda: stage in server.stderr)
        server.family()
        began = time.monotonic()
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.wait_end() == 130, server.stderr
        assert time.monotonic() - began < INTERRUPTED_S
        assert server.printed == []
        stages = ("starting ", "loading ")
        assert [line for line in server.stderr.splitlines() if not line.startswith(stages)] == []
        assert server.alive() == []
        assert list(server.temp_dir.iterdir()) == []


# ---- what cannot start


def assert_error(server: Server, *words: str) -> None:
    assert server.wait_end() == 1
    assert server.printed == []
    assert "Traceback" not in server.stderr
    errors = [line for line in server.stderr.splitlines() if line.startswith("error: ")]
    assert errors == server.stderr.splitlines()[-1:], server.stderr
    assert [word for word in words if word not in errors[0]] == [], errors[0]
    assert {entry.name for entry in server.temp_dir.iterdir()} == set()


def test_a_path_that_is_not_there(tmp_path):
    with starting(tmp_path / "nothing") as server:
        assert_error(server, "nothing", "does not exist")


def test_a_model_that_is_not_decoder_only(tmp_path):
    with starting(make_not_decoder_only(tmp_path / "bert")) as server:
        assert_error(server, "BertForMaskedLM", "not a decoder-only language model")


def test_a_file_of_unknown_type(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"weights")
    with starting(file) as server:
        assert_error(server, "model.bin", "not a .gguf file")


@pytest.mark.parametrize("option", ["--port", "--http-port"])
def test_a_port_that_is_taken(model, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with starting(model, option, str(port)) as server:
            assert_error(server, "router", str(port))


def test_a_port_that_the_second_router_finds_taken(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with starting(model, "--port", str(port - 1), "--routers", "2") as server:
            assert_error(server, "router", str(port))


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU here")
def test_a_device_that_is_not_there(model):
    with starting(model, "--device", "cuda") as server:
        assert_error(server, "cuda")
