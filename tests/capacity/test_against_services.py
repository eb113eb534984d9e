"""The capacity simulation leaves the services out; here it meets them.

The same few requests on one prefill and one decode worker, once with the production's services in
cluster/simulation and once with the decision objects alone: clients must see the same times.
"""

import asyncio
from dataclasses import dataclass, field, replace
from random import Random
from statistics import mean, quantiles

import pytest

from cluster.capacity.device import ByHand, DeviceProfile, HandOffTime, StepTime
from cluster.capacity.run import Setting, simulate
from cluster.simulation import links
from cluster.simulation.clients import Client
from cluster.simulation.model import Ask as SimAsk
from cluster.simulation.network import Delays
from cluster.simulation.settings import Arrival, Settings, Shape, draw
from cluster.simulation.world import World
from cluster.workload.asks import Ask, Workload
from kvrelay.config import LocalPrefill
from kvrelay.engine.step_cost import StepCost

REQUESTS = 60
BLOCK_TOKENS = 4
COST = StepCost(base_ms=8.0, ms_per_prompt_token=1.0, ms_per_sequence=2.0)
HOP_MS = 0.5
HOPS = 3  # of a client's call: to connect, to ask, and for the answer
BLOCK_MS = 2 * links._BLOCK_S * 1000  # to be sent, and to be read
FIRST_S = 1.0  # when the workers of both have met


@dataclass(frozen=True)
class Arrangement:
    """Of the workers, beside one that decodes, and what they and the router aim at."""

    prefill: int
    local_prefill: LocalPrefill
    itl_target_ms: int = 60
    ttft_target_ms: float = 0.0
    tpot_target_ms: float = 0.0


AIMED = Arrangement(0, "auto", itl_target_ms=0, ttft_target_ms=400.0, tpot_target_ms=30.0)


@dataclass
class Seen:
    """When tokens came to a client, by request."""

    at_s: dict[str, list[float]] = field(default_factory=dict)


def asks(gap_s: float) -> list[Ask]:
    dice = Random(7)
    at_s, drawn = 0.0, []
    for number in range(REQUESTS):
        at_s += dice.expovariate(1 / gap_s)
        prefix = (-number - 1,)  # nobody shares
        drawn.append(Ask(at_s, dice.randrange(8, 120), dice.randrange(2, 30), prefix))
    return drawn


def real_times(wanted: list[Ask], how: Arrangement, patch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    take = Client.tokens

    def note(self: Client, offset: int, tokens: list[int]) -> None:
        take(self, offset, tokens)
        now_s = asyncio.get_running_loop().time()
        seen.at_s.setdefault(self.ask.request_id, []).extend([now_s] * len(tokens))

    patch.setattr(Client, "tokens", note)
    world = World(settings(wanted, how))
    began_s = world.clients.loop.time()
    result = world.play()
    assert result.violations == []
    for request_id, times in seen.at_s.items():
        due_s = began_s + FIRST_S + wanted[int(request_id)].at_s
        seen.at_s[request_id] = [at_s - due_s for at_s in times]
    return seen


def settings(wanted: list[Ask], how: Arrangement) -> Settings:
    """Nothing fails, every message takes as long, no limit is near."""
    dice = Random(3)
    arrivals = tuple(
        Arrival(
            FIRST_S + ask.at_s,
            SimAsk(
                str(number),
                tuple(dice.randrange(1, 60) for _ in range(ask.prompt_tokens)),
                0,
                ask.answer_tokens,
                ignore_eos=True,
            ),
        )
        for number, ask in enumerate(wanted)
    )
    drawn = draw(1)
    shape = Shape(1, (2_000,) * how.prefill, (2_000,), ("tcp",))
    limits = {
        "chunk_tokens": 32,
        "batch_max": 64,
        "jobs_max": 64,
        "local_prompts_max": 64,
        "reservations_max": 64,
        "prefix_caching": True,
        "itl_target_ms": how.itl_target_ms,
        "tpot_target_ms": how.tpot_target_ms,
        "lease_ms": 120_000,
        "push_bytes_max": 1 << 20,
    }
    router = {
        "queue_max": 1_000,
        "queue_wait_ms": 120_000,
        "prefill_backlog_tokens": 4_096,
        "ttft_target_ms": how.ttft_target_ms,
        "tpot_target_ms": how.tpot_target_ms,
        "late_wait_ms": 10_000,
        "local_prefill": how.local_prefill,
        "reserve_ms": 10_000,
    }
    return replace(
        drawn,
        shape=shape,
        worker=drawn.worker.model_copy(update=limits),
        router=drawn.router.model_copy(update=router),
        cost=COST,
        delays=Delays(HOP_MS / 1000, HOP_MS / 1000, 0.0, 0.0),
        arrivals=arrivals,
        shuffle=False,
        faults_max=0,
    )


def simulated_times(wanted: list[Ask], how: Arrangement) -> list[tuple[float, float]]:
    device = DeviceProfile(
        name="services",
        source=ByHand(text="the cost of cluster/simulation"),
        step=StepTime(
            base_ms=COST.base_ms,
            ms_per_prompt_token=COST.ms_per_prompt_token,
            ms_per_sequence=COST.ms_per_sequence,
        ),
        hand_offs=(HandOffTime(link="tcp", fixed_ms=HOP_MS, ms_per_block=BLOCK_MS),),
        router_ms=HOPS * HOP_MS,
        block_tokens=BLOCK_TOKENS,
        block_bytes=1,
        kv_blocks=2_000,
        batch_max=64,
        chunk_tokens=32,
    )
    setting = Setting(
        device,
        prefill=how.prefill,
        local_prefill=how.local_prefill,
        itl_target_ms=how.itl_target_ms,
        ttft_target_ms=how.ttft_target_ms,
        tpot_target_ms=how.tpot_target_ms,
        network_ms=HOP_MS,
        checked=True,
    )
    played = simulate(setting, Workload("asks", tuple(wanted), BLOCK_TOKENS))
    return [(o.ttft_ms or 0.0, o.tpot_ms or 0.0) for o in by_number(played.outcomes, wanted)]


def by_number(outcomes, wanted):
    at = {id(ask): number for number, ask in enumerate(wanted)}
    return sorted(outcomes, key=lambda outcome: at[id(outcome.ask)])


@pytest.mark.parametrize(
    ("how", "gap_s"),
    [
        (Arrangement(1, "never"), 0.12),
        (Arrangement(0, "auto"), 0.25),
        (AIMED, 0.25),
    ],
    ids=["two workers", "one worker", "one worker with targets"],
)
def test_clients_see_the_times_that_services_give_them(how, gap_s, monkeypatch):
    wanted = asks(gap_s)
    real = real_times(wanted, how, monkeypatch).at_s
    pairs = simulated_times(wanted, how)
    assert len(real) == len(pairs) == REQUESTS
    ttfts, tpots = [], []
    for number, (ttft_ms, tpot_ms) in enumerate(pairs):
        times = real[str(number)]
        assert len(times) == wanted[number].answer_tokens
        ttfts.append((times[0] * 1000, ttft_ms))
        tpots.append(((times[-1] - times[0]) * 1000 / (len(times) - 1), tpot_ms))
    for name, both, within in (("TTFT", ttfts, 0.05), ("TPOT", tpots, 0.05)):
        there, here = [a for a, _ in both], [b for _, b in both]
        assert mean(here) == pytest.approx(mean(there), rel=within), name
        for q in (4, 8):  # the median, and the 9th of ten
            of_both = [quantiles(values, n=10)[q] for values in (here, there)]
            assert of_both[0] == pytest.approx(of_both[1], rel=within), (name, q)
