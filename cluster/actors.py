"""The Ray actors: one prefill or decode worker each, and nothing but its life in Ray's hands.

Ray places and starts them, cluster/pools.py watches them. Requests, tokens and KV never pass
through here: an actor method takes and returns a string or a number.
"""

import asyncio
import importlib
import logging
import os
from typing import Any

import ray

from cluster.cores import pin, shown
from cluster.options import LOG_FORMAT
from kvrelay.config import WorkerConfig

log = logging.getLogger(__name__)

# Named, not imported: torch is for the workers' processes, not for the one that starts them.
SERVICES = {
    "prefill": ("prefill_worker.service", "PrefillService"),
    "decode": ("decode_worker.service", "DecodeService"),
}


@ray.remote
class WorkerActor:
    """An asyncio actor: the service runs on the actor's own event loop."""

    def __init__(self, role: str, config_json: str) -> None:
        self._role = role
        self._config = WorkerConfig.model_validate_json(config_json)
        self._service: Any = None
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # they would end up in the user's terminal
        logging.basicConfig(level=self._config.log_level, format=LOG_FORMAT)
        if self._config.cores:
            self._pin()  # before torch is imported: its threads take over what they find

    async def start(self) -> str:
        """Loads the model and serves; returns the address routers connect to."""
        module, name = SERVICES[self._role]
        # Beside the loop, which is to say that the worker lives: torch takes its time.
        service = getattr(await asyncio.to_thread(importlib.import_module, module), name)
        self._service = await service.start(self._config)
        return self._service.address

    async def drain(self, deadline_s: float) -> bool:
        """Takes nothing new from here on. True once nothing runs here any more, False when that
        took longer than deadline_s."""
        return await self._service.drain(deadline_s)

    async def stop(self) -> None:
        if self._service is not None:
            await self._service.stop()

    async def wait_for_end(self) -> None:
        """Ends when the worker does; whoever waits for it learns at once when the process dies."""
        await self._service.wait_for_end()

    async def alive(self) -> int:
        """The process id. Whoever gets no answer knows that the worker's loop does not run."""
        return os.getpid()

    def _pin(self) -> None:
        cores, threads = shown(self._config.cores), self._config.threads
        try:
            pin(self._config.cores)
        except OSError as error:  # slower, but it serves
            log.warning("%s worker is not pinned to cores %s: %s", self._role, cores, error)
            # Nor can anybody be told when it computes there.
            self._config = self._config.model_copy(update={"cores": (), "borrows": ()})
            return
        plural = "" if threads == 1 else "s"
        log.info("%s worker on cores %s (%d thread%s)", self._role, cores, threads, plural)
