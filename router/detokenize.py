"""Owns the way from token ids to text to be streamed: whole characters, up to a stop string.

The front door makes one Detokenizer per model, AnswerStream one TextStream per request. Nothing
here looks back further than a few tokens, so a token costs the same wherever in the answer it is.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from typing import Protocol

from tokenizers import Tokenizer

# A byte-fallback decoder spells a run of byte tokens as text only if the whole run is UTF-8, so a
# run is held back until it ends. From this length its whole characters go out early.
BYTE_RUN_MAX = 32
# Tokens that the text of the next one may depend on; more than one only where they have no text.
CONTEXT_TOKENS_MAX = 8
REPLACEMENT = "\ufffd"


class _TokenText(Protocol):
    """Text of tokens as it becomes certain; finish() gives what was still held back."""

    def push(self, token_ids: Iterable[int]) -> str: ...

    def finish(self) -> str: ...


class Detokenizer:
    """What turning ids into text needs to know of a tokenizer; made once, shared by all streams.

    Raises ValueError for a decoder that cannot be streamed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        kinds = _decoder_kinds(tokenizer)
        self._byte_level = "ByteLevel" in kinds
        if self._byte_level and not kinds <= {"ByteLevel", "Fuse"}:
            raise ValueError(f"cannot stream text through the decoders {', '.join(sorted(kinds))}")
        self._byte_fallback = "ByteFallback" in kinds
        self._bytes: dict[int, bytes] = {}

    def start(self) -> _TokenText:
        return _ByteLevelText(self) if self._byte_level else _WindowText(self)

    def spelling(self, token_id: int) -> str | None:
        """The vocabulary's spelling; None for a token that has no part in the text."""
        token = self._tokenizer.id_to_token(token_id)
        return None if token is None or token in self._special else token

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes a token of a byte-level vocabulary stands for."""
        data = self._bytes.get(token_id)
        if data is None:
            data = byte_level_bytes(self.spelling(token_id) or "")
            self._bytes[token_id] = data
        return data

    def fallback_byte(self, spelling: str) -> int | None:
        """The byte that a spelling like <0x0A> stands for, where the decoder knows such tokens."""
        if not self._byte_fallback or len(spelling) != 6:
            return None
        if not (spelling.startswith("<0x") and spelling.endswith(">")):
            return None
        try:
            return int(spelling[3:5], 16)
        except ValueError:
            return None

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


class TextStream:
    """The text of one answer, from tokens as they come.

    All that push() and finish() return, put together, is the decoded answer cut before the first
    stop string that ends where one may. The one exception: BYTE_RUN_MAX valid byte-fallback bytes
    and then, in the same run, a broken character. The whole run would decode to U+FFFD, but its
    beginning is already out.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self._text = detokenizer.start()
        self._stop = _StopFilter(stop)
        self._may_stop = True
        self._finished = False

    @property
    def stopped(self) -> bool:
        """A stop string was met; further tokens are discarded."""
        return self._stop.stopped

    def push(self, token_ids: Iterable[int], *, may_stop: bool = True) -> str:
        """The text that is certain now and was not before; often empty.

        may_stop: a stop string that ends in this text counts.
        """
        assert not self._finished, "push after finish"
        self._may_stop = may_stop
        return "" if self.stopped else self._stop.push(self._text.push(token_ids), may_stop)

    def finish(self) -> str:
        """The text that was held back; an incomplete character comes out as U+FFFD."""
        if self._finished or self.stopped:
            self._finished = True
            return ""
        self._finished = True
        return self._stop.push(self._text.finish(), self._may_stop) + self._stop.finish()


