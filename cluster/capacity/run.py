"""One simulated run: a workload on a cluster, from its first request to its last token."""

import gc
import hashlib
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from operator import sub
from random import Random

from cluster.capacity.cluster import Cluster
from cluster.capacity.device import DeviceProfile, HandOffTime
from cluster.capacity.meter import Meter
from cluster.capacity.requests import MODEL, Names, SimRequest, make
from cluster.capacity.surroundings import KEY, NOWHERE, STAMPS_A_SECOND, Surroundings
from cluster.simulation.loop import START_S, Timeline
from cluster.workload.asks import Workload
from cluster.workload.outcomes import Outcome
from kvrelay.config import LocalPrefill, RouterConfig, WorkerConfig
from kvrelay.kv.layout import KVLayout
from router.request import Request

_SETTLE_S = 5.0  # after the last request has ended, until nothing of it is left anywhere
_LINE_UP_S = 0.05  # before the first request comes, workers and routers have met
_TOLD_EVERY = 2_000  # requests
_GC = (200_000, 50, 1_000)  # garbage in circles is rare here, and looking for it dear

# What those who serve have when nobody says anything else.
_ROUTER = {name: field.default for name, field in RouterConfig.model_fields.items()}
_WORKER = {name: field.default for name, field in WorkerConfig.model_fields.items()}

OnProgress = Callable[[int], None]  # requests that have ended


class SimulationError(Exception):
    """Nothing can be simulated so; one line that says what to do."""


@dataclass(frozen=True)
class Setting:
    """What is simulated. together: see Surroundings; False plays every step by itself.

    kill_every_s 0: nobody dies. Targets: as of `kvrelay serve`.
    """

    profile: DeviceProfile
    prefill: int = 1
    decode: int = 1
    routers: int = 1
    local_prefill: LocalPrefill = _ROUTER["local_prefill"]
    itl_target_ms: int = _WORKER["itl_target_ms"]
    ttft_target_ms: float = _ROUTER["ttft_target_ms"]
    tpot_target_ms: float = _ROUTER["tpot_target_ms"]
    network_ms: float = 0.1
    link: str | None = None
    block_tokens: int | None = None
    chunk_tokens: int | None = None
    prefix_caching: bool = _WORKER["prefix_caching"]
    queue_max: int = _ROUTER["queue_max"]
    queue_wait_ms: int = _ROUTER["queue_wait_ms"]
    backlog_tokens: int = _ROUTER["prefill_backlog_tokens"]
    kill_every_s: float = 0.0
    seed: int = 0
    together: bool = True
    metered: bool = False
    checked: bool = False  # every block and every sum, at the end

    def __post_init__(self) -> None:
        if self.decode < 1:
            raise SimulationError("no decode worker: nobody could write an answer; --decode 1")


@dataclass
class Played:
    """What came of it. cpu_s: of this process, for the run alone; virtual_s: of the cluster's own
    time, from the first request to the last token."""

    outcomes: list[Outcome]
    virtual_s: float
    cpu_s: float
    entries: int  # of the timeline
    kills: int
    hash: str
    meter: Meter | None = None
    local_prompts: int = 0  # computed by decode workers
    attempts: int = 0  # placements of all requests


def simulate(setting: Setting, workload: Workload, on_progress: OnProgress | None = None) -> Played:
    """Plays the whole workload. The same setting and workload give the same outcomes."""
    with _quiet_collector():
        return _Run(setting, workload, on_progress).play()


