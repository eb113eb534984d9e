"""Owns the checks of a request before it is queued: what is wrong with it, or what it asks for.

Pure functions, called by the front door and router/prompts.py in the order of their cost. Every
refusal is an InvalidRequest that names the field, what was given and what is allowed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvrelay.wire import inference_pb2

TEMPERATURE_MAX = 2.0
PENALTY_MAX = 2.0  # of presence and frequency, either way
SEED_MAX = 2**64 - 1


class InvalidRequest(ValueError):
    """The request can never be served as it is; the message is for the client."""


class TooLongRequest(InvalidRequest):
    """Prompt and answer together are more than the model or the workers can hold."""


@dataclass(frozen=True)
class RequestLimits:
    prompt_bytes_max: int = 4 << 20
    n_max: int = 16  # answers to one prompt, in one call
    choices_max: int = 128  # answers in one call, to all of its prompts
    messages_max: int = 1024
    content_parts_max: int = 1024  # of one message
    stop_strings_max: int = 16
    stop_string_bytes_max: int = 256
    stop_token_ids_max: int = 64
    request_id_bytes_max: int = 128
    max_tokens_default: int = 256
    priority_max: int = 100  # and the least is its negative


DEFAULT_LIMITS = RequestLimits()


@dataclass(frozen=True)
class Sampling:
    """SamplingParams with nothing unset and nothing out of range."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    stop: tuple[str, ...]
    eos_token_ids: tuple[int, ...]  # all that end the answer
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0

    @property
    def penalises(self) -> bool:
        """Whoever samples needs to know the tokens that there are."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


def check_sampling(
    params: inference_pb2.SamplingParams,
    *,
    eos_token_ids: Sequence[int],
    vocab_size: int,
    prompt_tokens: int,
    max_model_tokens: int,
    limits: RequestLimits,
    draw_seed: Callable[[], int],
) -> Sampling:
    max_tokens = _max_tokens(params, prompt_tokens, max_model_tokens, limits)
    ends = () if params.ignore_eos else tuple(eos_token_ids)
    sampling = Sampling(
        temperature=_temperature(params),
        top_k=_top_k(params),
        top_p=_top_p(params),
        seed=params.seed if params.HasField("seed") else draw_seed(),
        max_tokens=max_tokens,
        stop=_stop(params.stop, limits),
        eos_token_ids=ends + _stop_token_ids(params.stop_token_ids, vocab_size, limits),
        min_p=_min_p(params),
        repetition_penalty=_repetition_penalty(params),
        presence_penalty=_penalty("presence_penalty", params.presence_penalty),
        frequency_penalty=_penalty("frequency_penalty", params.frequency_penalty),
        min_tokens=_min_tokens(params, max_tokens),
    )
    assert 0 <= sampling.seed <= SEED_MAX, "draw_seed gave no 64-bit seed"
    return sampling


def check_text(
    text: str, *, max_model_tokens: int, longest_token_bytes: int, limits: RequestLimits
) -> None:
    """Refuses before the cost of tokenizing what could not fit however it were tokenized."""
    if not text:
        raise InvalidRequest("text: empty, needs at least one character")
    size = _utf8_bytes("text", text)
    if size > limits.prompt_bytes_max:
        raise InvalidRequest(f"text: {size} bytes, at most {limits.prompt_bytes_max} allowed")
    if size > max_model_tokens * longest_token_bytes:
        raise TooLongRequest(
            f"text: {size} bytes are more than {max_model_tokens} tokens, the limit of prompt and "
            f"answer together, even at {longest_token_bytes} bytes a token"
        )


def check_token_ids(token_ids: Sequence[int], *, vocab_size: int, max_model_tokens: int) -> None:
    if not token_ids:
        raise InvalidRequest("token_ids: empty, needs at least one token")
    check_prompt_tokens(len(token_ids), max_model_tokens)  # before a look at what may be millions
    _in_vocabulary("token_ids", token_ids, vocab_size)


def check_message_count(count: int, limits: RequestLimits) -> None:
    if not count:
        raise InvalidRequest("messages: empty, needs at least one message")
    if count > limits.messages_max:
        raise InvalidRequest(f"messages: {count}, at most {limits.messages_max} allowed")


def check_messages(messages: Sequence[tuple[str, str]], limits: RequestLimits) -> None:
    """Messages as (role, content). Some contents may be empty; the template decides on roles."""
    check_message_count(len(messages), limits)
    size = 0
    for index, (role, content) in enumerate(messages):
        if not role:
            raise InvalidRequest(f"messages[{index}].role: empty, needs a role such as 'user'")
        size += _utf8_bytes(f"messages[{index}].role", role)
        size += _utf8_bytes(f"messages[{index}].content", content)
    if not any(content for _, content in messages):
        raise InvalidRequest("messages: every content is empty, nothing is asked")
    if size > limits.prompt_bytes_max:
        raise InvalidRequest(
            f"messages: {size} bytes together, at most {limits.prompt_bytes_max} allowed"
        )


def check_request_id(request_id: str, limits: RequestLimits = DEFAULT_LIMITS) -> None:
    """An empty id is an unset one. Printable ASCII alone: ids go into logs and HTTP headers."""
    size = _utf8_bytes("request_id", request_id)
    if size > limits.request_id_bytes_max:
        raise InvalidRequest(
            f"request_id: {size} bytes, at most {limits.request_id_bytes_max} allowed"
        )
    if not all("!" <= char <= "~" for char in request_id):
        raise InvalidRequest(
            f"request_id: {request_id!a}, only printable ASCII without spaces is allowed"
        )


def check_urgency(
    priority: int,
    ttft_deadline_ms: int,
    limits: RequestLimits = DEFAULT_LIMITS,
    *,
    priority_min: int | None = None,
) -> None:
    """How soon a request wants to be served: its place in the queue follows from it.

    priority_min: the least that its caller may ask for; None: as the limits have it.
    """
    most = limits.priority_max
    if not -most <= priority <= most:
        raise InvalidRequest(f"priority: {priority}, allowed are {-most} (first) to {most}")
    if priority_min is not None and priority < priority_min:
        raise InvalidRequest(
            f"priority: {priority}, this API key may ask for {priority_min} (first) to {most}"
        )
    if ttft_deadline_ms < 0:
        raise InvalidRequest(f"ttft_deadline_ms: {ttft_deadline_ms}, allowed are 0 (none) and more")


def _temperature(params: inference_pb2.SamplingParams) -> float:
    # A comparison with NaN is false, so it is refused as well.
    if not 0.0 <= params.temperature <= TEMPERATURE_MAX:
        raise InvalidRequest(
            f"temperature: {params.temperature}, allowed are 0 to {TEMPERATURE_MAX:g}"
        )
    return params.temperature


def _top_k(params: inference_pb2.SamplingParams) -> int:
    if params.top_k < 0:
        raise InvalidRequest(f"top_k: {params.top_k}, allowed are 0 (keep all) and more")
    return params.top_k


def _top_p(params: inference_pb2.SamplingParams) -> float:
    top_p = params.top_p if params.HasField("top_p") else 1.0
    if not 0.0 < top_p <= 1.0:
        raise InvalidRequest(f"top_p: {top_p}, allowed are values over 0 up to 1")
    return top_p


def _min_p(params: inference_pb2.SamplingParams) -> float:
    if not 0.0 <= params.min_p <= 1.0:
        raise InvalidRequest(f"min_p: {params.min_p}, allowed are 0 to 1")
    return params.min_p


def _repetition_penalty(params: inference_pb2.SamplingParams) -> float:
    penalty = params.repetition_penalty if params.HasField("repetition_penalty") else 1.0
    if not 0.0 < penalty < math.inf:
        raise InvalidRequest(
            f"repetition_penalty: {penalty}, allowed are values over 0, 1 is no penalty"
        )
    return penalty


def _penalty(field: str, penalty: float) -> float:
    if not -PENALTY_MAX <= penalty <= PENALTY_MAX:
        raise InvalidRequest(f"{field}: {penalty}, allowed are {-PENALTY_MAX:g} to {PENALTY_MAX:g}")
    return penalty


def _min_tokens(params: inference_pb2.SamplingParams, max_tokens: int) -> int:
    if not 0 <= params.min_tokens <= max_tokens:
        raise InvalidRequest(
            f"min_tokens: {params.min_tokens}, allowed are 0 to {max_tokens}, which is max_tokens"
        )
    return params.min_tokens


def _max_tokens(
    params: inference_pb2.SamplingParams,
    prompt_tokens: int,
    max_model_tokens: int,
    limits: RequestLimits,
) -> int:
    room = check_prompt_tokens(prompt_tokens, max_model_tokens)
    if not params.HasField("max_tokens"):
        return min(limits.max_tokens_default, room)
    if params.max_tokens < 1:
        raise InvalidRequest(f"max_tokens: {params.max_tokens}, allowed are 1 to {room}")
    if params.max_tokens > room:
        raise TooLongRequest(
            f"max_tokens: {params.max_tokens} and {prompt_tokens} prompt tokens are more than "
            f"{max_model_tokens}, the limit of both together; allowed are 1 to {room}"
        )
    return params.max_tokens


def check_prompt_tokens(prompt_tokens: int, max_model_tokens: int) -> int:
    """Gives the tokens left for the answer, at least one."""
    room = max_model_tokens - prompt_tokens
    if room < 1:
        raise TooLongRequest(
            f"prompt: {prompt_tokens} tokens leave no room for an answer, prompt and answer "
            f"together may have {max_model_tokens}"
        )
    return room


def _stop(stop: Sequence[str], limits: RequestLimits) -> tuple[str, ...]:
    if len(stop) > limits.stop_strings_max:
        raise InvalidRequest(
            f"stop: {len(stop)} strings, at most {limits.stop_strings_max} allowed"
        )
    for index, string in enumerate(stop):
        if not string:
            raise InvalidRequest(f"stop[{index}]: empty, needs at least one character")
        size = _utf8_bytes(f"stop[{index}]", string)
        if size > limits.stop_string_bytes_max:
            raise InvalidRequest(
                f"stop[{index}]: {size} bytes, at most {limits.stop_string_bytes_max} allowed"
            )
    return tuple(stop)


def _stop_token_ids(
    token_ids: Sequence[int], vocab_size: int, limits: RequestLimits
) -> tuple[int, ...]:
    if len(token_ids) > limits.stop_token_ids_max:
        raise InvalidRequest(
            f"stop_token_ids: {len(token_ids)} tokens, at most {limits.stop_token_ids_max} allowed"
        )
    _in_vocabulary("stop_token_ids", token_ids, vocab_size)
    return tuple(token_ids)


def _in_vocabulary(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return  # the loop below takes long for a long prompt
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{field}[{index}]: {token_id}, allowed are 0 to {vocab_size - 1} "
                f"(vocabulary of {vocab_size})"
            )


def _utf8_bytes(field: str, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise InvalidRequest(
            f"{field}: {error.object[error.start]!a} at character {error.start} is not a "
            f"character, only valid Unicode is allowed"
        ) from error
