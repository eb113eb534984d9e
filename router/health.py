"""The health service of the public gRPC port: gRPC's own, with a limit on what has no end.

Made by router/main.py, which also says what is serving.
"""

from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2


class Health(health.aio.HealthServicer):
    """A watch stays open for as long as its client likes; so many at once may."""

    def __init__(self, watches_max: int) -> None:
        super().__init__()
        self._watches_max = watches_max
        self._watches = 0

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        if self._watches >= self._watches_max:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._watches} health watches are open, use Check instead",
            )
        self._watches += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watches -= 1
