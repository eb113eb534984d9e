"""More load than there is room for: who can wait waits, who cannot is told so, work goes on.

The short form of goodput has engines whose steps take a set time, and compares windows of peak and
of five times that, in turns. The full form computes, in worker processes.
"""

import asyncio
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from asked import check, oracle
from link_process import Nursery
from local_cluster import local_cluster
from offered_load import OfferedLoad, Window
from paced_engine import pace
from seeds import SEED, playable
from tiny_models import make_slow, make_tiny
from waiting import until
from worker_cluster import worker_cluster

from kvrelay.client import AsyncClient
from kvrelay.kv.layout import reserved_blocks

BLOCK_SIZE = 16
OVERLOAD = 5.0  # times what the peak finishes
KEPT_SHARE = 0.9  # of the goodput at peak
NOISE = 0.85  # what the short form allows for on a busy machine,
LOOKS = 3  # and how often it looks before it believes what it sees
PROMPT_TOKENS = 40
ANSWER_TOKENS = (5, 11)  # lengths differ, so that answers do not end in step
SLOTS = 8  # requests that the decode worker has room for
QUEUE = 16
WAIT_S = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def block_bytes() -> int:
    return 3 * 2 * BLOCK_SIZE * 2 * 16 * 4  # of the tiny llama: layers, KV, heads, head_dim


@pytest.mark.parametrize("prefill", [1, 0])
async def test_a_quarter_of_the_room_makes_requests_wait(
    model: Path, block_bytes: int, prefill: int
) -> None:
    """All at once, from the smallest to some that take nearly the whole pool."""
    with playable(SEED):
        rng = random.Random(SEED)
        async with oracle(model) as right:
            asked = await right.draw(rng, 24, tokens=(8, 80))
        needed = [
            reserved_blocks(answer.prompt_tokens, request.options["max_tokens"], BLOCK_SIZE)
            for request, answer in asked
        ]
        blocks = max(*needed, sum(needed) // 4)
        worker = {"kv_bytes": blocks * block_bytes, "chunk_tokens": 32}
        async with (
            local_cluster(model, prefill=prefill, worker=worker) as cluster,
            cluster.client() as client,
            asyncio.timeout(WAIT_S),
        ):
            waited = asyncio.ensure_future(
                until(lambda: cluster.router.fleet.dispatcher.queued > 5, within_s=WAIT_S)
            )
            await asyncio.gather(*(check(client, *each) for each in asked))
            await until(cluster.all_free, within_s=5)
            assert waited.done(), "nobody had to wait"


async def test_five_times_the_load_costs_no_goodput(
    model: Path, block_bytes: int, report: Callable[[str], None]
) -> None:
    blocks = SLOTS * reserved_blocks(PROMPT_TOKENS, max(ANSWER_TOKENS), BLOCK_SIZE)
    async with (
        local_cluster(
            model, worker={"kv_bytes": blocks * block_bytes}, router={"queue_max": QUEUE}
        ) as cluster,
        cluster.client() as client,
    ):
        pace(cluster.prefill[0], 4)
        pace(cluster.decode[0], 50)
        load = OfferedLoad(asking(client))
        for look in range(1, LOOKS + 1):
            peak, over = await in_turns(load, turns=2, seconds=1.5, warm_s=0.4)
            await until(cluster.all_free, within_s=5)  # of what the last window cancelled
            if goodput_kept(peak, over) >= KEPT_SHARE * NOISE or look == LOOKS:
                break
    report(compare(peak, over, KEPT_SHARE * NOISE))


@pytest.mark.slow
async def test_five_times_the_load_costs_no_goodput_of_engines_that_compute(
    tmp_path: Path, report: Callable[[str], None]
) -> None:
    model = make_slow(tmp_path / "slow")
    async with local_cluster(model) as cluster:  # packs the weights, too
        block_bytes = cluster.decode[0]._layout.block_bytes
    blocks = SLOTS * reserved_blocks(PROMPT_TOKENS, max(ANSWER_TOKENS), BLOCK_SIZE)
    with Nursery("worker_ends", str(model)) as nursery:
        async with (
            worker_cluster(
                nursery,
                model,
                prefill=1,
                decode=1,
                worker={"kv_bytes": blocks * block_bytes},
                router={"queue_max": QUEUE},
            ) as cluster,
            cluster.client() as client,
        ):
            peak, over = await in_turns(OfferedLoad(asking(client)), 5, seconds=5.0, warm_s=1.0)
            report(compare(peak, over, KEPT_SHARE))


def asking(client: AsyncClient) -> Callable[[int], Any]:
    """Prompts that have nothing in common, answers of several lengths."""

    def ask(number: int) -> Any:
        rng = random.Random(number)
        prompt = rng.choices(range(5, 270), k=PROMPT_TOKENS)
        tokens = rng.randint(*ANSWER_TOKENS)
        return client.generate(prompt, max_tokens=tokens, ignore_eos=True)

    return ask


async def in_turns(
    load: OfferedLoad, turns: int, *, seconds: float, warm_s: float
) -> tuple[list[Window], list[Window]]:
    """Windows at peak, where nobody is refused, and at five times what that finishes."""
    peak, over = [], []
    for _ in range(turns):
        peak.append(await load.closed(2 * SLOTS, seconds, warm_s))
        per_s = OVERLOAD * peak[-1].goodput
        over.append(await load.open(per_s, seconds, warm_s))
    return peak, over


def compare(peak: list[Window], over: list[Window], share: float) -> str:
    assert not any(window.refused for window in peak)
    refused = [error for window in over for error in window.refused]
    assert len(refused) > sum(window.finished for window in over), "that was no overload"
    assert {error.code for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all(error.retry_ms is not None for error in refused)
    kept = goodput_kept(peak, over)
    at_peak, beyond = goodput(peak), goodput(over)
    said = f"{at_peak:.1f} requests/s at peak, {beyond:.1f} at {OVERLOAD:g} times the load"
    assert kept >= share, said
    return f"{said}: {kept:.0%}; {len(refused)} refused, all with a hint"


def goodput(windows: list[Window]) -> float:
    return statistics.median(window.goodput for window in windows)


def goodput_kept(peak: list[Window], over: list[Window]) -> float:
    return goodput(over) / goodput(peak)
