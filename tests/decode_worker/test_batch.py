import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_fixtures import sampling

from decode_worker.batch import Batch, Ending, Output, Running
from kvrelay.engine.history import TokenHistory
from kvrelay.engine.step import Slice

EOS = 99


def sequence(number: int = 1, max_tokens: int = 5, prompt: int = 6) -> Running:
    params = sampling(max_tokens=max_tokens, eos_token_ids=frozenset({EOS}))
    return Running(("router", number), prompt, params, blocks=[4, 7, 1])


def keys(step: list[Running]) -> list[int]:
    return [s.key[1] for s in step]


def test_a_sequence_joins_with_the_prefill_workers_token():
    batch, s = Batch(4), sequence()
    assert batch.join(s, 11) == Output(s.key, 0, 11, Ending.NONE)
    assert batch.next_step() == [s]
    assert len(batch) == 1


def test_a_step_computes_the_newest_token_at_its_position():
    batch, s = Batch(4), sequence(prompt=6)
    batch.join(s, 11)
    assert s.slice() == Slice([11], 6, [4, 7, 1])
    assert s.next_position == 7
    assert batch.apply([s], [12]) == [Output(s.key, 1, 12, Ending.NONE)]
    assert s.slice() == Slice([12], 7, [4, 7, 1])
    assert s.next_position == 8


def test_sequences_join_and_leave_between_any_two_steps():
    batch = Batch(4)
    batch.join(sequence(1), 0)
    assert keys(batch.next_step()) == [1]
    batch.join(sequence(2), 0)
    assert keys(batch.next_step()) == [1, 2]
    batch.leave(("router", 1))
    assert keys(batch.next_step()) == [2]
    batch.leave(("router", 1))  # has ended already
    batch.leave(("router", 2))
    assert batch.next_step() == []


def test_a_history_is_told_every_token_the_first_included():
    batch, s = Batch(4), sequence()
    s.history = TokenHistory([3, 11, 3], answered=1)
    batch.join(s, 11)
    batch.apply([s], [12])
    batch.apply([s], [12])
    counts = dict(zip(s.history.ids.tolist(), s.history.counts.tolist(), strict=True))
    assert counts == {3: 1, 11: 1, 12: 2}
    assert s.history.sampled == len(s.answer) == 3


def test_max_tokens_ends_a_sequence_with_length():
    batch, s = Batch(4), sequence(max_tokens=2)
    batch.join(s, 11)
    assert batch.apply([s], [12]) == [Output(s.key, 1, 12, Ending.LENGTH)]
    assert batch.next_step() == []


def test_an_end_of_sequence_token_ends_a_sequence():
    batch, s = Batch(4), sequence()
    batch.join(s, 11)
    assert batch.apply([s], [EOS]) == [Output(s.key, 1, EOS, Ending.EOS)]
    assert len(batch) == 0


def test_eos_as_the_last_token_allowed_counts_as_eos():
    batch, s = Batch(4), sequence(max_tokens=2)
    batch.join(s, 11)
    assert batch.apply([s], [EOS])[0].ending is Ending.EOS


@pytest.mark.parametrize(
    ("max_tokens", "token", "ending"), [(1, 11, Ending.LENGTH), (5, EOS, Ending.EOS)]
)
def test_a_first_token_that_is_the_last_never_joins(max_tokens, token, ending):
    batch, s = Batch(4), sequence(max_tokens=max_tokens)
    assert batch.join(s, token) == Output(s.key, 0, token, ending)
    assert batch.next_step() == []


def test_a_sequence_that_left_while_the_step_ran_gets_no_token():
    batch = Batch(4)
    for number in (1, 2, 3):
        batch.join(sequence(number), 0)
    step = batch.next_step()
    batch.leave(("router", 2))
    assert [o.key[1] for o in batch.apply(step, [5, 6, 7])] == [1, 3]
    assert step[1].answer == [0]
    assert [o.token for o in batch.apply(batch.next_step(), [8, 9])] == [8, 9]


def test_a_sequence_that_joined_while_the_step_ran_gets_none_of_its_tokens():
    batch = Batch(4)
    batch.join(sequence(1), 0)
    step = batch.next_step()
    batch.join(sequence(2), 0)
    assert [o.key[1] for o in batch.apply(step, [5])] == [1]
    assert keys(batch.next_step()) == [1, 2]


def test_no_step_is_larger_than_batch_max():
    batch = Batch(2)
    for number in range(5):
        batch.join(sequence(number), 0)
    assert keys(batch.next_step()) == [0, 1]


@given(size=st.integers(1, 4), sequences=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_nobody_starves_when_more_run_than_fit_in_a_step(size, sequences):
    batch = Batch(size)
    for number in range(sequences):
        batch.join(sequence(number, max_tokens=1000), 0)
    rounds = 3 * sequences
    for _ in range(rounds):
        step = batch.next_step()
        batch.apply(step, [1] * len(step))
    answers = [len(s.answer) for s in batch._sequences.values()]
    assert max(answers) - min(answers) <= 1


def test_a_steady_stream_of_newcomers_does_not_starve_the_old():
    batch, old = Batch(2), sequence(0, max_tokens=1000)
    batch.join(old, 0)
    for number in range(1, 60):
        batch.join(sequence(number, max_tokens=3), 0)
        step = batch.next_step()
        batch.apply(step, [1] * len(step))
    assert len(old.answer) >= 10


@given(
    size=st.integers(1, 3),
    wanted=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    leavers=st.sets(st.integers(0, 7)),
)
@settings(max_examples=40, deadline=None)
def test_every_sequence_gets_its_tokens_in_order_each_once(size, wanted, leavers):
    batch = Batch(size)
    seen: dict[int, list[int]] = {}
    outputs = [batch.join(sequence(n, tokens), 100 * n) for n, tokens in enumerate(wanted)]
    while outputs:
        for output in outputs:
            assert output.offset == len(seen.setdefault(output.key[1], []))
            seen[output.key[1]].append(output.token)
            if output.key[1] in leavers and output.offset == 2:
                batch.leave(output.key)
        step = batch.next_step()
        outputs = batch.apply(step, [100 * s.key[1] + len(s.answer) for s in step])
    for n, tokens in enumerate(wanted):
        length = min(tokens, 3) if n in leavers else tokens
        assert seen[n] == [100 * n + i for i in range(length)]
    assert len(batch) == 0
