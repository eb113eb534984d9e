"""How many fields a message on the wire has, found without parsing it.

An empty message takes two bytes of the wire and some fifty of memory once it is parsed; millions of
them would hold up the event loop for a quarter of a second. Called by router/malformed.py.
"""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types
_VARINT_BYTES_MAX = 10


def has_more_fields(data: bytes, most: int) -> bool:
    """Whether the message itself, not those within it, has more than `most` fields. The cost is
    that of looking at `most`, however many there are. Bytes that are no message have those that
    come before the fault."""
    at = count = 0
    while at < len(data):
        count += 1
        if count > most:
            return True
        at = _after_field(data, at)
        if not at:
            return False
    return False


def _after_field(data: bytes, at: int) -> int:
    """Where the next field begins; 0 where no field can be read."""
    key, at = _varint(data, at)
    wire_type = key & 7
    if wire_type == _VARINT:
        return _varint(data, at)[1]
    if wire_type == _LENGTH:
        length, at = _varint(data, at)
        return at and at + length
    if wire_type in (_FIXED32, _FIXED64):
        return at + (4 if wire_type == _FIXED32 else 8)
    return 0


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where the next byte is; that is 0 where there is no number."""
    value = 0
    for shift, byte in enumerate(data[at : at + _VARINT_BYTES_MAX]):
        value |= (byte & 127) << 7 * shift
        if byte < 128:
            return value, at + shift + 1
    return 0, 0
