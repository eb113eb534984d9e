"""What a process of link_process.py is: one end of a KV link, as the workers use it.

Its commands are the `do_` methods of DecodeEnd and PrefillEnd.
"""

import asyncio
import functools
import json
import os
import socket
import threading
from typing import Any

from link_decode_end import DecodeEnd
from link_prefill_end import PrefillEnd
from namespaces import enter_namespace

from kvrelay.transport import nccl_link
from kvrelay.transport.nccl_book import NcclLimits


def warm() -> None:
    """All there is to do is done by the imports."""


def run(settings: dict[str, Any], control: socket.socket) -> None:
    """Obeys until the control socket is closed. `netns` is the network namespace to live in."""
    if "netns" in settings:
        enter_namespace(settings["netns"])
    # A pair that failed is tried again within the length of a test.
    nccl_link.NcclLimits = functools.partial(  # type: ignore[misc]
        NcclLimits, close_s=0.3, abort_s=0.5, backoff_s=0.05, backoff_max_s=0.2
    )
    asyncio.run(_obey(settings, control))


async def _obey(settings: dict[str, Any], control: socket.socket) -> None:
    control.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=control, limit=1 << 20)
    loop = asyncio.get_running_loop()

    of_loop = threading.get_ident()

    def say(**message: Any) -> None:
        """From any thread."""
        line = json.dumps(message).encode() + b"\n"
        if threading.get_ident() == of_loop:
            writer.write(line)  # at once: the process may stop itself
        else:
            loop.call_soon_threadsafe(writer.write, line)

    end = (DecodeEnd if settings["role"] == "decode" else PrefillEnd)(settings, say)
    tasks = set()

    async def answer(message: dict[str, Any]) -> None:
        do, number = message.pop("do"), message.pop("id")
        try:
            say(id=number, **await getattr(end, f"do_{do}")(**message))
        except Exception as error:
            say(id=number, error=f"{do}: {error!r}")

    while line := await reader.readline():
        task = asyncio.create_task(answer(json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    os._exit(0)  # whatever hangs
