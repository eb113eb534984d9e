"""Whole runs: times as the cost model says, nothing lost, the same twice."""

from dataclasses import replace
from typing import Any

import pytest

from cluster.capacity.device import BusyNeighbour, DeviceProfile, attended
from cluster.capacity.run import Played, Setting, SimulationError, simulate
from cluster.workload.asks import Ask, Workload
from cluster.workload.mixes import make_mix

NEAR_MS = 0.02  # a token's id says when it was made, to 10 us


def play(device: DeviceProfile, *asks: Ask, **setting: Any) -> Played:
    chosen = {"local_prefill": "never", "checked": True, "network_ms": 0.5, **setting}
    return simulate(Setting(device, **chosen), Workload("asks", asks, block_tokens=16))


def mixed(requests: int, rate: float = 30.0, seed: int = 1) -> Workload:
    return make_mix("uniform", rate, None, seed, requests=requests, prompt=(8, 200), answer=(1, 40))


def with_changes(device: DeviceProfile, **changes: Any) -> DeviceProfile:
    return device.model_copy(update=changes)


def test_ttft_and_tpot_of_one_request_are_what_the_cost_model_says(device):
    (outcome,) = play(device, Ask(0.0, 100, 5)).outcomes
    step = device.step
    # Two chunks of 64 and 36 tokens; then the router hears of the first token.
    prefill_ms = step.ms(64, attended(64, 0), 0, 0) + step.ms(36, attended(36, 64), 0, 0)
    messages_ms = 4 * 0.5  # Reserve, Reserved, Prefill, FirstToken
    assert outcome.ttft_ms == pytest.approx(1.0 + messages_ms + prefill_ms, abs=NEAR_MS)
    # Four blocks went while the second chunk was computed; three more and the commit after it.
    hand_off_ms = 3 * 0.25 + 2.0
    steps_ms = [step.ms(0, 0, 1, 100 + n) for n in range(1, 5)]
    gaps_ms = [gap * 1000 for gap in outcome.gaps_s]
    assert gaps_ms == pytest.approx([hand_off_ms + steps_ms[0], *steps_ms[1:]], abs=NEAR_MS)
    assert outcome.tpot_ms == pytest.approx((hand_off_ms + sum(steps_ms)) / 4, abs=NEAR_MS)
    assert outcome.hand_off_ms == pytest.approx(hand_off_ms, abs=NEAR_MS)


def test_a_prompt_that_the_decode_worker_computes_itself_takes_no_hand_off(device):
    (outcome,) = play(device, Ask(0.0, 40, 3), prefill=0, local_prefill="auto").outcomes
    step = device.step
    prefill_ms = step.ms(40, attended(40, 0), 0, 0)
    assert outcome.ttft_ms == pytest.approx(1.0 + 2 * 0.5 + prefill_ms, abs=NEAR_MS)
    steps_ms = [step.ms(0, 0, 1, 40 + n) for n in range(1, 3)]
    assert [gap * 1000 for gap in outcome.gaps_s] == pytest.approx(steps_ms, abs=NEAR_MS)


def test_who_joins_amid_a_run_of_steps_takes_part_from_the_next_one_on(device):
    first, second = play(device, Ask(0.0, 16, 30), Ask(0.1, 16, 5)).outcomes[::-1]
    alone, together = device.step.ms(0, 0, 1, 30), device.step.ms(0, 0, 2, 60)
    gaps_ms = [gap * 1000 for gap in first.gaps_s]
    assert min(gaps_ms[1:]) < alone < 5.5
    assert sum(gap > together - 0.4 for gap in gaps_ms[1:]) in (3, 4, 5)
    assert second.tokens == 5


def test_steps_played_together_are_those_played_one_by_one(device):
    """What workers make of their own steps differs a little, for a run is measured as one; so
    prompts do not all go to the same workers."""
    setting = Setting(device, 2, 2, checked=True, routers=2)
    together = simulate(setting, mixed(150, rate=12.0))
    one_by_one = simulate(replace(setting, together=False), mixed(150, rate=12.0))
    assert not any(outcome.error for outcome in together.outcomes)
    for name in ("ttft_ms", "tpot_ms"):
        means = [mean(played, name) for played in (together, one_by_one)]
        assert means[0] == pytest.approx(means[1], rel=0.15)


