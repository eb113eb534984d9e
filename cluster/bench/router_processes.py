"""The processes of `kvrelay bench router`: the real router, and what stands around it.

Called by router.py. Router, stand-in workers, bare server and load are a process each, so that the
router's memory and processor time are its own.
"""

import contextlib
import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster.bench.report import BenchError
from cluster.bench.router_clock import VOCAB
from kvrelay.config import RouterConfig
from kvrelay.membership import new_cluster_key
from kvrelay.wire import control_pb2, control_pb2_grpc

QUEUE_MAX = 1024
_REPLY_S = 120.0
_READY_S = 30.0
_END_S = 5.0

Started = TypeVar("Started", bound="Child")


class Child:
    """One process that says a line when it is ready, and then answers a line with a line."""

    def __init__(self, name: str, module: str, first_line: str = "") -> None:
        self.name = name
        command = [sys.executable, "-m", module]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._say(first_line)

    def ready(self) -> str:
        """Waits for the line that it says."""
        return self._line()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Raises BenchError when it fails."""
        self._say(json.dumps({"do": do, **arguments}) + "\n")
        answer = json.loads(self._line())
        if "error" in answer:
            raise BenchError(f"{self.name} failed: {answer['error']}")
        return answer

    def rss_bytes(self) -> int:
        return psutil.Process(self.pid).memory_info().rss

    def end(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # each of them ends with its stdin
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # the next line read will say so
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _line(self) -> str:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], _REPLY_S)[0]:
            raise BenchError(f"{self.name} did not answer within {_REPLY_S:g} s")
        line = self._process.stdout.readline()
        if not line or line.startswith("failed"):
            raise BenchError(f"{self.name} has ended: {line.strip() or 'see its traceback above'}")
        return line


class Server(Child):
    """A process that listens at `address`, which it says as the word grpc=HOST:PORT."""

    address = ""

    def ready(self) -> str:
        line = super().ready()
        self.address = dict(word.split("=", 1) for word in line.split() if "=" in word)["grpc"]
        return line


def _connect(control_socket: Path, worker_address: str) -> None:
    """Gives the router its workers, as cluster/serving.py does."""
    workers = control_pb2.WorkerSet(
        prefill_addresses=[worker_address], decode_addresses=[worker_address]
    )
    with grpc.insecure_channel(f"unix:{control_socket}") as channel:
        stub = control_pb2_grpc.RouterControlStub(channel)
        try:
            stub.SetWorkers(workers, timeout=_READY_S, wait_for_ready=True)
            stub.WaitReady(control_pb2.WaitReadyRequest(), timeout=_READY_S)
        except grpc.RpcError as error:
            raise BenchError(f"the router does not take the workers: {error.details()}") from error


@dataclass(frozen=True)
class Processes:
    """All of them."""

    router: Server
    workers: Server
    bare: Server
    load: Child

    def pace(self, tokens_s: int, streams: int = 1) -> None:
        """Workers and bare server make tokens_s for so many streams, in steps; 0: none."""
        step_ms = 1000 * streams / tokens_s if tokens_s else 0
        for server in (self.workers, self.bare):
            server.ask("pace", step_ms=step_ms)


@contextlib.contextmanager
def started() -> Iterator[Processes]:
    """Raises BenchError when one of them does not start."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvb-")))
        write_model(folder)
        config = RouterConfig(
            model_path=folder,
            model_name="bench",
            cluster_key=new_cluster_key(),
            control_socket=folder / "control.sock",
            port=0,
            local_prefill="never",
            queue_max=QUEUE_MAX,
            queue_patience_ms=3_600_000,  # nobody leaves a queue that is to stay full
            drain_ms=0,
        )

        def begun(kind: type[Started], name: str, module: str, first_line: str = "") -> Started:
            child = kind(name, module, first_line)
            stack.callback(child.end)
            return child

        here = "cluster.bench"
        key_line = f"{config.cluster_key}\n"
        workers = begun(Server, "the stand-in workers", f"{here}.router_workers", key_line)
        router = begun(Server, "the router", "router", f"{config.model_dump_json()}\n")
        bare = begun(Server, "the bare server", f"{here}.router_bare")
        load = begun(Child, "the load", f"{here}.router_load")
        for child in (workers, router, bare, load):  # they start side by side
            child.ready()
        _connect(config.control_socket, workers.address)
        yield Processes(router, workers, bare, load)


def write_model(folder: Path) -> None:
    """A model as far as a router looks: a byte-level vocabulary of VOCAB words, without weights."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"{at:x}".translate(_WORDS).rjust(4, "z") for at in range(VOCAB - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate([*alphabet, *words])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB}))


# Hexadecimal digits as letters.
_WORDS = str.maketrans("0123456789abcdef", "abcdefghijklmnop")
