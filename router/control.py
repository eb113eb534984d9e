"""The control service: whoever runs the cluster says here which workers there are.

Served on a unix socket in a folder that only the cluster's user can enter; never on a port.
"""

from typing import Any

from kvrelay.wire import control_pb2, control_pb2_grpc
from router.fleet import Fleet


class ControlService(control_pb2_grpc.RouterControlServicer):
    def __init__(self, fleet: Fleet, public_address: str, http_address: str) -> None:
        self._fleet = fleet
        self._public_address = public_address
        self._http_address = http_address

    async def SetWorkers(
        self, request: control_pb2.WorkerSet, context: Any
    ) -> control_pb2.RouterState:
        self._fleet.set_workers(request.prefill_addresses, request.decode_addresses)
        return self._state()

    async def WaitReady(
        self, request: control_pb2.WaitReadyRequest, context: Any
    ) -> control_pb2.RouterState:
        await self._fleet.wait_ready()
        return self._state()

    def _state(self) -> control_pb2.RouterState:
        return control_pb2.RouterState(
            public_address=self._public_address,
            http_address=self._http_address,
            prefill_connected=self._fleet.connected("prefill"),
            decode_connected=self._fleet.connected("decode"),
        )
