"""What has happened in one simulated run: a hash over all of it, and the last part for a person.

One line for every message that arrives, every token that a client sees and every fault. The hash
is the same for the same seed, in any process.
"""

from collections import Counter, deque
from hashlib import blake2b
from typing import Any

_TAIL = 300  # lines that are kept


class Trace:
    def __init__(self, *, whole: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self._hash = blake2b(digest_size=16)
        self._lines: deque[str] = deque(maxlen=None if whole else _TAIL)

    def note(self, now_s: float, what: str, kind: str) -> None:
        line = f"{now_s:.6f} {what}"
        self._hash.update(line.encode())
        self._lines.append(line)
        self.counts[kind] += 1

    @property
    def hash(self) -> str:
        return self._hash.hexdigest()

    def tail(self, lines: int | None = None) -> list[str]:
        kept = list(self._lines)
        return kept if lines is None else kept[-lines:]


def shown(message: Any) -> tuple[str, str]:
    """A protocol message as (kind, text): what decides, without signatures."""
    if isinstance(message, tuple):  # a client's, or a frame with blocks behind it
        if isinstance(message[0], str):
            return message[0], " ".join(map(str, message))
        message = message[0]
    kind = ""
    for group in ("event", "command", "body"):
        if group in message.DESCRIPTOR.oneofs_by_name:
            kind = message.WhichOneof(group) or "load"
            break
    text = kind
    if kind == "step":
        for output in message.step.outputs:
            text += f" {output.key}:{output.offset}={list(output.token_ids)}/{output.ending}"
    elif kind not in ("load", "resync", "info", "hello", "welcome", "refused"):
        part = getattr(message, kind)
        text += "".join(_field(part, name) for name in _SHOWN)
    if group == "event":
        load = message.load
        text += f" | {getattr(load, 'blocks_free', '')} {load.queued_tokens}"
        if message.HasField("blocks"):
            blocks = message.blocks
            text += f" | blocks {blocks.number} +{len(blocks.added)} -{len(blocks.removed)}"
    return kind, text


_SHOWN = (
    "key",
    "ticket",
    "transfer_id",
    "request_id",
    "attempt",
    "token_id",
    "first_index",
    "count",
    "again",
    "first_token_id",
    "code",
    "message",
    "reason",
    "indexes",
)


def _field(part: Any, name: str) -> str:
    if name not in part.DESCRIPTOR.fields_by_name:
        return ""
    value = getattr(part, name)
    if name == "ticket":
        return f" ticket={value.transfer_id} {value.first_block}+{list(value.block_ids)}"
    return f" {name}={value}" if value else ""
