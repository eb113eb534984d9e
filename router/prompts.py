"""Owns the way from a client's words to the tokens of a prompt, and what takes long on it.

Made by the front door. Texts are tokenized on threads of its own and chats are rendered in a
process of its own, so that nobody's stream waits for a long prompt.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tokenizers import Tokenizer

from router.admission import (
    DEFAULT_LIMITS,
    InvalidRequest,
    check_messages,
    check_prompt_tokens,
    check_text,
    check_token_ids,
)
from router.ask import Messages
from router.model_files import ModelFiles
from router.refusals import Reason, Refusal
from router.template_process import TemplateLimits, TemplateProcess

# Shorter texts are tokenized faster than a thread could be told to.
_INLINE_CHARS = 4096
_TEXT_THREADS = 2  # for longer ones

T = TypeVar("T")


class Prompts:
    """`open` before use, `close` after it. max_model_tokens: of prompt and answer, as of now."""

    def __init__(
        self, files: ModelFiles, max_model_tokens: Callable[[], int], limits: TemplateLimits
    ) -> None:
        self._files = files
        self._max_model_tokens = max_model_tokens
        self._template = (
            TemplateProcess(files.chat_template, files.special_tokens, limits)
            if files.chat_template
            else None
        )
        self._threads = ThreadPoolExecutor(_TEXT_THREADS, thread_name_prefix="texts")

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    async def open(self) -> None:
        """Raises ChatTemplateError for a template that is none."""
        if self._template is not None:
            await self._template.start()

    async def close(self) -> None:
        if self._template is not None:
            await self._template.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def tokens(self, prompt: str | Sequence[int] | Messages) -> Sequence[int]:
        """The ids of a prompt that leaves room for an answer.

        Raises:
            InvalidRequest, ChatTemplateError, Refusal: there are none.
            TemplateBusyError, TemplateDownError: not now.
        """
        if isinstance(prompt, str):
            return await self._of_text(prompt, add_special_tokens=True)
        if not isinstance(prompt, Messages):
            check_token_ids(
                prompt,
                vocab_size=self._files.vocab_size,
                max_model_tokens=self._max_model_tokens(),
            )
            return list(prompt)  # only now: it may have been millions
        if self._template is None:
            raise Refusal(
                Reason.UNSUPPORTED,
                f"model {self._files.name!r} has no chat template: send a prompt instead "
                "(Generate, /v1/completions)",
            )
        check_messages(prompt.messages, DEFAULT_LIMITS)
        text = await self._template.render(prompt.messages)
        # The template writes the special tokens itself.
        return await self._of_text(text, add_special_tokens=False)

    async def tokenize(self, text: str) -> tuple[list[int], list[str]]:
        """The ids of `text` as a prompt, and the tokens that they stand for.

        Raises:
            InvalidRequest: there are none, or more than the model takes.
        """
        ids = await self._of_text(text, add_special_tokens=True)
        return ids, await self._off_loop(len(text), _spelled, self._files.tokenizer, ids)

    async def _of_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        most = self._max_model_tokens()
        check_text(
            text,
            max_model_tokens=most,
            longest_token_bytes=self._files.longest_token_bytes,
            limits=DEFAULT_LIMITS,
        )
        tokenizer = self._files.tokenizer
        return await self._off_loop(len(text), _encode, tokenizer, text, add_special_tokens, most)

    async def _off_loop(self, size: int, work: Callable[..., T], *args: Any) -> T:
        if size <= _INLINE_CHARS:
            return work(*args)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool, most: int) -> list[int]:
    # `encode` would keep the interpreter for itself all the while; this one lets go of it.
    [encoding] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    if not len(encoding):
        raise InvalidRequest("text: no token comes of it")
    check_prompt_tokens(len(encoding), most)  # before a list is made of what may be millions
    return encoding.ids


def _spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.id_to_token(token_id) or "" for token_id in ids]
