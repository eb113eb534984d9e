"""Workloads that others recorded, read from files, and fitted to what is to be measured.

Two kinds of file, told apart by their first line: Azure's LLM inference traces (CSV: TIMESTAMP,
ContextTokens, GeneratedTokens) and Mooncake's (JSON lines: timestamp in ms, input_length,
output_length, hash_ids of blocks of 512 tokens).
"""

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from cluster.workload.asks import Ask, Workload, WorkloadError, own_rate

_MOONCAKE_BLOCK_TOKENS = 512
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_TOKENS_MAX = 1 << 31  # of one prompt or answer

_Reader = Callable[[str], Ask]  # of one line


class _BadLineError(Exception):
    """What is wrong with one line."""


def read_trace(path: Path) -> Workload:
    """All of its requests; the first of them is due at 0. Raises WorkloadError."""
    asks: list[Ask] = []
    read: _Reader | None = None
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    read = _take(line, read, asks)
                except _BadLineError as error:
                    raise WorkloadError(f"{path}, line {number}: {error}") from None
    except OSError as error:
        raise WorkloadError(f"{path}: {error.strerror or error}") from None
    if not asks:
        raise WorkloadError(f"{path}: there are no requests in it")
    return Workload(path.stem, _from_zero(asks), _MOONCAKE_BLOCK_TOKENS)


def scaled(
    workload: Workload,
    *,
    rate: float = 1.0,
    requests_per_s: float | None = None,
    length: float = 1.0,
    requests: int | None = None,
    seconds: float | None = None,
) -> Workload:
    """The first `requests` of it, `rate` times as fast, as far as they are due within `seconds`.

    `requests_per_s`, which takes the place of `rate`, is the mean over those that `requests`
    leaves. Prompts and answers are `length` times as long, at least 1 token; so are the blocks of
    prefixes, to whole tokens, and equal ones stay equal. Raises WorkloadError.
    """
    _check_positive(
        rate=rate, requests_per_s=requests_per_s, length=length, requests=requests, seconds=seconds
    )
    asks = workload.asks[:requests]
    if requests_per_s is not None:
        own = own_rate(asks)
        if own is None:
            raise WorkloadError(
                f"{workload.name}: its requests are all due at once, so there is no rate to "
                "change: take more of them, or scale it by a factor"
            )
        rate = requests_per_s / own
    block_tokens = _at_least_one(workload.block_tokens * length)
    fitted: Iterable[Ask] = (_scaled(ask, rate, length, block_tokens) for ask in asks)
    if seconds is not None:
        fitted = takewhile(lambda ask: ask.at_s < seconds, fitted)
    return Workload(workload.name, tuple(fitted), block_tokens)


def _scaled(ask: Ask, rate: float, length: float, block_tokens: int) -> Ask:
    prompt_tokens = _at_least_one(ask.prompt_tokens * length)
    return dataclasses.replace(
        ask,
        at_s=ask.at_s / rate,
        prompt_tokens=prompt_tokens,
        answer_tokens=_at_least_one(ask.answer_tokens * length),
        prefix=ask.prefix[: -(-prompt_tokens // block_tokens)],
    )


def _at_least_one(tokens: float) -> int:
    return max(1, round(tokens))


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            what = name.replace("_per_s", " a second")
            raise WorkloadError(f"{what} of {value:g}: it must be above 0")


# ---- lines


def _take(line: bytes, read: _Reader | None, asks: list[Ask]) -> _Reader | None:
    """Adds the line's request, if it has one. What the next lines are to be read with."""
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise _BadLineError("no text in UTF-8") from None
    if not text:
        return read
    if read is None:
        if not text.startswith("{"):
            _check_heading(text)
            return _azure_ask
        read = _mooncake_ask
    asks.append(read(text))
    return read


def _check_heading(text: str) -> None:
    if tuple(name.strip() for name in _fields(text)) != _AZURE_COLUMNS:
        raise _BadLineError(
            f"neither the heading of an Azure trace ({','.join(_AZURE_COLUMNS)}) "
            "nor a JSON object of a Mooncake trace"
        )


def _azure_ask(line: str) -> Ask:
    fields = _fields(line)
    if len(fields) != len(_AZURE_COLUMNS):
        raise _BadLineError(f"{len(fields)} fields instead of {len(_AZURE_COLUMNS)}")
    time, prompt, answer = fields
    try:
        at = datetime.fromisoformat(time.strip())
    except ValueError:
        raise _BadLineError(f"TIMESTAMP is no time: {_shown(time)}") from None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return Ask(
        at.timestamp(),
        _tokens("ContextTokens", _integer("ContextTokens", prompt)),
        _tokens("GeneratedTokens", _integer("GeneratedTokens", answer)),
    )


def _mooncake_ask(line: str) -> Ask:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise _BadLineError(f"no JSON: {_shown(line)}") from None
    if not isinstance(fields, dict):
        raise _BadLineError(f"no JSON object: {_shown(line)}")
    at_ms = _field(fields, "timestamp")
    if isinstance(at_ms, bool) or not isinstance(at_ms, int | float) or not math.isfinite(at_ms):
        raise _BadLineError(f"timestamp is no number: {_shown(at_ms)}")
    prompt_tokens = _tokens("input_length", _field(fields, "input_length"))
    ids = fields.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise _BadLineError(f"hash_ids is no list of integers: {_shown(ids)}")
    blocks = -(-prompt_tokens // _MOONCAKE_BLOCK_TOKENS)
    if len(ids) > blocks:
        raise _BadLineError(
            f"{len(ids)} hash_ids for {prompt_tokens} tokens, which are {blocks} blocks"
        )
    answer_tokens = _tokens("output_length", _field(fields, "output_length"))
    return Ask(at_ms / 1000, prompt_tokens, answer_tokens, tuple(ids))


def _field(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise _BadLineError(f"there is no {name}")
    return fields[name]


def _fields(line: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise _BadLineError(f"no CSV: {error}") from None


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _BadLineError(f"{name} is no integer: {_shown(text)}") from None


def _tokens(name: str, value: Any) -> int:
    """At least 1: where a trace has none, one token is asked for."""
    if type(value) is not int or not 0 <= value <= _TOKENS_MAX:
        raise _BadLineError(f"{name} is no number of tokens: {_shown(value)}")
    return max(1, value)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _from_zero(asks: list[Ask]) -> tuple[Ask, ...]:
    """In order, with times from the first one on."""
    asks.sort(key=lambda ask: ask.at_s)
    start_s = asks[0].at_s
    return tuple(dataclasses.replace(ask, at_s=ask.at_s - start_s) for ask in asks)
