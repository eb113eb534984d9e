"""Owns what a client asks for, whatever protocol it speaks.

Made by the gRPC service and the HTTP routes; router/frontdoor.py makes requests of it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvrelay.wire.inference_pb2 import SamplingParams


@dataclass(frozen=True)
class Messages:
    """A chat, for the model's own template: (role, content), oldest first."""

    messages: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Ask:
    """One prompt. Empty `model` and `request_id`: the one served, one we make up."""

    prompt: str | Sequence[int] | Messages
    sampling: SamplingParams
    model: str = ""
    request_id: str = ""
    priority: int = 0  # lower goes first
    ttft_deadline_ms: int = 0  # 0: none
    protocol: Literal["grpc", "http"] = "grpc"  # it came by; for the metrics
    answers: int = 1  # choices; each is a request of its own


def choice_seed(seed: int, index: int) -> int:
    """The seed of a choice, 64 bits; choice 0 has the request's own."""
    if index == 0:
        return seed
    folded = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(folded, digest_size=8).digest(), "little")
