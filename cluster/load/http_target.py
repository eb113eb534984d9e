"""Any server that speaks as OpenAI's does as a target: /v1/completions, streamed.

What it takes is found out with one short request before the load: prompts as token ids or else as
text, answers of a given length, its own count of tokens. What it does not take is left out, and
said in the notes.
"""

import contextlib
import itertools
import json
import ssl
from array import array
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.http_events import DONE, Call, Endpoint, LostError, StatusError, events, whole
from cluster.load.plan import LoadError, Target
from cluster.load.prompts import Prompts, words
from cluster.load.reading import Reading
from cluster.load.targets import Clock, Failure, Server
from cluster.workload.asks import Ask

_PATH, _MODELS_PATH = "/v1/completions", "/v1/models"
_IDS_ENDS = (32_000, 256)  # most vocabularies have so many tokens; the smallest are of bytes
_USAGE, _USAGE_ALWAYS = {"include_usage": True}, {"continuous_usage_stats": True}
# From what tells most to what any server takes.
_EXTRAS: tuple[Mapping[str, Any], ...] = (
    {"ignore_eos": True, "stream_options": _USAGE | _USAGE_ALWAYS},
    {"ignore_eos": True, "stream_options": _USAGE},
    {"stream_options": _USAGE},
    {},
)
_REFUSED = (400, 404, 422)  # statuses that a request of another form may not get


@dataclass(frozen=True)
class _Form:
    """How requests are written. words: None sends token ids."""

    model: str
    extras: Mapping[str, Any]
    ids_end: int
    words: list[str] | None = None

    def body(self, prompt: "array[int]", answer_tokens: int) -> bytes:
        shown: Any = prompt.tolist()
        if self.words is not None:
            shown = " ".join(self.words[each] for each in prompt)
        fields = {
            "model": self.model,
            "prompt": shown,
            "max_tokens": answer_tokens,
            "temperature": 0,
            "stream": True,
            **self.extras,
        }
        return json.dumps(fields).encode()

    @property
    def counts_always(self) -> bool:
        """Asks for the count of tokens with every message."""
        return "continuous_usage_stats" in self.extras.get("stream_options", {})

    @property
    def notes(self) -> tuple[str, ...]:
        options = self.extras.get("stream_options", {})
        found = {
            "The server takes no token ids: prompts are words, of about as many tokens.": (
                self.words is not None
            ),
            "The server takes no ignore_eos: its answers may be shorter than asked for.": (
                "ignore_eos" not in self.extras
            ),
            "The server does not count tokens: each message of its stream counts as one.": (
                not options
            ),
            "The server counts tokens at the end only: ITL is between messages of its stream.": (
                options == _USAGE
            ),
        }
        return tuple(note for note, holds in found.items() if holds)


class HttpTarget:
    def __init__(
        self, endpoint: Endpoint, target: Target, form: _Form, prompts: Prompts, tokens_max: int
    ) -> None:
        self._endpoint = endpoint
        self._headers = _headers(target)
        self._form = form
        self._prompts = prompts
        kind = "token ids" if form.words is None else "text"
        self.server = Server("HTTP", form.model, kind, tokens_max, form.notes)

    @classmethod
    async def open(cls, target: Target, seed: int, block_tokens: int) -> "HttpTarget":
        """Raises LoadError."""
        endpoint = _endpoint(target)
        model, tokens_max = await _model(endpoint, target)
        common = words()
        ends = [(end, None) for end in _IDS_ENDS] + [(len(common), common)]
        refused = ""
        for (ids_end, text), extras in itertools.product(ends, _EXTRAS):
            form = _Form(model, extras, ids_end, text)
            prompts = Prompts(seed, block_tokens, ids_end)
            opened = cls(endpoint, target, form, prompts, tokens_max)
            try:
                counted = await opened._try()
            except StatusError as error:
                _check_refusal(target, error)
                refused = refused or str(error)
            else:
                if counted or not form.counts_always:
                    return opened
        raise LoadError(f"{target.url} takes no request of ours: {refused}")

    async def _try(self) -> bool:
        """One short request, with the highest id. Whether messages came with a count of tokens:
        some servers pass over an option that they do not know. Raises StatusError, LoadError."""
        ids = array("I", [self._form.ids_end - 1, self._form.ids_end - 1])
        counted = False
        try:
            async for event in self._answer(self._form.body(ids, 1)):
                counted = counted or bool(event.get("choices") and event.get("usage"))
        except (LostError, Failure) as error:
            where = self._endpoint.authority
            raise LoadError(f"{where} does not answer as an OpenAI server: {error}") from None
        return counted

    def prepare(self, ask: Ask, number: int) -> bytes:
        return self._form.body(self._prompts.tokens(ask, number), ask.answer_tokens)

    def size_of(self, prepared: bytes) -> int:
        return len(prepared)

    async def ask(self, prepared: bytes, reading: Reading, clock: Clock) -> None:
        usage: Mapping[str, Any] = {}
        always = self._form.counts_always
        try:
            async with contextlib.aclosing(self._answer(prepared)) as answer:
                async for event in answer:
                    usage = event.get("usage") or usage
                    if tokens := _new_tokens(event, usage if always else {}, reading):
                        reading.came(clock(), tokens)
        except StatusError as error:
            raise Failure(f"HTTP {error.status}", str(error)) from None
        except LostError as error:
            raise Failure("connection lost", str(error)) from None
        details = usage.get("prompt_tokens_details") or {}
        reading.ended(usage.get("completion_tokens"), details.get("cached_tokens") or 0)

    async def _answer(self, body: bytes) -> AsyncGenerator[Mapping[str, Any], None]:
        """The events of a whole answer. Raises StatusError, LostError, Failure."""
        call = Call(_PATH, body, self._headers)
        finished = False
        async with contextlib.aclosing(events(self._endpoint, call)) as answer:
            async for data in answer:
                if data == DONE:
                    return
                event = _object(data)
                finished = finished or any(map(_finish_reason, event.get("choices") or ()))
                yield event
        if not finished:
            raise LostError("the stream ended before the answer did")

    async def close(self) -> None:
        pass


