"""The open loop: sent when due, whatever runs; and what is late is said to be."""

import asyncio
import time
from typing import Any

import pytest
from waiting import until

from cluster.load.pacing import Pacing
from cluster.load.plan import LATE_MS_MAX
from cluster.load.reading import Reading
from cluster.load.result import LoadResult, LoopLateness
from cluster.load.targets import Clock, Failure, Server
from cluster.workload.asks import Ask, Workload
from cluster.workload.figures import quantiles
from cluster.workload.slo import Slo

SLO = Slo(1000, 1000)
SERVER = Server("test", "none", "nothing")


class Stub:
    """A server that answers when `let` is set, and may keep the event loop busy."""

    def __init__(self, busy_s: float = 0.0) -> None:
        self.server = SERVER
        self.let = asyncio.Event()
        self.began = asyncio.Event()
        self.wanted = 0
        self.running = 0
        self.prepared: list[int] = []
        self._busy_s = busy_s

    def prepare(self, ask: Ask, number: int) -> Any:
        self.prepared.append(number)
        return number

    def size_of(self, prepared: Any) -> int:
        return 100 << 20

    async def ask(self, prepared: Any, reading: Reading, clock: Clock) -> None:
        self.running += 1
        if self.running == self.wanted:
            self.began.set()
        time.sleep(self._busy_s)  # noqa: ASYNC251  # the load generator itself is slow
        await self.let.wait()
        reading.came(clock(), 1)
        reading.ended()

    async def close(self) -> None: ...


def pacing_of(stub: Any, count: int, gap_s: float = 0.0, connections_max: int = 100) -> Pacing:
    asks = tuple(Ask(at * gap_s, 1, 1) for at in range(count))
    return Pacing(stub, Workload("test", asks), connections_max, timeout_s=30)


async def ended(pacing: Pacing) -> None:
    await until(lambda: pacing.is_done, within_s=30)
    await pacing.stop()


def result_of(pacing: Pacing, **seen: Any) -> LoadResult:
    return LoadResult("url", "test", 0, SERVER, pacing.outcomes, **seen)


async def test_no_request_waits_for_an_answer() -> None:
    stub = Stub()
    stub.wanted = 50
    pacing = pacing_of(stub, 50)
    pacing.prepare()
    assert stub.prepared == [0, 1, 2]  # as many as there is room for; the others as it runs
    pacing.begin()
    await asyncio.wait_for(stub.began.wait(), 30)  # all run, none is answered
    assert (pacing.running, pacing.sent, len(pacing.outcomes)) == (50, 50, 0)
    stub.let.set()
    await ended(pacing)
    assert sorted(stub.prepared) == list(range(50))
    assert len(pacing.outcomes) == 50


async def test_requests_beyond_the_connections_are_late_and_said_to_be() -> None:
    stub = Stub()
    stub.wanted = 2
    pacing = pacing_of(stub, 5, connections_max=2)
    pacing.begin()
    await asyncio.wait_for(stub.began.wait(), 30)
    await until(lambda: pacing.held == 3, within_s=30)
    held_until_s = pacing.clock()
    assert pacing.sent == 2
    stub.let.set()
    await ended(pacing)
    late = [outcome.sent_s for outcome in pacing.outcomes if outcome.sent_s >= held_until_s]
    assert len(late) == 3
    assert min(outcome.ttft_ms for outcome in pacing.outcomes) >= held_until_s * 1000
    result = result_of(pacing, held=pacing.held, connections_max=2)
    assert "3 requests were sent late, for 2 ran" in result.warnings(result.figures(SLO))[0]


async def test_a_slow_loop_is_reported_and_counts_in_ttft() -> None:
    busy_s = 3 * LATE_MS_MAX / 1000
    stub = Stub(busy_s)
    stub.let.set()
    pacing = pacing_of(stub, 10, gap_s=0.001)
    pacing.begin()
    await ended(pacing)
    late = quantiles(pacing.loop_late_ms)
    result = result_of(pacing, loop=LoopLateness(late.p50, late.p99, late.most))
    found = result.figures(SLO)
    assert found.lateness_ms.p99 > LATE_MS_MAX
    assert found.ttft_ms.most >= found.lateness_ms.most
    warnings = " ".join(result.warnings(found))
    assert "Requests were sent late: p99" in warnings
    assert "its loop woke late by p99" in warnings


def test_who_is_in_time_gets_no_warning() -> None:
    result = LoadResult("url", "test", 0, SERVER, [])
    assert result.warnings(result.figures(SLO)) == ()


@pytest.mark.parametrize(
    ("error", "kind"),
    [(Failure("refused", "come again"), "refused"), (ValueError("broken"), "ValueError")],
)
async def test_whatever_fails_is_an_outcome(error: Exception, kind: str) -> None:
    class Failing(Stub):
        async def ask(self, prepared: Any, reading: Reading, clock: Clock) -> None:
            raise error

    pacing = pacing_of(Failing(), 3)
    pacing.begin()
    await ended(pacing)
    assert [outcome.error for outcome in pacing.outcomes] == [kind] * 3
    assert pacing.told == {kind: str(error)}


async def test_what_is_stopped_leaves_what_runs_out() -> None:
    stub = Stub()
    stub.wanted = 2
    pacing = pacing_of(stub, 3, gap_s=0.0)
    pacing._asks = (*pacing._asks[:2], Ask(1000.0, 1, 1))
    pacing.begin()
    await asyncio.wait_for(stub.began.wait(), 30)
    assert not pacing.is_done
    await pacing.stop()
    assert pacing.outcomes == []
    assert pacing.running == 0
