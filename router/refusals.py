"""Why a client does not get what it asked for, in words that both protocols share.

Raised or made in router/frontdoor.py; the gRPC service and the HTTP routes turn a Refusal into a
status of theirs.
"""

from enum import Enum

from router.admission import InvalidRequest, TooLongRequest
from router.chat import ChatTemplateError
from router.commands import (
    DuplicateRequestError,
    ExhaustedTrouble,
    InvalidTrouble,
    LeavingTrouble,
    NotKeptTrouble,
    OverloadError,
    PoisonTrouble,
    TakenOverTrouble,
    Trouble,
)
from router.quotas import BeyondQuotaError, QuotaExceededError
from router.template_process import TemplateBusyError, TemplateDownError

RETRY_HINT_MS = 1000  # where nothing is predicted
# Of one message, whose start and end say the most. What a client sent may be in it, megabytes; and
# gRPC sends it as a header, a character in twelve bytes at most, of which clients take 8 KiB.
_START_CHARS, _END_CHARS = 400, 100
_RETRY_MS = (100, 60_000)  # least and most: a prediction may be far off


class Reason(Enum):
    INVALID = "invalid"  # as it is, it can never be served
    TOO_LONG = "too_long"  # nor this
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"  # to this API key
    NOT_FOUND = "not_found"
    UNSUPPORTED = "unsupported"  # not by this model
    DUPLICATE = "duplicate"
    TAKEN_OVER = "taken_over"  # its client goes on with it in another call
    EXHAUSTED = "exhausted"  # later it may be served
    UNAVAILABLE = "unavailable"
    LEAVING = "leaving"  # at another router it may go on, at once
    POISON = "poison"  # workers die of it: not to be tried again


class Refusal(Exception):
    """A request that is not served, or not to its end; the message is for the client.

    retry_ms: when to try again, for a request that may be served later; else None. For one that
    finds no router or no worker that works there is always a hint. prompt: which of its call's it
    is about, where there are several.
    """

    def __init__(self, reason: Reason, message: str, retry_ms: int | None = None) -> None:
        if len(message) > _START_CHARS + _END_CHARS:
            message = f"{message[:_START_CHARS]} ... {message[-_END_CHARS:]}"
        super().__init__(message)
        if retry_ms is None and reason in (Reason.UNAVAILABLE, Reason.LEAVING):
            retry_ms = RETRY_HINT_MS
        self.reason = reason
        self.retry_ms = retry_ms
        self.prompt: int | None = None


def refusal(error: Exception) -> Refusal | None:
    """What the client is told of `error`; None for one that is a fault of ours."""
    match error:
        case Refusal():
            return error
        case TooLongRequest():
            return Refusal(Reason.TOO_LONG, str(error))
        case InvalidRequest() | ChatTemplateError() | InvalidTrouble() | BeyondQuotaError():
            return Refusal(Reason.INVALID, str(error))
        case DuplicateRequestError():
            return Refusal(Reason.DUPLICATE, str(error))
        case NotKeptTrouble():
            return Refusal(Reason.NOT_FOUND, str(error))
        case TakenOverTrouble():
            return Refusal(Reason.TAKEN_OVER, str(error))
        case OverloadError() | ExhaustedTrouble():
            return _exhausted(error, _predicted(error.retry_ms))
        case TemplateBusyError():
            return _exhausted(error, RETRY_HINT_MS)
        case QuotaExceededError():
            return _exhausted(error, RETRY_HINT_MS if error.retry_ms is None else error.retry_ms)
        case LeavingTrouble():
            return Refusal(Reason.LEAVING, str(error))
        case PoisonTrouble():
            return Refusal(Reason.POISON, str(error))
        case TemplateDownError() | Trouble():
            return Refusal(Reason.UNAVAILABLE, str(error))
        case _:
            return None


def _predicted(retry_ms: float | None) -> int:
    least, most = _RETRY_MS
    return RETRY_HINT_MS if retry_ms is None else int(min(max(retry_ms, least), most))


def _exhausted(error: Exception, retry_ms: int) -> Refusal:
    return Refusal(Reason.EXHAUSTED, f"{error}; try again in {retry_ms} ms", retry_ms)
