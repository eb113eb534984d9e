"""Owns what is sent back: OpenAI's objects, whole ones and chunks of a stream.

Whole answers are pydantic models, which also describe them in the OpenAPI document; chunks, made
for every token, are plain dicts.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from kvrelay.wire import inference_pb2
from kvrelay.wire.inference_pb2 import Delta, Finished
from router.served import Served

FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorDetail


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kvrelay"
    max_model_len: int  # prompt and answer together, in tokens


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


@dataclass
class Tally:
    """The usage of one call: each prompt counts once, however many answers it has."""

    n: int  # answers to each prompt
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def begin(self, number: int, served: Served) -> None:
        if number % self.n == 0:
            self.prompt_tokens += len(served.request.prompt)

    def add(self, number: int, event: Delta | Finished) -> None:
        if isinstance(event, Delta):
            self.completion_tokens += len(event.token_ids)
        elif number % self.n == 0:
            self.cached_tokens += event.cached_tokens

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.cached_tokens),
        )


@dataclass(frozen=True)
class Form:
    """What all that is sent for one call has in common."""

    chat: bool
    request_id: str
    created: int  # seconds since 1970
    model: str

    @property
    def id(self) -> str:
        return f"{'chatcmpl' if self.chat else 'cmpl'}-{self.request_id}"

    def whole(self, answers: "dict[int, WholeAnswer]", usage: Usage) -> ChatCompletion | Completion:
        common: dict[str, Any] = {"id": self.id, "created": self.created, "model": self.model}
        numbered = sorted(answers.items())
        if self.chat:
            chats = [
                ChatChoice(
                    index=number,
                    message=AssistantMessage(content=answer.text),
                    finish_reason=answer.finish_reason,
                )
                for number, answer in numbered
            ]
            return ChatCompletion(choices=chats, usage=usage, **common)
        texts = [
            CompletionChoice(index=number, text=answer.text, finish_reason=answer.finish_reason)
            for number, answer in numbered
        ]
        return Completion(choices=texts, usage=usage, **common)

    def begin_chunk(self, number: int) -> dict[str, Any] | None:
        """A chat's choice begins with its role."""
        return self._chunk(number, {"role": "assistant", "content": ""}) if self.chat else None

    def text_chunk(self, number: int, text: str) -> dict[str, Any]:
        return self._chunk(number, {"content": text} if self.chat else text)

    def end_chunk(self, number: int, finish_reason: FinishReason) -> dict[str, Any]:
        return self._chunk(number, {} if self.chat else "", finish_reason)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.model_dump()}

    @property
    def _head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(
        self, number: int, said: dict[str, str] | str, finish_reason: FinishReason | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": number,
            "delta" if self.chat else "text": said,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        return {**self._head, "choices": [choice]}


@dataclass
class WholeAnswer:
    """One choice, as it comes together."""

    texts: list[str] = field(default_factory=list)
    finish_reason: FinishReason = "stop"

    @property
    def text(self) -> str:
        return "".join(self.texts)


def finish_reason(finished: Finished) -> FinishReason:
    return "length" if finished.reason == inference_pb2.FINISH_REASON_LENGTH else "stop"
