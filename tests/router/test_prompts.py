"""From words to tokens: what takes long keeps nobody waiting."""

import asyncio
from typing import Any

import pytest
from http_router import tiny_files
from loop_gap import loop_gap

from router.admission import InvalidRequest
from router.ask import Messages
from router.prompts import Prompts
from router.template_process import TemplateLimits

DEADLINE_S = 60.0  # only a broken test waits this long
# 400,000 tokens: to count them takes a second or so, by a tokenizer that keeps the interpreter for
# itself all in one piece.
LONG = "hello world " * 33_000
GAP_S = 0.5  # of a loaded machine


def prompts_of(max_model_tokens: int = 1000, **files: Any) -> Prompts:
    return Prompts(tiny_files(**files), lambda: max_model_tokens, TemplateLimits())


async def test_ids_and_the_tokens_that_they_stand_for():
    prompts = prompts_of()
    assert await prompts.tokenize("hi") == ([104, 105], ["h", "i"])
    await prompts.close()


async def test_a_long_text_keeps_nobody_waiting():
    prompts = prompts_of(len(LONG) + 1)
    async with asyncio.timeout(DEADLINE_S), loop_gap() as gap:
        ids, tokens = await prompts.tokenize(LONG)
    assert len(ids) == len(tokens) > 300_000
    assert gap.longest_s < GAP_S
    await prompts.close()


@pytest.mark.parametrize("text", ["a" * 1000, "a" * 10_000], ids=["inline", "on a thread"])
async def test_more_tokens_than_the_model_takes_are_counted_not_made(text):
    prompts = prompts_of(max_model_tokens=1000)
    for take in (prompts.tokenize, prompts.tokens):
        with pytest.raises(InvalidRequest, match=f"prompt: {len(text)} tokens leave no room"):
            await take(text)
    await prompts.close()


async def test_a_chat_is_rendered_and_tokenized():
    prompts = prompts_of(chat_template="{{ messages[0].content }}")
    async with asyncio.timeout(DEADLINE_S):
        assert await prompts.tokens(Messages([("user", "hi")])) == [104, 105]
    await prompts.close()
