"""Owns how much there may be in a body: strings, lists and objects, values.

Pure. JSON of few bytes can stand for very many things, and to make them stops everybody's stream.
So they are counted while the body comes, a piece at a time, before anything is made of it; a
`Shape` takes one body and is made by router/http/reading.py.
"""

from dataclasses import dataclass

from router.admission import DEFAULT_LIMITS

_PARTS_PER_MESSAGE = 3  # on average; one message may have more
_STRINGS_PER_PART = 4  # "type", "text" and what they are
_STRINGS_PER_MESSAGE = 4  # "role", "content" and what they are
_BESIDES = 512  # what is not in the messages: other fields, stop strings


@dataclass(frozen=True)
class ShapeLimits:
    """Of one body. The defaults have room for messages_max messages of some parts each."""

    # Keys are strings, too.
    strings_max: int = _BESIDES + DEFAULT_LIMITS.messages_max * (
        _STRINGS_PER_MESSAGE + _PARTS_PER_MESSAGE * _STRINGS_PER_PART
    )
    containers_max: int = _BESIDES + DEFAULT_LIMITS.messages_max * (2 + _PARTS_PER_MESSAGE)
    values_max: int = 1 << 18  # in lists and objects; nearly all are token ids


class ShapeError(Exception):
    """More than there may be; the message is for the client."""


class Shape:
    """What there is in the JSON so far. What is no JSON is found out by whoever parses it."""

    def __init__(self, limits: ShapeLimits = ShapeLimits()) -> None:  # frozen
        self._limits = limits
        self._quotes = 0
        self._containers = 0
        self._commas = 0
        self._in_string = False
        self._escaped = False  # the last piece has ended with half an escape

    def add(self, piece: bytes) -> None:
        """Raises ShapeError."""
        if not piece:
            return
        if self._escaped:
            piece = piece[1:]
        bare = piece.replace(rb"\\", b"").replace(rb"\"", b"")
        self._escaped = bare.endswith(b"\\")
        quotes = bare.count(b'"')
        self._quotes += quotes
        _check("strings", (self._quotes + 1) // 2, self._limits.strings_max)
        outside = b"".join(bare.split(b'"')[self._in_string :: 2])
        self._in_string ^= bool(quotes % 2)
        self._containers += outside.count(b"{") + outside.count(b"[")
        _check("lists and objects", self._containers, self._limits.containers_max)
        self._commas += outside.count(b",")
        _check("values", self._commas + 1, self._limits.values_max)


def _check(what: str, count: int, most: int) -> None:
    if count > most:
        raise ShapeError(f"it has more than {most} {what}: send less, or a long prompt as text")
