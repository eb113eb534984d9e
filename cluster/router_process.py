"""One router process: its start, what it is told of workers, its end.

Made and owned by cluster/routers.py. Nothing here waits longer than it is told to.
"""

import contextlib
import functools
import logging
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

# Read when gRPC is first used. Nothing of ours uses it on both sides of a fork, and what it does
# before one may wait for ever for its own threads.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc

from cluster.options import ServeError
from cluster.pulse import Pulse
from kvrelay.config import RouterConfig
from kvrelay.wire import control_pb2, control_pb2_grpc

log = logging.getLogger(__name__)

READY_S = 30.0
HANG_S = 10.0  # a router that answers nothing for longer is killed
_BEAT_S = 1.0  # from one word to the next
_TELL_S = 2.0
_STARTED = re.compile(r"router grpc=(?P<grpc>\S+) http=(?P<http>\S+)")  # what a router says
_POLL_S = 0.1
_SILENCE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True)
class RouterAddress:
    grpc: str
    http: str

    def __str__(self) -> str:
        return f"grpc={self.grpc} http={self.http}"

    @property
    def ports(self) -> dict[str, int]:
        """As a RouterConfig names them."""
        ports = {"port": self.grpc, "http_port": self.http}
        return {name: int(address.rsplit(":", 1)[1]) for name, address in ports.items()}


class RouterProcess:
    """Starts as it is made; `module` is what runs as the router."""

    def __init__(self, config: RouterConfig, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C in a terminal is for us; we tell the router. Not in a session of its own: Linux
            # shares out cores by session, and there workers' steps keep the router from them.
            process_group=0,
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(config.model_dump_json() + "\n")
            self._process.stdin.flush()
        self._line = ControlLine(config)

    @property
    def status(self) -> int | None:
        """Once it has ended: what it returned, or the signal that ended it, negative."""
        return self._process.poll()

    def started(self, wait_s: float) -> RouterAddress | None:
        """Where it listens, once it says so; raises ServeError when it cannot start."""
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], wait_s)[0]:
            return None
        line = stdout.readline()
        started = _STARTED.fullmatch(line.strip())
        if started is None:
            self.kill()
            reason = line.strip().removeprefix("failed ") or "see its traceback above"
            raise ServeError(f"the router did not start: {reason}")
        return RouterAddress(started["grpc"], started["http"])

    def connect(self, workers: control_pb2.WorkerSet, wait_s: float) -> None:
        """Returns when it is connected to all of `workers`; raises grpc.RpcError."""
        self._line.connect(workers, wait_s)

    def keep_told(self, workers: control_pb2.WorkerSet) -> None:
        self._line.keep_told(workers, time.monotonic())

    def knows(self, workers: control_pb2.WorkerSet) -> bool:
        return self._line.known == workers

    @property
    def is_hung(self) -> bool:
        return self._line.pulse.silent_s > HANG_S

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    def ask_to_end(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self, deadline_s: float, hurry: threading.Event) -> None:
        """Until it has ended, which it is made to at deadline_s, or when `hurry` is set."""
        while self._process.poll() is None:
            if hurry.is_set() or time.monotonic() > deadline_s:
                self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_POLL_S)
        self._close()

    def _close(self) -> None:
        self._line.close()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what a router that died has not read
                    stream.close()


class ControlLine:
    """Tells a router which workers there are, at every change and every _BEAT_S: its answers are
    its signs of life, and what was lost on the way is made good a moment later."""

    def __init__(self, config: RouterConfig) -> None:
        self.known: control_pb2.WorkerSet | None = None  # the last one it has answered to
        self.pulse = Pulse(time.monotonic())
        self._target = f"unix:{config.control_socket}"
        self._channel: grpc.Channel | None = None
        self._asked: control_pb2.WorkerSet | None = None
        self._asked_s = 0.0
        self._call: Any = None  # a grpc.Future, and a grpc.Call
        self._said = ""  # why it does not take them

    def connect(self, workers: control_pb2.WorkerSet, wait_s: float) -> None:
        self._stub.SetWorkers(workers, timeout=wait_s, wait_for_ready=True)
        self._stub.WaitReady(control_pb2.WaitReadyRequest(), timeout=wait_s)
        self.known = workers

    def keep_told(self, workers: control_pb2.WorkerSet, now_s: float) -> None:
        self.pulse.look(now_s, beat=self._take_answer())
        changed = workers != self._asked
        if changed or (self._call is None and now_s - self._asked_s >= _BEAT_S):
            if self._call is not None:
                self._call.cancel()
            self._asked, self._asked_s = workers, now_s
            self._call = self._stub.SetWorkers.future(workers, timeout=_TELL_S, wait_for_ready=True)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()

    @functools.cached_property
    def _stub(self) -> control_pb2_grpc.RouterControlStub:
        # Not before it is needed: Ray forks as it starts, and a fork beside gRPC's threads may
        # never end. A pool of its own: the process before it had the same socket.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(self._target, options=options)
        return control_pb2_grpc.RouterControlStub(self._channel)

    def _take_answer(self) -> bool:
        """True when there is a new one, whatever it says."""
        call = self._call
        if call is None or not call.done():
            return False
        self._call = None
        if call.code() is grpc.StatusCode.OK:
            self.known, self._said = self._asked, ""
            return True
        reason = " ".join(str(call.details()).split())
        if reason != self._said:
            log.error("a router does not take the workers: %s; trying again", reason)
            self._said = reason
        return call.code() not in _SILENCE
