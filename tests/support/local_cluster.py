"""A whole cluster in one process and on one event loop: real workers, links and router, no Ray.

For tests that look inside (ledgers, cancels, peers that die). What Ray adds is tested in e2e/.
"""

import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decode_worker.service import DecodeService
from kvrelay.client import AsyncClient
from kvrelay.config import RouterConfig, WorkerConfig
from kvrelay.membership import new_cluster_key
from prefill_worker.service import PrefillService
from router.main import Router


@dataclass
class LocalCluster:
    prefill: list[PrefillService]
    decode: list[DecodeService]
    routers: list[Router]

    @property
    def router(self) -> Router:
        """The only one, or the first."""
        return self.routers[0]

    def client(self, router: Router | None = None, **credentials: Any) -> AsyncClient:
        """Of the first router, with the cluster's certificates, unless told otherwise."""
        router = router or self.router
        own = {"certificates": router._config.certificates}
        return AsyncClient(router.address, **{**own, **credentials})

    def all_free(self) -> bool:
        """Every block is free, or cached and nobody's."""
        return all(w.ledger.available == w.ledger.total for w in (*self.prefill, *self.decode))

    def check_ledgers(self) -> None:
        caches = [w._schedule.cache for w in self.prefill] + [w._handoff.cache for w in self.decode]
        for cache in caches:
            cache.check()
            assert cache.ledger.available == cache.ledger.total, cache.ledger


@contextlib.asynccontextmanager
async def local_cluster(
    model: Path,
    *,
    prefill: int = 1,
    decode: int = 1,
    routers: int = 1,
    worker: dict[str, Any] | None = None,
    decode_worker: dict[str, Any] | None = None,
    router: dict[str, Any] | None = None,
) -> AsyncIterator[LocalCluster]:
    """Starts it, and at the end checks that every block came back.

    decode_worker: what decode workers have different from `worker`.
    """
    key = new_cluster_key()
    with tempfile.TemporaryDirectory(prefix="kvr-") as folder:
        run_dir = Path(folder)
        settings = {"kv_bytes": 8 << 20, **(worker or {})}
        config = WorkerConfig(model_path=model, cluster_key=key, socket_dir=run_dir, **settings)
        router_config = RouterConfig(
            model_path=model,
            model_name=model.name,
            cluster_key=key,
            control_socket=run_dir / "control.sock",
            port=0,
            http_port=0,
            **{
                "drain_ms": 0,
                # Tests of the hand-off need it, and decode workers would take the short prompts.
                "local_prefill": "never",
                "certificates": settings.get("certificates"),
                **(router or {}),
            },
        )
        async with contextlib.AsyncExitStack() as stack:
            prefills = [await PrefillService.start(config) for _ in range(prefill)]
            own = config.model_copy(update=decode_worker or {})
            decodes = [await DecodeService.start(own) for _ in range(decode)]
            for started in (*prefills, *decodes):
                stack.push_async_callback(started.stop)
            fronts = []
            for number in range(routers):
                own_socket = {"control_socket": run_dir / f"control-{number}.sock"}
                front = await Router.start(router_config.model_copy(update=own_socket))
                stack.push_async_callback(front.stop)
                front.fleet.set_workers([p.address for p in prefills], [d.address for d in decodes])
                await front.fleet.wait_ready()
                fronts.append(front)
            cluster = LocalCluster(prefills, decodes, fronts)
            yield cluster
            cluster.check_ledgers()
