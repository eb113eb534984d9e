"""What is asked of whom: what the command hands to the process that asks."""

import secrets
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.workload.asks import Ask, Workload

TIMEOUT_S = 600.0
CONNECTIONS_MAX = 8192  # requests that run at once; those beyond it are sent late, and counted
# The generator's own delays that are passed over; beyond them the report warns.
LATE_MS_MAX = 20.0
_PROMPTS_SEED_BITS = 62


class LoadError(Exception):
    """The load cannot be made; one line that says what to do."""


class Target(BaseModel):
    """Who is asked.

    url: http(s)://HOST[:PORT][/PATH] of an OpenAI-compatible server, or grpc(s)://HOST:PORT or
    HOST:PORT of kvrelay's own. model: "" asks the server for its only one. certificates: a folder
    as that of kvrelay's clients; "" trusts the system's authorities over https.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    model: str = ""
    api_key: str | None = None
    certificates: str = ""
    timeout_s: float = TIMEOUT_S  # of one answer

    @property
    def is_http(self) -> bool:
        return self.url.startswith(("http://", "https://"))


class Plan(BaseModel):
    """One run. seed: what the workload was drawn from, for the report. prompts_seed: of the
    prompts' tokens, new ones in each run: those of an earlier run would be in the server's cache.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: Target
    name: str
    block_tokens: int
    asks: tuple[tuple[Any, ...], ...]
    seed: int = 0
    prompts_seed: int = Field(default_factory=lambda: secrets.randbits(_PROMPTS_SEED_BITS))
    connections_max: int = CONNECTIONS_MAX

    @classmethod
    def of(cls, target: Target, workload: Workload, seed: int = 0, **limits: int) -> "Plan":
        return cls(
            target=target,
            name=workload.name,
            block_tokens=workload.block_tokens,
            asks=tuple(ask_fields(ask) for ask in workload.asks),
            seed=seed,
            **limits,
        )

    @property
    def workload(self) -> Workload:
        return Workload(self.name, tuple(map(ask_from, self.asks)), self.block_tokens)


def ask_fields(ask: Ask) -> tuple[Any, ...]:
    """As JSON has it."""
    return ask.at_s, ask.prompt_tokens, ask.answer_tokens, ask.prefix, ask.kind


def ask_from(fields: Sequence[Any]) -> Ask:
    at_s, prompt_tokens, answer_tokens, prefix, kind = fields
    return Ask(at_s, prompt_tokens, answer_tokens, tuple(prefix), kind)
