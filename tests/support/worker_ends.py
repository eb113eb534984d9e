"""What a process of link_process.py is when it is a whole worker: a service, without Ray.

It tells {"event": "tripped"} before an armed failpoint does what it is armed for. As in a Ray
actor, the process ends when the service's own loops do.
"""

import asyncio
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import torch

from decode_worker.service import DecodeService
from kvrelay.config import WorkerConfig
from kvrelay.engine.runner import ModelRunner
from kvrelay.kv.pool import KVPool
from prefill_worker.service import PrefillService

_SERVICES = {"prefill": PrefillService, "decode": DecodeService}


def warm(model: str) -> None:
    """Loads what a worker would: its compiled kernels stay in memory for every fork."""
    torch.set_num_threads(1)  # a thread would be lost in every fork
    runner = ModelRunner.load(Path(model))
    pool = KVPool(runner.layout, 1, shared=False, device="cpu")
    runner.attach(pool)
    runner.warm_up()
    runner.close()
    pool.close()


def run(settings: dict[str, Any], control: socket.socket) -> None:
    """Obeys until the control socket is closed. `config`: the WorkerConfig as JSON."""
    logging.getLogger("kvrelay.failpoints").addHandler(_Teller(control.fileno()))
    asyncio.run(_obey(settings, control))


class _Teller(logging.Handler):
    """Says what a failpoint logs, from any thread and at once: the process may be about to die."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        line = json.dumps({"event": "tripped", "said": record.getMessage()})
        os.write(self._fd, line.encode() + b"\n")


async def _obey(settings: dict[str, Any], control: socket.socket) -> None:
    control.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=control, limit=1 << 20)
    worker = _Worker(settings)
    while line := await reader.readline():
        message = json.loads(line)
        try:
            answer = await getattr(worker, f"do_{message['do']}")()
        except Exception as error:
            answer = {"error": f"{message['do']}: {error!r}"}
        writer.write(json.dumps({"id": message["id"], **answer}).encode() + b"\n")
    os._exit(0)  # whatever hangs


class _Worker:
    """Its commands are the `do_` methods."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._role = settings["role"]
        self._config = WorkerConfig.model_validate_json(settings["config"])
        self._service: Any = None
        self._end: asyncio.Task[None]

    async def do_start(self) -> dict[str, Any]:
        self._service = await _SERVICES[self._role].start(self._config)
        self._end = asyncio.ensure_future(self._service.wait_for_end())
        self._end.add_done_callback(lambda _: os._exit(1))
        return {"address": self._service.address, "instance": self._service.instance_id}

    async def do_ledger(self) -> dict[str, Any]:
        """free: blocks that nobody has; open: prompts or reservations that have not ended."""
        service = self._service
        books = service._schedule if self._role == "prefill" else service._handoff
        books.cache.check()
        ledger = service.ledger
        return {"free": ledger.available, "total": ledger.total, "open": len(books)}
