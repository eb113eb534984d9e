"""Calls of the public gRPC service made up from its descriptors: slightly wrong ones, what is no
message at all, and some that turn out right. The same number gives the same call, in any process.

What is right asks for little, so that what the calls cost is what they cost to refuse.
"""

import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from kvrelay.wire import inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]
METHODS = {method.name: method for method in SERVICE.methods}
STREAMING = ("Generate", "Chat", "Resume")
_SHARES = {"Generate": 40, "Chat": 35, "Resume": 10, "Tokenize": 10, "ListModels": 4, "Teleport": 1}
TOKENS_MAX = 4  # of an answer to a right one
_HUGE_SHARE = 0.005  # of calls, with one field of up to megabytes
_HUGE_BYTES = (1 << 16, 1 << 20, 5 << 20, 7 << 20, 9 << 20)
_CANCELLED_SHARE = 0.15
_CANCEL_MS_MAX = 30.0
_FIELDS_MAX = 6  # made wrong in one message

_STRINGS = (
    *("", " ", "\0", "a\0b", "\r\n", "\t", "'\"\\", "{{ 7 * 7 }}", "{% raise %}", "%s%n", "../.."),
    *(
        "\ud7ff",
        "\ufffd",
        "\uffff",
        "\U0010ffff",
        "\u202e",
        "e\u0301" * 20,
        "👩‍👩‍👧‍👦" * 9,
        "ﷺ" * 50,
    ),
    *("<s>", "</s>", "<|user|>", "<|assistant|>", "null", "NaN", "-1", "x" * 129, "x" * 300),
    *("user", "assistant", "system", "endless", "gpt-17", "req-1", "same"),
)
_DOUBLES = (
    *(math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 2.0, 2.0000001, -2.0, 0.5, 1e308),
    *(-1e308, 5e-324, 1e-30),
)
_INTS = (0, 1, -1, 2, 4, 5, 63, 100, 101, -100, -101, 280, 281, 512, 4096, 1 << 20)
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}
_COUNTS = (0, 1, 2, 3, 16, 17, 64, 65, 1024, 1025, 5000)


@dataclass(frozen=True)
class GeneratedCall:
    method: str
    data: bytes  # of the request, a message or not
    metadata: tuple[tuple[str, str | bytes], ...]
    cancel_ms: float | None  # the client goes away then


def generated_call(seed: int, number: int) -> GeneratedCall:
    dice = random.Random(f"{seed} {number}")
    method = dice.choices(list(_SHARES), list(_SHARES.values()))[0]
    known = METHODS.get(method)
    message: Any = _right(dice, known.input_type.name if known else "GenerateRequest")
    make = dice.choices([_slightly_wrong, _all_wrong, _broken, _unknown], [55, 15, 25, 5])[0]
    if dice.random() < _HUGE_SHARE:
        make = _huge
    data = make(dice, message)
    return GeneratedCall(
        method,
        data,
        _metadata(dice),
        dice.uniform(0, _CANCEL_MS_MAX) if dice.random() < _CANCELLED_SHARE else None,
    )


# ---- the request


def _right(dice: random.Random, name: str) -> Message:
    sampling = pb.SamplingParams(max_tokens=dice.randint(1, TOKENS_MAX))
    if dice.random() < 0.5:
        sampling.temperature = dice.uniform(0, 2)
    if name == "GenerateRequest":
        if dice.random() < 0.5:
            return pb.GenerateRequest(text="once upon", sampling=sampling)
        ids = pb.TokenIds(ids=dice.choices(range(2, 281), k=dice.randint(1, 40)))
        return pb.GenerateRequest(token_ids=ids, sampling=sampling)
    if name == "ChatRequest":
        message = pb.ChatMessage(role="user", content="what is new?")
        return pb.ChatRequest(messages=[message], sampling=sampling)
    if name == "TokenizeRequest":
        return pb.TokenizeRequest(text="once upon a time")
    if name == "ResumeRequest":
        return pb.ResumeRequest(request_id=f"req-{dice.randint(0, 9)}", next_offset=0)
    return pb.ListModelsRequest()


def _slightly_wrong(dice: random.Random, message: Message) -> bytes:
    for _ in range(dice.randint(1, _FIELDS_MAX)):
        at = message
        while True:
            if not at.DESCRIPTOR.fields:
                break
            field = dice.choice(at.DESCRIPTOR.fields)
            inner = field.message_type is not None and not field.is_repeated
            if not inner or dice.random() < 0.2:
                _fill(dice, at, field)
                break
            at = getattr(at, field.name)
    return message.SerializeToString()


def _all_wrong(dice: random.Random, message: Message) -> bytes:
    for field in message.DESCRIPTOR.fields:
        _fill(dice, message, field)
    return message.SerializeToString()