def mean(played: Played, name: str) -> float:
    values = [getattr(outcome, name) for outcome in played.outcomes]
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("batch_max", [3, 16])
def test_one_worker_of_each_role_plays_the_same_tokens_either_way(device, batch_max):
    """Nothing is to be chosen, so not a time differs. With batch_max 3 there are often more
    sequences than a step takes."""
    profile = with_changes(device, batch_max=batch_max)
    setting = Setting(profile, local_prefill="never", checked=True)
    played = [simulate(replace(setting, together=way), mixed(60)) for way in (True, False)]
    assert played[0].hash == played[1].hash
    assert played[0].entries < played[1].entries


def test_the_same_setting_gives_the_same_hash(device):
    setting = Setting(device, 3, 2, routers=2, kill_every_s=1.5, checked=True)
    hashes = [simulate(setting, mixed(100)).hash for _ in range(2)]
    assert hashes[0] == hashes[1]
    assert simulate(replace(setting, seed=2), mixed(100)).hash != hashes[0]


def test_every_request_ends_although_workers_are_killed(device):
    setting = Setting(device, 4, 4, kill_every_s=2.0, checked=True)
    played = simulate(setting, mixed(300, rate=20.0))
    assert played.kills > 3
    assert played.attempts > 300  # some were placed again
    poisoned = [outcome for outcome in played.outcomes if outcome.error]
    assert {outcome.error for outcome in poisoned} <= {"PoisonTrouble"}  # met two deaths
    assert len(poisoned) < 10
    for outcome in played.outcomes:
        if outcome.error:
            continue
        assert outcome.tokens == outcome.ask.answer_tokens
        assert len(outcome.gaps_s) == outcome.tokens - 1
        assert min(outcome.gaps_s, default=0) >= 0


@pytest.mark.parametrize("seed", [0, 3])
def test_a_prompt_that_is_given_up_amid_a_step_leaves_the_others_of_that_step_alone(device, seed):
    """Several prompts in most steps, and workers die all the time."""
    setting = Setting(device, 6, 6, kill_every_s=0.3, chunk_tokens=256, checked=True, seed=seed)
    played = simulate(setting, mixed(200, rate=40.0))
    assert len(played.outcomes) == 200  # however they ended


def test_with_a_target_prompts_on_a_decode_worker_wait_until_answers_can_afford_them(device):
    asks = [Ask(0.0, 16, 60)] + [Ask(0.1 + 0.05 * n, 300, 2) for n in range(2)]
    target_ms = 8.0
    how = {"prefill": 0, "local_prefill": "auto", "itl_target_ms": 0}

    def answer_ms(**targets: float) -> float:
        (answer,) = (o for o in play(device, *asks, **how, **targets).outcomes if o.tokens == 60)
        assert answer.tpot_ms is not None
        return answer.tpot_ms

    assert answer_ms() > target_ms
    assert answer_ms(tpot_target_ms=target_ms, ttft_target_ms=2_000.0) <= target_ms


def test_prompts_that_share_a_prefix_find_it_cached(device):
    shared = tuple(range(8))  # 128 tokens
    asks = [Ask(n * 0.5, 140, 2, shared) for n in range(4)]
    played = play(device, *asks)
    assert [outcome.cached_tokens for outcome in played.outcomes] == [0, 128, 128, 128]
    others = [Ask(n * 0.5, 140, 2, (n, *shared[1:])) for n in range(2)]
    assert play(device, *others).outcomes[1].cached_tokens == 0
    plain = play(device, *asks, prefix_caching=False)
    assert {outcome.cached_tokens for outcome in plain.outcomes} == {0}


def test_a_busy_neighbour_stretches_steps(device):
    asks = [Ask(0.0, 200, 40), Ask(0.3, 200, 40)]
    alone = play(device, *asks)
    neighbours = BusyNeighbour(prefill=2.0, decode=2.0)
    shared = with_changes(device, workers_per_host=2, busy_neighbour=neighbours)
    both = play(shared, *asks)
    assert mean(both, "tpot_ms") > 1.1 * mean(alone, "tpot_ms")
    assert mean(both, "tpot_ms") < 2.1 * mean(alone, "tpot_ms")


def test_what_never_fits_fails_by_name(device):
    (outcome,) = play(device, Ask(0.0, 10_000, 5)).outcomes
    assert outcome.error == "InvalidTrouble"


def test_without_decode_workers_nothing_can_be_simulated(device):
    with pytest.raises(SimulationError, match="no decode worker"):
        Setting(device, decode=0)
