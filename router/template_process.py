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
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.chat import ChatTemplateError

log = logging.getLogger(__name__)

# JSON spells one byte of text in six at most.
_JSON_BYTES_PER_BYTE = 6
_ERRORS_BYTES = 4096  # the end of what a process has to say of its troubles
_INLINE_BYTES = 64 << 10  # of JSON, which is read and written faster than a thread is told to


@dataclass(frozen=True)
class TemplateLimits:
    template_ms: int = 1_000  # one rendering
    start_ms: int = 30_000  # a process, on a busy machine
    memory_bytes: int = 1 << 30  # of address space; Python alone takes some 50 MB
    text_bytes_max: int = 8 << 20  # of a rendered prompt
    waiting_max: int = 256  # chats that wait for their turn
    waiting_ms: int = 10_000  # one of them


_TRIES = 2  # processes for one chat, when the first is found dead or dies of something else


class TemplateBusyError(Exception):
    """Too many chats wait to be rendered, or this one has waited too long."""


class TemplateDownError(RuntimeError):
    """There is no process to render in; the message is for the client."""


class _EndedError(Exception):
    """The process has ended before it has answered."""


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
        self._last_words: asyncio.Task[str] | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._rendering: asyncio.Task[str] | None = None  # the one whose turn it is
        self._closed = False

    async def start(self) -> None:
        """Not needed, but then the first chat does not wait for the process.

        Raises:
            ChatTemplateError: the template cannot be read.
            TemplateDownError: the process does not come up; says why.
        """
        async with self._turn:
            try:
                await self._running()
            except _EndedError as error:
                raise TemplateDownError(f"the chat template's process fails: {error}") from error

    async def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The prompt for (role, content) messages; see ChatTemplate.render.

        Raises:
            ChatTemplateError: the template makes no prompt of these messages, in time.
            TemplateBusyError: too many others wait, or they take too long.
            TemplateDownError: there is no process to render in.
        """
        if self._waiting >= self._limits.waiting_max:
            raise TemplateBusyError(f"{self._waiting} chats wait to be rendered")
        self._waiting += 1
        try:
            await self._wait_for_turn()
            # Once it has begun it goes on to its end, even if the client is gone: the process would
            # have to end with it. Whoever still waits just goes.
            self._rendering = asyncio.create_task(self._render(messages))
            self._rendering.add_done_callback(self._end_turn)
            rendering = self._rendering
            await asyncio.wait([rendering])
        finally:
            self._waiting -= 1
        return rendering.result()

    async def close(self) -> None:
        """Whoever waits is cancelled."""
        self._closed = True
        if self._rendering is not None:
            self._rendering.cancel()
            await asyncio.wait([self._rendering])
        await self._end()

    async def _wait_for_turn(self) -> None:
        try:
            async with asyncio.timeout(self._limits.waiting_ms / 1000):
                await self._turn.acquire()
        except TimeoutError:
            why = f"a chat has waited {self._limits.waiting_ms} ms to be rendered"
            raise TemplateBusyError(why) from None
        if self._closed:
            self._turn.release()
            raise asyncio.CancelledError

    def _end_turn(self, rendering: asyncio.Task[str]) -> None:
        self._rendering = None
        self._turn.release()
        if not rendering.cancelled():
            rendering.exception()  # the client that would be told of it may be gone

    async def _render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Call in turn."""
        size = sum(len(role) + len(content) for role, content in messages)
        line = await _off_loop(_to_line, messages, size)
        for left in reversed(range(_TRIES)):
            try:
                process = await self._running()
                answer = await self._ask(process, line, self._limits.template_ms)
                break
            except _EndedError as error:
                log.warning("the process of the chat template has ended: %s", error)
                if not left:
                    why = "the chat template's process has failed, the router's log has the reason"
                    raise TemplateDownError(why) from error
        if "text" not in answer:
            raise ChatTemplateError(answer["error"])
        return answer["text"]

    async def _running(self) -> Process:
        """The process there is, or a new one. Call in turn."""
        if self._process is not None and self._process.returncode is None:
            return self._process
        await self._end()
        try:
            self._process = await self._spawn()
        except OSError as error:
            raise _EndedError(f"it cannot be started: {error.strerror}") from error
        self._last_words = asyncio.create_task(_last_line(self._process))
        start_ms = self._limits.start_ms
        try:
            answer = await self._ask(self._process, _to_line(self._first), start_ms)
        except ChatTemplateError as error:
            raise _EndedError(f"it is not up after {start_ms} ms") from error
        if "error" in answer:
            await self._end()
            raise ChatTemplateError(answer["error"])
        return self._process

    async def _spawn(self) -> Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "router.template_child"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env=_bare_environment(),
            limit=_JSON_BYTES_PER_BYTE * self._limits.text_bytes_max + 1024,
        )

    async def _ask(self, process: Process, line: bytes, within_ms: int) -> dict[str, str]:
        """Ends the process unless it answers: what it would say later is nobody's."""
        assert process.stdin is not None
        assert process.stdout is not None
        whole = b""
        try:
            async with asyncio.timeout(within_ms / 1000):
                process.stdin.write(line)
                with contextlib.suppress(OSError):  # it is gone: the end of its output says so
                    await process.stdin.drain()
                whole = await process.stdout.readline()
        except TimeoutError:
            raise await self._too_much(f"takes longer than {within_ms} ms") from None
        except ValueError:
            raise await self._too_much("writes more than it may") from None
        if not whole.endswith(b"\n"):
            raise _EndedError(await self._end())
        answer: dict[str, str] = await _off_loop(json.loads, whole, len(whole))
        return answer

    async def _too_much(self, why: str) -> ChatTemplateError:
        await self._end()
        log.warning("the chat template %s; it gets a new process", why)
        return ChatTemplateError(f"the model's chat template {why} with these messages")

    async def _end(self) -> str:
        """Ends the process, if there is one; gives the last line that it wrote of its troubles."""
        process, self._process = self._process, None
        words, self._last_words = self._last_words, None
        if process is None:
            return ""
        _kill(process)
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()
        line = await words if words is not None else ""
        return line or f"exit status {process.returncode}"


async def _last_line(process: Process) -> str:
    """The last line of its errors, once it has ended; no more than the end of them is kept."""
    assert process.stderr is not None
    end = b""
    while piece := await process.stderr.read(_ERRORS_BYTES):
        end = (end + piece)[-_ERRORS_BYTES:]
    lines = end.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


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