class _Run:
    def __init__(
        self, setting: Setting, workload: Workload, on_progress: OnProgress | None
    ) -> None:
        self._setting = setting
        self._asks = workload.asks
        self._on_progress = on_progress
        self._timeline = Timeline()
        self._around = _surroundings(setting, self._timeline, self._prompt_tokens)
        self._meter = Meter() if setting.metered else None
        self._dice = Random(f"{setting.seed} capacity")
        self._names = Names(self._around.layout.block_size, workload.block_tokens)
        self._outcomes: list[Outcome] = []
        self._hash = hashlib.blake2b(digest_size=16)
        self._attempts = self._local = 0
        self._last_s = START_S
        self._cluster = Cluster(
            self._around,
            setting.prefill,
            setting.decode,
            setting.routers,
            self._ended,
            self._meter,
        )

    def play(self) -> Played:
        setting, timeline = self._setting, self._timeline
        self._let(timeline.now_s + _LINE_UP_S)
        gc.collect()
        gc.freeze()
        if setting.kill_every_s:
            self._cluster.kill_every(setting.kill_every_s, self._dice)
        if self._meter is not None:
            self._meter.clear()
        self._began_s = timeline.now_s
        began_cpu_s = time.process_time()
        self._come(0)
        total, step = len(self._asks), timeline.step
        while len(self._outcomes) < total:
            step()
        cpu_s = time.process_time() - began_cpu_s
        self._settle()
        return Played(
            outcomes=self._outcomes,
            virtual_s=self._last_s - self._began_s,
            cpu_s=cpu_s,
            entries=timeline.entries,
            kills=self._cluster.kills,
            hash=self._hash.hexdigest(),
            meter=self._meter,
            local_prompts=self._local,
            attempts=self._attempts,
        )

    def _let(self, until_s: float) -> None:
        """Time goes on until then."""
        over: list[None] = []
        self._timeline.put(until_s, None, lambda: over.append(None))
        while not over:
            self._timeline.step()

    def _settle(self) -> None:
        """Until nothing is left of any request, and every book balances."""
        until_s = self._timeline.now_s + _SETTLE_S
        while not self._cluster.is_idle and self._timeline.now_s < until_s:
            self._let(self._timeline.now_s + 0.1)
        self._cluster.check(deep=self._setting.checked)

    # ---- requests come and end

    def _prompt_tokens(self, request_id: str) -> int:
        return self._asks[int(request_id)].prompt_tokens

    def _come(self, number: int) -> None:
        """The next request; what the router adds to its first token it adds before it places it."""
        asks, timeline = self._asks, self._timeline
        if number == len(asks):
            return
        ask = asks[number]
        at_s = self._began_s + ask.at_s + self._around.profile.router_ms / 1000

        def come() -> None:
            chain = self._names.chain(number, ask.prompt_tokens, ask.prefix)
            request = make(number, ask, chain, timeline.now_s * 1000)
            routers = self._cluster.routers
            router = routers[0] if len(routers) == 1 else self._dice.choice(routers)
            router.submit(request)
            self._come(number + 1)

        timeline.put(at_s, None, come)

    def _ended(self, request: Request, error: str) -> None:
        assert isinstance(request, SimRequest)
        ask, answer = request.ask, request.answer
        outcome = Outcome(ask, ask.at_s, error=error, tokens=len(answer))
        self._attempts += request.attempt
        if answer:
            self._local += request.prefill_here
            # A token's id says when it was made; it reaches the router a while later.
            stamps = array("q", answer)
            began_s = self._began_s - self._around.network_s
            outcome.first_token_s = answer[0] / STAMPS_A_SECOND - began_s
            outcome.last_token_s = answer[-1] / STAMPS_A_SECOND - began_s
            gaps = map(sub, islice(answer, 1, None), answer)
            outcome.gaps_s = array("f", [gap / STAMPS_A_SECOND for gap in gaps])
            outcome.cached_tokens = request.times.cached_tokens
            outcome.prefill_ms = request.times.prefill_ms
            outcome.hand_off_ms = request.times.kv_exposed_ms
            if request.times.prefill_began_at_ms is not None:
                waited_ms = request.times.prefill_began_at_ms - request.times.arrived_at_ms
                outcome.queue_ms = waited_ms
            self._last_s = max(self._last_s, outcome.last_token_s + self._began_s)
            self._hash.update(stamps.tobytes())
        self._hash.update(f"{request.request_id} {error};".encode())
        self._outcomes.append(outcome)
        if self._on_progress is not None and len(self._outcomes) % _TOLD_EVERY == 0:
            self._on_progress(len(self._outcomes))


def _surroundings(
    setting: Setting, timeline: Timeline, prompt_tokens: Callable[[str], int]
) -> Surroundings:
    profile = setting.profile
    block_tokens = setting.block_tokens or profile.block_tokens
    share = block_tokens / profile.block_tokens
    hand_off: HandOffTime = profile.hand_off(setting.link)
    worker = WorkerConfig(
        model_path=NOWHERE,
        cluster_key=KEY,
        socket_dir=NOWHERE,
        block_size=block_tokens,
        chunk_tokens=setting.chunk_tokens or profile.chunk_tokens,
        batch_max=profile.batch_max,
        itl_target_ms=setting.itl_target_ms,
        tpot_target_ms=setting.tpot_target_ms,
        prefix_caching=setting.prefix_caching,
    )
    router = RouterConfig(
        model_path=NOWHERE,
        model_name=MODEL,
        cluster_key=KEY,
        control_socket=NOWHERE,
        local_prefill=setting.local_prefill,
        ttft_target_ms=setting.ttft_target_ms,
        tpot_target_ms=setting.tpot_target_ms,
        queue_max=setting.queue_max,
        queue_wait_ms=setting.queue_wait_ms,
        prefill_backlog_tokens=setting.backlog_tokens,
    )
    return Surroundings(
        timeline=timeline,
        profile=profile,
        layout=KVLayout(MODEL, "float16", 1, block_tokens, 1, 1),
        kv_blocks=max(1, int(profile.kv_blocks / share)),
        ms_per_block=hand_off.ms_per_block * share,
        hand_off_ms=hand_off.fixed_ms,
        network_s=setting.network_ms / 1000,
        worker=worker,
        router=router,
        together=setting.together,
        prompt_tokens=prompt_tokens,
    )


@contextmanager
def _quiet_collector() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*_GC)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
