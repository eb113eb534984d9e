"""An answer over OpenAI's API, read as it comes, and what becomes of one that fails.

Called by asking.py.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.http_events import DONE, Call, Endpoint, LostError, StatusError, events

_REFUSED_FOR_NOW = (429, 503)


class RouterLostError(Exception):
    """The connection broke, or could not be made: the request may be asked again."""


class RefusedError(Exception):
    """Not now. retry_s: when to come back."""

    def __init__(self, message: str, retry_s: float) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class AnswerFailedError(Exception):
    """The router ended the request with an error."""


@dataclass(frozen=True)
class Piece:
    text: str
    finish_reason: str  # "" for all but the last


async def pieces(address: str, path: str, body: Mapping[str, Any]) -> AsyncIterator[Piece]:
    """The answer to one call with one choice; whole when it ends without an error.

    Raises RouterLostError, RefusedError, AnswerFailedError.
    """
    call = Call(path, json.dumps({**body, "stream": True}).encode())
    try:
        async with contextlib.aclosing(events(Endpoint.of(f"http://{address}"), call)) as answer:
            async for event in answer:
                if event == DONE:
                    return
                if (piece := _piece(json.loads(event))) is not None:
                    yield piece
    except LostError as error:
        raise RouterLostError(str(error)) from None
    except StatusError as error:
        message = f"status {error.status}: {error}"
        if error.status in _REFUSED_FOR_NOW:
            raise RefusedError(message, error.retry_s) from None
        raise AnswerFailedError(message) from None
    raise RouterLostError("the stream ended without [DONE]")


def _piece(event: Mapping[str, Any]) -> Piece | None:
    if "error" in event:
        raise AnswerFailedError(event["error"]["message"])
    for choice in event["choices"]:
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        return Piece(text or "", choice["finish_reason"] or "")
    return None
