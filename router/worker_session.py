"""A worker's address, and the session to it that is kept up.

Made by router/fleet.py, one for each worker, which is told what comes of it.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc

from kvrelay.config import RouterConfig
from kvrelay.wire import worker_pb2
from router.worker_calls import Connect

log = logging.getLogger(__name__)

_RECONNECT_S = (0.1, 0.5, 1.0, 2.0)


class Told(Protocol):
    """Who is told of a session."""

    def worker_up(self, worker: "WorkerSession", info: worker_pb2.WorkerInfo) -> None:
        """Raises ValueError when the worker does not fit the others."""

    def worker_said(self, worker: "WorkerSession", event: Any) -> None: ...

    def worker_down(self, worker: "WorkerSession") -> None:
        """It may have been down already."""


class WorkerSession:
    """One session at a time, with one task, until `stop`."""

    def __init__(
        self,
        told: Told,
        config: RouterConfig,
        connect: Connect,
        router_id: str,
        role: str,
        address: str,
    ) -> None:
        self.role = role
        self.instance_id = ""
        self._told = told
        self._config = config
        self._connect = connect
        self._router_id = router_id
        self._address = address
        self._outbox: asyncio.Queue[Any] = asyncio.Queue()
        self._limit = asyncio.timeout(None)  # of the session
        self.stopped = False
        self.draining = False  # as it last said
        self.task = asyncio.create_task(self._keep_up())

    def send(self, command: Any) -> None:
        self._outbox.put_nowait(command)

    def stop(self) -> None:
        self.stopped = True
        self.task.cancel()

    def end_session(self) -> None:
        """The worker says nothing: its requests go elsewhere at once, and it is dialed again."""
        self._told.worker_down(self)
        with contextlib.suppress(RuntimeError):  # the session is ending already
            self._limit.reschedule(asyncio.get_running_loop().time())

    async def _keep_up(self) -> None:
        failures = 0
        while True:
            try:
                await self._session()
            except TimeoutError:
                silence_s = self._config.silence_ms / 1000
                log.warning("%s %s says nothing for %g s", self.role, self._address, silence_s)
            except (grpc.aio.AioRpcError, ValueError) as error:
                reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else error
                log.warning("session with %s %s ended: %s", self.role, self._address, reason)
            except Exception:
                log.exception("session with %s %s failed", self.role, self._address)
            finally:
                was_up = bool(self.instance_id)
                self._told.worker_down(self)
                self.instance_id, self.draining = "", False
            if self.stopped:
                return  # gRPC may swallow a cancel that comes while a call begins
            failures = 0 if was_up else failures + 1
            await asyncio.sleep(_RECONNECT_S[min(failures, len(_RECONNECT_S) - 1)])

    async def _session(self) -> None:
        self._outbox = asyncio.Queue()
        commands = _drain(self._outbox)
        try:
            async with (
                self._connect(
                    self._config, self.role, self._address, commands, self._router_id
                ) as events,
                asyncio.timeout(None) as self._limit,
            ):
                async for event in events:
                    if event.WhichOneof("event") == "info":
                        self._told.worker_up(self, event.info)
                        self.instance_id = event.info.instance_id  # only then it is up
                    else:
                        self._told.worker_said(self, event)
        finally:
            self._outbox.put_nowait(None)  # gRPC does not end who reads it


async def _drain(outbox: "asyncio.Queue[Any]") -> AsyncIterator[Any]:
    """Commands, up to None."""
    while (command := await outbox.get()) is not None:
        yield command
