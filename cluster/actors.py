"""The Ray actors: one prefill or decode worker each, and nothing but its life in Ray's hands.

Ray places, starts and supervises them. Requests, tokens and KV never pass through here: an actor
method takes and returns short strings only.
"""

import importlib
import logging
import os
from typing import Any

import ray

from cluster.options import LOG_FORMAT
from kvrelay.config import WorkerConfig

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

    async def start(self) -> str:
        """Loads the model and serves; returns the address routers connect to."""
        module, name = SERVICES[self._role]
        service = getattr(importlib.import_module(module), name)
        self._service = await service.start(self._config)
        return self._service.address

    async def stop(self) -> None:
        if self._service is not None:
            await self._service.stop()

    async def wait_for_end(self) -> None:
        """Ends when the worker does; whoever waits for it learns at once when the process dies."""
        await self._service.wait_for_end()
