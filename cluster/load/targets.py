"""What the driver needs of a server, whatever it speaks. Made by http_target.py, grpc_target.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.load.reading import Reading
from cluster.workload.asks import Ask

Clock = Callable[[], float]  # seconds since the workload's beginning


@dataclass(frozen=True)
class Server:
    """What was found out before the load began. `tokens_max`: of prompt and answer; 0: unknown."""

    protocol: str
    model: str
    prompts: str  # "token ids" or "text"
    tokens_max: int = 0
    notes: tuple[str, ...] = ()  # sentences: what figures lack, for want of what

    def is_too_long(self, ask: Ask) -> bool:
        return 0 < self.tokens_max < ask.prompt_tokens + ask.answer_tokens


@dataclass
class Failure(Exception):
    """One request failed. `kind` is of few words, to be counted; `told` the whole line."""

    kind: str
    told: str

    def __str__(self) -> str:
        return self.told


class Opened(Protocol):
    """A server that has answered once."""

    server: Server

    def prepare(self, ask: Ask, number: int) -> Any:
        """The request, ready to be sent: what takes time is done before it is due."""

    def size_of(self, prepared: Any) -> int:
        """Bytes that it holds."""

    async def ask(self, prepared: Any, reading: Reading, clock: Clock) -> None:
        """Sends it and reads the answer. Raises Failure."""

    async def close(self) -> None: ...
