"""Comparison with the right answer, and what a stream's silences come to."""

import pytest

from cluster.chaos.answers import Answer, difference
from cluster.chaos.streams import Stream, is_struck, stall_beyond_s, stall_s

RIGHT = Answer("abcdef", (1, 2, 3, 4, 5, 6), "length")


def got(ids: tuple[int, ...] | None, text: str = "abcdef", reason: str = "length") -> Answer:
    return Answer(text, ids, reason)


# ---- comparison


def test_the_same_answer_is_right():
    assert difference(RIGHT, RIGHT) is None
    assert difference(RIGHT, got(None)) is None  # over HTTP


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (got((1, 2, 9, 4, 5, 6)), "token 2 is 9, and should be 3"),
        (got((1, 2, 4, 5, 6)), "token 2 is 4, and should be 3"),
        (got((1, 2, 3)), "it ends after 3 of 6 tokens"),
        (got((1, 2, 3, 4, 5, 6, 7)), "token 6 is 7, and should be nothing"),
        (got((1, 2, 3, 4, 5, 6), text="abcdxf"), "character 4 is 'x', and should be 'e'"),
        (got(None, text="abc"), "it ends after 3 of 6 characters"),
        (got((1, 2, 3, 4, 5, 6), reason="stop"), "it ended for stop, and not for length"),
        (got((1, 2, 3, 4, 5, 6), reason=""), "it ended for no reason, and not for length"),
        (got((1, 2, 3), text="abc", reason=""), "it ends after 3 of 6 tokens"),
        (got(None, text="abc", reason=""), "it ends after 3 of 6 characters"),
    ],
)
def test_what_is_not_right_is_told(answer, what):
    found = difference(RIGHT, answer)
    assert (found.kind, found.what) == ("wrong", what)


@pytest.mark.parametrize(
    "ids",
    [
        (1, 2, 3, 3, 4, 5, 6),
        (1, 2, 3, 2, 3, 4, 5, 6),
        (1, 2, 3, 4, 3, 4),  # it ends where the right one does
        (1, 2, 3, 4, 5, 6, 6),
        (1, 2, 3, 4, 5, 6, 4, 5, 6),
    ],
)
def test_what_came_twice_is_told(ids):
    assert difference(RIGHT, got(ids)).kind == "repeated"


def test_an_answer_that_was_cancelled_is_the_beginning_of_the_right_one():
    assert difference(RIGHT, Answer("abc", (1, 2, 3, 4), "", cut=True)) is None
    assert difference(RIGHT, Answer("", (), "", cut=True)) is None
    assert difference(RIGHT, Answer("abc", (1, 2, 4), "", cut=True)).kind == "wrong"
    assert difference(RIGHT, Answer("abcdefg", None, "", cut=True)).kind == "wrong"


# ---- stalls


def stream_of(*came_s: float, asked_s: float = 0.0, ended_s: float | None = None) -> Stream:
    stream = Stream(0, 0, asked_s)
    for at_s in came_s:
        stream.came(at_s, 1)
    stream.end(came_s[-1] if ended_s is None else ended_s)
    return stream


def test_the_wait_for_the_first_token_is_a_silence_and_the_end_is_one_too():
    assert stall_s(stream_of(3.0, 3.1, 3.2)) == pytest.approx(3.0)
    assert stall_s(stream_of(0.1, 0.2, ended_s=4.2)) == pytest.approx(4.0)
    assert stall_s(stream_of(0.1, 2.6, 3.0)) == pytest.approx(2.5)


def test_of_short_silences_the_longest_is_remembered():
    stream = stream_of(0.01, 0.11, 0.12)
    assert stream.silences == [(0.01, 0.11)]


def test_what_lies_in_restarts_is_beyond_no_restart():
    stream = stream_of(0.1, 5.1, 6.0)
    assert stall_beyond_s(stream, []) == pytest.approx(5.0)
    assert stall_beyond_s(stream, [(1.0, 4.0)]) == pytest.approx(2.0)
    assert stall_beyond_s(stream, [(-1.0, 2.0), (3.0, 9.0)]) == pytest.approx(1.0)
    assert stall_beyond_s(stream, [(0.0, 9.0)]) == 0.0


def test_the_gap_before_each_token_but_the_first():
    stream = Stream(0, 0, 1.0)
    assert [stream.came(at_s, 2) for at_s in (1.5, 1.6)] == [None, pytest.approx(0.1)]
    assert (stream.first_s, stream.tokens) == (1.5, 4)


def test_a_stream_is_struck_when_it_runs():
    stream = stream_of(2.0, asked_s=1.0)
    assert is_struck(stream, [(0.0, 0.5), (1.5, 1.6)])
    assert is_struck(stream, [(0.0, 1.0)])
    assert not is_struck(stream, [(0.0, 0.5), (2.5, 9.0)])