# ---- what comes


def _new_tokens(event: Mapping[str, Any], usage: Mapping[str, Any], reading: Reading) -> int:
    """As the server counts them, where it always says; else a message with text is one."""
    if "completion_tokens" in usage:
        return max(0, int(usage["completion_tokens"]) - reading.outcome.tokens)
    return sum(1 for choice in event.get("choices") or () if choice.get("text"))


def _finish_reason(choice: Mapping[str, Any]) -> bool:
    return bool(choice.get("finish_reason"))


def _object(data: bytes) -> Mapping[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        raise Failure("no JSON", f"an event is no JSON: {data[:60]!r}") from None
    if not isinstance(event, dict):
        raise Failure("no JSON object", f"an event is no JSON object: {data[:60]!r}")
    if error := event.get("error"):
        told = error.get("message", error) if isinstance(error, dict) else error
        raise Failure("error in the stream", str(told))
    return event


# ---- before the load


def _endpoint(target: Target) -> Endpoint:
    base = target.url.rstrip("/")
    for ending in (_PATH, "/v1"):
        base = base.removesuffix(ending)
    try:
        return Endpoint.of(base, _tls(target))
    except OSError as error:
        raise LoadError(
            f"--certificates {target.certificates}: {error.strerror or error}: "
            "it needs a ca.pem, and a key.pem beside a cert.pem"
        ) from None
    except ValueError as error:
        raise LoadError(f"{target.url}: {error}") from None


def _tls(target: Target) -> ssl.SSLContext | None:
    if not target.certificates:
        return None
    folder = Path(target.certificates)
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    if (folder / "cert.pem").exists():
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


def _headers(target: Target) -> dict[str, str]:
    return {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}


async def _model(endpoint: Endpoint, target: Target) -> tuple[str, int]:
    """Its name, and how many tokens it takes; 0 where nobody says."""
    try:
        listed = json.loads(await whole(endpoint, Call(_MODELS_PATH, headers=_headers(target))))
        models = {each["id"]: each.get("max_model_len") or 0 for each in listed["data"]}
    except LostError as error:
        raise LoadError(
            f"no HTTP server answers at {endpoint.authority} ({error}): "
            "check the URL, and that the server runs"
        ) from None
    except StatusError as error:
        _check_key(target, error)
        models = {}
    except (ValueError, TypeError, KeyError):
        models = {}
    if target.model:
        return target.model, models.get(target.model, 0)
    if not models:
        raise LoadError(
            f"{target.url} does not list its models as OpenAI's servers do: "
            "check the URL, or name one with --model"
        )
    return next(iter(models.items()))


def _check_key(target: Target, error: StatusError) -> None:
    if error.status in (401, 403):
        what = "refuses this --api-key" if target.api_key else "asks for an --api-key"
        raise LoadError(f"{target.url} {what}: {error}") from None


def _check_refusal(target: Target, error: StatusError) -> None:
    """Passes what another form of request may mend."""
    _check_key(target, error)
    if error.status not in _REFUSED:
        raise LoadError(f"{target.url} answers with status {error.status}: {error}") from None
