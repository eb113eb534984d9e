"""Synthetic mixes: drawn from a seed, at their rate, with what each is there for."""

import itertools
import math
import random
import statistics

import pytest

from cluster.workload.arrivals import Arrivals, arrival_times
from cluster.workload.asks import Ask, WorkloadError
from cluster.workload.mixes import BLOCK_TOKENS, MIXES, make_mix


def gaps(arrivals: Arrivals, count: int = 20_000) -> list[float]:
    times = itertools.islice(arrival_times(arrivals, 5.0, random.Random(1)), count)
    return [b - a for a, b in itertools.pairwise(times)]


@pytest.mark.parametrize(
    ("arrivals", "variation"), [("constant", 0), ("poisson", 1), ("bursty", 2)]
)
def test_arrivals_have_their_rate_and_their_variation(arrivals: Arrivals, variation: float) -> None:
    drawn = gaps(arrivals)
    mean = statistics.fmean(drawn)
    assert mean == pytest.approx(0.2, rel=0.05)
    assert statistics.pstdev(drawn) / mean == pytest.approx(variation, rel=0.1, abs=1e-6)


@pytest.mark.parametrize("name", MIXES)
def test_a_mix_is_drawn_from_its_seed(name: str) -> None:
    workload = make_mix(name, 10.0, 20.0, seed=3)
    assert workload == make_mix(name, 10.0, 20.0, seed=3)
    assert workload != make_mix(name, 10.0, 20.0, seed=4)
    assert 100 < len(workload.asks) < 300
    times = [ask.at_s for ask in workload.asks]
    assert times == sorted(times)
    assert times[-1] < 20.0
    for ask in workload.asks:
        assert ask.prompt_tokens >= 1
        assert ask.answer_tokens >= 1
        assert ask.kind
        assert len(ask.prefix) <= math.ceil(ask.prompt_tokens / BLOCK_TOKENS)


def test_another_rate_asks_the_same_at_other_times() -> None:
    slow, fast = (make_mix("chat", rate, None, requests=50).asks for rate in (1.0, 7.0))
    assert [(ask.prompt_tokens, ask.prefix) for ask in slow] == [
        (ask.prompt_tokens, ask.prefix) for ask in fast
    ]
    assert slow[-1].at_s == pytest.approx(7 * fast[-1].at_s)


def test_uniform_keeps_to_its_ranges() -> None:
    workload = make_mix("uniform", 1.0, None, requests=2000, prompt=(64, 66), answer=(1, 2))
    assert {ask.prompt_tokens for ask in workload.asks} == {64, 65, 66}
    assert {ask.answer_tokens for ask in workload.asks} == {1, 2}


def test_turns_of_a_conversation_begin_with_what_was_said() -> None:
    asks = make_mix("chat", 1.0, None, requests=400).asks
    turns: dict[int, list[Ask]] = {}
    for ask in asks:
        turns.setdefault(ask.prefix[0], []).append(ask)
    assert max(map(len, turns.values())) >= 3
    for conversation in turns.values():
        for before, after in itertools.pairwise(conversation):
            assert after.prompt_tokens > before.prompt_tokens + before.answer_tokens
            assert after.prefix[: len(before.prefix)] == before.prefix
    of_all = [block for conversation in turns.values() for block in conversation[-1].prefix]
    assert len(of_all) == len(set(of_all))  # no two share a block


def test_shared_prefixes_are_long_and_few() -> None:
    asks = make_mix("shared-prefix", 1.0, None, requests=400).asks
    assert 2 <= len({ask.prefix for ask in asks}) <= 8
    assert all(len(ask.prefix) * BLOCK_TOKENS < ask.prompt_tokens for ask in asks)


def test_reasoning_has_long_answers_and_mixed_has_all_kinds() -> None:
    asks = make_mix("reasoning", 1.0, None, requests=400).asks
    assert statistics.median(ask.answer_tokens for ask in asks) > 5 * statistics.median(
        ask.prompt_tokens for ask in asks
    )
    kinds = {ask.kind for ask in make_mix("mixed", 1.0, None, requests=400).asks}
    assert kinds == {"chat", "code", "summarise", "reasoning"}


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"name": "talk"}, "there is no mix 'talk': take one of chat, code"),
        ({"arrivals": "daily"}, "there are no arrivals 'daily'"),
        ({"rate": 0.0}, "must be above 0"),
        ({"rate": math.inf}, "must be above 0"),
        ({"seconds": None}, "how many seconds or requests"),
        ({"seconds": 0.0}, "must be more than 0"),
        ({"requests": 0}, "it must be 1 to"),
        ({"rate": 1e9}, "ask for less"),
        ({"rate": 1e-6, "arrivals": "constant"}, "are none"),
        ({"name": "uniform", "prompt": (0, 4)}, "prompts of 0 to 4 tokens"),
        ({"name": "uniform", "answer": (5, 4)}, "answers of 5 to 4 tokens"),
    ],
)
def test_what_cannot_be_made(wrong: dict[str, object], complaint: str) -> None:
    plan = {"name": "chat", "rate": 1.0, "seconds": 10.0, **wrong}
    with pytest.raises(WorkloadError, match=complaint):
        make_mix(**plan)
