"""Renders chat messages in a process of its own, for a template is code that came with a model.

Made by the front door. One process lives as long as the router and renders one chat after the
other; whoever keeps it longer than template_ms, or ends it, gets a refusal, and the next one a
fresh process. router/template_child.py is what runs in it.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.chat import ChatTemplateError

log = logging.getLogger(__name__)

# JSON spells one byte of text in six at most.
_JSON_BYTES_PER_BYTE = 6
_INLINE_BYTES = 64 << 10  # of JSON, which is read and written faster than a thread is told to


@dataclass(frozen=True)
class TemplateLimits:
    template_ms: int = 1_000  # one rendering
    start_ms: int = 30_000  # a process, on a busy machine
    memory_bytes: int = 1 << 30  # of address space; Python alone takes some 50 MB
    text_bytes_max: int = 8 << 20  # of a rendered prompt
    waiting_max: int = 256  # chats that wait for their turn


class TemplateBusyError(Exception):
    """Too many chats wait to be rendered."""


class TemplateProcess:
    """`render` from one event loop; `close` at the end."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        limits: TemplateLimits = TemplateLimits(),  # frozen
    ) -> None:
        self._limits = limits
        self._first = {
            "source": source,
            "special_tokens": dict(special_tokens),
            "memory_bytes": limits.memory_bytes,
            "text_bytes_max": limits.text_bytes_max,
            "line_ms": limits.start_ms,  # we are faster, unless we are gone
        }
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self._renderings: set[asyncio.Task[str]] = set()

    async def start(self) -> None:
        """Not needed, but then the first chat does not wait for the process.

        Raises:
            ChatTemplateError: the template cannot be read.
        """
        async with self._turn:
            await self._running()

    async def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The prompt for (role, content) messages; see ChatTemplate.render.

        Raises:
            ChatTemplateError: the template makes no prompt of these messages, in time.
            TemplateBusyError: too many others wait.
        """
        if len(self._renderings) >= self._limits.waiting_max:
            raise TemplateBusyError(f"{len(self._renderings)} chats wait to be rendered")
        rendering = asyncio.create_task(self._render(messages))
        self._renderings.add(rendering)
        rendering.add_done_callback(self._rendered)
        # To its end, even if the client is gone: the process would have to end with it.
        await asyncio.wait([rendering])
        return rendering.result()

    async def close(self) -> None:
        """Whoever waits is cancelled."""
        renderings = list(self._renderings)
        for rendering in renderings:
            rendering.cancel()
        await asyncio.gather(*renderings, return_exceptions=True)
        await self._end()

    def _rendered(self, rendering: "asyncio.Task[str]") -> None:
        self._renderings.discard(rendering)
        if not rendering.cancelled():
            rendering.exception()  # whoever waits sees it; a client that is gone needs no log

    async def _render(self, messages: Sequence[tuple[str, str]]) -> str:
        size = sum(len(role) + len(content) for role, content in messages)
        line = await _off_loop(_to_line, messages, size)
        async with self._turn:
            process = await self._running()
            answer = await self._ask(process, line, self._limits.template_ms)
        if "text" not in answer:
            raise ChatTemplateError(answer["error"])
        return answer["text"]

    async def _running(self) -> Process:
        """The process there is, or a new one. Call in turn."""
        if self._process is not None and self._process.returncode is None:
            return self._process
        await self._end()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "router.template_child"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            env=_bare_environment(),
            limit=_JSON_BYTES_PER_BYTE * self._limits.text_bytes_max + 1024,
        )
        answer = await self._ask(self._process, _to_line(self._first), self._limits.start_ms)
        if "error" in answer:
            await self._end()
            raise ChatTemplateError(answer["error"])
        return self._process

    async def _ask(self, process: Process, line: bytes, within_ms: int) -> dict[str, str]:
        """Ends the process unless it answers: what it would say later is nobody's."""
        assert process.stdin is not None
        assert process.stdout is not None
        whole = b""
        why = "ends its process"
        try:
            async with asyncio.timeout(within_ms / 1000):
                process.stdin.write(line)
                await process.stdin.drain()
                whole = await process.stdout.readline()
        except TimeoutError:
            why = f"takes longer than {within_ms} ms"
        except (OSError, ValueError):  # it is gone; it wrote beyond its limit
            pass
        if not whole.endswith(b"\n"):
            await self._end()
            log.warning("the chat template %s; it gets a new one", why)
            raise ChatTemplateError(f"the model's chat template {why} with these messages")
        answer: dict[str, str] = await _off_loop(json.loads, whole, len(whole))
        return answer

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
            await process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


def _bare_environment() -> dict[str, str]:
    """Where to find our code, and the time zone of strftime_now: no secrets of the router's."""
    kept = {name: os.environ[name] for name in ("TZ",) if name in os.environ}
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **kept}


def _to_line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


async def _off_loop(work: Any, value: Any, size: int) -> Any:
    if size <= _INLINE_BYTES:
        return work(value)
    return await asyncio.to_thread(work, value)
