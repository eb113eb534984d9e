"""`kvrelay serve` as a process of its own, what runs under it, and requests beside the test.

For tests in e2e/ of what only whole processes show: signals, deaths, what is left.
"""

import contextlib
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import psutil
import pytest

from kvrelay.client import Client
from kvrelay.wire import inference_pb2 as pb
from kvrelay.wire.inference_pb2_grpc import InferenceStub

KVRELAY = Path(sys.executable).with_name("kvrelay")
SHM = Path("/dev/shm")
# Only a broken test waits so long: to be ready, for one answer, for the end.
READY_S, ANSWER_S, END_S = 240.0, 180.0, 120.0
SAMPLED = {"temperature": 1.0, "seed": 7}


class Server:
    """One `kvrelay serve`, in a session and with a temp folder of its own."""

    def __init__(self, model: Path | str, options: Sequence[str]) -> None:
        # A short path: unix sockets are made in it.
        self.temp_dir = Path(tempfile.mkdtemp(prefix="kvt-", dir="/tmp"))
        self.printed: list[str] = []
        self.address = self.http_address = ""
        self._shm_before = set(SHM.iterdir())
        self._family: set[psutil.Process] = set()
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._stderr_path = self.temp_dir.with_suffix(".err")
        with self._stderr_path.open("w") as stderr:
            self.process = subprocess.Popen(
                [
                    KVRELAY,
                    "serve",
                    str(model),
                    "--kv-gib",
                    "0.05",
                    "--port",
                    "0",
                    "--http-port",
                    "0",
                    # Short prompts, which decode workers would compute themselves.
                    "--local-prefill",
                    "never",
                    *options,
                ],
                # A Ray cluster of somebody else is not joined.
                env={**os.environ, "TMPDIR": str(self.temp_dir), "RAY_ADDRESS": "127.0.0.1:1"},
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line)
            self._lines.put(line)
        self._lines.put(None)

    @property
    def stderr(self) -> str:
        return self._stderr_path.read_text()

    def wait_ready(self) -> None:
        try:
            line = self._lines.get(timeout=READY_S)
        except queue.Empty:
            pytest.fail(f"not ready in {READY_S} s: {self.stderr}")
        assert line is not None, self.stderr
        ready = re.fullmatch(r"ready grpc=(\S+) http=(\S+)\n", line)
        assert ready, line
        self.address, self.http_address = ready.groups()

    def family(self) -> set[psutil.Process]:
        """The server and all processes under it now; those seen before are remembered."""
        server = psutil.Process(self.process.pid)
        now = {server, *server.children(recursive=True)}
        self._family |= now
        return now

    def alive(self) -> list[psutil.Process]:
        """Of all that were ever seen, by pid and time of birth, those that run."""
        return [p for p in self._family if p.is_running() and p.status() != "zombie"]

    def router(self) -> psutil.Process:
        [router] = self.routers()
        return router

    def routers(self) -> list[psutil.Process]:
        return [p for p in self.family() if p.cmdline()[-2:] == ["-m", "router"]]

    def further_routers(self, count: int) -> list[tuple[str, str]]:
        """The (gRPC, HTTP) addresses of the lines after the first."""
        lines = [self._lines.get(timeout=READY_S) for _ in range(count)]
        found = [re.fullmatch(r"router grpc=(\S+) http=(\S+)\n", line or "") for line in lines]
        return [(one[1], one[2]) for one in found if one]

    def workers(self) -> set[psutil.Process]:
        return {p for p in self.family() if name_of(p).startswith("ray::WorkerActor")}

    def decode_workers(self) -> set[psutil.Process]:
        """They alone listen for KV. Not to be had with --transport tcp."""
        return {
            worker
            for worker in self.workers()
            if any("/decode-" in c.laddr for c in worker.net_connections("unix"))
        }

    def client(self) -> Client:
        return Client(self.address, timeout_s=ANSWER_S)

    def wait_end(self) -> int:
        code = self.process.wait(END_S)
        self._reader.join(END_S)
        return code

    def assert_nothing_left(self) -> None:
        assert soon(lambda: not self.alive()), self.alive()
        assert {entry.name for entry in self.temp_dir.iterdir()} == set()
        # Others' Ray may be starting beside us: its file there has a name for a moment only.
        assert soon(lambda: set(SHM.iterdir()) <= self._shm_before)
        host, port = self.address.rsplit(":", 1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=5)

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family()
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(END_S)
        self._reader.join(END_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        shutil.rmtree(self.temp_dir, ignore_errors=True)
        self._stderr_path.unlink()


def name_of(process: psutil.Process) -> str:
    try:
        return process.cmdline()[0]
    except (psutil.Error, IndexError):
        return ""


def soon(condition: Callable[[], bool], within_s: float = END_S) -> bool:
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def starting(model: Path | str, *options: str) -> Iterator[Server]:
    server = Server(model, options)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    with starting(model, *options) as server:
        server.wait_ready()
        server.family()
        yield server


class Answering(threading.Thread):
    """A request that runs beside the test. `accepted` and `begun`, its first token, are set when
    it ends as well."""

    def __init__(self, server: Server, prompt: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.accepted, self.begun = threading.Event(), threading.Event()
        self.token_ids: list[int] = []
        self.finished: pb.Finished | None = None
        self.error: grpc.RpcError | None = None
        self._address = server.address
        sampling = pb.SamplingParams(max_tokens=max_tokens, **SAMPLED)
        self._request = pb.GenerateRequest(text=prompt, sampling=sampling)
        self.start()

    def run(self) -> None:
        try:
            with grpc.insecure_channel(self._address) as channel:
                for event in InferenceStub(channel).Generate(self._request, timeout=ANSWER_S):
                    self._take(event)
        except grpc.RpcError as error:
            self.error = error
        finally:
            self.accepted.set()
            self.begun.set()

    def _take(self, event: pb.GenerateResponse) -> None:
        self.accepted.set()
        if event.HasField("finished"):
            self.finished = event.finished
        elif event.HasField("delta"):
            self.token_ids += event.delta.token_ids
            self.begun.set()

    def wait(self, event: threading.Event) -> None:
        assert event.wait(ANSWER_S)
        assert self.is_running, (self.finished, self.error)

    @property
    def is_running(self) -> bool:
        return self.finished is None and self.error is None

    def whole_answer(self) -> list[int]:
        self.join(ANSWER_S)
        assert self.error is None, self.error
        assert self.finished is not None
        return self.token_ids

    def status(self) -> grpc.StatusCode:
        self.join(ANSWER_S)
        assert self.error is not None
        return self.error.code()
