"""`kvrelay bench router`: what the router adds to an answer, and how much it carries.

Called by commands.py. The workers are stand-ins that take no time of their own; the same client
reads the same messages from a bare gRPC server, in turns with the router.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, TypeVar

from cluster.bench.machine import OtherPrograms, describe_machine, unrest
from cluster.bench.report import BenchError, Report, Row
from cluster.bench.router_processes import QUEUE_MAX, Processes, Server, started
from cluster.bench.router_workers import BLOCKS
from cluster.preparation import Progress

T = TypeVar("T")

STREAMS = 200
RATE = 200.0  # requests/s
BASELINE = "bare gRPC"
_WARM_UP_STREAMS = 50
_PERCENTS = (50, 99)
_OPENED_AT_ONCE = 100
_NOTES = (
    "first-token: from the call until the client has read it, at 200 requests/s (Poisson), 128 ids"
    " each. added: to what the bare server takes; the router's round trips to the stand-in workers"
    " are in it.",
    "stream/N: the stand-in workers make N tokens/s for 200 streams of one connection. late: from"
    " the making of a message's oldest token until the client has read it. cpu: of the router.",
    "bare gRPC: the same client reads the same messages, a token each, from a server that does"
    " nothing else; where it is behind it leaves tokens out. stream/most: as fast as it can write.",
)


@dataclass(frozen=True)
class RouterBench:
    """How much is measured. paces: tokens/s that the stand-in workers make for all streams."""

    rounds: int
    seconds: float  # of each thing in each round
    paces: tuple[int, ...]
    idle_streams: tuple[int, ...]

    @classmethod
    def of(cls, *, quick: bool) -> "RouterBench":
        if quick:
            return cls(1, 0.5, (10_000,), (100, 200))
        return cls(3, 4.0, (10_000, 20_000, 40_000), (1000, 2000))


def bench_router(asked: RouterBench, on_progress: Progress) -> Report:
    """Raises BenchError when a process does not start, or fails."""
    others = OtherPrograms()
    rows: list[Row] = []
    parts = (_memory_rows, _first_token_rows, _stream_rows, _refusal_rows)
    with started() as processes:
        for done, part in enumerate(parts):  # memory first: freed memory would hide its growth
            on_progress("measuring the router", done / len(parts))
            rows += part(asked, processes)
    busy = others.cores_busy()
    machine = {**describe_machine(threads=1), "others busy": busy}
    return Report(machine, rows, (*_NOTES, *unrest(busy)))


def _memory_rows(asked: RouterBench, processes: Processes) -> list[Row]:
    """kB a stream that has its first token and waits for the next."""
    processes.pace(0)
    grown: list[list[float]] = []
    for server in (processes.router, processes.bare):
        _hold(processes, server, _WARM_UP_STREAMS, "delta")
        before, opened, of_server = server.rss_bytes(), 0, []
        for streams in asked.idle_streams:
            _hold(processes, server, streams - opened, "delta")
            opened = streams
            of_server.append((server.rss_bytes() - before) / streams / 1000)
        grown.append(of_server)
        processes.load.ask("release")
    return [
        Row(f"idle/{streams}", ours, "kB/stream", bare)
        for streams, ours, bare in zip(asked.idle_streams, *grown, strict=True)
    ]


def _first_token_rows(asked: RouterBench, processes: Processes) -> list[Row]:
    processes.pace(200)
    times: list[list[float]] = [[], []]
    for server, taken in _turns(asked, processes, times):
        answer = _at_rate(asked, processes, server)
        if answer["refused_ms"]:
            raise BenchError("the router has refused requests that it has workers for")
        taken += answer["token_ms"]
    ours, bare = times
    added = [
        Row(f"first-token/added/p{p}", _percentile(ours, p) - _percentile(bare, p), "ms")
        for p in _PERCENTS
    ]
    return added + _percentile_rows("first-token", ours, bare)


def _stream_rows(asked: RouterBench, processes: Processes) -> list[Row]:
    rows: list[Row] = []
    for pace in asked.paces:
        processes.pace(pace, STREAMS)
        rows += _paced_rows(f"stream/{pace}", asked, processes)
    processes.bare.ask("flat-out")
    alone = _stream(asked, processes, processes.bare)
    processes.pace(0)
    most = max((row for row in rows if row.unit == "tokens/s"), key=lambda row: row.value)
    return [*rows, Row("stream/most", most.value, most.unit, alone["tokens/s"])]


def _paced_rows(name: str, asked: RouterBench, processes: Processes) -> list[Row]:
    ours: list[dict[str, float]] = []
    bare: list[dict[str, float]] = []
    for server, figures in _turns(asked, processes, (ours, bare)):
        figures.append(_stream(asked, processes, server))
    units = {
        "tokens/s": name,
        "tokens/message": f"{name}/coalesced",
        "us/token": f"{name}/cpu",
        "late_p50_ms": f"{name}/late/p50",
        "late_p99_ms": f"{name}/late/p99",
    }
    return [
        Row(
            row,
            median(figures[unit] for figures in ours),
            "ms" if unit.endswith("_ms") else unit,
            median(figures[unit] for figures in bare),
        )
        for unit, row in units.items()
    ]


def _refusal_rows(asked: RouterBench, processes: Processes) -> list[Row]:
    """Requests at the usual rate, when no worker has room and the queue is full."""
    processes.workers.ask("room", blocks=0)
    _hold(processes, processes.router, QUEUE_MAX, "accepted")
    answer = _at_rate(asked, processes, processes.router)
    processes.load.ask("release")
    processes.workers.ask("room", blocks=BLOCKS)
    if answer["token_ms"] or not answer["refused_ms"]:
        raise BenchError("the router has answered requests that no worker had room for")
    return _percentile_rows("refusal", answer["refused_ms"])


def _turns(
    asked: RouterBench, processes: Processes, results: Sequence[T]
) -> Iterator[tuple[Server, T]]:
    """Router and bare server in turns, so that a neighbour on the machine hits both."""
    for _ in range(asked.rounds):
        yield from zip((processes.router, processes.bare), results, strict=True)


def _at_rate(asked: RouterBench, processes: Processes, server: Server) -> dict[str, Any]:
    return processes.load.ask(
        "first_tokens", address=server.address, rate=RATE, seconds=asked.seconds
    )


def _stream(asked: RouterBench, processes: Processes, server: Server) -> dict[str, float]:
    answer = processes.load.ask(
        "stream", address=server.address, streams=STREAMS, seconds=asked.seconds, pid=server.pid
    )
    tokens = max(1, answer["tokens"])
    return {
        **answer,
        "tokens/s": tokens / answer["seconds"],
        "tokens/message": tokens / max(1, answer["messages"]),
        "us/token": answer["cpu_s"] / tokens * 1e6,
    }


def _hold(processes: Processes, server: Server, streams: int, until: str) -> None:
    for begun in range(0, streams, _OPENED_AT_ONCE):
        count = min(_OPENED_AT_ONCE, streams - begun)
        processes.load.ask("hold", address=server.address, streams=count, until=until)


def _percentile_rows(name: str, ours: list[float], bare: list[float] | None = None) -> list[Row]:
    return [
        Row(
            f"{name}/p{percent}",
            _percentile(ours, percent),
            "ms",
            _percentile(bare, percent) if bare else None,
        )
        for percent in _PERCENTS
    ]


def _percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1]
