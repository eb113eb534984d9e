import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_fixtures import sampling

from decode_worker.batch import Running
from decode_worker.prompts import LocalPrompt, LocalPrompts, PromptsFullError
from decode_worker.slack import Room
from decode_worker.step import DecodeStep
from kvrelay.engine.history import TokenHistory
from kvrelay.engine.step import Slice
from kvrelay.engine.step_cost import StepCost, StepFit

BLOCK = 4
CHUNK = 32
TARGET_MS = 51
COST = StepCost(base_ms=10.0, ms_per_prompt_token=1.0, ms_per_sequence=2.0)


def measured(cost: StepCost = COST) -> StepFit:
    fit = StepFit()
    for size in ((0, 1), (0, 10), (CHUNK, 0), (CHUNK, 5)) * 3:
        fit.measured(*size, cost.predict_ms(*size))
    return fit


def prompts_of(*lengths: int, target_ms: int = TARGET_MS, prompts_max: int = 8) -> LocalPrompts:
    prompts = LocalPrompts(
        BLOCK, chunk_tokens=CHUNK, itl_target_ms=target_ms, prompts_max=prompts_max
    )
    for number, length in enumerate(lengths):
        prompts.add(prompt_of(number, length))
    return prompts


def prompt_of(number: int, length: int, cached: int = 0) -> LocalPrompt:
    tokens = range(100 * number, 100 * number + length)
    key = ("router", number)
    return LocalPrompt(key, tokens, sampling(), [number], cached, computed=cached)


def plan(chunks) -> list[tuple[int, int, int]]:
    return [(chunk.job.key[1], chunk.start, chunk.count) for chunk in chunks]


def step(prompts: LocalPrompts, running: int, fit: StepFit) -> list[tuple[int, int, int]]:
    chunks = prompts.next_chunks(running, fit)
    for chunk in chunks:
        assert prompts.computed(chunk)
    return plan(chunks)


# ---- how much


def test_while_nobody_runs_a_step_is_a_whole_chunk():
    assert step(prompts_of(100), 0, measured()) == [(0, 0, CHUNK)]


def test_while_sequences_run_a_chunk_is_what_the_target_leaves_in_whole_blocks():
    # 51 ms less 10 and 5 times 2 leave 31 tokens.
    assert step(prompts_of(100), 5, measured()) == [(0, 0, 28)]


def test_a_target_that_leaves_nothing_leaves_a_block():
    assert step(prompts_of(100), 40, measured()) == [(0, 0, BLOCK)]


def test_without_a_target_there_is_no_bound_but_the_chunk():
    assert step(prompts_of(100, target_ms=0), 40, measured()) == [(0, 0, CHUNK)]


def test_a_chunk_is_never_larger_than_chunk_tokens():
    cheap = StepCost(0.1, 0.001, 0.1)
    assert step(prompts_of(100), 2, measured(cheap)) == [(0, 0, CHUNK)]


def test_chunks_grow_from_a_block_while_the_cost_is_unknown():
    fit, prompts = StepFit(), prompts_of(1000)
    sizes = []
    for _ in range(6):
        [(_, _, count)] = step(prompts, 3, fit)
        fit.measured(count, 3, 1.0 + 0.001 * count)
        sizes.append(count)
    assert sizes == [4, 8, 16, 32, 32, 32]


