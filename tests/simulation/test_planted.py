"""Bugs that are planted are found: otherwise the simulation shows nothing."""

import planted_bugs as planted
import pytest

from cluster.simulation.world import run

SEEDS_MAX = 1000
QUICK_MAX = 60
# Those that need more luck than a few seeds have.
RARE = (
    planted.a_cached_block_is_evicted_while_it_is_read,
    planted.a_prefill_worker_frees_what_it_still_computes,
    planted.a_commit_is_accepted_before_its_blocks_are_there,
    planted.a_wrong_checksum_is_overlooked,
)
QUICK = [plant for plant in planted.PLANTS if plant not in RARE]


def found_within(plant: planted.Plant, seeds: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    plant(monkeypatch)
    return any(run(seed).violations for seed in range(seeds))


def test_there_are_bugs_of_many_kinds():
    assert len(set(planted.PLANTS)) == len(planted.PLANTS) >= 10 + len(RARE)


@pytest.mark.parametrize("plant", QUICK, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found_within_a_few_seeds(plant, monkeypatch):
    assert found_within(plant, QUICK_MAX, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("plant", RARE, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found_in_the_end(plant, monkeypatch):
    assert found_within(plant, SEEDS_MAX, monkeypatch)
