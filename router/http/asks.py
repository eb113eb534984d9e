"""Owns what a body asks of the front door: one Ask for each prompt."""

from collections.abc import Sequence
from dataclasses import replace

from kvrelay.wire.inference_pb2 import SamplingParams
from router.admission import DEFAULT_LIMITS
from router.ask import Ask, Messages
from router.http.bodies import Body, ChatBody, CompletionBody
from router.http.errors import invalid

_SEEDS = 2**64


def chat_ask(body: ChatBody, request_id: str) -> Ask:
    """Raises HttpError."""
    body.check_extras()
    max_tokens = body.max_tokens
    if body.max_completion_tokens is not None:
        max_tokens = body.max_completion_tokens
    messages = Messages([(message.role, message.text) for message in body.messages])
    return _ask(body, messages, max_tokens, request_id)


def completion_asks(body: CompletionBody, request_id: str) -> list[Ask]:
    """One for each prompt; the first has the request's id. Raises HttpError."""
    body.check_extras()
    prompts = body.prompts
    choices = len(prompts) * body.choices
    if choices > DEFAULT_LIMITS.choices_max:
        raise invalid(
            f"prompt: {len(prompts)} prompts with {body.choices} answers each, at most"
            f" {DEFAULT_LIMITS.choices_max} answers in one call are allowed"
        )
    first = _ask(body, prompts[0], body.max_tokens, request_id)
    return [first, *(replace(first, prompt=prompt, request_id="") for prompt in prompts[1:])]


def _ask(
    body: Body, prompt: str | Sequence[int] | Messages, max_tokens: int | None, request_id: str
) -> Ask:
    return Ask(
        prompt,
        _sampling(body, max_tokens),
        model=body.model or "",
        request_id=request_id,
        priority=body.priority or 0,
        ttft_deadline_ms=body.ttft_deadline_ms or 0,
        protocol="http",
        answers=body.choices,
    )


def _sampling(body: Body, max_tokens: int | None) -> SamplingParams:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    top_k = 0 if body.top_k == -1 else body.top_k  # vLLM's spelling of "all"
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=top_k,
        top_p=body.top_p,
        seed=None if body.seed is None else body.seed % _SEEDS,
        stop=stop,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos or False,
        stop_token_ids=body.stop_token_ids,
    )
