"""Chats rendered in a process of its own: what goes wrong costs one client its prompt."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator

import psutil
import pytest

from router.chat import ChatTemplateError
from router.template_process import TemplateBusyError, TemplateLimits, TemplateProcess

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
async def template(source: str = SOURCE) -> AsyncIterator[TemplateProcess]:
    process = TemplateProcess(source, {"bos_token": "<s>"}, LIMITS)
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
        assert turns > 20
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


async def test_what_a_template_says_to_a_client_that_is_gone_is_no_news(caplog):
    async with template() as process:
        await process.start()
        gone = asyncio.create_task(process.render(says("refuse")))
        await asyncio.sleep(0)
        [rendering] = process._renderings
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await asyncio.wait([rendering])
        del rendering, gone
        assert await process.render(says("again")) == "<s>again"
        gc.collect()
    assert caplog.messages == []


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
