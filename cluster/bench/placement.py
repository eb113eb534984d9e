"""`kvrelay bench placement`: what one placement costs the router, as its fleet grows.

The production objects, driven as the dispatcher drives them; called by commands.py. The router has
no part of its own in it: no socket, no clock, no worker process.
"""

import gc
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles

from cluster.bench.machine import OtherPrograms, describe_machine, unrest
from cluster.bench.report import Report, Row
from cluster.bench.timing import Budget, interleaved_times
from cluster.preparation import Progress
from kvrelay.config import RouterConfig
from kvrelay.kv.prefix import HASH_BYTES, join_hashes
from kvrelay.wire import transfer_pb2, worker_pb2
from router.admission import Sampling
from router.request import Request, Times
from router.workers import Workers

FLEETS = (10, 100, 1_000, 10_000)  # workers, half of each role
BLOCKS = 1_000_000  # indexed, of all workers together
PROMPT_TOKENS = 1_500
SHARED_TOKENS = 1_000  # of a prompt, that one of the system prompts makes up
ANSWER_TOKENS = 256
SYSTEM_PROMPTS = 50
_BLOCK_SIZE = 16
_MODEL = "0123456789abcdef"
_REQUESTS = 200  # different ones, placed again and again
_SAMPLING = Sampling(0.0, 0, 1.0, 0, ANSWER_TOKENS, (), ())
_NOTES = (
    "Processor time of one placement: the longest cached prefix, the candidates, the choice and its"
    f" claim; prompts of {PROMPT_TOKENS:,} tokens, two thirds of them known to many workers.",
    "ratio: beside the smallest fleet. naming: hashing a prompt's blocks, once for each request.",
)


@dataclass(frozen=True)
class PlacementBench:
    """What is measured."""

    fleets: tuple[int, ...] = FLEETS
    blocks: int = BLOCKS
    quick: bool = False


def bench_placement(asked: PlacementBench, on_progress: Progress) -> Report:
    others = OtherPrograms()
    budget = Budget(rounds_min=3, row_s=2.0 if asked.quick else 12.0, turn_s=0.02)
    fleets = []
    for workers in asked.fleets:
        on_progress(f"filling {workers:,} workers", None)
        fleets.append(_Fleet(workers, asked.blocks))
    gc.collect()
    gc.freeze()  # as a router's own index is old: a full collection does not come every second
    try:
        times = interleaved_times([fleet.place_one for fleet in fleets], budget)
    finally:
        gc.unfreeze()
    base = median(times[0])
    rows = []
    for fleet, taken in zip(fleets, times, strict=True):
        name = f"placement/{fleet.workers}"
        rows += [
            Row(f"{name}/p50", median(taken) * 1e6, "us", baseline=base * 1e6),
            Row(f"{name}/p99", quantiles(taken, n=100)[98] * 1e6, "us"),
        ]
    (naming,) = interleaved_times([partial(_name_one, random.Random(1))], Budget.quick())
    rows.append(Row(f"naming/{PROMPT_TOKENS}", median(naming) * 1e6, "us"))
    busy = others.cores_busy()
    machine = {**describe_machine(threads=1), "blocks": asked.blocks, "others busy": busy}
    return Report(machine, rows, (*_NOTES, *unrest(busy)))


class _Fleet:
    """Workers with load and cached blocks, and requests to be placed on them."""

    def __init__(self, workers: int, blocks: int) -> None:
        self.workers = workers
        self._dice = random.Random(workers)
        self._state = Workers(_config())
        self._key = 0
        self._requests = [self._request(n) for n in range(_REQUESTS)]
        for number in range(workers):
            self._add(number, blocks // workers)

    def place_one(self) -> float:
        """Seconds of the processor. Taking the claim back does not count: it is another event."""
        request = self._dice.choice(self._requests)
        self._key += 1
        start = time.thread_time()
        choice = self._state.choosing.choose(request)
        assert choice is not None, "no worker has room"
        self._state.claim(self._key, choice.placement, PROMPT_TOKENS, ANSWER_TOKENS)
        taken = time.thread_time() - start
        self._state.claims.release(self._key)
        return taken

    def _request(self, number: int) -> Request:
        shared = [number % SYSTEM_PROMPTS] * SHARED_TOKENS
        own = [self._dice.randrange(32_000) for _ in range(PROMPT_TOKENS - SHARED_TOKENS)]
        request = Request(f"r{number}", shared + own, _SAMPLING, Times(0.0))
        request.name_blocks(_MODEL, _BLOCK_SIZE)
        return request

    def _add(self, number: int, blocks: int) -> None:
        """Caches whole prompts of some requests, and blocks of nobody's for the rest."""
        name, prefill = f"w{number}", number % 2 == 0
        info = worker_pb2.WorkerInfo(
            layout=transfer_pb2.KvLayout(model_fingerprint=_MODEL, block_size=_BLOCK_SIZE),
            blocks_total=2 * blocks + 1_000,
            max_model_tokens=8_192,
            itl_target_ms=50,
        )
        cost = worker_pb2.StepCost(base_ms=5, ms_per_prompt_token=0.2, ms_per_sequence=0.4)
        names = dict.fromkeys(self._cached(blocks))
        changes = worker_pb2.BlockChanges(number=1, everything=True, added=join_hashes(names))
        if prefill:
            queued = self._dice.randrange(0, 2_000)
            load = worker_pb2.PrefillLoad(queued_tokens=queued, cost=cost)
            self._state.prefill_up(name, info)
            self._state.prefill_load(name, load, refused=False)
        else:
            free, running = self._dice.randrange(500, 1_000), self._dice.randrange(40)
            load_d = worker_pb2.DecodeLoad(blocks_free=free, running=running, cost=cost)
            self._state.decode_up(name, info)
            self._state.decode_load(name, load_d, refused=False)
        self._state.blocks_changed(name, changes)

    def _cached(self, blocks: int) -> Iterator[bytes]:
        left = blocks
        for request in self._dice.sample(self._requests, 3):
            assert request.chain is not None
            yield from request.chain.hashes[:left]
            left = max(0, left - len(request.chain.hashes))
        for _ in range(left):
            yield self._dice.randbytes(HASH_BYTES)


def _name_one(dice: random.Random) -> float:
    prompt = [dice.randrange(32_000) for _ in range(PROMPT_TOKENS)]
    request = Request("r", prompt, _SAMPLING, Times(0.0))
    start = time.thread_time()
    request.name_blocks(_MODEL, _BLOCK_SIZE)
    return time.thread_time() - start


def _config() -> RouterConfig:
    return RouterConfig(
        model_path=Path("none"),
        model_name="none",
        cluster_key="-" * 16,
        control_socket=Path("none"),
    )
