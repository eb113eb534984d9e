"""Workers in processes of their own, a router in this one: for tests that kill and stop workers.

Who supervises is the test: `replace` does what cluster/pools.py does with a worker that died.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from link_process import End, Nursery

from kvrelay.client import AsyncClient
from kvrelay.config import RouterConfig, WorkerConfig
from kvrelay.failpoints import Failpoint
from kvrelay.membership import new_cluster_key
from router.main import Router

_START_S = 60.0  # only a broken test waits so long


@dataclass(eq=False)
class Worker:
    role: str
    end: End
    address: str

    @property
    def alive(self) -> bool:
        return self.end.alive

    async def tripped(self) -> None:
        """Returns when its failpoint begins to do what it is armed for."""
        await self.end.told("tripped")

    @property
    def has_tripped(self) -> bool:
        return self.end.has_told("tripped")


class WorkerCluster:
    """Made by `worker_cluster`. `workers` are those that the router has been told of."""

    def __init__(self, nursery: Nursery, config: WorkerConfig, router: Router) -> None:
        self.router = router
        self.workers: list[Worker] = []
        self._nursery = nursery
        self._config = config
        self._made = 0

    def client(self) -> AsyncClient:
        return AsyncClient(self.router.address)

    def of_role(self, role: str) -> list[Worker]:
        return [worker for worker in self.workers if worker.role == role]

    async def add(self, role: str, failpoints: Sequence[Failpoint] = ()) -> Worker:
        """A new worker; the router is told of it."""
        config = self._config.model_copy(update={"failpoints": tuple(failpoints)})
        self._made += 1
        name = f"{role}-{self._made}"
        async with asyncio.timeout(_START_S):
            end = await self._nursery.fork(role, name, config=config.model_dump_json())
        worker = Worker(role, end, end.started["address"])
        self.workers.append(worker)
        self._tell_router()
        return worker

    async def remove(self, worker: Worker) -> None:
        """Kills it, if it lives."""
        self.workers.remove(worker)
        self._tell_router()
        await worker.end.kill()

    async def replace(self, worker: Worker, failpoints: Sequence[Failpoint] = ()) -> Worker:
        """Kills it, if it lives, and starts another."""
        await self.remove(worker)
        return await self.add(worker.role, failpoints)

    def connected(self, role: str) -> int:
        """How many workers the router takes for alive."""
        return self.router.fleet.connected(role)

    async def ready(self) -> None:
        """Returns when the router has a session with every worker."""
        async with asyncio.timeout(_START_S):
            await self.router.fleet.wait_ready()

    async def all_free(self, within_s: float) -> None:
        """AssertionError, with every ledger, unless nobody has a block of a living worker soon."""
        ledgers: dict[str, Any] = {}
        try:
            async with asyncio.timeout(within_s):
                while not ledgers or any(not _is_free(ledger) for ledger in ledgers.values()):
                    ledgers = {w.end.name: await w.end.ask("ledger") for w in self.workers}
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"not free within {within_s} s: {ledgers}") from None

    async def close(self) -> None:
        for worker in list(self.workers):
            await self.remove(worker)

    def _tell_router(self) -> None:
        prefill, decode = ([w.address for w in self.of_role(r)] for r in ("prefill", "decode"))
        self.router.fleet.set_workers(prefill, decode)


def _is_free(ledger: dict[str, Any]) -> bool:
    return ledger["free"] == ledger["total"] and not ledger["open"]


@contextlib.asynccontextmanager
async def worker_cluster(
    nursery: Nursery,
    model: Path,
    *,
    prefill: int = 2,
    decode: int = 2,
    worker: dict[str, Any] | None = None,
    router: dict[str, Any] | None = None,
) -> AsyncIterator[WorkerCluster]:
    """nursery: of worker_ends.py, for this model."""
    key = new_cluster_key()
    with tempfile.TemporaryDirectory(prefix="kvw-") as folder:
        settings = {"kv_bytes": 8 << 20, **(worker or {})}
        config = WorkerConfig(
            model_path=model, cluster_key=key, socket_dir=Path(folder), **settings
        )
        router_config = RouterConfig(
            model_path=model,
            model_name=model.name,
            cluster_key=key,
            control_socket=Path(folder) / "control.sock",
            port=0,
            http_port=0,
            # Or decode workers would take the short prompts.
            **{"drain_ms": 0, "local_prefill": "never", **(router or {})},
        )
        front = await Router.start(router_config)
        cluster = WorkerCluster(nursery, config, front)
        try:
            for role, count in (("prefill", prefill), ("decode", decode)):
                for _ in range(count):
                    await cluster.add(role)
            await cluster.ready()
            yield cluster
        finally:
            await cluster.close()
            await front.stop()
