"""Several tokens at once give the client what it would have had of them one by one."""

import random
from dataclasses import replace

import pytest
from byte_tokenizer import (
    EOS,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    metaspace_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.wire import inference_pb2 as pb
from router.admission import Sampling
from router.answer import Answer, ReadingTurns
from router.answer_stream import AnswerStream
from router.commands import UnavailableTrouble
from router.detokenize import Detokenizer
from router.metrics import Metrics
from router.refusals import Reason, Refusal
from router.request import Ending, Request, Times
from router.served import Served

TOKENIZER = byte_level_tokenizer()
EOS_ID = TOKENIZER.token_to_id(EOS)


def request_of(stop: tuple[str, ...] = ()) -> Request:
    return Request("r1", [1, 2], Sampling(0.0, 0, 1.0, 0, 100, stop, (EOS_ID,)), Times(0.0))


def stream_of(stop: tuple[str, ...] = ()) -> AnswerStream:
    return AnswerStream(request_of(stop), Detokenizer(TOKENIZER))


def play(stream: AnswerStream, events: list[list[int] | Ending]) -> tuple[list[int], str]:
    """All tokens and text that a client sees; offsets are checked on the way."""
    tokens: list[int] = []
    text = ""
    for event in events:
        if stream.finished is not None:
            break
        delta = stream.on(event)
        if delta is not None:
            assert delta.offset == len(tokens)
            tokens += delta.token_ids
            text += delta.text
    return tokens, text


def split(tokens: list[int], draw: random.Random) -> list[list[int] | Ending]:
    events: list[list[int] | Ending] = []
    at = 0
    while at < len(tokens):
        end = at + draw.randrange(1, 6)
        events.append(tokens[at:end])
        at = end
    return [*events, Ending.LENGTH]


@pytest.mark.parametrize("stop", [(), ("the cat",), ("\u20ac", "zz"), ("never",)])
@pytest.mark.parametrize("seed", range(10))
def test_any_grouping_shows_the_same(stop, seed):
    tokens = TOKENIZER.encode("so the \u20ac bought the cat a \u20ac hat").ids
    one_by_one = stream_of(stop)
    expected = play(one_by_one, [*([token] for token in tokens), Ending.LENGTH])
    grouped = stream_of(stop)
    assert play(grouped, split(tokens, random.Random(seed))) == expected
    assert grouped.finished is not None
    assert one_by_one.finished is not None
    assert grouped.finished.completion_tokens == one_by_one.finished.completion_tokens
    assert grouped.finished.reason == one_by_one.finished.reason
    for string in stop:
        assert string not in expected[1]


def test_tokens_after_a_stop_string_in_the_same_event_are_not_shown():
    stream = stream_of(("b",))
    delta = stream.on(TOKENIZER.encode("abc").ids)
    assert delta is not None
    assert (list(delta.token_ids), delta.text) == (TOKENIZER.encode("ab").ids, "a")
    assert stream.finished is not None
    assert stream.finished.completion_tokens == 2
    assert stream.finished.reason == pb.FINISH_REASON_STOP


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_an_end_token_is_shown_as_a_token_and_has_no_text(stop):
    stream = stream_of(stop)
    tokens, text = play(stream, [[*TOKENIZER.encode("ab").ids, EOS_ID], Ending.EOS])
    assert tokens == [*TOKENIZER.encode("ab").ids, EOS_ID]
    assert text == "ab"


async def test_a_client_that_reads_slowly_gets_what_has_come_meanwhile_in_one_delta():
    answer = Answer(ReadingTurns())
    served = Served(request_of(), answer, Detokenizer(TOKENIZER), Metrics())
    first, *rest = TOKENIZER.encode("a \u20ac is more than a dollar").ids
    answer.put([first])
    deltas = [await served.next()]
    for token in rest:  # while the first one is written
        answer.put([token])
    answer.put(Ending.LENGTH)
    while (event := await served.next()) is not None:
        deltas.append(event)
    assert [delta.text for delta in deltas[:-1]] == ["a", " \u20ac is more than a dollar"]
    assert [(d.offset, list(d.token_ids)) for d in deltas[:-1]] == [(0, [first]), (1, rest)]
    assert deltas[-1].completion_tokens == 1 + len(rest)


async def test_a_trouble_reaches_the_client_as_a_refusal_after_what_came_before():
    answer = Answer(ReadingTurns())
    served = Served(request_of(), answer, Detokenizer(TOKENIZER), Metrics())
    answer.put(TOKENIZER.encode("ab").ids)
    answer.put(UnavailableTrouble("all workers are gone"))
    assert (await served.next()).text == "ab"
    with pytest.raises(Refusal, match="all workers are gone") as refused:
        await served.next()
    assert refused.value.reason is Reason.UNAVAILABLE


# ---- an answer that goes on in another stream


TOKENIZERS = {
    "byte level": byte_level_tokenizer(),
    "byte fallback": byte_fallback_tokenizer(),
    "metaspace": metaspace_tokenizer(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)  # a busy machine is no fault
@given(data=st.data())
def test_what_the_first_n_tokens_show_follows_from_them_alone(name: str, data: st.DataObject):
    """Whatever was grouped, there and here: what one stream has shown when it breaks off after n
    tokens, and what another shows from n on, are the whole answer, each part of it once."""
    tokenizer = TOKENIZERS[name]
    size = tokenizer.get_vocab_size()
    tokens = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=40))
    whole = tokenizer.decode(tokens)
    cuts = st.tuples(st.integers(0, len(whole)), st.integers(1, 4))
    stop = [whole[a : a + n] for a, n in data.draw(st.lists(cuts, max_size=3))]
    sampling = replace(
        request_of().sampling,
        stop=tuple(filter(None, stop)),
        eos_token_ids=(data.draw(st.integers(0, size - 1)),),
        min_tokens=data.draw(st.integers(0, len(tokens))),
    )

    def groups() -> list[list[int] | Ending]:
        ends = sorted({*data.draw(st.sets(st.integers(1, len(tokens)))), len(tokens)})
        starts = [0, *ends[:-1]]
        parts = [tokens[a:b] for a, b in zip(starts, ends, strict=True)]
        return [*parts, data.draw(st.sampled_from([Ending.EOS, Ending.LENGTH]))]

    def stream(first: int = 0) -> AnswerStream:
        request = Request("r1", [1, 2], sampling, Times(0.0))
        return AnswerStream(request, Detokenizer(tokenizer), first)

    right_tokens, right_text = play(stream(), [*([token] for token in tokens), Ending.LENGTH])
    seen: list[int] = []
    text = ""
    broken = stream()
    for event in groups():
        if broken.finished is not None or data.draw(st.booleans()):
            break
        if isinstance(event, list) and (delta := broken.on(event)) is not None:
            seen += delta.token_ids
            text += delta.text
    resumed = stream(len(seen))
    for event in groups():
        if resumed.finished is None and (delta := resumed.on(event)) is not None:
            assert not delta.token_ids or delta.offset == len(seen)
            seen += delta.token_ids
            text += delta.text
    assert resumed.finished is not None
    assert (seen, text) == (right_tokens, right_text)
    assert resumed.finished.completion_tokens == len(right_tokens)


async def test_the_client_is_told_where_its_answer_is_kept_when_that_changes():
    answer, request = Answer(ReadingTurns()), request_of()
    served = Served(request, answer, Detokenizer(TOKENIZER), Metrics())
    kept_at = []
    for worker in ("d1", "d1", "d2"):
        request.decode_id = worker
        answer.put(TOKENIZER.encode("a").ids)
        kept_at.append((await served.next()).kept_at)
    assert kept_at == ["d1", "", "d2"]
