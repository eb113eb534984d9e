"""What the dispatcher decides, as commands that the fleet carries out, and how it refuses.

Made by router/dispatcher.py. The front door turns troubles and refusals into what clients
are told (router/refusals.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.kv.prefix import join_hashes
from kvrelay.wire import transfer_pb2, worker_pb2
from kvrelay.wire.worker_pb2 import DecodeCommand, PrefillCommand
from router.request import Ending, Request
from router.resumption import Resumption


class DuplicateRequestError(Exception):
    """A running request has this id."""


class OverloadError(Exception):
    """Not accepted, for want of room. retry_ms: when to try again; None: nobody can tell."""

    def __init__(self, message: str, retry_ms: float | None = None) -> None:
        super().__init__(message)
        self.retry_ms = retry_ms


class QueueFullError(OverloadError):
    """`queue_max` requests are waiting."""


class DeadlineError(OverloadError):
    """The first token would come too late, by all that is measured."""


# ---- commands


@dataclass(frozen=True)
class ToPrefill:
    worker_id: str
    command: PrefillCommand


@dataclass(frozen=True)
class ToDecode:
    worker_id: str
    command: DecodeCommand


@dataclass(frozen=True)
class Deliver:
    """New tokens of an answer, in order, each once."""

    request: Request
    offset: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class Finished:
    request: Request
    ending: Ending


class Trouble(Exception):
    """Why a request could not be finished; raised to its client."""


class ExhaustedTrouble(Trouble):
    """No room in time: try again later. retry_ms: as in OverloadError."""

    def __init__(self, message: str, retry_ms: float | None = None) -> None:
        super().__init__(message)
        self.retry_ms = retry_ms


class UnavailableTrouble(Trouble):
    """Workers failed it too often."""


class LeavingTrouble(Trouble):
    """This router ends, the request's workers go on: another router may have it."""


class InvalidTrouble(Trouble):
    """No worker here can ever serve it."""


class NotKeptTrouble(Trouble):
    """A request to be resumed is nowhere."""


class TakenOverTrouble(Trouble):
    """Its client goes on with it in another call; this one is read no more."""

    def __init__(self) -> None:
        super().__init__("the request was resumed in another call")


class PoisonTrouble(Trouble):
    """Workers died while they served it, by all that is known because of it."""


@dataclass(frozen=True)
class Failed:
    request: Request
    trouble: Trouble


@dataclass(frozen=True)
class Resumed:
    """The request goes on here, for this wish's client alone; its log is what there is so far."""

    wish: Resumption
    request: Request


@dataclass(frozen=True)
class NotKept:
    wish: Resumption
    trouble: NotKeptTrouble


Command = ToPrefill | ToDecode | Deliver | Finished | Failed | Resumed | NotKept


# ---- what workers are told of a request's present attempt


def reserve(request: Request) -> ToDecode:
    assert request.chain is not None, "its blocks have no names"
    message = worker_pb2.Reserve(
        key=request.key,
        request_id=request.request_id,
        attempt=request.attempt,
        prompt_tokens=request.prompt_tokens_now,
        sampling=_sampling(request),
        block_hashes=join_hashes(request.chain.hashes),
        hash_root=request.chain.root,
        tail_token_ids=request.chain.tail,
        prompt_token_ids=request.prompt_on_wire,
        answered=len(request.answer),
        prefill_here=request.prefill_here,
        tenant=request.tenant,
        stop=request.sampling.stop,
        priority=request.priority,
        min_tokens=request.sampling.min_tokens,
        nonce=request.nonce,
    )
    return ToDecode(request.decode_id, DecodeCommand(reserve=message))


def prefill(request: Request, ticket: transfer_pb2.Ticket) -> ToPrefill:
    assert request.chain is not None, "its blocks have no names"
    assert request.prefill_id is not None, "its decode worker computes the prompt"
    message = worker_pb2.Prefill(
        key=request.key,
        prompt_token_ids=request.prompt_on_wire,
        sampling=_sampling(request),
        ticket=ticket,
        block_hashes=join_hashes(request.chain.hashes),
        answered=len(request.answer),
    )
    return ToPrefill(request.prefill_id, PrefillCommand(prefill=message))


def cancel_decode(request: Request) -> ToDecode:
    return cancel_adopted(request.decode_id, request.key)


def adopt(worker_id: str, key: int, wish: Resumption) -> ToDecode:
    message = worker_pb2.Adopt(
        key=key, tenant=wish.tenant, request_id=wish.request_id, nonce=wish.nonce
    )
    return ToDecode(worker_id, DecodeCommand(adopt=message))


def cancel_adopted(worker_id: str, key: int) -> ToDecode:
    """Of an Adopt that was answered too late."""
    return ToDecode(worker_id, DecodeCommand(cancel=worker_pb2.Cancel(key=key)))


def acknowledge(request: Request) -> ToDecode:
    message = worker_pb2.Acknowledge(keys=[request.key])
    return ToDecode(request.decode_id, DecodeCommand(acknowledge=message))


def cancel_prefill(request: Request) -> ToPrefill:
    assert request.prefill_id is not None, "no prefill worker knows of it"
    cancel = worker_pb2.Cancel(key=request.key)
    return ToPrefill(request.prefill_id, PrefillCommand(cancel=cancel))


def resync_prefill(worker_id: str) -> ToPrefill:
    return ToPrefill(worker_id, PrefillCommand(resync=worker_pb2.Resync()))


def resync_decode(worker_id: str) -> ToDecode:
    return ToDecode(worker_id, DecodeCommand(resync=worker_pb2.Resync()))


def _sampling(request: Request) -> worker_pb2.Sampling:
    sampling = request.sampling
    return worker_pb2.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        max_tokens=request.max_tokens_now,
        eos_token_ids=sampling.eos_token_ids,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        min_tokens=request.min_tokens_now,
    )
