"""One failure at one point of real workers, among streams that must not notice.

Two prefill and two decode workers, one of them armed. Requests come in waves until the failpoint
was hit; what dies is replaced, what hangs is continued or replaced, as the seed says.
"""

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass

from asked import Oracle, check
from link_process import EndDiedError
from waiting import until
from worker_cluster import Worker, WorkerCluster

from kvrelay.client import AsyncClient
from kvrelay.failpoints import Action, Failpoint, Point

_WAVES_S = 60.0  # the armed worker gets its share of most, unless a bad start makes it look slow
_FREE_S = 10.0  # a writer that hung on a link has let go by then
_NOTICED_S = 10.0  # only a broken test waits so long
_WAVE_S = 30.0
_STREAMS = 5  # side by side
_ASLEEP_MS = 1_500  # longer than the router puts up with

# Up to which hit of a point, drawn from the seed: what a worker surely sees in a few waves.
_HITS = {
    Point.PREFILL_BEFORE_CHUNK: 5,
    Point.PREFILL_AFTER_CHUNK: 5,
    Point.PREFILL_PUSHED: 5,
    Point.DECODE_RECEIVED: 5,
    Point.DECODE_BEFORE_STEP: 30,
    Point.DECODE_AFTER_STEP: 30,
}
_HITS_OF_STEPS = {"prefill": 5, "decode": 30}


@dataclass(frozen=True)
class Case:
    """Where, what, and the seed of all the rest."""

    role: str
    point: Point
    action: Action
    seed: int

    def __str__(self) -> str:
        return f"{self.role} worker, {self.point}, {self.action}, seed {self.seed}"


async def play(case: Case, cluster: WorkerCluster, oracle: Oracle) -> None:
    """Raises AssertionError or KvrelayError when a client has noticed, or a block is not free."""
    rng = random.Random(str(case))
    plan = _Plan.draw(case, rng)
    armed = await cluster.replace(rng.choice(cluster.of_role(case.role)), [plan.failpoint])
    await cluster.ready()
    streams_ended = asyncio.Event()
    mishap = asyncio.create_task(_live_through(plan, cluster, armed, streams_ended))
    try:
        async with cluster.client() as client:
            await _waves(client, oracle, rng, armed)
        streams_ended.set()
        await mishap
    finally:
        mishap.cancel()
    await cluster.all_free(_FREE_S)


@dataclass(frozen=True)
class _Plan:
    failpoint: Failpoint
    after: str  # what is done with the worker: replace, continue, continue late, nothing

    @classmethod
    def draw(cls, case: Case, rng: random.Random) -> "_Plan":
        after, hang_ms = "nothing", 0
        if case.action is Action.KILL:
            after = "replace"
        elif case.action is Action.HANG:
            after = rng.choice(["replace", "continue", "continue late", "nothing"])
            hang_ms = _ASLEEP_MS if after == "nothing" else 0
        hits = _HITS_OF_STEPS[case.role] if case.point is Point.ENGINE_STEP else None
        hit = rng.randint(1, hits or _HITS.get(case.point, 2))
        how = {"point": case.point, "action": case.action, "hit": hit, "hang_ms": hang_ms}
        return cls(Failpoint(**how), after)


async def _waves(client: AsyncClient, oracle: Oracle, rng: random.Random, armed: Worker) -> None:
    """Streams, until one of them has come by the failpoint."""
    until_s = time.monotonic() + _WAVES_S
    while time.monotonic() < until_s:
        asked = await oracle.draw(rng, _STREAMS)
        async with asyncio.timeout(_WAVE_S), asyncio.TaskGroup() as streams:
            for request, right in asked:
                streams.create_task(check(client, request, right))
        if armed.has_tripped:
            return
    raise AssertionError(f"{armed.end.name} was never there")


async def _live_through(
    plan: _Plan, cluster: WorkerCluster, armed: Worker, streams_ended: asyncio.Event
) -> None:
    await armed.tripped()
    if plan.failpoint.action is Action.HANG and plan.after != "nothing":
        await armed.end.has_stopped()
        # Of its role the other one is left: the router has noticed.
        await until(lambda: cluster.connected(armed.role) < 2, within_s=_NOTICED_S)
    if plan.after == "replace":
        await cluster.replace(armed)
        return
    if plan.after != "continue":
        await streams_ended.wait()
    armed.end.go_on()
    with contextlib.suppress(EndDiedError):  # its loops may have ended with an error
        await armed.end.ask("ledger")
    if not armed.alive:
        await cluster.replace(armed)
