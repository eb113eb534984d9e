"""kvrelay's own gRPC as a target: token ids in, and the times of its phases out."""

from array import array
from dataclasses import dataclass
from pathlib import Path

from cluster.load.plan import LoadError, Target
from cluster.load.prompts import Prompts
from cluster.load.reading import Reading
from cluster.load.targets import Clock, Failure, Server
from cluster.workload.asks import Ask
from kvrelay.answer import Completion, Model
from kvrelay.client import AsyncClient, KvrelayError

_LOOK_S = 30.0  # for the models that the server has, before the load
_LOCAL = "local"  # kvrelay.v1.Timings.transport of a prompt that was not handed off


@dataclass(frozen=True)
class _Prepared:
    prompt: "array[int]"
    answer_tokens: int


class GrpcTarget:
    """Answers are not resumed: a server that is lost shows as failed requests."""

    def __init__(
        self, client: AsyncClient, target: Target, model: Model, seed: int, block_tokens: int
    ) -> None:
        self._client = client
        self._timeout_s = target.timeout_s
        self._model = model.name
        self._prompts = Prompts(seed, block_tokens, model.vocab_size)
        self.server = Server("gRPC", model.name, "token ids", model.max_model_tokens)

    @classmethod
    async def open(cls, target: Target, seed: int, block_tokens: int) -> "GrpcTarget":
        """Raises LoadError."""
        scheme, _, rest = target.url.rpartition("://")
        if scheme not in ("", "grpc", "grpcs") or "/" in rest.rstrip("/"):
            raise LoadError(
                f"{target.url}: not a server's address: http(s)://HOST[:PORT][/PATH], "
                "grpc://HOST:PORT or grpcs://HOST:PORT"
            )
        if scheme == "grpcs" and not target.certificates:
            raise LoadError(f"{target.url}: add --certificates, a folder with the server's ca.pem")
        certificates = Path(target.certificates) if target.certificates else None
        try:
            client = AsyncClient(
                rest.rstrip("/"),
                timeout_s=_LOOK_S,
                api_key=target.api_key,
                certificates=certificates,
                resume_for_s=0,
            )
        except (KvrelayError, ValueError) as error:
            raise LoadError(f"{target.url}: {error}") from None
        try:
            model = _chosen(target, await client.models())
            opened = cls(client, target, model, seed, block_tokens)
            await opened.ask(opened.prepare(Ask(0.0, 2, 1), -1), Reading(Ask(0.0, 2, 1), 0), _never)
        except (KvrelayError, Failure) as error:
            await client.close()
            raise LoadError(str(error)) from None  # which names the address
        except BaseException:
            await client.close()
            raise
        return opened

    def prepare(self, ask: Ask, number: int) -> _Prepared:
        return _Prepared(self._prompts.tokens(ask, number), ask.answer_tokens)

    def size_of(self, prepared: _Prepared) -> int:
        return len(prepared.prompt) * prepared.prompt.itemsize

    async def ask(self, prepared: _Prepared, reading: Reading, clock: Clock) -> None:
        try:
            async with self._client.generate(
                prepared.prompt,
                model=self._model,
                timeout_s=self._timeout_s,
                max_tokens=prepared.answer_tokens,
                temperature=0.0,
                ignore_eos=True,
            ) as stream:
                async for delta in stream.deltas():
                    if delta.token_ids:
                        reading.came(clock(), len(delta.token_ids))
                completion = await stream.result()
        except KvrelayError as error:
            raise Failure(error.code.name, str(error)) from None
        _note_phases(reading, completion)

    async def close(self) -> None:
        await self._client.close()


def _never() -> float:
    return 0.0


def _chosen(target: Target, models: tuple[Model, ...]) -> Model:
    for model in models:
        if target.model in ("", model.name):
            return model
    names = ", ".join(model.name for model in models)
    raise LoadError(f"{target.url} has no model {target.model!r}: --model takes {names}")


def _note_phases(reading: Reading, completion: Completion) -> None:
    timings = completion.timings
    reading.ended(completion.completion_tokens, completion.cached_tokens)
    reading.outcome.queue_ms = timings.queue_ms
    reading.outcome.prefill_ms = timings.prefill_ms
    if timings.transport != _LOCAL:
        reading.outcome.hand_off_ms = timings.kv_exposed_ms
