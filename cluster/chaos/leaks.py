"""What is left of the load once nothing runs any more: blocks, requests, processes, shared memory.

Called by run.py. The ledgers are read as a router would: in a session, with the cluster's key.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from cluster.chaos.processes import ROLES, WORKER_ACTOR, Processes, router_gauges
from cluster.serving import Serving
from kvrelay.config import WorkerConfig
from kvrelay.membership import NotAMemberError, prove
from kvrelay.rpc import dial
from kvrelay.wire import worker_pb2_grpc

_PROOF_S = 10.0
_LOOK_S = 0.5
_PROC = Path("/proc")
_POOL = "memfd:kvrelay-kv"  # the name of kvrelay/kv/pool.py
_ENDED_S = 5.0  # one that was killed may take so long to go
_IDLE = ("kvrelay_requests_running", "kvrelay_requests_queued")
_WORKER_STUBS: dict[str, Any] = {
    "prefill": worker_pb2_grpc.PrefillWorkerStub,
    "decode": worker_pb2_grpc.DecodeWorkerStub,
}


@dataclass(frozen=True)
class Before:
    """What there was before the load."""

    names: Mapping[int, str]
    pools: int  # of KV blocks in shared memory, that anybody below has open or mapped


@dataclass
class Leaks:
    """What was left, and of what. `unread`: workers whose ledger could not be read."""

    blocks: dict[str, int] = field(default_factory=dict)  # by role and address; 0: all are back
    requests: int = 0  # that routers still have
    processes: list[str] = field(default_factory=list)
    pools: int = 0  # more than before: those of workers that are gone
    unread: list[str] = field(default_factory=list)

    @property
    def found(self) -> list[str]:
        """A line for each leak."""
        lines = [f"{count} blocks of {where}" for where, count in self.blocks.items() if count]
        if self.requests:
            lines.append(f"{self.requests} requests at routers")
        lines += [f"a process: {name}" for name in self.processes]
        if self.pools:
            lines.append(f"{self.pools} KV pools in shared memory whose workers are gone")
        return lines + [f"the ledger of {where} could not be read" for where in self.unread]


def before(processes: Processes) -> Before:
    return Before(processes.names(), len(_pools(processes)))


def find_leaks(serving: Serving, processes: Processes, then: Before, within_s: float) -> Leaks:
    """What is not back within so long."""
    deadline_s = time.monotonic() + within_s
    leaks = Leaks()
    asyncio.run(_read_ledgers(serving, deadline_s, leaks))
    while True:
        leaks.requests = _requests(processes)
        leaks.processes = _odd(then.names, processes.names(), processes.counts)
        leaks.processes += [f"{name}, without a parent" for name in processes.orphans()]
        leaks.pools = max(0, len(_pools(processes)) - then.pools)
        late = time.monotonic() > deadline_s
        if late or not (leaks.requests or leaks.processes or leaks.pools):
            return leaks
        time.sleep(_LOOK_S)


def left_behind(processes: Processes) -> list[str]:
    """Processes that are there although the cluster has been stopped: below this one, or not any
    more."""
    deadline_s = time.monotonic() + _ENDED_S
    while True:
        processes.descendants()
        found = processes.survivors()
        if not found or time.monotonic() > deadline_s:
            return [f"{name} after the end" for name in found]
        time.sleep(_LOOK_S)


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


def _odd(then: Mapping[int, str], now: Mapping[int, str], counts: Mapping[str, int]) -> list[str]:
    """Names of processes that there are more of, and roles that lack one. Ray starts and ends its
    own as it likes, but for those that are workers."""
    have = Counter(now.values())
    more = have - Counter(then.values())
    found = [name for name in more.elements() if not _is_rays(name)]
    lacking = {role: counts[role] - have[role] for role in ROLES}
    found += [f"{count} {role} too few" for role, count in lacking.items() if count > 0]
    return sorted(found)


def _is_rays(name: str) -> bool:
    return name.startswith("ray::") and name != WORKER_ACTOR


def _pools(processes: Processes) -> frozenset[int]:
    """Shared KV pools, by inode, that processes below this one have open or mapped."""
    pids = [process.pid for process in processes.descendants()]
    return frozenset(inode for pid in pids for inode in pools_of(pid))


def pools_of(pid: int) -> Iterator[int]:
    """Inodes of the shared KV pools that this process has open or mapped."""
    with contextlib.suppress(OSError):  # it has ended, or is somebody else's
        for line in (_PROC / str(pid) / "maps").read_text().splitlines():
            if _POOL in line:
                yield int(line.split()[4])
    with contextlib.suppress(OSError):
        for descriptor in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                if _POOL in str(descriptor.readlink()):
                    yield descriptor.stat().st_ino
