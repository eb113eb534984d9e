import itertools

import pytest
from byte_tokenizer import (
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    metaspace_tokenizer,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from router.detokenize import BYTE_RUN_MAX, Detokenizer, TextStream

# Tokens that begin and end inside characters, as merges learnt from bytes do.
SPLIT_MERGES = [
    (b"\x82", b"\xac"),
    (b"\xe2", b"\x82"),
    (b"\xac", b"\xe2"),
    (b"\xac\xe2", b"\x82"),
    (b"\xbf", b"\xbd"),
    (b"\xef", b"\xbf"),
    (b"a", b"b"),
    (b"ab", b"c"),
]
BYTE_LEVEL = byte_level_tokenizer(SPLIT_MERGES)
BYTE_LEVEL.add_tokens([AddedToken("<user> ", special=False), AddedToken("\u20ac", special=False)])
FALLBACK = byte_fallback_tokenizer()
METASPACE = metaspace_tokenizer()
SPACED = metaspace_tokenizer()
SPACED.decoder = None
WORD_ENDS = Tokenizer(models.BPE(vocab={"a": 0, "a</w>": 1, "b</w>": 2, "c": 3}, merges=[]))
WORD_ENDS.decoder = decoders.BPEDecoder()
WORD_PIECES = Tokenizer(models.WordPiece(vocab={"a": 0, "##a": 1, ".": 2, "b": 3, "[UNK]": 4}))
WORD_PIECES.decoder = decoders.WordPiece()

ALL = {
    "byte_level": BYTE_LEVEL,
    "fallback": FALLBACK,
    "metaspace": METASPACE,
    "no_decoder": SPACED,
    "word_ends": WORD_ENDS,
    "word_pieces": WORD_PIECES,
}

texts = st.text(alphabet=st.sampled_from("abc €é\ufffd😀\n"), max_size=30)
# Where UTF-8 ranges begin and end: overlong forms, surrogates, past the last character.
EDGES = b"A\x80\x8f\x90\x9f\xa0\xbf\xc0\xc2\xe0\xe2\xed\xef\xf0\xf4\xf5\xff"
near_utf8 = st.lists(st.sampled_from(list(EDGES)), max_size=40).map(bytes)
stops = st.lists(st.text(alphabet="ab c€\ufffd", min_size=1, max_size=6), max_size=4)


def cut(text: str, stop: list[str]) -> str:
    found = [text.find(string) for string in stop]
    return text[: min((at for at in found if at >= 0), default=len(text))]


def split(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids)))
    bounds = [0, *sorted(cuts), len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(bounds)]


def run(tokenizer: Tokenizer, pushes: list[list[int]], stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(Detokenizer(tokenizer), stop)
    out = [stream.push(ids) for ids in pushes]
    out.append(stream.finish())
    return out, stream.stopped


def check(tokenizer: Tokenizer, pushes: list[list[int]], stop: list[str]) -> None:
    ids = [token_id for ids in pushes for token_id in ids]
    out, stopped = run(tokenizer, pushes, stop)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(out) == cut(whole, stop)
    assert stopped == any(string in whole for string in stop)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), payload=st.binary(max_size=40) | near_utf8, stop=stops)
def test_any_bytes_in_any_split(data: st.DataObject, payload: bytes, stop: list[str]) -> None:
    check(BYTE_LEVEL, split(data, list(payload)), stop)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), text=texts, stop=stops)
def test_characters_split_over_tokens(data: st.DataObject, text: str, stop: list[str]) -> None:
    ids = list(text.encode())
    if data.draw(st.booleans()):
        ids = BYTE_LEVEL.encode(text).ids
    check(BYTE_LEVEL, split(data, ids), stop)


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=200)
@given(data=st.data(), stop=stops)
def test_any_tokens_of_any_vocabulary(name: str, data: st.DataObject, stop: list[str]) -> None:
    tokenizer = ALL[name]
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    # The upper ids are the merges and pieces; one past the end is in no vocabulary.
    token_ids = st.integers(0, size) | st.integers(max(0, size - 12), size)
    ids = data.draw(st.lists(token_ids, max_size=30))
    check(tokenizer, split(data, ids), stop)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), parts=st.lists(st.binary(max_size=6) | texts.map(str.encode), max_size=6))
@example(data=None, parts=[b" ", b"", b" a"])
def test_runs_of_fallback_bytes(data: st.DataObject | None, parts: list[bytes]) -> None:
    space = FALLBACK.token_to_id("▁a")
    ids = [i for part in parts for i in [*(1 + byte for byte in part[: BYTE_RUN_MAX - 1]), space]]
    check(FALLBACK, split(data, ids) if data else [[i] for i in ids], [])


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(alphabet="ab", max_size=24), stop=st.lists(st.text("ab", min_size=1), max_size=4)
)
def test_nothing_of_a_stop_string_leaks(text: str, stop: list[str]) -> None:
    stream = TextStream(Detokenizer(BYTE_LEVEL), stop)
    out = ""
    for byte in text.encode():
        out += stream.push([byte])
        assert cut(text, stop).startswith(out)
    assert out + stream.finish() == cut(text, stop)


