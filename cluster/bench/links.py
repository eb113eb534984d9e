"""Hand-offs between two processes over each link, beside what the machine and others can do.

Called by transport.py. This process is the prefill worker's end, link_peer.py the decode worker's,
each on a core of its own where there are two, as in `kvrelay serve`.
"""

import asyncio
import base64
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch
from torch import distributed

from cluster.bench.link_cases import CASES, LAYOUT, end_config
from cluster.bench.report import BenchError, Row
from cluster.bench.timing import Budget, Work, interleaved_times, timed
from cluster.preparation import Progress
from kvrelay.config import Transport
from kvrelay.kv.pool import KVPool
from kvrelay.transport.writer_pool import WriterPool
from kvrelay.wire.transfer_pb2 import Ticket

_REPLY_S = 30.0
LINKS: tuple[Transport, ...] = ("shm", "tcp")


def bench_links(sizes_mb: list[int], budget: Budget, on_progress: Progress) -> list[Row]:
    """GB/s of a whole hand-off, from the first push to the acknowledged commit, and its times. With
    a codec, of KV as the pools hold it.

    In turns with a copy into shared memory, a loop over a plain TCP socket, and gloo.
    """
    blocks = max(_blocks(size) for size in sizes_mb)
    rows: list[Row] = []
    with _two_processes(blocks) as ends, ends.in_gloo_group():
        for done, size in enumerate(sizes_mb):
            on_progress("measuring links", done / len(sizes_mb))
            rows += _rows(size, ends, budget)
    return rows


def _blocks(size_mb: int) -> int:
    return -(-size_mb * 1_000_000 // LAYOUT.block_bytes)


def _rows(size_mb: int, ends: "_Ends", budget: Budget) -> list[Row]:
    count = _blocks(size_mb)
    sides: dict[str, Work] = {"memcpy": ends.copying(count)}
    with ends.socket(count) as over_socket:
        sides |= {"socket": over_socket, "gloo": ends.gloo(count)}
        for case, (_, links) in CASES.items():
            for link in links:
                sides[f"{link}/{case}".rstrip("/")] = ends.handing_off(link, case, count)
        for work in sides.values():
            work()  # connects, and touches its buffers
        times = dict(zip(sides, interleaved_times(list(sides.values()), budget), strict=True))
        for link in LINKS:
            times[link] += [sides[link]() for _ in range(budget.samples_min - len(times[link]))]
    moved = count * LAYOUT.block_bytes
    speed = {name: moved / median(taken) / 1e9 for name, taken in times.items()}
    rows = [Row(f"{name}/{size_mb}", speed[name], "GB/s") for name in ("memcpy", "socket", "gloo")]
    for name in (name for name in sides if name.startswith(LINKS)):
        limit = speed["memcpy" if name.startswith("shm") else "socket"]
        rows.append(Row(f"{name}/{size_mb}", speed[name], "GB/s", speed["gloo"], limit))
    for name in LINKS:
        for part, value in (("p50", 49), ("p99", 98)):
            milliseconds = quantiles(times[name], n=100, method="inclusive")[value] * 1000
            rows.append(Row(f"{name}/{size_mb}/{part}", milliseconds, "ms"))
    return rows


@dataclass
class _Ends:
    """This process's pool and links, and the peer's commands."""

    pool: KVPool
    peer: "subprocess.Popen[str]"
    folder: Path
    runner: asyncio.Runner
    writers: dict[tuple[str, str], WriterPool]

    def copying(self, count: int) -> Work:
        target = KVPool(LAYOUT, count, shared=True)
        target.bytes[:] = 0
        source = self.pool.bytes[:count]
        return lambda: timed(lambda: np.copyto(target.bytes, source))

    def handing_off(self, link: str, case: str, count: int) -> Work:
        writers = self.writers[link, case]

        async def hand_off() -> float:
            ticket = Ticket.FromString(base64.b64decode(self._ask(f"ticket {count} {case}")))
            transfer = await writers.begin(ticket)
            started = time.perf_counter()
            await transfer.push(range(count))
            await transfer.commit(0, _REPLY_S)
            taken = time.perf_counter() - started
            transfer.close()
            return taken

        return lambda: self.runner.run(hand_off())

    @contextlib.contextmanager
    def socket(self, count: int) -> Iterator[Work]:
        size = count * LAYOUT.block_bytes
        source = self.pool.bytes[:count].reshape(-1).data
        with socket.create_connection(("127.0.0.1", int(self._ask(f"socket {size}")))) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def send() -> None:
                sock.sendall(source)
                sock.recv(1)

            yield lambda: timed(send)

    @contextlib.contextmanager
    def in_gloo_group(self) -> Iterator[None]:
        path = self.folder / "gloo"
        self._ask(f"gloo {path} {self.pool.size_bytes}")
        distributed.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=2)
        try:
            yield
        finally:
            distributed.destroy_process_group()

    def gloo(self, count: int) -> Work:
        source = torch.from_numpy(self.pool.bytes[:count].reshape(-1))
        length, answer = torch.tensor([source.numel()]), torch.zeros(1, dtype=torch.uint8)

        def send() -> None:
            distributed.send(length, 1)
            distributed.send(source, 1)
            distributed.recv(answer, 1)

        return lambda: timed(send)

    def _ask(self, command: str) -> str:
        assert self.peer.stdin
        assert self.peer.stdout
        self.peer.stdin.write(command + "\n")
        self.peer.stdin.flush()
        answer = self.peer.stdout.readline()
        if not answer:
            raise BenchError("the other process of the bench has ended")
        return answer


@contextlib.contextmanager
def _two_processes(blocks: int) -> Iterator[_Ends]:
    before = os.sched_getaffinity(0)
    ours, theirs = (*sorted(before), None, None)[:2] if len(before) > 1 else (None, None)
    core = "-" if theirs is None else str(theirs)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvb-")))
        command = [sys.executable, "-m", "cluster.bench.link_peer", str(folder), str(blocks), core]
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(_end, peer)
        if ours is not None:
            os.sched_setaffinity(0, {ours})
            stack.callback(os.sched_setaffinity, 0, before)
        pool = KVPool(LAYOUT, blocks)
        pool.bytes[:] = np.random.default_rng(0).integers(0, 256, LAYOUT.block_bytes, np.uint8)
        if not (peer.stdout and peer.stdout.readline()):
            raise BenchError("the other process of the bench did not start")
        runner = stack.enter_context(asyncio.Runner())
        writers: dict[tuple[str, str], WriterPool] = {}
        for case, (_, links) in CASES.items():
            for link in links:
                config = end_config(folder, case).model_copy(update={"transport": link})
                writers[link, case] = WriterPool(config, "bench-prefill", pool)
        try:
            yield _Ends(pool, peer, folder, runner, writers)
        finally:
            for pool_of_links in writers.values():
                runner.run(pool_of_links.close())


def _end(peer: "subprocess.Popen[str]") -> None:
    assert peer.stdin
    assert peer.stdout
    peer.kill()
    peer.wait()
    peer.stdin.close()
    peer.stdout.close()
