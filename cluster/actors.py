"""The Ray actors: one prefill or decode worker each, and nothing but its life in Ray's hands.

Ray places, starts and supervises them. Requests, tokens and KV never pass through here: an actor
method takes and returns short strings only.
"""

import asyncio
from typing import Any

import ray

from decode_worker.service import DecodeService
from kvrelay.config import WorkerConfig
from prefill_worker.service import PrefillService

SERVICES: dict[str, Any] = {"prefill": PrefillService, "decode": DecodeService}


@ray.remote
class WorkerActor:
    """An asyncio actor: the service runs on the actor's own event loop."""

    def __init__(self, role: str, config_json: str) -> None:
        self._role = role
        self._config = WorkerConfig.model_validate_json(config_json)
        self._service: Any = None

    async def start(self) -> str:
        """Loads the model and serves; returns the address routers connect to."""
        self._service = await SERVICES[self._role].start(self._config)
        return self._service.address

    async def stop(self) -> None:
        if self._service is not None:
            await self._service.stop()

    async def wait_for_end(self) -> None:
        """Never returns: whoever waits for it learns at once when the process ends."""
        await asyncio.get_running_loop().create_future()
