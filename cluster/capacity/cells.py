"""A cluster as several cells, each with its part of the workers and of the requests: `--jobs`.

That is how routers scale: nothing is shared between cells, so each is simulated by a process of its
own, and what came of them is put together.
"""

import hashlib
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from random import Random
from typing import Any

from cluster.capacity.meter import Meter
from cluster.capacity.parcels import OutcomesParcel, WorkloadParcel
from cluster.capacity.run import OnProgress, Played, Setting, SimulationError, simulate
from cluster.workload.asks import Workload

# A cell looks here and there in hundreds of MB, and much of its time goes with finding the pages:
# large ones are a fifth faster. glibc asks for them when told to, Python's own allocator does not.
_LARGE_PAGES = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def simulate_cells(
    setting: Setting, workload: Workload, jobs: int, on_progress: OnProgress | None = None
) -> Played:
    """Raises SimulationError when there are too few workers or requests for so many cells."""
    if jobs == 1:
        return simulate(setting, workload, on_progress)
    if setting.decode < jobs or 0 < setting.prefill < jobs or len(workload.asks) < jobs:
        raise SimulationError(
            f"--jobs {jobs}: each has a part of the workers of both roles, and of the requests; "
            "take fewer jobs or more workers"
        )
    settings = [
        replace(
            setting,
            prefill=_part(setting.prefill, cell, jobs),
            decode=_part(setting.decode, cell, jobs),
            routers=max(1, _part(setting.routers, cell, jobs)),
            kill_every_s=setting.kill_every_s * jobs,
            seed=setting.seed * jobs + cell,
        )
        for cell in range(jobs)
    ]
    with _environment(_LARGE_PAGES):
        cells = [_Cell() for _ in settings]
    played = []
    try:
        dealt = _dealt(workload, jobs, setting.seed)
        for cell, own, part in zip(cells, settings, dealt, strict=True):
            cell.begin(own, WorkloadParcel.of(part))
        for cell, part in zip(cells, dealt, strict=True):
            came, outcomes = cell.wait()
            played.append(replace(came, outcomes=outcomes.open(part.asks)))
            if on_progress is not None:
                on_progress(sum(len(one.outcomes) for one in played))
    finally:
        for cell in cells:
            cell.end()
    return _together(played)


class _Cell:
    """A process that plays one cell."""

    # Not forked: gRPC's threads would not be there.
    _CONTEXT = multiprocessing.get_context("spawn")

    def __init__(self) -> None:
        self._there, theirs = self._CONTEXT.Pipe()
        self._process = self._CONTEXT.Process(target=_run, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, setting: Setting, parcel: WorkloadParcel) -> None:
        with suppress(BrokenPipeError):  # as `wait` will say
            self._there.send((setting, parcel))

    def wait(self) -> tuple[Played, OutcomesParcel]:
        """The outcomes are apart from what else came of it."""
        try:
            played: Played
            outcomes: OutcomesParcel
            played, outcomes = self._there.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise SimulationError(
                f"the process of a cell ended with status {self._process.exitcode}: what it said "
                "is above; without a word, it may have needed more memory than there is"
            ) from None
        return played, outcomes

    def end(self) -> None:
        """Not by itself: to let go of millions of objects, one by one, takes seconds."""
        self._process.kill()
        self._process.join()
        self._there.close()


def _run(there: "Connection[Any, Any]") -> None:
    """All that the process of a cell does."""
    with suppress(KeyboardInterrupt):  # which says so itself, where it was begun
        there.send(_play(*there.recv()))


def _play(setting: Setting, parcel: WorkloadParcel) -> tuple[Played, OutcomesParcel]:
    workload = parcel.open()
    played = simulate(setting, workload)
    outcomes = OutcomesParcel.of(played.outcomes, workload.asks)
    return replace(played, outcomes=[]), outcomes


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Of processes that begin meanwhile; what the user has set stays."""
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _part(count: int, cell: int, jobs: int) -> int:
    return count // jobs + (cell < count % jobs)


def _dealt(workload: Workload, jobs: int, seed: int) -> list[Workload]:
    """At random: a load balancer before the routers knows nothing of requests."""
    dice = Random(f"{seed} cells")
    order = [number % jobs for number in range(len(workload.asks))]
    dice.shuffle(order)
    return [
        replace(
            workload,
            asks=tuple(a for a, to in zip(workload.asks, order, strict=True) if to == cell),
        )
        for cell in range(jobs)
    ]


def _together(cells: Sequence[Played]) -> Played:
    outcomes = [outcome for cell in cells for outcome in cell.outcomes]
    outcomes.sort(key=lambda outcome: outcome.ask.at_s)
    meters = [cell.meter for cell in cells if cell.meter is not None]
    return Played(
        outcomes=outcomes,
        virtual_s=max(cell.virtual_s for cell in cells),
        cpu_s=sum(cell.cpu_s for cell in cells),
        entries=sum(cell.entries for cell in cells),
        kills=sum(cell.kills for cell in cells),
        hash=hashlib.blake2b("".join(c.hash for c in cells).encode(), digest_size=16).hexdigest(),
        meter=Meter.together(meters) if meters else None,
        local_prompts=sum(cell.local_prompts for cell in cells),
        attempts=sum(cell.attempts for cell in cells),
    )
