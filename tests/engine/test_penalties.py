"""Penalties, min_p and min_tokens, against transformers' processors and loops of a few lines."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from kv_fixtures import sampling
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from kvrelay.engine.sampling import sample
from kvrelay.engine.sampling_params import SamplingParams, history_of
from kvrelay.wire import worker_pb2

VOCAB = 40
EOS = 7
PROMPT = [3, 9, 9, 20, 31, 3, 12]
TOKENS = 48
# Each alone and all at once, greedy and drawn.
EXTRAS = (
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"presence_penalty": -0.5},
    {"frequency_penalty": 0.4},
    {"frequency_penalty": -0.2},
    {"min_tokens": 30},
    {"min_p": 0.2},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "min_p": 0.05,
        "min_tokens": 25,
    },
)
WAYS = ({"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 1.3, "top_k": 12, "top_p": 0.9})
CASES = [{**extra, **way} for extra in EXTRAS for way in WAYS]


def params_of(case: dict[str, float], min_tokens_done: int = 0) -> SamplingParams:
    left = max(0, int(case.get("min_tokens", 0)) - min_tokens_done)
    ends = frozenset({EOS, VOCAB + 5})  # one that the model has not
    fixed = {"seed": 17, "eos_token_ids": ends, "max_tokens": TOKENS}
    return sampling(**{**case, **fixed, "min_tokens": left})


def model(tokens: Sequence[int]) -> torch.Tensor:
    """Logits `[1, vocab]` that depend on the place and the last token, and like to repeat it."""
    generator = torch.Generator().manual_seed(1000 * len(tokens) + tokens[-1])
    logits = torch.randn(1, VOCAB, generator=generator) * 2
    logits[0, tokens[-1]] += 2
    logits[0, EOS] += 2
    return logits


def generated(case: dict[str, float], ends: Sequence[int] = ()) -> list[int]:
    """TOKENS tokens; after each count of `ends` a worker that knows the tokens alone goes on."""
    answer: list[int] = []
    history = None
    for index in range(TOKENS):
        if index == 0 or index in ends:
            params = params_of(case, min_tokens_done=index)
            tokens = [*PROMPT, *answer]
            history = history_of(params, tokens, len(tokens), len(answer))
        tokens = [*PROMPT, *answer]
        [token] = sample(model(tokens), [params], [len(tokens)], [history])
        if history is not None:
            history.add(token)
        answer.append(token)
    return answer


def reference(case: dict[str, float]) -> list[int]:
    answer: list[int] = []
    plain = {k: v for k, v in case.items() if k in ("top_k", "top_p")}
    for index in range(TOKENS):
        tokens = [*PROMPT, *answer]
        scores = model(tokens).double()
        if "repetition_penalty" in case:
            processor = RepetitionPenaltyLogitsProcessor(case["repetition_penalty"])
            scores = processor(torch.tensor([tokens]), scores)
        for token, count in Counter(answer).items():
            scores[0, token] -= case.get("frequency_penalty", 0) * count
            scores[0, token] -= case.get("presence_penalty", 0)
        if index < case.get("min_tokens", 0):
            scores[0, EOS] = -torch.inf
        if not case["temperature"]:
            answer.append(int(scores.argmax()))
            continue
        scores = scores / case["temperature"]
        if "min_p" in case:
            scores = MinPLogitsWarper(case["min_p"])(torch.tensor([tokens]), scores)
        [token] = sample(scores, [sampling(temperature=1.0, seed=17, **plain)], [len(tokens)])
        answer.append(token)
    return answer


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_are_those_of_the_reference(case):
    answer = generated(case)
    assert answer == reference(case)
    if "min_tokens" in case:
        assert EOS not in answer[: case["min_tokens"]]
        assert EOS in answer[case["min_tokens"] :]


@pytest.mark.parametrize("case", [case for case in CASES if "min_p" not in case], ids=str)
def test_the_extras_make_a_difference(case):
    way = {name: case[name] for name in ("temperature", "top_k", "top_p") if name in case}
    assert generated(case) != generated(way)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("ends", [(1,), (24,), (25, 26), (5, 10, 31)], ids=str)
def test_a_worker_that_takes_over_goes_on_with_the_same_tokens(case, ends):
    assert generated(case, ends) == generated(case)


def test_a_row_gets_the_same_token_in_a_batch_and_alone():
    contexts = [[*PROMPT, *range(n)] for n in range(1, len(CASES) + 1)]
    logits = torch.cat([model(tokens) for tokens in contexts])
    params = [params_of(case) for case in CASES]
    histories = [
        history_of(p, tokens, len(tokens), 2) for p, tokens in zip(params, contexts, strict=True)
    ]
    positions = [len(tokens) for tokens in contexts]
    alone = [
        sample(logits[row : row + 1], [params[row]], [positions[row]], [histories[row]])[0]
        for row in range(len(CASES))
    ]
    assert sample(logits, params, positions, histories) == alone
    # Rows without extras are not touched by those that have them.
    mixed = [None if row % 2 else history for row, history in enumerate(histories)]
    plain = sample(logits, params, positions)
    assert sample(logits, params, positions, mixed)[1::2] == plain[1::2]


def test_logits_are_left_as_they_are():
    logits = model(PROMPT)
    before = logits.clone()
    params = params_of(CASES[-1])
    sample(logits, [params], [7], [history_of(params, PROMPT, len(PROMPT), 3)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("strength", [5e-324, 1e-30, 1e30, 1.7e308])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_largest_and_least_repetition_penalty_decide_by_themselves(strength, temperature):
    logits = torch.tensor([[-1.0, 2.0, 0.5, 0.0]])
    params = sampling(repetition_penalty=strength, temperature=temperature)
    history = history_of(params, [1, 0], 2, 0)
    drawn = {sample(logits, [params], [position], [history])[0] for position in range(60)}
    if strength < 1:
        assert drawn == {1}
    else:
        assert drawn == ({1, 2, 3} if temperature else {2})


def test_a_row_that_is_not_a_number_fails_with_penalties_too():
    logits = model(PROMPT)
    logits[0, 11] = float("nan")
    params = params_of(CASES[0])
    assert sample(logits, [params], [7], [history_of(params, PROMPT, 7, 0)]) == [None]


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.0, {0, 1, 2, 3}), (0.25, {0, 1, 2}), (0.4, {0, 1}), (1.0, {0})]
)
def test_min_p_is_a_share_of_the_likeliest(min_p, kept):
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]) * 0.9)[None]
    params = sampling(temperature=1.0, min_p=min_p, seed=4)
    drawn = sample(logits.expand(600, -1), [params] * 600, range(600))
    assert set(drawn) == kept


def test_min_p_comes_after_temperature():
    logits = torch.log(torch.tensor([[0.8, 0.2]]))
    cold, hot = (sampling(temperature=t, min_p=0.4, seed=4) for t in (1.0, 2.0))
    assert set(sample(logits.expand(200, -1), [cold] * 200, range(200))) == {0}
    assert set(sample(logits.expand(200, -1), [hot] * 200, range(200))) == {0, 1}


def test_extras_come_whole_from_the_wire():
    message = worker_pb2.Sampling(
        min_p=0.1,
        repetition_penalty=1.3,
        presence_penalty=-1,
        frequency_penalty=0.7,
        min_tokens=5,
    )
    params = SamplingParams.from_wire(message)
    assert (params.min_p, params.repetition_penalty, params.min_tokens) == (0.1, 1.3, 5)
    assert (params.presence_penalty, params.frequency_penalty) == (-1, 0.7)


def test_an_unset_repetition_penalty_is_none():
    params = SamplingParams.from_wire(worker_pb2.Sampling())
    assert (params.repetition_penalty, params.penalises) == (1.0, False)


def test_penalties_are_exact_where_rows_are_long():
    """What depends on a place in memory, such as the order of tokens, must not reach a score."""
    rng = np.random.default_rng(0)
    vocab = 5000
    tokens = rng.integers(0, vocab, 900).tolist()
    params = sampling(repetition_penalty=1.17, frequency_penalty=0.31, presence_penalty=0.07)
    grown = history_of(params, tokens[:100], 100, 40)
    for token in tokens[100:]:
        grown.add(token)
    whole = history_of(params, tokens, 900, 840)
    for _ in range(50):
        logits = torch.from_numpy(rng.standard_normal((1, vocab)).astype(np.float32))
        drawn = sampling(
            temperature=1.0,
            seed=int(rng.integers(1 << 40)),
            repetition_penalty=1.17,
            frequency_penalty=0.31,
            presence_penalty=0.07,
        )
        assert sample(logits, [drawn], [900], [grown]) == sample(logits, [drawn], [900], [whole])
