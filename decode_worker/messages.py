"""What a decode worker's messages mean and how its own are made. Called by its service."""

from collections.abc import Callable, Sequence
from typing import Any

from decode_worker.batch import Batch, Ending, Output
from decode_worker.handoff import HandOff
from decode_worker.kept import KeptAnswer
from decode_worker.prompts import LocalPrompt, LocalPrompts, PromptsFullError
from decode_worker.reservation import InvalidReservationError, Key, Reservation
from kvrelay.draining import DrainingError
from kvrelay.engine.history import TokenHistory
from kvrelay.engine.sampling_params import SamplingParams, history_of
from kvrelay.kv.ledger import OutOfBlocksError
from kvrelay.kv.prefix import PrefixChain, split_hashes
from kvrelay.wire import transfer_pb2, worker_pb2
from kvrelay.wire.worker_pb2 import DecodeEvent, FailureCode

ENDINGS = {
    Ending.NONE: worker_pb2.ENDING_NONE,
    Ending.EOS: worker_pb2.ENDING_EOS,
    Ending.LENGTH: worker_pb2.ENDING_LENGTH,
}

# What a reservation may be refused with, and what its router is told.
REFUSALS = {
    DrainingError: FailureCode.FAILURE_CODE_EXHAUSTED,
    OutOfBlocksError: FailureCode.FAILURE_CODE_EXHAUSTED,
    PromptsFullError: FailureCode.FAILURE_CODE_EXHAUSTED,
    InvalidReservationError: FailureCode.FAILURE_CODE_INVALID,
}


def refusal_code(error: Exception) -> FailureCode:
    """What the router is told of one of REFUSALS, or of a kind of it."""
    return next(code for kind, code in REFUSALS.items() if isinstance(error, kind))


def prefix_chain(reserve: worker_pb2.Reserve, block_size: int) -> PrefixChain | None:
    """Over the prompt; None when the router names no blocks."""
    if not reserve.hash_root:
        return None
    try:
        hashes = split_hashes(reserve.block_hashes)
    except ValueError as error:
        raise InvalidReservationError(str(error)) from error
    return PrefixChain(reserve.hash_root, block_size, hashes, reserve.tail_token_ids)


def token_history(reserve: worker_pb2.Reserve, sampling: SamplingParams) -> TokenHistory | None:
    """What sampling has to know of the prompt; raises InvalidReservationError when that is not in
    the message."""
    prompt = reserve.prompt_token_ids
    try:
        return history_of(sampling, prompt, reserve.prompt_tokens, reserve.answered)
    except ValueError as error:
        raise InvalidReservationError(str(error)) from error


def check_prompt(reserve: worker_pb2.Reserve) -> None:
    """Raises InvalidReservationError unless the whole prompt is in the message."""
    sent = len(reserve.prompt_token_ids)
    if sent == 0 or sent != reserve.prompt_tokens:
        raise InvalidReservationError(f"{sent} tokens sent of a prompt of {reserve.prompt_tokens}")
    if reserve.answered > sent:
        raise InvalidReservationError(
            f"{reserve.answered} tokens answered, of {sent} prompt tokens"
        )


def local_prompt(
    reserve: worker_pb2.Reserve, reservation: Reservation, block_size: int
) -> LocalPrompt:
    cached_tokens = reservation.first_block * block_size
    return LocalPrompt(
        key=reservation.key,
        prompt=list(reserve.prompt_token_ids),
        sampling=reservation.sampling,
        blocks=reservation.blocks,
        cached_tokens=cached_tokens,
        computed=cached_tokens,
        history=reservation.history,
    )


def ticket(
    reserve: worker_pb2.Reserve,
    *,
    instance_id: str,
    layout: transfer_pb2.KvLayout | None,
    endpoints: Sequence[transfer_pb2.Endpoint],
    lease_ms: int,
) -> transfer_pb2.Ticket:
    """What the hand-off completes and signs (`HandOff.sign`)."""
    return transfer_pb2.Ticket(
        request_id=reserve.request_id,
        attempt=reserve.attempt,
        decode_instance_id=instance_id,
        layout=layout,
        endpoints=endpoints,
        lease_ms=lease_ms,
    )


def started(prompt: LocalPrompt) -> DecodeEvent:
    event = worker_pb2.PrefillStarted(key=prompt.key[1], cached_tokens=prompt.cached_tokens)
    return DecodeEvent(started=event)


def first_token(prompt: LocalPrompt, token: int, prefill_ms: float) -> DecodeEvent:
    event = worker_pb2.FirstToken(
        key=prompt.key[1],
        token_id=token,
        prefill_ms=prefill_ms,
        cached_tokens=prompt.cached_tokens,
    )
    return DecodeEvent(first_token=event)


def adopted(number: int, answer: KeptAnswer) -> DecodeEvent:
    event = worker_pb2.Adopted(
        key=number,
        reserve=answer.reserve,
        token_ids=answer.token_ids,
        ending=ENDINGS[answer.ending],
    )
    for names_of_blocks in ("block_hashes", "hash_root", "tail_token_ids"):
        event.reserve.ClearField(names_of_blocks)
    return DecodeEvent(adopted=event)


def step_outputs(
    outputs: Sequence[Output], holder: Callable[[Key], Key | None]
) -> dict[Any, DecodeEvent]:
    """One message for each router's session, with all its requests' tokens.

    holder: what the router of a request calls it; None where there is no router.
    """
    by_session: dict[Any, DecodeEvent] = {}
    for output in outputs:
        called = holder(output.key)
        if called is None:
            continue
        session, key = called
        event = by_session.get(session)
        if event is None:
            event = by_session[session] = DecodeEvent()
        event.step.outputs.add(
            key=key,
            offset=output.offset,
            token_ids=[output.token],
            ending=ENDINGS[output.ending],
        )
    return by_session


def write_load(
    load: worker_pb2.DecodeLoad,
    handoff: HandOff,
    batch: Batch,
    prompts: LocalPrompts,
    cost: worker_pb2.StepCost,
) -> None:
    """What a worker says of itself with every event."""
    load.blocks_free = handoff.ledger.available
    load.running = len(batch)
    load.queued_tokens = prompts.queued_tokens
    load.queued_prompts = prompts.queued_prompts
    load.cost.CopyFrom(cost)
    load.draining = handoff.draining


class RoomNews:
    """Whether routers must be told that there are more blocks: requests may be waiting for them.

    told: what the last event that every router could see has said.
    """

    def __init__(self, available: int) -> None:
        self._told = available

    def told(self, available: int) -> None:
        self._told = available

    def grew(self, available: int) -> bool:
        """Since then; from now on they know."""
        before, self._told = self._told, available
        return available > before
