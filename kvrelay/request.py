"""What a client asks for: owns how options and prompts become messages of the wire.

Called by kvrelay/client.py. What is malformed is refused here only where it has no place in a
message; limits and ranges are the server's to check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import grpc

from kvrelay.peer import KvrelayError
from kvrelay.wire import inference_pb2 as pb


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen. What is left out or None is for the server to decide."""

    max_tokens: int | None  # answer length limit in tokens, at least 1
    temperature: float | None  # 0 to 2; 0 is greedy
    top_k: int | None  # keep the k likeliest tokens; 0 keeps all
    top_p: float | None  # keep the likeliest that add up to this, over 0 to 1
    seed: int | None  # same request and seed, same tokens
    stop: str | Sequence[str]  # the answer ends before the first of these
    min_p: float | None  # keep tokens at least this share as likely as the likeliest, 0 to 1
    repetition_penalty: float | None  # over 0; above 1: tokens of prompt and answer less likely
    presence_penalty: float | None  # -2 to 2; on tokens that the answer has
    frequency_penalty: float | None  # -2 to 2; for each time that the answer has them
    min_tokens: int | None  # the answer does not end before it has so many
    ignore_eos: bool  # the model's own end tokens do not end the answer
    stop_token_ids: Sequence[int]  # tokens that end it as the model's own do


class RequestOptions(SamplingOptions, total=False):
    """What `generate` and `chat` of both clients take besides the prompt and `timeout_s`."""

    model: str  # a name from models(); empty is the model served
    request_id: str  # unique among running requests; empty lets the server make one
    priority: int  # lower goes first, -100 to 100; below 0 an API key has to be allowed it
    ttft_deadline_ms: int  # refused when the first token would come later than this; 0: none


def generate_request(prompt: str | Sequence[int], options: RequestOptions) -> pb.GenerateRequest:
    """The request that continues `prompt`, a text or token ids."""
    common = _common_fields(**options)
    if isinstance(prompt, str):
        return _message(pb.GenerateRequest, text=prompt, **common)
    if isinstance(prompt, bytes | bytearray):
        # A sequence of ints to Python, but hardly token ids.
        raise TypeError("the prompt must be str or token ids, not bytes")
    return _message(pb.GenerateRequest, token_ids=_message(pb.TokenIds, ids=prompt), **common)


def chat_request(
    messages: Sequence[Mapping[str, str]] | str, options: RequestOptions
) -> pb.ChatRequest:
    """The request that answers `messages`; a text is one message of the user."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    wire = [_message(pb.ChatMessage, **message) for message in messages]
    return _message(pb.ChatRequest, messages=wire, **_common_fields(**options))


def tokenize_request(text: str, model: str) -> pb.TokenizeRequest:
    """The request that cuts `text` into tokens."""
    return _message(pb.TokenizeRequest, model=model, text=text)


def _common_fields(
    *,
    model: str = "",
    request_id: str = "",
    priority: int = 0,
    ttft_deadline_ms: int = 0,
    **sampling: Unpack[SamplingOptions],
) -> dict[str, Any]:
    return {
        "model": model,
        "request_id": request_id,
        "priority": priority,
        "ttft_deadline_ms": ttft_deadline_ms,
        "sampling": _sampling(**sampling),
    }


def _sampling(
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    min_tokens: int | None = None,
    ignore_eos: bool = False,
    stop_token_ids: Sequence[int] = (),
) -> pb.SamplingParams:
    return _message(
        pb.SamplingParams,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=[stop] if isinstance(stop, str) else stop,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=stop_token_ids,
    )


def _message(kind: Any, **fields: Any) -> Any:
    """A wire message, or KvrelayError where a value does not fit its field."""
    try:
        return kind(**fields)
    except UnicodeEncodeError:
        message = "the text cannot be sent: it is not valid Unicode"
        raise KvrelayError(grpc.StatusCode.INVALID_ARGUMENT, message) from None
    except ValueError as error:
        raise KvrelayError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
