"""What must hold of every process: at any time, and when all requests have ended.

Cheap checks are made after every message that a process has handled, deep ones now and then.
"""

from collections.abc import Iterator
from typing import Any

from cluster.simulation.processes import SimProcess, SimWorker
from cluster.simulation.routers import SimRouter
from kvrelay.kv.ledger import BlockState
from prefill_worker.schedule import JobState

_IDLE = (BlockState.FREE, BlockState.CACHED)


def cheap(process: SimProcess) -> Iterator[str]:
    """Sums and limits."""
    if isinstance(process, SimWorker) and process.service is not None:
        ledger, config = process.service.ledger, process._config
        if sum(ledger._counts.values()) != ledger.total:
            yield f"{process.name}: the ledger's states do not sum up: {ledger!r}"
        if len(ledger._free) != ledger._counts[BlockState.FREE]:
            yield f"{process.name}: {len(ledger._free)} free blocks at hand, {ledger!r}"
        if process.role == "prefill" and len(process.service._schedule) > config.jobs_max:
            yield f"{process.name}: more than jobs_max jobs"
        if process.role == "decode" and len(process.service._handoff) > config.reservations_max:
            yield f"{process.name}: more than reservations_max reservations"
    elif isinstance(process, SimRouter) and process.fleet is not None:
        waiting = process.fleet.dispatcher._queue._keys
        if len(waiting) > process._config.queue_max:
            new = sum(request.key == 0 for request in waiting)
            if new > process._config.queue_max:
                yield f"{process.name}: {new} new requests in its queue"


def deep(process: SimProcess) -> Iterator[str]:
    """The objects' own checks of themselves."""
    try:
        if isinstance(process, SimWorker) and process.service is not None:
            _cache(process).check()
            if process.role == "prefill":
                process.service._schedule._turns.check()
            else:
                process.service._prompts._turns.check()
                process.service._kept.check()
        elif isinstance(process, SimRouter) and process.fleet is not None:
            process.fleet.dispatcher.check()
    except AssertionError as error:
        yield f"{process.name}: it contradicts itself: {error!r}"


def left(process: SimProcess) -> Iterator[str]:
    """What nobody uses any more and is still held."""
    if isinstance(process, SimRouter) and process.fleet is not None:
        if len(process.fleet.dispatcher) or process.fleet._readers._answers:
            yield f"{process.name}: {len(process.fleet.dispatcher)} requests are left"
        return
    if not isinstance(process, SimWorker) or process.service is None:
        return
    service, ledger = process.service, process.service.ledger
    if ledger.available != ledger.total:
        yield f"{process.name}: blocks are left: {ledger!r}"
    if process.role == "prefill":
        if len(service._schedule) or service._running:
            yield f"{process.name}: {len(service._schedule)} jobs are left"
        return
    if len(service._kept):
        yield f"{process.name}: {len(service._kept)} answers are left"
    if len(service._handoff) or len(service._batch) or len(service._prompts):
        yield f"{process.name}: {len(service._handoff)} reservations are left"
    elif service._listener._links:
        yield f"{process.name}: {len(service._listener._links)} transfers are left"


def _cache(worker: SimWorker) -> Any:
    service = worker.service
    return service._schedule.cache if worker.role == "prefill" else service._handoff.cache


def unwanted(worker: SimWorker, routers: dict[str, SimRouter]) -> Iterator[tuple[str, int]]:
    """What it does for attempts that their router knows no more of, or whose session is over: by
    the router's name and its key."""
    if worker.service is None:
        return
    for session, number in _wanted_keys(worker):
        end = worker.calls.get(session._writer)
        if end is None:
            yield "a session that is over", number
            continue
        router = routers.get(end.peer.place.name)
        if router is None or router.fleet is None:
            continue
        if router.fleet.dispatcher._attempts.get(number) is None:
            yield router.name, number


def _wanted_keys(worker: SimWorker) -> list[Any]:
    """As their routers call them, of all that is not being let go of already and has a router."""
    service = worker.service
    if worker.role == "prefill":
        jobs = service._schedule._jobs
        return [key for key, job in jobs.items() if job.state is not JobState.ABORTING]
    keys = [key for key in service._handoff._by_key if not service._handoff.is_aborting(key)]
    return [holder for key in keys if (holder := service._kept.holder(key)) is not None]
