"""What clients may send, and what it means."""

import json
from typing import Any

import pytest

from router.ask import Messages, choice_seed
from router.http.asks import chat_ask, completion_asks
from router.http.bodies import (
    CHAT_NOT_SUPPORTED,
    COMPLETION_NOT_SUPPORTED,
    HARMLESS,
    MESSAGE_NOT_SUPPORTED,
    ChatBody,
    CompletionBody,
)
from router.http.errors import HttpError
from router.http.reading import parse

USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> ChatBody:
    return parse(ChatBody, json.dumps({"messages": [USER], **fields}).encode())


def completion(**fields: Any) -> CompletionBody:
    return parse(CompletionBody, json.dumps({"prompt": "hi", **fields}).encode())


def refused(make: Any) -> HttpError:
    with pytest.raises(HttpError) as raised:
        make()
    assert raised.value.status == 400
    return raised.value


# ---- what becomes of fields


def test_all_that_decides_over_tokens():
    body = completion(
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=3,
        stop=["a", "b"],
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[4],
        priority=-2,
        ttft_deadline_ms=900,
    )
    [ask] = completion_asks(body, "id")
    assert (ask.request_id, ask.priority, ask.ttft_deadline_ms) == ("id", -2, 900)
    sampling = ask.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (5, 0.5, 0.9)
    assert (sampling.top_k, sampling.min_p, sampling.seed) == (7, 0.1, 3)
    assert (list(sampling.stop), list(sampling.stop_token_ids)) == (["a", "b"], [4])
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, 0.25)
    assert (sampling.frequency_penalty, sampling.min_tokens) == (-0.25, 2)
    assert sampling.ignore_eos


def test_what_is_unset_is_left_to_the_front_door_but_for_the_temperature():
    nulls = dict.fromkeys(ChatBody.model_fields.keys() - {"messages"})
    for body in (chat(), chat(**nulls)):
        sampling = chat_ask(body, "").sampling
        assert [field.name for field, _ in sampling.ListFields()] == ["temperature"]
        assert sampling.temperature == 1


def test_other_spellings():
    assert chat_ask(chat(max_tokens=3, max_completion_tokens=4), "").sampling.max_tokens == 4
    assert chat_ask(chat(top_k=-1), "").sampling.top_k == 0
    assert chat_ask(chat(seed=-1), "").sampling.seed == 2**64 - 1
    assert list(chat_ask(chat(stop="end"), "").sampling.stop) == ["end"]


def test_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": parts, "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": None, "annotations": []},
    ]
    ask = chat_ask(chat(messages=messages), "")
    assert ask.prompt == Messages([("system", "s"), ("user", "a\nb"), ("assistant", "")])


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_forms_of_a_prompt(prompt, prompts):
    asks = completion_asks(completion(prompt=prompt), "id")
    assert [ask.prompt for ask in asks] == prompts
    assert [ask.request_id for ask in asks] == ["id", *[""] * (len(prompts) - 1)]


def test_seeds_of_choices():
    assert choice_seed(5, 0) == 5
    seeds = [choice_seed(seed, index) for seed in (0, 5, 2**64 - 1) for index in range(16)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)


# ---- what is not supported


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_fields_that_change_nothing(name):
    completion_asks(completion(**{name: {"any": "thing"}}), "")
    chat_ask(chat(**{name: "anything"}), "")


@pytest.mark.parametrize("name", sorted(CHAT_NOT_SUPPORTED))
def test_fields_that_chat_refuses_when_they_ask_for_something(name):
    for value in (None, *CHAT_NOT_SUPPORTED[name]):
        chat_ask(chat(**{name: value}), "")
    error = refused(lambda: chat_ask(chat(**{name: {"some": "thing"}}), ""))
    assert (error.param, error.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize("name", sorted(COMPLETION_NOT_SUPPORTED))
def test_fields_that_completions_refuse_when_they_ask_for_something(name):
    for value in (None, *COMPLETION_NOT_SUPPORTED[name]):
        completion_asks(completion(**{name: value}), "")
    assert refused(lambda: completion_asks(completion(**{name: ["thing"]}), "")).param == name


@pytest.mark.parametrize("name", sorted(MESSAGE_NOT_SUPPORTED))
def test_fields_of_a_message(name):
    error = refused(lambda: chat_ask(chat(messages=[USER, {**USER, name: "thing"}]), ""))
    assert error.param == f"messages[1].{name}"


def test_a_field_that_nobody_knows():
    error = refused(lambda: chat_ask(chat(max_token=3), ""))
    assert error.code == "unknown_parameter"
    assert error.message == "max_token: this field is not known here"
    error = refused(lambda: chat_ask(chat(**{"x\n" * 500: 3}), ""))
    assert error.message == "...: this field is not known here"


# ---- what is wrong


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n: input should be greater than or equal to 1, given was 0"),
        ({"n": 17}, "n: input should be less than or equal to 16, given was 17"),
        ({"max_tokens": "5"}, "max_tokens: input should be a valid integer, given was '5'"),
        ({"max_tokens": True}, "max_tokens: input should be a valid integer, given was True"),
        ({"stream": 1}, "stream: input should be a valid boolean, given was 1"),
        ({"stop": 5}, "stop: needs a string or a list of strings, given was 5"),
        ({"stop": [5]}, "stop[0]: input should be a valid string, given was 5"),
        (
            {"prompt": []},
            "prompt: needs a string, a list of token ids, or a list of either, given was []",
        ),
        ({"prompt": [1, "a"]}, "prompt[1]: input should be a valid integer, given was 'a'"),
        ({"prompt": [[1], "a"]}, "prompt[1]: input should be a valid array, given was 'a'"),
        ({"prompt": None}, None),
        (
            {"stream_options": {"include_usage": "yes"}},
            "stream_options.include_usage: input should be a valid boolean, given was 'yes'",
        ),
        ({"best_of": 3, "n": 2}, "best_of: 3, only 2 (as n) is supported"),
        (
            {"prompt": ["a"] * 9, "n": 16},
            "prompt: 9 prompts with 16 answers each, at most 128 answers in one call are allowed",
        ),
    ],
)
def test_one_line_says_what_is_wrong(fields, message):
    error = refused(lambda: completion_asks(completion(**fields), ""))
    assert message is None or error.message == message
    assert error.param == error.message.split(":")[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (5, "messages[0].content: needs a string or a list of text parts, given was 5"),
        (
            [{"type": "image_url", "image_url": {"url": "u"}}],
            "messages[0].content[0].type: input should be 'text', given was 'image_url'",
        ),
    ],
)
def test_contents_that_are_no_text(content, message):
    assert refused(lambda: chat(messages=[{"role": "user", "content": content}])).message == message


def test_what_is_missing():
    error = refused(lambda: parse(ChatBody, b"{}"))
    assert (error.message, error.param) == ("messages: missing, it is required", "messages")


def test_a_million_errors_are_one():
    data = b'{"prompt": [1, ' + b'"a", ' * 500_000 + b'"a"]}'
    error = refused(lambda: parse(CompletionBody, data))
    assert error.param == "prompt[1]"
    assert len(error.message) < 200
