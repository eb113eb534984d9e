"""Chats rendered in a process of its own: what goes wrong costs one client its prompt."""

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest

from router.chat import ChatTemplateError
from router.template_process import (
    TemplateBusyError,
    TemplateDownError,
    TemplateLimits,
    TemplateProcess,
)

DEADLINE_S = 30.0  # only a broken test waits this long
# What a message says is what the template does.
SOURCE = """
{%- set word = messages[0].content -%}
{%- if word == 'loop' -%}
    {%- for a in range(99999) -%}{%- for b in range(99999) -%}
    {%- for c in range(99999) -%}{%- endfor -%}{%- endfor -%}{%- endfor -%}
{%- elif word == 'memory' -%}{%- set x = 'x' * 4000000000 -%}{{ x }}
{%- elif word == 'long' -%}{{ 'é' * 3000 }}
{%- elif word == 'refuse' -%}{{ raise_exception('no') }}
{%- else -%}{{ bos_token }}{{ word }}
{%- endif -%}
"""
LIMITS = TemplateLimits(template_ms=300, text_bytes_max=5000, waiting_max=4)


@contextlib.asynccontextmanager
async def template(source: str = SOURCE, **limits: Any) -> AsyncIterator[TemplateProcess]:
    process = TemplateProcess(source, {"bos_token": "<s>"}, dataclasses.replace(LIMITS, **limits))
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield process
    finally:
        await process.close()


def says(word: str) -> list[tuple[str, str]]:
    return [("user", word)]


def pid(process: TemplateProcess) -> int:
    assert process._process is not None
    return process._process.pid


async def test_renders_in_one_process_that_lives_as_long_as_it_is_used():
    async with template() as process:
        await process.start()
        first = pid(process)
        for text in ("hello", 'line\nbreak "é" \U0001f600\u2028\x00', "x" * 4000):
            assert await process.render(says(text)) == f"<s>{text}"
        assert pid(process) == first
    assert not psutil.pid_exists(first)


@pytest.mark.parametrize(
    ("word", "why", "lives"),
    [
        ("loop", "takes longer than 300 ms", False),
        ("memory", "MemoryError", True),
        ("long", "makes 6000 bytes of these messages, at most 5000", True),
        ("refuse", "template refuses: no", True),
    ],
)
async def test_what_goes_wrong_is_told_to_that_client_and_others_are_served(word, why, lives):
    async with template() as process:
        await process.start()
        first = pid(process)
        bad = asyncio.create_task(process.render(says(word)))
        good = asyncio.create_task(process.render(says("hello")))
        with pytest.raises(ChatTemplateError, match=why):
            await bad
        assert await good == "<s>hello"
        assert (pid(process) == first) == lives


async def test_a_loop_does_not_stop_the_event_loop():
    async with template() as process:
        await process.start()
        bad = asyncio.create_task(process.render(says("loop")))
        turns = 0
        while not bad.done():
            await asyncio.sleep(0.001)
            turns += 1
        assert turns > 2, "it turned while the template looped"
        with pytest.raises(ChatTemplateError):
            await bad


async def test_a_process_that_was_killed_is_replaced():
    async with template() as process:
        await process.render(says("hello"))
        first = process._process
        first.kill()
        await first.wait()
        assert await process.render(says("again")) == "<s>again"
        assert pid(process) != first.pid


async def test_a_client_that_goes_away_does_not_end_the_process():
    async with template() as process:
        await process.start()
        first = pid(process)
        gone = asyncio.create_task(process.render(says("hello")))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert await process.render(says("again")) == "<s>again"
        assert pid(process) == first


async def test_no_more_wait_than_are_allowed():
    async with template() as process:
        waiting = [asyncio.create_task(process.render(says("hello"))) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(TemplateBusyError, match="4 chats wait"):
            await process.render(says("hello"))
        assert await asyncio.gather(*waiting) == ["<s>hello"] * 4


async def test_a_template_that_cannot_be_read_is_refused_at_the_start():
    async with template("{% for %}") as process:
        with pytest.raises(ChatTemplateError, match="the model's chat template: TemplateSyntax"):
            await process.start()


async def test_close_ends_a_process_that_is_busy():
    async with template() as process:
        await process.start()
        bad = asyncio.create_task(process.render(says("loop")))
        await asyncio.sleep(0)
        await process.close()
        with pytest.raises(asyncio.CancelledError):
            await bad


async def test_the_process_knows_no_secrets(monkeypatch):
    monkeypatch.setenv("KVRELAY_API_KEY", "kvr_secret")
    async with template() as process:
        await process.start()
        environment = psutil.Process(pid(process)).environ()
    assert "kvr_secret" not in str(environment)


async def test_a_process_that_dies_costs_nobody_the_prompt():
    async with template() as process:
        await process.start()
        assert process._process is not None
        process._process.kill()  # and nobody has noticed yet
        assert await process.render(says("hello")) == "<s>hello"


async def test_one_that_dies_again_is_no_mistake_of_the_client(monkeypatch):
    async with template(template_ms=30_000) as process:
        with monkeypatch.context() as patched:
            running = process._running

            async def dying() -> Any:
                found = await running()
                found.kill()
                return found

            patched.setattr(process, "_running", dying)
            with pytest.raises(TemplateDownError, match="the router's log has the reason"):
                await process.render(says("hello"))
        assert await process.render(says("again")) == "<s>again"


async def test_a_process_that_does_not_come_up_says_why(monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho first >&2\necho it is broken >&2\nexit 3\n")
    broken.chmod(0o700)
    async with template() as process:
        monkeypatch.setattr(sys, "executable", str(broken))
        with pytest.raises(TemplateDownError, match="process fails: it is broken"):
            await process.start()
        monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
        with pytest.raises(TemplateDownError, match="cannot be started: No such file"):
            await process.start()


async def test_chats_whose_clients_have_gone_are_not_rendered():
    async with template(waiting_max=2) as process:
        await process.start()
        first = pid(process)
        await process._turn.acquire()
        for _ in range(10):  # more than may wait at once
            waiting = asyncio.create_task(process.render(says("loop")))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        process._turn.release()
        assert await process.render(says("again")) == "<s>again"
        assert pid(process) == first


async def test_nobody_waits_for_ever():
    async with template(waiting_ms=20) as process:
        await process._turn.acquire()
        with pytest.raises(TemplateBusyError, match="has waited 20 ms"):
            await process.render(says("hello"))
