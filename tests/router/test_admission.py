import math
from typing import Any

import pytest

from kvrelay.wire import inference_pb2
from router.admission import (
    InvalidRequest,
    RequestLimits,
    Sampling,
    check_messages,
    check_request_id,
    check_sampling,
    check_text,
    check_token_ids,
    check_urgency,
)

LIMITS = RequestLimits(
    prompt_bytes_max=100,
    messages_max=3,
    stop_strings_max=2,
    stop_string_bytes_max=4,
    stop_token_ids_max=3,
    request_id_bytes_max=8,
    max_tokens_default=16,
)


def sampling(prompt_tokens: int = 10, max_model_tokens: int = 100, **params: Any) -> Sampling:
    return check_sampling(
        inference_pb2.SamplingParams(**params),
        eos_token_ids=[2, 3],
        vocab_size=50,
        prompt_tokens=prompt_tokens,
        max_model_tokens=max_model_tokens,
        limits=LIMITS,
        draw_seed=lambda: 77,
    )


def test_all_unset() -> None:
    assert sampling() == Sampling(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=77,
        max_tokens=16,
        stop=(),
        eos_token_ids=(2, 3),
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        min_tokens=0,
    )


def test_all_set() -> None:
    given = sampling(temperature=2.0, top_k=5, top_p=0.5, seed=0, max_tokens=90, stop=["a", "€"])
    assert given == Sampling(
        temperature=2.0,
        top_k=5,
        top_p=0.5,
        seed=0,
        max_tokens=90,
        stop=("a", "€"),
        eos_token_ids=(2, 3),
    )


def test_all_extras_set() -> None:
    extras = {
        "min_p": 1.0,
        "repetition_penalty": 1.5,
        "presence_penalty": -2.0,
        "frequency_penalty": 2.0,
        "min_tokens": 90,
    }
    given = sampling(max_tokens=90, stop_token_ids=[0, 49], **extras)
    assert {name: getattr(given, name) for name in extras} == extras
    assert given.eos_token_ids == (2, 3, 0, 49)


def test_ignore_eos_leaves_what_the_client_named() -> None:
    assert sampling(ignore_eos=True).eos_token_ids == ()
    assert sampling(ignore_eos=True, stop_token_ids=[3, 7]).eos_token_ids == (3, 7)


def test_unset_min_tokens_fits_an_unset_max_tokens() -> None:
    assert sampling(min_tokens=16).min_tokens == sampling().max_tokens == 16
    with pytest.raises(InvalidRequest, match="min_tokens: 17, allowed are 0 to 16"):
        sampling(min_tokens=17)


@pytest.mark.parametrize(
    ("params", "penalises"),
    [
        ({}, False),
        ({"repetition_penalty": 1.0, "presence_penalty": 0.0, "min_tokens": 3}, False),
        ({"min_p": 0.5, "stop_token_ids": [4], "ignore_eos": True}, False),
        ({"repetition_penalty": 0.9}, True),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
    ],
)
def test_who_samples_needs_the_tokens_only_for_penalties(
    params: dict[str, Any], penalises: bool
) -> None:
    assert sampling(**params).penalises is penalises