@settings(deadline=None, max_examples=500)
@given(
    text=st.text(alphabet="ab", max_size=24),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    exempt=st.integers(0, 24),
)
@example(text="aaab", stop=["a"], exempt=3)
@example(text="abab", stop=["ab"], exempt=3)  # the second begins where no stop string may end
@example(text="aba", stop=["abaa", "ab"], exempt=2)
def test_a_stop_string_counts_where_it_ends_in_text_that_may_stop(
    text: str, stop: list[str], exempt: int
) -> None:
    found = (text.find(string, max(0, exempt - len(string) + 1)) for string in stop)
    expected = text[: min((at for at in found if at >= 0), default=len(text))]
    stream, out = TextStream(Detokenizer(BYTE_LEVEL), stop), ""
    for index, byte in enumerate(text.encode()):
        out += stream.push([byte], may_stop=index >= exempt)
        assert expected.startswith(out)
    assert out + stream.finish() == expected


def test_an_incomplete_character_that_may_not_stop_does_not_at_the_end_either() -> None:
    stream = TextStream(Detokenizer(BYTE_LEVEL), ["\ufffd"])
    assert stream.push(["\u20ac".encode()[0]], may_stop=False) == ""
    assert (stream.finish(), stream.stopped) == ("\ufffd", False)


@settings(deadline=None, max_examples=200)
@given(text=texts)
def test_only_an_unfinished_character_is_held_back(text: str) -> None:
    stream, out = TextStream(Detokenizer(BYTE_LEVEL)), ""
    for char in text:
        *begin, last = char.encode()
        assert stream.push(begin) == ""
        out += stream.push([last])
    assert out == text


def test_broken_bytes_do_not_stall_the_stream() -> None:
    stream = TextStream(Detokenizer(BYTE_LEVEL))
    assert "".join(stream.push([0x80]) for _ in range(100)) == "\ufffd" * 100


def test_tokens_that_never_end_on_a_character_do_not_stall_the_stream() -> None:
    token_id = BYTE_LEVEL.token_to_id("¬âĤ")  # AC E2 82, the middle of "€€"
    stream = TextStream(Detokenizer(BYTE_LEVEL))
    assert stream.push([0xE2, 0x82]) == ""
    assert [stream.push([token_id]) for _ in range(50)] == ["€"] * 50


def test_the_earliest_stop_string_in_the_text_wins_over_the_first_complete() -> None:
    stop = ["abcdef", "cd"]
    assert run(BYTE_LEVEL, [list(b"xabcd"), list(b"ef")], stop) == (["x", "", ""], True)
    assert run(BYTE_LEVEL, [list(b"xabcd"), list(b"eX")], stop) == (["x", "ab", ""], True)
    assert run(BYTE_LEVEL, [list(b"xabcd")], stop) == (["x", "ab"], True)


def test_everything_after_a_stop_string_is_discarded() -> None:
    stream = TextStream(Detokenizer(BYTE_LEVEL), ["\n"])
    assert stream.push(list(b"one\ntwo")) == "one"
    assert stream.stopped
    assert stream.push(list(b"three")) == ""
    assert stream.finish() == ""


def test_an_incomplete_character_at_the_end_can_complete_a_stop_string() -> None:
    assert run(BYTE_LEVEL, [list(b"a\xe2")], ["\ufffd"]) == (["a", ""], True)


def test_a_byte_run_that_is_broken_is_replaced_whole_and_at_once() -> None:
    stream = TextStream(Detokenizer(FALLBACK))
    assert stream.push([1 + byte for byte in b"\xe2\x82\xac"]) == ""
    assert stream.push([1 + 0xFF]) == "\ufffd" * 4
    assert stream.push([1 + ord("A")]) == "\ufffd"
    assert stream.push([FALLBACK.token_to_id("▁a")]) == " a"


@pytest.mark.parametrize("lead", [[], ["a"]])
def test_a_long_byte_run_goes_out_before_it_ends(lead: list[str]) -> None:
    ids = [FALLBACK.token_to_id(piece) for piece in lead] + [1 + b for b in ("€" * 60).encode()]
    stream, out, longest = TextStream(Detokenizer(FALLBACK)), "", 0
    for count, token_id in enumerate(ids, start=1):
        out += stream.push([token_id])
        longest = max(longest, count - len(out.encode()))
    assert longest <= BYTE_RUN_MAX
    assert out + stream.finish() == FALLBACK.decode(ids)


def test_a_first_space_is_stripped_only_once() -> None:
    for ids in ([1 + 0x20, FALLBACK.token_to_id("▁a")], [FALLBACK.token_to_id("▁")] * 20):
        check(FALLBACK, [[token_id] for token_id in ids], [])


def test_tokens_without_text_do_not_count_as_the_beginning() -> None:
    tokenizer = byte_fallback_tokenizer(["", "▁a"])
    space, empty = tokenizer.token_to_id("▁a"), tokenizer.token_to_id("")
    for ids in (
        [empty, space],
        [empty, 1 + 0x20, space],
        [space, empty, space],
        [empty] * 20 + [space, empty, space],
    ):
        check(tokenizer, [[token_id] for token_id in ids], [])


def test_a_decoder_that_cannot_be_streamed_is_refused() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    with pytest.raises(ValueError, match="ByteLevel, Strip"):
        Detokenizer(tokenizer)