def _huge(dice: random.Random, message: Any) -> bytes:
    """One field of megabytes: a long text, or millions of values that take a byte or two each."""
    fields = [(message, field) for field in message.DESCRIPTOR.fields]
    if isinstance(message, pb.GenerateRequest | pb.ChatRequest):
        fields += [(message.sampling, field) for field in message.sampling.DESCRIPTOR.fields]
    if isinstance(message, pb.GenerateRequest):
        fields.append((message.token_ids, pb.TokenIds.DESCRIPTOR.fields[0]))
    grows = [
        (at, field)
        for at, field in fields
        if field.is_repeated or field.cpp_type == FieldDescriptor.CPPTYPE_STRING
    ]
    if not grows:
        return dice.randbytes(dice.choice(_HUGE_BYTES))
    at, field = dice.choice(grows)
    size = dice.choice(_HUGE_BYTES)
    if not field.is_repeated:
        setattr(at, field.name, dice.choice("x \nÿ") * (size // 2))
    elif field.message_type is not None:
        return message.SerializeToString() + _key(field) * (size // 2)
    else:
        at.ClearField(field.name)
        value = "" if field.cpp_type == FieldDescriptor.CPPTYPE_STRING else 1
        getattr(at, field.name).extend([value] * (size // 2))
    return message.SerializeToString()


def _key(field: FieldDescriptor) -> bytes:
    """An empty value of a message's field."""
    return _varint(field.number << 3 | 2) + b"\0"


def _broken(dice: random.Random, message: Message) -> bytes:
    """Bytes that are mostly no message."""
    data = bytearray(message.SerializeToString())
    kind = dice.randrange(4)
    if kind == 0:
        return dice.randbytes(dice.choice((1, 2, 10, 64, 1000, 20_000)))
    if kind == 1:
        return bytes(data[: dice.randint(0, len(data))])
    for _ in range(dice.randint(1, 4)):
        at = dice.randint(0, len(data))
        piece = dice.choice((dice.randbytes(3), b"\xff" * 11, b"\xed\xa0\x80", b"\x1a\x02\xff\xfe"))
        data[at : at + (kind == 2) * len(piece)] = piece
    return bytes(data)


def _unknown(dice: random.Random, message: Message) -> bytes:
    """With fields that the contract does not have, or that have another type in it."""
    data = message.SerializeToString()
    for _ in range(dice.randint(1, 50)):
        number = dice.choice((*range(1, 30), 1000, (1 << 29) - 1))
        kind = dice.choice((0, 1, 2, 5))
        value = {
            0: lambda: _varint(dice.getrandbits(64)),
            1: lambda: struct.pack("<d", dice.choice(_DOUBLES)),
            2: lambda: _varint(5) + dice.randbytes(5),
            5: lambda: dice.randbytes(4),
        }[kind]()
        data += _varint(number << 3 | kind) + value
    return data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


# ---- one field


def _fill(dice: random.Random, message: Any, field: FieldDescriptor) -> None:
    message.ClearField(field.name)
    if field.is_repeated:
        _fill_repeated(dice, getattr(message, field.name), field)
    elif field.message_type is not None:
        inner = getattr(message, field.name)
        inner.SetInParent()
        for within in field.message_type.fields:
            if dice.random() < 0.5:
                _fill(dice, inner, within)
    else:
        setattr(message, field.name, _value(dice, field))


def _fill_repeated(dice: random.Random, values: Any, field: FieldDescriptor) -> None:
    count = dice.choice(_COUNTS)
    if field.message_type is None:
        few = [_value(dice, field) for _ in range(min(count, 5))]
        values.extend(dice.choices(few, k=count) if few else [])
        return
    for _ in range(min(count, 1025)):
        inner = values.add()
        for within in field.message_type.fields:
            if dice.random() < 0.9:
                setattr(inner, within.name, _value(dice, within))


def _value(dice: random.Random, field: FieldDescriptor) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return dice.choice(_STRINGS)
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return dice.choice(_DOUBLES)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return dice.random() < 0.5
    least, most = _RANGES[kind]
    fits = [least, most, *(value for value in _INTS if least <= value <= most)]
    return dice.choice(fits)


# ---- what comes with it


def _metadata(dice: random.Random) -> tuple[tuple[str, str | bytes], ...]:
    """What a client may send; what gRPC itself would not let out is not here."""
    if dice.random() < 0.8:
        return ()
    some: list[Callable[[], tuple[str, str | bytes]]] = [
        lambda: ("authorization", dice.choice(("", "Bearer", "Bearer x", "Basic eDp5", "x" * 500))),
        lambda: ("kvrelay-proof", "x" * dice.randint(0, 100)),
        lambda: ("x-data-bin", dice.randbytes(dice.randint(0, 200))),
        lambda: (f"x-{dice.randrange(99)}", "~" * dice.choice((0, 1, 1000, 5000, 9000))),
        lambda: ("content-encoding", "gzip"),
        lambda: ("user-agent", "'; DROP TABLE kv; --"),
    ]
    return tuple(make() for make in dice.choices(some, k=dice.randint(1, 5)))
