"""One run of load, from the side of who wants it: starts the process that asks, and follows it.

Called by `kvrelay bench serve` and by bench/goodput/.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

from cluster.bench.report import BenchError
from cluster.bench.router_processes import Child
from cluster.load.plan import LoadError, Plan
from cluster.load.result import LoadResult, LoopLateness, outcome_from
from cluster.load.targets import Server
from cluster.preparation import Progress, silent
from cluster.workload.outcomes import Outcome

_POLL_S = 0.2
_OUTCOMES_AT_ONCE = 500


def run_load(plan: Plan, on_progress: Progress = silent) -> LoadResult:
    """Returns when every answer has come or failed; after Ctrl-C, what there is until then.

    A second Ctrl-C raises KeyboardInterrupt. Raises LoadError.
    """
    child = Child("the load generator", "cluster.load.driver")
    try:
        with _stopping() as stopped:
            on_progress(f"asking {plan.target.url} for the first time", None)
            child.ready()
            opened = child.ask("open", **plan.model_dump())
            server = Server(**{**opened, "notes": tuple(opened["notes"])})
            _check_lengths(plan, server)
            _follow(child, plan, stopped, on_progress)
            seen = child.ask("finish")
            outcomes = list(_outcomes(child, seen["outcomes"]))
    except BenchError as error:
        raise LoadError(str(error).removeprefix("the load generator failed: ")) from None
    finally:
        child.end()
    return LoadResult(
        url=plan.target.url,
        workload=plan.name,
        seed=plan.seed,
        server=server,
        outcomes=sorted(outcomes, key=lambda outcome: outcome.ask.at_s),
        loop=LoopLateness(**seen["loop"]),
        planned=len(plan.asks),
        unfinished=seen["unfinished"],
        held=seen["held"],
        connections_max=plan.connections_max,
        stopped=stopped.is_set(),
        told=seen["told"],
    )


def _check_lengths(plan: Plan, server: Server) -> None:
    """Some requests that are too long are part of a trace; a trace of them is a mistake."""
    if plan.asks and all(map(server.is_too_long, plan.workload.asks)):
        raise LoadError(
            f"{plan.name}: all requests are longer than the {server.tokens_max:,} tokens, prompt "
            f"and answer, that {server.model} takes: add --length-scale"
        )


def _follow(child: Child, plan: Plan, stopped: threading.Event, on_progress: Progress) -> None:
    """To its end, or until it is stopped."""
    child.ask("begin")
    count = len(plan.asks)
    while not stopped.wait(_POLL_S):
        seen = child.ask("progress")
        if seen["done"]:
            return
        on_progress(f"asking for {count} answers", seen["ended"] / count)


def _outcomes(child: Child, count: int) -> Iterator[Outcome]:
    for first in range(0, count, _OUTCOMES_AT_ONCE):
        some = child.ask("outcomes", first=first, count=_OUTCOMES_AT_ONCE)
        yield from map(outcome_from, some["outcomes"])


@contextlib.contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, where the second one ends everything. On any thread but
    the main one Ctrl-C is somebody else's."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        stopped.set()

    signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
