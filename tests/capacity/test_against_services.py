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
from kvrelay.engine.step_cost import StepCost

REQUESTS = 60
BLOCK_TOKENS = 4
COST = StepCost(base_ms=8.0, ms_per_prompt_token=1.0, ms_per_sequence=2.0)
HOP_MS = 0.5
HOPS = 3  # of a client's call: to connect, to ask, and for the answer
BLOCK_MS = 2 * links._BLOCK_S * 1000  # to be sent, and to be read
FIRST_S = 1.0  # when the workers of both have met


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


def real_times(wanted: list[Ask], local: str, patch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    take = Client.tokens

    def note(self: Client, offset: int, tokens: list[int]) -> None:
        take(self, offset, tokens)
        now_s = asyncio.get_running_loop().time()
        seen.at_s.setdefault(self.ask.request_id, []).extend([now_s] * len(tokens))

    patch.setattr(Client, "tokens", note)
    world = World(settings(wanted, local))
    began_s = world.clients.loop.time()
    result = world.play()
    assert result.violations == []
    for request_id, times in seen.at_s.items():
        due_s = began_s + FIRST_S + wanted[int(request_id)].at_s
        seen.at_s[request_id] = [at_s - due_s for at_s in times]
    return seen


def settings(wanted: list[Ask], local: str) -> Settings:
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
    here = local == "only"
    shape = Shape(1, () if here else (2_000,), (2_000,), ("tcp",))
    limits = {
        "chunk_tokens": 32,
        "batch_max": 64,
        "jobs_max": 64,
        "local_prompts_max": 64,
        "reservations_max": 64,
        "prefix_caching": True,
        "itl_target_ms": 60,
        "tpot_target_ms": 0.0,
        "lease_ms": 120_000,
        "push_bytes_max": 1 << 20,
    }
    router = {
        "queue_max": 1_000,
        "queue_wait_ms": 120_000,
        "prefill_backlog_tokens": 4_096,
        "ttft_target_ms": 0.0,
        "tpot_target_ms": 0.0,
        "local_prefill": "auto" if here else "never",
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


def simulated_times(wanted: list[Ask], local: str) -> list[tuple[float, float]]:
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
        prefill=0 if local == "only" else 1,
        local_prefill="auto" if local == "only" else "never",
        itl_target_ms=60,
        network_ms=HOP_MS,
        checked=True,
    )
    played = simulate(setting, Workload("asks", tuple(wanted), BLOCK_TOKENS))
    return [(o.ttft_ms or 0.0, o.tpot_ms or 0.0) for o in by_number(played.outcomes, wanted)]


def by_number(outcomes, wanted):
    at = {id(ask): number for number, ask in enumerate(wanted)}
    return sorted(outcomes, key=lambda outcome: at[id(outcome.ask)])


@pytest.mark.parametrize(("local", "gap_s"), [("never", 0.12), ("only", 0.25)])
def test_clients_see_the_times_that_services_give_them(local, gap_s, monkeypatch):
    wanted = asks(gap_s)
    real = real_times(wanted, local, monkeypatch).at_s
    pairs = simulated_times(wanted, local)
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