def test_unset_max_tokens_is_what_room_there_is() -> None:
    assert sampling(prompt_tokens=95).max_tokens == 5
    assert sampling(prompt_tokens=99).max_tokens == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, "temperature: -0.1, allowed are 0 to 2"),
        ({"temperature": 2.1}, "temperature: 2.1, allowed are 0 to 2"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": math.inf}, "temperature: inf"),
        ({"top_k": -1}, "top_k: -1, allowed are 0"),
        ({"top_p": 0.0}, "top_p: 0.0, allowed are values over 0 up to 1"),
        ({"top_p": 1.01}, "top_p: 1.01"),
        ({"top_p": math.nan}, "top_p: nan"),
        ({"max_tokens": 0}, "max_tokens: 0, allowed are 1 to 90"),
        ({"max_tokens": -5}, "max_tokens: -5, allowed are 1 to 90"),
        ({"max_tokens": 91}, "max_tokens: 91 and 10 prompt tokens are more than 100"),
        ({"stop": ["a", "b", "c"]}, "stop: 3 strings, at most 2"),
        ({"stop": ["a", ""]}, "stop.1.: empty"),
        ({"stop": ["€€"]}, "stop.0.: 6 bytes, at most 4"),
        ({"min_p": -0.1}, "min_p: -0.1, allowed are 0 to 1$"),
        ({"min_p": 1.1}, "min_p: 1.1, allowed are 0 to 1$"),
        ({"min_p": math.nan}, "min_p: nan, allowed are 0 to 1$"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0, allowed are values over 0, 1 is"),
        ({"repetition_penalty": -1.0}, "repetition_penalty: -1.0, allowed are values over 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty: inf, allowed are"),
        ({"repetition_penalty": math.nan}, "repetition_penalty: nan, allowed are"),
        ({"presence_penalty": 2.1}, "presence_penalty: 2.1, allowed are -2 to 2$"),
        ({"presence_penalty": -2.1}, "presence_penalty: -2.1, allowed are -2 to 2$"),
        ({"presence_penalty": math.nan}, "presence_penalty: nan, allowed are -2 to 2$"),
        ({"frequency_penalty": 2.1}, "frequency_penalty: 2.1, allowed are -2 to 2$"),
        ({"frequency_penalty": math.nan}, "frequency_penalty: nan, allowed are -2 to 2$"),
        ({"min_tokens": -1}, "min_tokens: -1, allowed are 0 to 16, which is max_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens: 6, allowed are 0 to 5, which is max_"),
        ({"stop_token_ids": [1, 2, 3, 4]}, "stop_token_ids: 4 tokens, at most 3 allowed"),
        ({"stop_token_ids": [49, 50]}, r"stop_token_ids\[1\]: 50, allowed are 0 to 49 .voc.*f 50"),
    ],
)
def test_sampling_out_of_range(params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        sampling(**params)


@pytest.mark.parametrize("prompt_tokens", [100, 101])
@pytest.mark.parametrize("params", [{}, {"max_tokens": 1}])
def test_a_prompt_that_leaves_no_room(prompt_tokens: int, params: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"prompt: {prompt_tokens} tokens .* may have 100"):
        sampling(prompt_tokens=prompt_tokens, **params)


def text(given: str, max_model_tokens: int = 50, longest_token_bytes: int = 9) -> None:
    check_text(
        given,
        max_model_tokens=max_model_tokens,
        longest_token_bytes=longest_token_bytes,
        limits=LIMITS,
    )


def test_text() -> None:
    text("x" * 100)
    text("x" * 20, max_model_tokens=10, longest_token_bytes=2)
    with pytest.raises(InvalidRequest, match="text: empty"):
        text("")
    with pytest.raises(InvalidRequest, match="text: 102 bytes, at most 100"):
        text("€" * 34)
    with pytest.raises(InvalidRequest, match="text: 21 bytes are more than 10 tokens"):
        text("x" * 21, max_model_tokens=10, longest_token_bytes=2)
    with pytest.raises(InvalidRequest, match=r"text: '\\ud83d' at character 1 is not"):
        text("x\ud83d")


def test_token_ids() -> None:
    check_token_ids([0, 9], vocab_size=10, max_model_tokens=8)
    with pytest.raises(InvalidRequest, match="token_ids: empty"):
        check_token_ids([], vocab_size=10, max_model_tokens=8)
    with pytest.raises(InvalidRequest, match=r"token_ids\[1\]: 10, .* 0 to 9 .*vocabulary of 10"):
        check_token_ids([9, 10, 11], vocab_size=10, max_model_tokens=8)
    with pytest.raises(InvalidRequest, match=r"token_ids\[0\]: -1"):
        check_token_ids([-1], vocab_size=10, max_model_tokens=8)
    with pytest.raises(InvalidRequest, match="8 tokens leave no room"):
        check_token_ids([99] * 8, vocab_size=10, max_model_tokens=8)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: empty"),
        ([("user", "x")] * 4, "messages: 4, at most 3"),
        ([("user", "x"), ("", "x")], r"messages\[1\].role: empty"),
        ([("user", "x" * 48), ("user", "x" * 48)], "messages: 104 bytes together, at most 100"),
        ([("user", "\udc00")], r"messages\[0\].content: '\\udc00'"),
    ],
)
def test_bad_messages(messages: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_messages(messages, LIMITS)


def test_good_messages() -> None:
    check_messages([("user", ""), ("assistant", "x" * 44), ("user", "x" * 39)], LIMITS)


def test_request_id() -> None:
    check_request_id("")
    check_request_id("chatcmpl-0/a:b", RequestLimits())
    check_request_id("x" * 8, LIMITS)
    with pytest.raises(InvalidRequest, match="request_id: 9 bytes, at most 8"):
        check_request_id("x" * 9, LIMITS)
    with pytest.raises(InvalidRequest, match=r"request_id: 'a\\nb', only printable ASCII"):
        check_request_id("a\nb", LIMITS)
    with pytest.raises(InvalidRequest, match=r"request_id: '\\xe9'"):
        check_request_id("é", LIMITS)


@pytest.mark.parametrize("priority", [-100, 0, 100])
def test_urgency_within_its_range(priority: int) -> None:
    check_urgency(priority, ttft_deadline_ms=0)
    check_urgency(priority, ttft_deadline_ms=2**32 - 1)


@pytest.mark.parametrize(
    ("priority", "deadline_ms", "says"),
    [
        (-(2**31), 0, "priority: -2147483648, allowed are -100 (first) to 100"),
        (101, 0, "priority: 101, allowed are -100 (first) to 100"),
        (0, -1, "ttft_deadline_ms: -1, allowed are 0 (none) and more"),
    ],
)
def test_urgency_out_of_range(priority: int, deadline_ms: int, says: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_urgency(priority, deadline_ms)
    assert str(refused.value) == says
