"""Every phase of a request, and a worker that dies, hangs or fails in it: nobody notices.

Real processes on the tiny model: 2 prefill workers, 2 decode workers, a router. Several streams are
under way, greedy and sampled, with and without stop strings; each must have exactly the tokens that
a cluster without failures gives, every token once. Then no block of a living worker is anybody's.

A failure says how to play its seed again.
"""

import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from asked import Oracle, oracle
from failpoint_case import Case, play
from link_process import Nursery
from seeds import SEED, SEEDS, playable
from tiny_models import make_tiny
from worker_cluster import WorkerCluster, worker_cluster

from kvrelay.failpoints import Action, Point

pytestmark = pytest.mark.asyncio(loop_scope="module")

TRANSPORTS = ("shm", "tcp")
PHASES = [
    *(("prefill", point) for point in Point if not point.startswith("decode.")),
    *(("decode", point) for point in Point if not point.startswith("prefill.")),
]

# kept_ms: what a worker that hung keeps for a router that may be gone is free soon after it.
WORKER = {"chunk_tokens": 32, "link_reply_ms": 2_000, "heartbeat_ms": 100, "kept_ms": 500}
# On a busy machine a worker may seem to be silent that is not. That costs an attempt, as the
# failpoint does, and must not cost the request. Nor may one bad figure keep work from a worker.
ROUTER = {"silence_ms": 500, "attempts_max": 6, "strikes_max": 6, "measured_fade_ms": 200}

# Each phase and action once, the transports in turn.
SHORT = [
    (TRANSPORTS[(at + turn) % 2], role, point, action)
    for at, (role, point) in enumerate(PHASES)
    for turn, action in enumerate(Action)
]
FULL = [
    (transport, role, point, action)
    for transport, (role, point), action in itertools.product(TRANSPORTS, PHASES, Action)
]


def names(cases: list[tuple[str, str, Point, Action]]) -> list[str]:
    return [f"{transport}-{role}-{point}-{action}" for transport, role, point, action in cases]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def right(model: Path) -> AsyncIterator[Oracle]:
    async with oracle(model) as made:
        yield made


@pytest.fixture(scope="module")
def nursery(right: Oracle, model: Path) -> Iterator[Nursery]:
    with Nursery("worker_ends", str(model)) as made:  # after `right`: the weights are packed
        yield made


class Clusters:
    """One for each transport, made when it is first asked for, and again after a failure."""

    def __init__(self, nursery: Nursery, model: Path) -> None:
        self._nursery = nursery
        self._model = model
        self._made: dict[str, tuple[WorkerCluster, contextlib.AsyncExitStack]] = {}

    @contextlib.asynccontextmanager
    async def of(self, transport: str) -> AsyncIterator[WorkerCluster]:
        if transport not in self._made:
            stack = contextlib.AsyncExitStack()
            worker = {"transport": transport, **WORKER}
            made = worker_cluster(self._nursery, self._model, worker=worker, router=ROUTER)
            self._made[transport] = await stack.enter_async_context(made), stack
        try:
            yield self._made[transport][0]
        except BaseException:
            await self._close(transport)
            raise

    async def close(self) -> None:
        for transport in list(self._made):
            await self._close(transport)

    async def _close(self, transport: str) -> None:
        if transport in self._made:
            _, stack = self._made.pop(transport)
            await stack.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clusters(nursery: Nursery, model: Path) -> AsyncIterator[Clusters]:
    made = Clusters(nursery, model)
    yield made
    await made.close()


async def play_on(clusters: Clusters, transport: str, case: Case, right: Oracle) -> None:
    with playable(case.seed):
        async with clusters.of(transport) as cluster:
            await play(case, cluster, right)


@pytest.mark.parametrize(("transport", "role", "point", "action"), SHORT, ids=names(SHORT))
async def test_a_failure_in_every_phase(
    clusters: Clusters, right: Oracle, transport: str, role: str, point: Point, action: Action
) -> None:
    await play_on(clusters, transport, Case(role, point, action, SEED), right)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("transport", "role", "point", "action"), FULL, ids=names(FULL))
async def test_failures_in_every_phase(
    clusters: Clusters, right: Oracle, transport: str, role: str, point: Point, action: Action
) -> None:
    for seed in range(SEED, SEED + SEEDS):
        await play_on(clusters, transport, Case(role, point, action, seed), right)
