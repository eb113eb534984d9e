import random
from collections import Counter

import numpy as np
import pytest
from kv_fixtures import sampling

from kvrelay.engine.history import TokenHistory
from kvrelay.engine.sampling_params import history_of


def counted(history: TokenHistory) -> dict[int, int]:
    return dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_it_counts_as_a_counter_would(seed):
    rng = random.Random(seed)
    prompt = rng.choices(range(60), k=rng.choice([0, 1, 50]))
    answered = rng.randint(0, len(prompt))
    history = TokenHistory(prompt, answered)
    expected = Counter(dict.fromkeys(prompt, 0))
    expected.update(prompt[len(prompt) - answered :])
    assert counted(history) == expected
    for number in range(200):
        token = rng.randrange(100)
        history.add(token)
        expected[token] += 1
        assert counted(history) == expected
        assert history.sampled == number + 1


def test_a_token_does_not_walk_over_what_came_before():
    history = TokenHistory(range(1000))
    room = history._ids
    for token in range(500):
        history.add(token)
    assert history._ids is room
    grown = set()
    for token in range(1000, 3000):
        history.add(token)
        grown.add(id(history._ids))
    assert len(grown) <= 2
    assert np.array_equal(np.sort(history.ids), np.arange(3000))


def test_more_answered_than_there_is_is_a_bug():
    with pytest.raises(AssertionError):
        TokenHistory([1, 2], 3)


# ---- who needs one


def test_nothing_is_kept_of_a_request_without_extras():
    params = sampling(temperature=1.0, top_k=5, min_p=0.5, repetition_penalty=1.0)
    assert history_of(params, [1, 2], 2, 0) is None


def test_min_tokens_needs_no_prompt():
    history = history_of(sampling(min_tokens=2), (), 7, 3)
    assert history is not None
    assert (counted(history), history.sampled) == ({}, 0)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_what_looks_at_the_answer_alone_keeps_the_answer_alone(name):
    history = history_of(sampling(**{name: 0.5}), [1, 2, 3, 3], 4, 2)
    assert history is not None
    assert counted(history) == {3: 2}


def test_repetition_keeps_the_prompt_too():
    history = history_of(sampling(repetition_penalty=1.5), [1, 2, 3, 3, 1], 5, 2)
    assert history is not None
    assert counted(history) == {1: 1, 2: 0, 3: 1}


def test_a_prompt_that_is_missing_or_too_short_is_refused():
    params = sampling(frequency_penalty=1.0)
    with pytest.raises(ValueError, match="penalties need all 4 prompt tokens, got 0"):
        history_of(params, (), 4, 0)
    with pytest.raises(ValueError, match="5 tokens answered, of 4 prompt tokens"):
        history_of(params, [1, 2, 3, 4], 4, 5)
