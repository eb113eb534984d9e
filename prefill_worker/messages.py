"""What a prefill worker says to routers. Called by its service."""

from kvrelay.wire import worker_pb2
from kvrelay.wire.worker_pb2 import PrefillEvent
from prefill_worker.schedule import Job, Schedule


def started(job: Job) -> PrefillEvent:
    event = worker_pb2.PrefillStarted(key=job.key[1], cached_tokens=job.cached_tokens)
    return PrefillEvent(started=event)


def first_token(job: Job, token: int, prefill_ms: float) -> PrefillEvent:
    event = worker_pb2.FirstToken(
        key=job.key[1],
        token_id=token,
        prefill_ms=prefill_ms,
        cached_tokens=job.cached_tokens,
    )
    return PrefillEvent(first_token=event)


def write_load(load: worker_pb2.PrefillLoad, schedule: Schedule, cost: worker_pb2.StepCost) -> None:
    """What a worker says of itself with every event."""
    load.queued_tokens = schedule.queued_tokens
    load.queued_prompts = schedule.queued_prompts
    load.cost.CopyFrom(cost)
    load.draining = schedule.draining
    load.blocks_free = schedule.ledger.available