class _ByteLevelText:
    """Text of a byte-level vocabulary: tokens are bytes, joined and read as UTF-8."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join(map(self._detokenizer.bytes_of, token_ids)))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowText:
    """Text of every other vocabulary: what a token adds to the text of the few before it."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._context: list[int] = []  # last tokens whose text is out; empty only at the start
        self._context_text = ""
        self._run: list[int] = []  # byte tokens held back, and the bytes they stand for
        self._run_bytes = bytearray()
        self._run_broken = False

    def push(self, token_ids: Iterable[int]) -> str:
        return "".join(map(self._push_one, token_ids))

    def finish(self) -> str:
        return self._end_run()

    def _push_one(self, token_id: int) -> str:
        spelling = self._detokenizer.spelling(token_id)
        if spelling is None:
            return ""
        byte = self._detokenizer.fallback_byte(spelling)
        if byte is not None:
            return self._push_byte(token_id, byte)
        return self._end_run() + self._advance([token_id])

    def _push_byte(self, token_id: int, byte: int) -> str:
        if self._run_broken:
            return REPLACEMENT
        self._run.append(token_id)
        self._run_bytes.append(byte)
        whole = _whole_characters(self._run_bytes)
        if whole is None:
            self._run_broken = True
            return self._release(len(self._run))
        return self._release(whole) if len(self._run) >= BYTE_RUN_MAX else ""

    def _end_run(self) -> str:
        text = self._release(len(self._run)) if self._run else ""
        self._run_broken = False
        return text

    def _release(self, count: int) -> str:
        """The text of the first `count` bytes of the run, which leave it."""
        token_ids, data = self._run[:count], bytes(self._run_bytes[:count])
        del self._run[:count], self._run_bytes[:count]
        if not self._context_text:  # the decoder may strip the beginning of a text: let it
            return self._advance(token_ids)
        return _fallback_text(data)

    def _advance(self, token_ids: list[int]) -> str:
        """What tokens add behind the context, which moves on to them."""
        window = self._context + token_ids
        added = self._detokenizer.decode(window)[len(self._context_text) :]
        self._move_context(window)
        return added

    def _move_context(self, window: list[int]) -> None:
        # A context without text would not shield the next token from being stripped as the first.
        for count in range(1, CONTEXT_TOKENS_MAX + 1):
            self._context = window[-count:]
            self._context_text = self._detokenizer.decode(self._context)
            if self._context_text or count >= len(window):
                return


class _StopFilter:
    """Passes text on up to the first stop string, holding back what may be the start of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "an empty stop string"
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self._exempt = 0  # so much of it came before a stop string may end: none ends in there
        self.stopped = False

    def push(self, text: str, may_stop: bool) -> str:
        if not self._stop or not text:
            return text
        self._held += text
        if not may_stop:
            self._exempt = len(self._held)
        match, begun = self._match_at(), self._begun_at()
        # A longer stop string that began earlier may still come to match and would cut more off.
        if match < len(self._held) and match <= begun:
            return self._cut(match)
        return self._take(min(match, begun))

    def finish(self) -> str:
        match = self._match_at()
        return self._cut(match) if match < len(self._held) else self._take(match)

    def _match_at(self) -> int:
        """Where the first complete stop string begins; the end of the held text if nowhere."""
        begins = ((stop, max(0, self._exempt - len(stop) + 1)) for stop in self._stop)
        found = (self._held.find(stop, begin) for stop, begin in begins)
        return min((at for at in found if at >= 0), default=len(self._held))

    def _begun_at(self) -> int:
        """Where a stop string may begin that the text so far ends in; the end if nowhere."""
        size = len(self._held)
        for at in range(max(0, size - self._longest + 1), size):
            tail = self._held[at:]
            if any(stop.startswith(tail) for stop in self._stop):
                return at
        return size

    def _cut(self, at: int) -> str:
        self.stopped = True
        text, self._held = self._held[:at], ""
        return text

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._exempt = max(0, self._exempt - count)
        return text


def byte_level_bytes(spelling: str) -> bytes:
    """What a byte-level decoder reads a token as; one outside its alphabet is plain text."""
    try:
        return bytes(_BYTE_OF[char] for char in spelling)
    except KeyError:
        return spelling.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    if tokenizer.decoder is None:
        return set()
    spec = json.loads(tokenizer.decoder.__getstate__())
    members = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    return {member["type"] for member in members}


def _whole_characters(data: bytearray) -> int | None:
    """Bytes in complete characters, less an incomplete one at the end; None if it is not UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start if error.reason == "unexpected end of data" else None
    return len(data)


def _fallback_text(data: bytes) -> str:
    """What a byte-fallback decoder makes of a run of bytes: all of it text, or none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return REPLACEMENT * len(data)
