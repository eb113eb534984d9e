from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_fixtures import sampling

from kvrelay.engine.sampling import sample, uniform
from kvrelay.engine.sampling_params import SamplingParams
from kvrelay.wire import worker_pb2

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
SOFTMAX = LOGITS.softmax(-1).tolist()  # likeliest first: 1, 3, 2, 0, 4


def drawn(logits: torch.Tensor = LOGITS, draws: int = 400, **params) -> Counter[int]:
    """Tokens at so many positions, temperature 1 unless given."""
    p = sampling(**{"temperature": 1.0, "seed": 3, **params})
    return Counter(sample(logits.expand(draws, -1), [p] * draws, range(draws)))


def test_temperature_zero_takes_the_likeliest_whatever_else_is_set():
    assert sample(LOGITS[None], [sampling(top_k=3, top_p=0.5, seed=9)], [7]) == [1]


def test_draws_follow_the_softmax():
    draws = 4000
    counts = drawn(draws=draws)
    chi2 = sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in enumerate(SOFTMAX))
    assert chi2 < 18.5, counts  # 4 degrees of freedom, p = 0.001


def test_a_high_temperature_flattens_and_a_low_one_sharpens():
    assert drawn(temperature=0.3)[1] > drawn()[1] > drawn(temperature=2.0)[1]
    assert drawn(temperature=0.01) == {1: 400}


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 5e-324])
def test_the_smallest_temperatures_are_greedy(temperature):
    assert drawn(temperature=temperature, draws=3) == {1: 3}


def test_the_smallest_temperature_is_greedy_when_all_logits_are_negative():
    assert drawn(LOGITS - 50, temperature=1e-310, draws=3) == {1: 3}


@pytest.mark.parametrize(
    ("top_k", "kept"),
    [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (5, set(range(5))), (99, set(range(5)))],
)
def test_top_k_keeps_the_k_likeliest(top_k, kept):
    assert set(drawn(temperature=2.0, top_k=top_k)) == kept


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, {1}), (0.6, {1}), (0.7, {1, 3}), (0.9, {1, 2, 3}), (0.98, {0, 1, 2, 3})],
)
def test_top_p_keeps_up_to_and_with_the_token_that_reaches_p(top_p, kept):
    cumulative = np.cumsum(sorted(SOFTMAX, reverse=True))
    assert len(kept) == np.searchsorted(cumulative, top_p) + 1
    assert set(drawn(draws=1500, top_p=top_p)) == kept


def test_top_p_counts_shares_of_what_top_k_has_left():
    shares = np.cumsum([SOFTMAX[1], SOFTMAX[3]]) / (SOFTMAX[1] + SOFTMAX[3])
    assert shares[0] > 0.7  # of all five tokens, token 1 alone has less
    assert set(drawn(top_k=2, top_p=0.7)) == {1}


def test_a_token_of_no_probability_is_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    assert set(drawn(logits)) == {1, 3}


def test_low_precision_logits_are_sampled_too():
    assert sample(LOGITS[None].bfloat16(), [sampling(temperature=0.5, top_k=1)], [0]) == [1]


def test_params_come_whole_from_the_wire():
    message = worker_pb2.Sampling(
        temperature=0.5, top_k=4, top_p=0.9, seed=2**64 - 1, max_tokens=7, eos_token_ids=[2, 3]
    )
    assert SamplingParams.from_wire(message) == SamplingParams(
        0.5, 4, 0.9, 2**64 - 1, 7, frozenset({2, 3})
    )


@given(seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6), start=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_row_gets_the_same_token_in_a_batch_and_alone(seeds, start):
    logits = torch.randn(len(seeds), 50, generator=torch.Generator().manual_seed(start))
    params = [sampling(temperature=1.0, top_p=0.9, seed=seed) for seed in seeds]
    positions = list(range(start, start + len(seeds)))
    alone = [sample(logits[i : i + 1], [params[i]], [positions[i]])[0] for i in range(len(seeds))]
    assert sample(logits, params, positions) == alone


# ---- the noise

UINT64 = st.integers(0, 2**64 - 1)


@given(seed=UINT64, position=st.integers(0, 2**31), choice=st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_uniform_is_a_function_of_its_arguments_alone(seed, position, choice):
    value = uniform(seed, position, choice)
    np.random.default_rng().random()
    assert uniform(seed, position, choice) == value
    assert 0 <= value < 1


def test_uniform_is_known_for_ever():
    # A stream may go on at a worker of a later version: these numbers must not change.
    assert uniform(0, 0, 0) == 0.011546754286331562
    assert uniform(1, 0, 0) == 0.3035680343067586
    assert uniform(0, 1, 0) == 0.5023796042735054
    assert uniform(0, 0, 1) == 0.21185954403345741


@pytest.mark.parametrize("varied", ["seed", "position", "choice"])
def test_uniform_looks_uniform_along_each_argument(varied):
    cells, draws = 20, 2000
    fixed = {"seed": 5, "position": 5, "choice": 5}
    values = np.array([uniform(**{**fixed, varied: n}) for n in range(draws)])
    counts = np.histogram(values, cells, (0, 1))[0]
    assert ((counts - draws / cells) ** 2 / (draws / cells)).sum() < 43.8  # 19 df, p = 0.001
    neighbours = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(neighbours) < 0.08


def test_a_row_that_is_not_a_number_fails_alone():
    logits = torch.randn(3, 50)
    logits[1, 7] = float("nan")
    hot = SamplingParams(0.9, 5, 0.5, 3, 10, frozenset())
    tokens = sample(logits, [hot] * 3, [4, 4, 4])
    assert tokens[1] is None
    assert [tokens[0], tokens[2]] == sample(logits[[0, 2]], [hot] * 2, [4, 4])
