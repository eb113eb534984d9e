"""What is left of the load once nothing runs any more: blocks, requests, processes, shared memory.

Called by run.py. The ledgers are read as a router would: in a session, with the cluster's key.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil

from cluster.chaos.processes import Processes, router_gauges
from cluster.serving import Serving
from kvrelay.config import WorkerConfig
from kvrelay.membership import NotAMemberError, prove
from kvrelay.rpc import dial
from kvrelay.wire import worker_pb2_grpc

_PROOF_S = 10.0
_LOOK_S = 0.5
_SHM = Path("/dev/shm")
_IDLE = ("kvrelay_requests_running", "kvrelay_requests_queued")
_WORKER_STUBS: dict[str, Any] = {
    "prefill": worker_pb2_grpc.PrefillWorkerStub,
    "decode": worker_pb2_grpc.DecodeWorkerStub,
}


@dataclass(frozen=True)
class Before:
    """What there was before the load."""

    names: Mapping[int, str]
    shm: frozenset[str]


@dataclass
class Leaks:
    """What was left, and of what. `unread`: workers whose ledger could not be read."""

    blocks: dict[str, int] = field(default_factory=dict)  # by role and address; 0: all are back
    requests: int = 0  # that routers still have
    processes: list[str] = field(default_factory=list)
    shm: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def found(self) -> list[str]:
        """A line for each leak."""
        lines = [f"{count} blocks of {where}" for where, count in self.blocks.items() if count]
        if self.requests:
            lines.append(f"{self.requests} requests at routers")
        lines += [f"a process: {name}" for name in self.processes]
        lines += [f"{_SHM / name}" for name in self.shm]
        return lines + [f"the ledger of {where} could not be read" for where in self.unread]


def before(processes: Processes) -> Before:
    return Before(processes.names(), _shm_names())


def find_leaks(serving: Serving, processes: Processes, then: Before, within_s: float) -> Leaks:
    """What is not back within so long."""
    deadline_s = time.monotonic() + within_s
    leaks = Leaks()
    asyncio.run(_read_ledgers(serving, deadline_s, leaks))
    while True:
        leaks.requests = _requests(processes)
        leaks.processes = _too_many(then.names, processes.names())
        leaks.shm = sorted(_shm_names() - then.shm)
        late = time.monotonic() > deadline_s
        if late or not (leaks.requests or leaks.processes or leaks.shm):
            return leaks
        time.sleep(_LOOK_S)


def left_behind() -> list[str]:
    """Processes that are there although the cluster has been stopped."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append(f"{process.name()} {process.pid} after the end")
    return found


async def _read_ledgers(serving: Serving, deadline_s: float, leaks: Leaks) -> None:
    async def read(role: str, address: str) -> None:
        where = f"{role} worker {address}"
        try:
            used = await blocks_used(role, address, serving.worker_config, deadline_s)
        except (grpc.aio.AioRpcError, NotAMemberError):
            used = None
        if used is None:
            leaks.unread.append(where)
        else:
            leaks.blocks[where] = used

    roles = [(role, each) for role in _WORKER_STUBS for each in serving.worker_addresses(role)]
    await asyncio.gather(*(read(*each) for each in roles))


async def blocks_used(
    role: str, address: str, config: WorkerConfig, deadline_s: float
) -> int | None:
    """Blocks that are neither free nor cached and nobody's: 0 as soon as all are back, else those
    at the deadline. None: the worker has said nothing until then."""
    total: int | None = None
    used: int | None = None
    ended = asyncio.Event()
    async with dial(address, config.certificates) as channel:
        session = _WORKER_STUBS[role](channel).Session
        proof = await prove(session, address, config.cluster_key, _PROOF_S)
        call = session(_silence(ended), metadata=proof)
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                async for event in call:
                    if event.WhichOneof("event") == "info":
                        total = event.info.blocks_total
                    if total is not None and event.HasField("load"):
                        used = total - event.load.blocks_free
                    if used == 0:
                        break
        except TimeoutError:
            pass
        finally:
            call.cancel()
            ended.set()
    return used


async def _silence(ended: asyncio.Event) -> AsyncIterator[Any]:
    """A router's commands, of which there are none."""
    while not ended.is_set():
        await ended.wait()
        return
    yield


def _requests(processes: Processes) -> int:
    """A router that does not answer counts for one."""
    total = 0.0
    for address in processes.router_http:
        gauges = router_gauges(address)
        total += sum(gauges[name] for name in _IDLE) if gauges else 1
    return int(total)


def _too_many(then: Mapping[int, str], now: Mapping[int, str]) -> list[str]:
    """Names of processes that there are more of. Ray starts and ends its own as it likes."""
    more = Counter(now.values()) - Counter(then.values())
    return sorted(name for name in more.elements() if not name.startswith("ray::"))


def _shm_names() -> frozenset[str]:
    return frozenset(path.name for path in _SHM.iterdir()) if _SHM.is_dir() else frozenset()