@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    running=st.integers(0, 30),
    target_ms=st.integers(0, 200),
    base_ms=st.floats(0, 60),
    per_token_ms=st.floats(0.01, 20),
    per_sequence_ms=st.floats(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_the_predicted_step_is_within_the_target_or_has_one_block_and_all_get_done(
    lengths, running, target_ms, base_ms, per_token_ms, per_sequence_ms
):
    fit = measured(StepCost(base_ms, per_token_ms, per_sequence_ms))
    prompts = prompts_of(*lengths, target_ms=target_ms)
    done = dict.fromkeys(range(len(lengths)), 0)
    while len(prompts):
        queued = prompts.queued_tokens
        assert prompts.queued_prompts == len(prompts)
        chunks = step(prompts, running, fit)
        tokens = sum(count for _, _, count in chunks)
        assert 0 < tokens <= CHUNK
        assert prompts.queued_tokens == queued - tokens
        if running and target_ms and tokens > BLOCK:
            assert fit.cost.predict_ms(tokens, running) <= target_ms + 1e-6
        for number, start, count in chunks:
            assert start == done[number]
            done[number] += count
    assert list(done.values()) == lengths
    assert prompts.next_chunks(running, fit) == []


# ---- whose


def test_a_short_prompt_waits_for_a_chunk_of_a_long_one_and_not_for_its_end():
    prompts = prompts_of(1000, 6)
    fit = measured()
    assert step(prompts, 5, fit) == [(0, 0, 28)]
    assert step(prompts, 5, fit) == [(1, 0, 6), (0, 28, 24)]
    prompts.add(prompt_of(2, 8))
    assert step(prompts, 5, fit) == [(0, 52, 28)]
    assert step(prompts, 5, fit) == [(2, 0, 8), (0, 80, 20)]


def test_who_came_during_a_step_goes_before_who_was_in_it():
    prompts = prompts_of(100)
    chunks = prompts.next_chunks(5, measured())
    prompts.add(prompt_of(1, 40))
    assert prompts.computed(chunks[0])
    assert step(prompts, 5, measured())[0][0] == 1


def test_turns_are_fair_to_equal_prompts():
    prompts, fit = prompts_of(200, 200, 200), measured()
    done = [0, 0, 0]
    for _ in range(12):
        for number, _, count in step(prompts, 5, fit):
            done[number] += count
    assert max(done) - min(done) <= CHUNK


def test_what_is_cached_is_not_computed():
    prompts = prompts_of()
    prompts.add(prompt_of(0, 10, cached=8))
    assert prompts.queued_tokens == 2
    [chunk] = prompts.next_chunks(1, measured())
    assert (chunk.start, chunk.count, chunk.is_first, chunk.is_last) == (8, 2, True, True)


# ---- coming and going


def test_no_more_prompts_than_prompts_max():
    prompts = prompts_of(5, 5, prompts_max=2)
    with pytest.raises(PromptsFullError, match="2 prompts are to be computed here already"):
        prompts.check_room()
    with pytest.raises(PromptsFullError):
        prompts.add(prompt_of(2, 5))
    assert len(prompts) == 2
    step(prompts, 0, measured())
    prompts.check_room()


def test_a_prompt_that_left_while_its_chunk_ran_is_not_computed_further():
    prompts = prompts_of(100, 10)
    chunks = prompts.next_chunks(0, measured())
    prompts.leave(("router", 0))
    assert not prompts.computed(chunks[0])
    prompts.leave(("router", 0))  # has left already
    assert step(prompts, 0, measured()) == [(1, 0, 10)]
    assert (len(prompts), prompts.queued_tokens) == (0, 0)


# ---- the step they become part of


def test_a_step_asks_for_a_token_of_all_but_the_chunks_that_do_not_end_a_prompt():
    params = [sampling(seed=n) for n in range(3)]
    prompts = prompts_of(target_ms=0)
    for number, length in ((1, 5), (2, 100)):
        prompt = prompt_of(number, length)
        prompt.sampling, prompt.history = params[number], TokenHistory()
        prompts.add(prompt)
    running = Running(("router", 0), 7, params[0], [9], answer=[11, 12])
    both = DecodeStep([running], prompts.next_chunks(1, measured()))
    of_1, of_2 = (chunk.job for chunk in both.chunks)
    assert both.keys == [("router", 0), ("router", 1), ("router", 2)]
    assert both.slices() == [
        Slice([12], 8, [9]),
        Slice(range(100, 105), 0, [1]),
        Slice(range(200, 224), 0, [2]),
    ]
    assert both.params() == [params[0], params[1], None]
    assert both.positions()[:2] == [9, 5]
    assert both.histories() == [None, of_1.history, of_2.history]
    assert both.tokens_of_running([31, 32]) == [31]
    assert both.tokens_of_chunks([31, 32]) == [32, None]


def test_a_step_of_nothing_is_false():
    assert not DecodeStep()
    assert DecodeStep([], prompts_of(3).next_chunks(0, StepFit()))


# ---- where answers have a target


def afforded(
    prompts: LocalPrompts, room: Room, running: int = 5, fit: StepFit | None = None
) -> list[tuple[int, int, int]]:
    chunks = prompts.next_chunks(running, fit or measured(), room)
    for chunk in chunks:
        assert prompts.computed(chunk)
    return plan(chunks)


def test_a_chunk_is_what_the_answers_can_afford():
    assert afforded(prompts_of(100, target_ms=0), Room(20 + 13)) == [(0, 0, 12)]


def test_prompts_wait_until_the_answers_can_afford_a_block():
    prompts = prompts_of(100, target_ms=0)
    assert afforded(prompts, Room(20 + 3.9)) == []
    assert afforded(prompts, Room(20 + 4.1)) == [(0, 0, BLOCK)]


def test_the_bounds_of_one_step_hold_beside_what_answers_can_afford():
    assert afforded(prompts_of(100), Room(500)) == [(0, 0, 28)]
    assert afforded(prompts_of(100), Room(500, most_ms=20 + 9)) == [(0, 0, 8)]


def test_a_block_that_answers_can_afford_may_take_longer_than_a_step():
    assert afforded(prompts_of(100), Room(500, most_ms=1)) == [(0, 0, BLOCK)]


def test_prompts_do_not_wait_for_ever():
    prompts = prompts_of(100, target_ms=0)
    assert [afforded(prompts, Room(-1.0)) for _ in range(64)] == [[]] * 64
    assert afforded(prompts, Room(-1.0)) == [(0, 0, BLOCK)]
    assert afforded(prompts, Room(-1.0)) == []


def test_where_nobody_runs_a_block_never_waits():
    assert afforded(prompts_of(100), Room(most_ms=10 + 9), running=0) == [(0, 0, 8)]
    assert afforded(prompts_of(100), Room(most_ms=1), running=0) == [(0, 0, BLOCK)]


def test_while_nobody_knows_what_prompts_cost_a_step_has_a_block():
    assert afforded(prompts_of(100), Room(500), fit=StepFit()) == [(0, 0, BLOCK)]
