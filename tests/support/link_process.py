"""Processes that hold one end of a KV link, or a whole worker, for tests that kill and stop them.

`Nursery` is one process that has imported everything and forks an end when asked, which takes tens
of milliseconds rather than seconds. What an end is, its module says, link_ends.py or
worker_ends.py. An end obeys lines of JSON on a socket: {"id", "do", ...} is answered with
{"id", ...}, and what it tells by itself has an "event". An end dies with the nursery, and the
nursery with the test, stopped or not.
"""

import asyncio
import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from waiting import until

_ROOT = Path(__file__).parents[2]
_STOP_S = 10.0
_PR_SET_PDEATHSIG = 1
_LINE_BYTES_MAX = 1 << 20
_READY_S = 120.0  # importing torch on a busy machine


class EndDiedError(Exception):
    """The process ended before it answered."""


class End:
    """One process, as the test sees it."""

    def __init__(self, name: str, pid: int, pidfd: int) -> None:
        self.name = name
        self.pid = pid
        self.alive = True
        self.stopped = False
        self.was_stopped = False
        self.started: dict[str, Any] = {}  # what it said of itself
        self._pidfd = pidfd
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._events: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._asked = 0
        self._reading: asyncio.Task[None]
        self._writer: asyncio.StreamWriter

    @classmethod
    async def over(cls, sock: socket.socket, name: str, pid: int, pidfd: int) -> "End":
        end = cls(name, pid, pidfd)
        reader, end._writer = await asyncio.open_unix_connection(sock=sock, limit=_LINE_BYTES_MAX)
        end._reading = asyncio.ensure_future(end._read(reader))
        return end

    async def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Its answer; EndDiedError when there will be none. The caller sets the deadline."""
        self._asked += 1
        number = self._asked
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        if not self.alive:
            answer.set_exception(EndDiedError(self.name))
        else:
            line = json.dumps({"id": number, "do": do, **arguments})
            self._writer.write(line.encode() + b"\n")
        try:
            said = await answer
        finally:
            self._answers.pop(number, None)
        assert "error" not in said, f"{self.name}: {said['error']}"
        return said

    def tell(self, do: str, **arguments: Any) -> None:
        """Asks without waiting for an answer; it may be stopped or gone."""
        if self.alive:
            self._writer.write(json.dumps({"id": 0, "do": do, **arguments}).encode() + b"\n")

    async def told(self, event: str, **fields: Any) -> dict[str, Any]:
        """The event, as soon as it has been told, which may be already."""
        while True:
            for each in self._events:
                if each["event"] == event and fields.items() <= each.items():
                    return each
            if not self.alive:
                raise EndDiedError(self.name)
            self._news.clear()
            await self._news.wait()

    def has_told(self, event: str, **fields: Any) -> bool:
        return any(e["event"] == event and fields.items() <= e.items() for e in self._events)

    def forget_events(self) -> None:
        self._events.clear()

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)
        self.stopped = self.was_stopped = True

    async def has_stopped(self) -> None:
        """Returns when it has stopped itself."""
        stat = Path(f"/proc/{self.pid}/stat")
        await until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", within_s=_STOP_S)
        self.stopped = self.was_stopped = True

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)
        self.stopped = False

    async def kill(self) -> None:
        """Returns when the kernel has taken everything back from it."""
        self._signal(signal.SIGKILL)
        await self.gone()

    async def gone(self) -> None:
        """Returns when the process has ended and all it said has been read."""
        await self._reading
        if self._pidfd >= 0:
            ended = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(self._pidfd, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _signal(self, number: int) -> None:
        if self._pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                message = json.loads(line)
                answer = self._answers.get(message.get("id", 0))
                if answer is not None and not answer.done():
                    answer.set_result(message)
                elif "event" in message:
                    self._events.append(message)
                    self._news.set()
        self.alive = False
        self._news.set()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EndDiedError(self.name))


class Nursery:
    """Used as a context; forks ends until it is left, which ends them all.

    module: has `run(settings, control)`, which is the end, and `warm(*arguments)`, which does once
    what all ends would do.
    """

    def __init__(self, module: str = "link_ends", *arguments: str) -> None:
        self._command = ["-m", "link_process", module, *arguments]

    def __enter__(self) -> "Nursery":
        self._sock, theirs = socket.socketpair()
        paths = [str(_ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        # A process that forks must have no thread but the first.
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *self._command, str(theirs.fileno())],
                env={**os.environ, **single, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                pass_fds=[theirs.fileno()],
            )
        self._sock.settimeout(_READY_S)
        assert self._sock.recv(1) == b"r", "the nursery did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()
        self._process.wait(_READY_S)

    async def fork(self, role: str, name: str, **settings: Any) -> End:
        """A new process that is a `role`, decode or prefill; `settings` are its module's."""
        ours, theirs = socket.socketpair()
        with theirs:
            request = json.dumps({"role": role, "name": name, **settings}).encode()
            socket.send_fds(self._sock, [request], [theirs.fileno()])
            pid = int(self._sock.recv(16))
        # It waits for a line of ours, so it cannot have ended and its number be another's.
        pidfd = os.pidfd_open(pid)
        ours.setblocking(False)
        end = await End.over(ours, name, pid, pidfd)
        end.started = await end.ask("start")
        return end


def main(module: str, *arguments: str) -> None:
    """The nursery itself: forks one end for each request on the socket, until that is closed. The
    last argument is the socket's descriptor."""
    _die_with_parent()
    ends = importlib.import_module(module)
    ends.warm(*arguments[:-1])
    fd = int(arguments[-1])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none of them is waited for
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, "a thread would be lost in every fork"
    requests = socket.socket(fileno=fd)
    requests.send(b"r")
    while True:
        request, fds, _, _ = socket.recv_fds(requests, 1 << 16, 1)
        if not request:
            return
        pid = os.fork()
        if not pid:
            requests.close()
            _die_with_parent()
            ends.run(json.loads(request), socket.socket(fileno=fds[0]))
            os._exit(0)  # threads that hang must not keep it
        os.close(fds[0])
        requests.send(str(pid).encode())


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
