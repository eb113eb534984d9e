import copy
import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from kv_fixtures import LAYOUT, sampling

from kvrelay.draining import DrainingError
from kvrelay.engine.step import Slice
from kvrelay.engine.turns import Chunk
from kvrelay.kv.ledger import BlockLedger, BlockState
from kvrelay.kv.prefix import PrefixChain, chain_root
from kvrelay.lifecycle import IllegalTransitionError
from kvrelay.wire.transfer_pb2 import Ticket
from prefill_worker.schedule import (
    CAUSES,
    TRANSITIONS,
    InvalidJobError,
    Job,
    JobEvent,
    JobState,
    QueueFullError,
    Schedule,
)

S, E, B = JobState, JobEvent, BlockState
TOTAL = 16
CHUNK = 16  # tokens; four blocks
ROOT = chain_root("model", LAYOUT.block_size, "")


@pytest.fixture
def schedule() -> Iterator[Schedule]:
    schedule = Schedule(LAYOUT, BlockLedger(TOTAL), chunk_tokens=CHUNK, jobs_max=5)
    yield schedule
    schedule.cache.check()
    for job in list(schedule._jobs.values()):
        schedule.abort(job.key, E.CANCEL)
        if job.state is S.ABORTING:
            schedule.quiet(job)
    schedule.cache.check()
    assert schedule.ledger.available == TOTAL
    assert schedule.queued_tokens == len(schedule) == 0


def job(number: int, tokens: int, blocks: int | None = None) -> Job:
    needed = LAYOUT.blocks_for(tokens) if blocks is None else blocks
    ticket = Ticket(block_ids=range(needed))
    return Job(("router", number), list(range(tokens)), sampling(), ticket)


def named(number: int, prompt: Sequence[int], first_block: int = 0) -> Job:
    """A job whose full blocks have names."""
    ticket = Ticket(
        first_block=first_block, block_ids=range(first_block, LAYOUT.blocks_for(len(prompt)))
    )
    chain = PrefixChain(ROOT, LAYOUT.block_size)
    chain.extend(prompt)
    return Job(("router", number), list(prompt), sampling(), ticket, chain.hashes)


def served(schedule: Schedule, one: Job) -> Job:
    schedule.add(one)
    while one.state is not S.HANDING_OFF:
        run(schedule)
    schedule.acknowledged(one)
    return one


def added(schedule: Schedule, *tokens: int) -> list[Job]:
    """Jobs 1, 2, 3 ... of so many prompt tokens."""
    jobs = [job(number, n) for number, n in enumerate(tokens, 1)]
    for one in jobs:
        schedule.add(one)
    return jobs


def plan(step: Sequence[Chunk]) -> list[tuple[int, int, int]]:
    """(job number, start, count) of each chunk."""
    return [(chunk.job.key[1], chunk.start, chunk.count) for chunk in step]


def run(schedule: Schedule) -> list[tuple[int, int, int]]:
    """One whole step."""
    step = schedule.next_step()
    for chunk in step:
        schedule.computed(chunk)
    return plan(step)


def names(value: object) -> str:
    return getattr(value, "name", str(value))


# ---- the table


@pytest.mark.parametrize(("state", "event"), list(itertools.product(S, E)), ids=names)
def test_every_event_in_every_state_is_in_the_table_or_raises(state, event):
    one = job(1, 4)
    one.state = state
    before = copy.copy(vars(one))
    if (state, event) in TRANSITIONS:
        one.on(event)
        assert one.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=f"{event.name} while {state.name}"):
            one.on(event)
        assert vars(one) == before


@pytest.mark.parametrize(
    "event", [E.CANCEL, E.TIMEOUT, E.ROUTER_LOST, E.DECODER_LOST, E.FAIL, E.DRAIN], ids=names
)
def test_what_may_come_at_any_moment_is_a_row_in_every_state_but_closed(event):
    assert {state for state, its in TRANSITIONS if its is event} == set(S) - {S.CLOSED}
    assert not [event for state, event in TRANSITIONS if state is S.CLOSED]


def brought_to(schedule: Schedule, state: JobState, number: int = 1) -> Job:
    """Of 20 tokens, so two chunks; five blocks. ABORTING: computing before."""
    one = job(number, 20)
    schedule.add(one)
    if state is not S.QUEUED:
        run(schedule)
    if state is S.HANDING_OFF:
        run(schedule)
    elif state is S.ABORTING:
        schedule.abort(one.key, E.CANCEL)
    assert one.state is state
    return one


def computed(schedule: Schedule, one: Job) -> None:
    for chunk in schedule.next_step():
        schedule.computed(chunk)


def let_go(why: JobEvent) -> Callable[[Schedule, Job], object]:
    return lambda schedule, one: schedule.abort(one.key, why)


def router_lost(schedule: Schedule, one: Job) -> None:
    for key in schedule.of_session("router"):
        schedule.abort(key, E.ROUTER_LOST)


DRIVERS: dict[JobEvent, Callable[[Schedule, Job], object]] = {
    E.ADMIT: lambda schedule, one: schedule.next_step(),
    E.COMPUTED: computed,
    E.ACKNOWLEDGED: lambda schedule, one: schedule.acknowledged(one),
    E.CANCEL: let_go(E.CANCEL),
    E.TIMEOUT: let_go(E.TIMEOUT),
    E.ROUTER_LOST: router_lost,
    E.DECODER_LOST: let_go(E.DECODER_LOST),
    E.FAIL: let_go(E.FAIL),
    E.QUIET: lambda schedule, one: schedule.quiet(one),
    E.DRAIN: lambda schedule, one: schedule.drain(),
}
HELD = {
    S.QUEUED: {},
    S.COMPUTING: {B.OWNED: 5},
    S.HANDING_OFF: {B.OWNED: 5},
    S.ABORTING: {B.QUARANTINED: 5},
    S.CLOSED: {},
}


@pytest.mark.parametrize(("state", "event"), list(TRANSITIONS), ids=names)
def test_a_row_moves_the_job_and_its_blocks(schedule, monkeypatch, state, event):
    one = brought_to(schedule, state)
    seen = []
    on = Job.on
    monkeypatch.setattr(Job, "on", lambda j, e: (seen.append(e), on(j, e)))
    DRIVERS[event](schedule, one)
    assert seen == [event]
    assert one.state is TRANSITIONS[state, event]
    schedule.cache.check()
    counts = schedule.ledger.counts()
    assert {state: n for state, n in counts.items() if n and state is not B.FREE} == HELD[one.state]
    assert sum(counts.values()) == TOTAL
    assert len(schedule) == (one.state is not S.CLOSED)
    if one.state in (S.ABORTING, S.CLOSED):
        assert schedule.queued_tokens == schedule.queued_prompts == 0


@pytest.mark.parametrize(
    ("state", "event"),
    [
        pair
        for pair in itertools.product(S, (E.ACKNOWLEDGED, E.QUIET))
        if pair not in TRANSITIONS and pair[0] is not S.CLOSED
    ],
    ids=names,
)
def test_what_is_no_row_changes_nothing(schedule, state, event):
    one = brought_to(schedule, state)
    before = schedule.ledger.counts()
    with pytest.raises(IllegalTransitionError):
        DRIVERS[event](schedule, one)
    assert one.state is state
    assert schedule.ledger.counts() == before


def test_why_jobs_were_let_go_of_is_counted_once_each(schedule):
    one, two = added(schedule, 4, 4)
    run(schedule)
    schedule.abort(one.key, E.DECODER_LOST)
    schedule.abort(one.key, E.CANCEL)
    schedule.acknowledged(two)
    schedule.abort(two.key, E.CANCEL)
    assert schedule.causes == {E.DECODER_LOST: 1}
    with pytest.raises(AssertionError):
        schedule.abort(one.key, E.QUIET)


# ---- draining


def test_a_draining_worker_takes_nothing_new_and_finishes_what_it_has(schedule):
    one = brought_to(schedule, S.QUEUED)
    schedule.drain()
    with pytest.raises(DrainingError):
        schedule.add(job(2, 4))
    run(schedule)
    run(schedule)
    schedule.acknowledged(one)
    assert len(schedule) == 0


# ---- add


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (job(1, 0), "the prompt is empty"),
        (job(1, 4 * TOTAL + 1), "65 prompt tokens need 17 KV blocks; this prefill worker has 16"),
        (job(1, 8, blocks=1), "a ticket for blocks 0 to 1, not to 2"),
        (job(1, 8, blocks=3), "a ticket for blocks 0 to 3, not to 2"),
    ],
    ids=["empty", "too long", "ticket too small", "ticket too large"],
)
def test_a_job_that_can_never_be_served_is_refused(schedule, bad, why):
    with pytest.raises(InvalidJobError, match=why):
        schedule.add(bad)
    assert len(schedule) == schedule.queued_tokens == 0


def test_a_key_is_good_for_one_job(schedule):
    added(schedule, 4)
    with pytest.raises(InvalidJobError, match="here already"):
        schedule.add(job(1, 4))
    assert schedule.queued_tokens == 4


def test_jobs_max_is_a_typed_refusal_and_the_next_fits_once_one_has_gone(schedule):
    added(schedule, 1, 1, 1, 1, 1)
    with pytest.raises(QueueFullError, match="5 prompts"):
        schedule.add(job(6, 1))
    schedule.abort(("router", 3), E.CANCEL)
    schedule.add(job(6, 1))


# ---- chunks and turns


def test_no_job_is_no_step(schedule):
    assert schedule.next_step() == []


def test_a_long_prompt_is_computed_in_whole_blocks_until_its_last_chunk(schedule):
    added(schedule, 39)
    assert [run(schedule) for _ in range(3)] == [[(1, 0, 16)], [(1, 16, 16)], [(1, 32, 7)]]
    assert run(schedule) == []


@pytest.mark.parametrize("chunk_tokens", [5, 7])
def test_a_chunk_that_is_not_a_multiple_of_a_block_is_rounded_down(chunk_tokens):
    schedule = Schedule(LAYOUT, BlockLedger(TOTAL), chunk_tokens=chunk_tokens, jobs_max=5)
    added(schedule, 12)
    assert [run(schedule) for _ in range(3)] == [[(1, 0, 4)], [(1, 4, 4)], [(1, 8, 4)]]


def test_a_chunk_smaller_than_a_block_is_one_block():
    schedule = Schedule(LAYOUT, BlockLedger(TOTAL), chunk_tokens=1, jobs_max=5)
    added(schedule, 6)
    assert [run(schedule) for _ in range(2)] == [[(1, 0, 4)], [(1, 4, 2)]]


def test_short_prompts_share_a_step(schedule):
    added(schedule, 5, 6, 5)
    assert run(schedule) == [(1, 0, 5), (2, 0, 6), (3, 0, 5)]


def test_what_is_left_of_a_step_is_filled_with_whole_blocks_only(schedule):
    added(schedule, 5, 40)
    assert run(schedule) == [(1, 0, 5), (2, 0, 8)]


def test_less_than_a_block_left_goes_to_nobody_who_needs_more(schedule):
    added(schedule, 14, 8)
    assert run(schedule) == [(1, 0, 14)]
    assert run(schedule) == [(2, 0, 8)]


def test_a_short_prompt_behind_a_long_one_is_served_in_the_next_step(schedule):
    added(schedule, 48, 3)
    assert run(schedule) == [(1, 0, 16)]
    assert run(schedule) == [(2, 0, 3), (1, 16, 12)]


def test_a_short_prompt_that_comes_while_a_long_one_runs_is_served_in_the_next_step(schedule):
    added(schedule, 48)
    step = schedule.next_step()
    schedule.add(job(2, 3))
    schedule.computed(step[0])
    assert run(schedule) == [(2, 0, 3), (1, 16, 12)]


def test_long_prompts_take_turns(schedule):
    added(schedule, 32, 32)
    assert [run(schedule)[0][0] for _ in range(4)] == [1, 2, 1, 2]


def test_the_last_chunk_says_so_and_the_engine_gets_its_tokens_and_blocks(schedule):
    (one,) = added(schedule, 20)
    (first,) = schedule.next_step()
    assert not first.is_last
    assert first.slice() == Slice(list(range(16)), 0, one.blocks)
    schedule.computed(first)
    (last,) = schedule.next_step()
    assert last.is_last
    assert last.slice() == Slice([16, 17, 18, 19], 16, one.blocks)
    schedule.computed(last)
    assert one.state is S.HANDING_OFF


def test_queued_tokens_are_those_accepted_and_not_computed(schedule):
    added(schedule, 20, 50)
    assert schedule.queued_tokens == 70  # the second waits for blocks
    step = schedule.next_step()
    assert schedule.queued_tokens == 70
    schedule.computed(step[0])
    assert schedule.queued_tokens == 54
    schedule.abort(("router", 1), E.CANCEL)
    assert schedule.queued_tokens == 50


# ---- blocks


def test_jobs_are_admitted_in_order_once_their_blocks_are_free(schedule):
    first, second, third = added(schedule, 40, 30, 3)
    assert run(schedule) == [(1, 0, 16)]
    assert [j.state for j in (first, second, third)] == [S.COMPUTING, S.QUEUED, S.QUEUED]
    assert schedule.ledger.free == 6  # enough for the third, but it is not its turn
    run(schedule)
    run(schedule)
    assert run(schedule) == []  # handing off: the blocks are not free yet
    schedule.acknowledged(first)
    assert run(schedule) == [(2, 0, 16)]
    assert third.state is S.COMPUTING


def test_acknowledged_frees_the_blocks(schedule):
    (one,) = added(schedule, 5)
    run(schedule)
    assert schedule.ledger.counts()[B.OWNED] == 2
    schedule.acknowledged(one)
    assert one.state is S.CLOSED
    assert schedule.ledger.free == TOTAL
    assert len(schedule) == 0


# ---- abort


def test_abort_of_a_queued_job_leaves_nothing(schedule):
    (one,) = added(schedule, 5)
    assert schedule.abort(one.key, E.CANCEL) is one
    assert one.state is S.CLOSED
    assert schedule.next_step() == []
    assert len(schedule) == 0


def test_abort_of_a_computing_job_keeps_its_blocks_until_all_is_quiet(schedule):
    one, two = added(schedule, 32, 4)
    run(schedule)
    assert schedule.abort(one.key, E.CANCEL) is one
    assert schedule.ledger.counts()[B.QUARANTINED] == 8
    assert run(schedule) == [(2, 0, 4)]
    schedule.quiet(one)
    assert one.state is S.CLOSED
    assert schedule.ledger.counts()[B.QUARANTINED] == 0
    assert len(schedule) == 1
    assert two.state is S.HANDING_OFF


def test_abort_while_a_step_runs_lets_the_step_end_without_effect(schedule):
    one, two = added(schedule, 4, 4)
    step = schedule.next_step()
    schedule.abort(one.key, E.CANCEL)
    for chunk in step:
        schedule.computed(chunk)
    assert (one.state, one.computed) == (S.ABORTING, 0)
    assert two.state is S.HANDING_OFF
    assert schedule.ledger.counts()[B.QUARANTINED] == 1


def test_a_step_that_ends_after_its_aborted_job_was_closed_has_no_effect(schedule):
    (one,) = added(schedule, 4)
    (chunk,) = schedule.next_step()
    schedule.abort(one.key, E.CANCEL)
    schedule.quiet(one)
    schedule.computed(chunk)
    assert one.state is S.CLOSED


def test_abort_while_handing_off_keeps_the_blocks_until_all_is_quiet(schedule):
    (one,) = added(schedule, 4)
    run(schedule)
    schedule.abort(one.key, E.CANCEL)
    assert schedule.ledger.counts()[B.QUARANTINED] == 1
    schedule.quiet(one)
    assert schedule.ledger.free == TOTAL


def test_a_second_abort_and_one_of_an_ended_job_are_nothing(schedule):
    (one,) = added(schedule, 4)
    run(schedule)
    assert schedule.abort(one.key, E.CANCEL) is one
    assert schedule.abort(one.key, E.CANCEL) is None
    schedule.quiet(one)
    assert schedule.abort(one.key, E.CANCEL) is None


def test_the_blocks_of_an_aborted_job_go_to_the_next_in_line_once_quiet(schedule):
    one, two = added(schedule, 64, 8)
    run(schedule)
    schedule.abort(one.key, E.CANCEL)
    assert schedule.next_step() == []
    schedule.quiet(one)
    assert run(schedule) == [(2, 0, 8)]
    assert two.state is S.HANDING_OFF


def test_a_lost_session_is_answered_with_exactly_its_keys(schedule):
    ours, theirs = object(), object()
    for key in ((ours, 1), (theirs, 1), (ours, 2)):
        one = job(1, 4)
        one.key = key
        schedule.add(one)
    assert schedule.of_session(ours) == [(ours, 1), (ours, 2)]


# ---- prefix caching


def test_what_is_cached_of_a_prompt_is_not_computed_again(schedule):
    first = served(schedule, named(1, range(14)))
    assert schedule.ledger.counts()[B.CACHED] == 3
    assert schedule.ledger.available == TOTAL
    second = named(2, range(15))
    schedule.add(second)
    assert schedule.queued_tokens == 15
    assert run(schedule) == [(2, 12, 3)]
    assert (second.blocks[:3], second.cached_tokens) == (first.blocks[:3], 12)
    assert second.blocks[3] not in first.blocks[:3]


@pytest.mark.parametrize(("tokens", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_the_last_token_is_computed_always_and_into_a_block_of_ones_own(schedule, tokens, cached):
    served(schedule, named(1, range(12)))
    one = named(2, range(tokens))
    schedule.add(one)
    (chunk,) = schedule.next_step()
    assert (chunk.start, one.cached_tokens, chunk.is_first, chunk.is_last) == (
        cached,
        cached,
        True,
        True,
    )
    assert schedule.ledger.state(one.blocks[cached // 4]) is B.OWNED


def test_the_second_block_of_a_name_is_freed_when_its_job_ends(schedule):
    served(schedule, named(1, range(8)))
    served(schedule, named(2, range(8)))  # computes the last block again
    assert schedule.ledger.counts()[B.CACHED] == 2
    assert schedule.ledger.free == TOTAL - 2


def test_a_running_prompt_is_shared_as_far_as_it_is_computed(schedule):
    schedule.add(named(1, range(40)))
    run(schedule)
    schedule.add(named(2, range(30)))
    assert run(schedule) == [(1, 16, 16)]
    assert run(schedule) == [(2, 28, 2), (1, 32, 8)]


def test_prompts_admitted_together_compute_what_they_share_once():
    schedule = Schedule(LAYOUT, BlockLedger(400), chunk_tokens=CHUNK, jobs_max=8)
    jobs = [named(number, [*range(98), 200 + number, 300]) for number in range(8)]
    for one in jobs:
        schedule.add(one)
    tokens = 0
    while step := schedule.next_step():
        for chunk in step:
            tokens += chunk.count
            schedule.computed(chunk)
    assert tokens == 96 + 8 * 4  # 96 are whole blocks
    assert tokens == sum(len(one.prompt) - one.cached_tokens for one in jobs)
    for one in jobs:
        schedule.acknowledged(one)
    schedule.cache.check()
    assert schedule.ledger.available == 400
    assert (schedule.queued_tokens, schedule.queued_prompts) == (0, 0)


@given(
    shared=st.integers(0, 60),
    own=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    chunk=st.integers(4, 40),
)
@settings(max_examples=80, deadline=None)
def test_nothing_that_is_shared_is_computed_twice_but_within_the_step_that_ends_a_prompt(
    shared, own, chunk
):
    schedule = Schedule(LAYOUT, BlockLedger(400), chunk_tokens=chunk, jobs_max=8)
    jobs = [named(n, [*range(shared), *[100 + n] * count]) for n, count in enumerate(own)]
    for one in jobs:
        schedule.add(one)
    shareable = shared - shared % LAYOUT.block_size
    seen, twice, ends = set(), 0, 0
    while step := schedule.next_step():
        for piece in step:
            places = range(piece.start, min(piece.start + piece.count, shareable))
            twice += len(seen.intersection(places))
        for piece in step:
            seen.update(range(piece.start, piece.start + piece.count))
            schedule.computed(piece)
        ends += any(piece.is_last for piece in step)
    size = LAYOUT.block_size  # the block of a prompt's last token is always its own
    assert twice <= len(jobs) * size
    assert [one.state for one in jobs] == [S.HANDING_OFF] * len(jobs)
    total = sum(len(one.prompt) - one.cached_tokens for one in jobs)
    assert total <= shareable + sum(own) + len(jobs) * size + ends * chunk
    for one in jobs:
        schedule.acknowledged(one)
    schedule.cache.check()
    assert schedule.ledger.available == 400


def test_a_chunk_is_its_jobs_first_until_the_job_has_computed_something(schedule):
    schedule.add(named(1, range(28)))
    schedule.add(named(2, range(32)))
    assert run(schedule) == [(1, 0, 16)]
    (chunk,) = schedule.next_step()  # what it waited for came from the other
    assert (chunk.job.key[1], chunk.start, chunk.is_first) == (2, 16, True)
    schedule.computed(chunk)
    (chunk,) = schedule.next_step()
    assert (chunk.job.key[1], chunk.start, chunk.is_first) == (1, 24, False)


def test_equal_prompts_computed_at_once_leave_one_copy(schedule):
    both = [named(number, range(8)) for number in (1, 2)]
    for one in both:
        schedule.add(one)
    assert run(schedule) == [(1, 0, 8), (2, 0, 8)]
    for one in both:
        schedule.acknowledged(one)
    assert schedule.ledger.counts()[B.CACHED] == 2
    assert schedule.ledger.free == TOTAL - 2


def test_cached_blocks_make_room_for_the_next_in_line(schedule):
    served(schedule, named(1, range(48)))
    assert schedule.ledger.free == 4
    one = named(2, range(100, 132))
    schedule.add(one)
    assert run(schedule) == [(2, 0, 16)]
    assert len(schedule.cache.match(named(3, range(48)).hashes)) == 8


def test_an_aborted_job_keeps_what_a_push_may_still_read_until_all_is_quiet(schedule):
    served(schedule, named(1, range(8)))
    one = named(2, range(40))
    schedule.add(one)
    run(schedule)
    schedule.abort(one.key, E.CANCEL)
    assert schedule.ledger.counts()[B.CACHED] == 6
    assert schedule.ledger.counts()[B.QUARANTINED] == 4
    assert schedule.ledger.available == TOTAL - 10
    schedule.quiet(one)
    assert schedule.ledger.available == TOTAL
    assert len(schedule.cache.match(one.hashes)) == 6


def test_nothing_of_a_chunk_that_was_aborted_is_shared(schedule):
    one = named(1, range(8))
    schedule.add(one)
    (chunk,) = schedule.next_step()
    schedule.abort(one.key, E.CANCEL)
    schedule.computed(chunk)
    schedule.quiet(one)
    assert schedule.ledger.free == TOTAL


def test_what_is_distrusted_is_found_no_more(schedule):
    served(schedule, named(1, range(8)))
    one = named(2, range(12))
    schedule.add(one)
    run(schedule)
    schedule.distrust(one)
    schedule.abort(one.key, E.CANCEL)
    schedule.quiet(one)
    assert schedule.ledger.free == TOTAL


@pytest.mark.parametrize("first_block", [0, 1, 3])
def test_a_ticket_may_begin_at_any_block(schedule, first_block):
    served(schedule, named(1, range(12), first_block))
    bad = named(2, range(12), first_block)
    bad.ticket.first_block += 1
    with pytest.raises(InvalidJobError, match=f"a ticket for blocks {first_block + 1} to 4, not"):
        schedule.add(bad)


def test_hashes_that_are_not_the_prompts_are_refused(schedule):
    bad = named(1, range(12))
    bad.hashes = bad.hashes[1:]
    with pytest.raises(InvalidJobError, match="2 block hashes for 3 full blocks"):
        schedule.add(bad)


# ---- all of it at random

TEXTS = [[1] * 70, [1] * 30 + [2] * 40]


class ScheduleMachine(RuleBasedStateMachine):
    """Adds, aborts, steps and acknowledgements; a step may be under way during all but steps.

    `pool` is the truth about which token's KV is in which slot of each block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool: list[list[int]] = [[0] * LAYOUT.block_size for _ in range(TOTAL)]
        self.meaning: dict[bytes, list[int]] = {}  # the tokens of a block of that name
        self.ledger = BlockLedger(TOTAL)
        self.schedule = Schedule(LAYOUT, self.ledger, chunk_tokens=10, jobs_max=6)
        self.jobs: list[Job] = []
        self.step: list[Chunk] = []
        self.done: dict[Job, list[int]] = {}
        self.cached: dict[Job, int] = {}  # tokens, found at the start or later

    @rule(
        text=st.sampled_from(TEXTS), tokens=st.integers(1, 70), caching=st.sampled_from([1, 1, 0])
    )
    def add(self, text: list[int], tokens: int, caching: bool) -> None:
        one = named(len(self.jobs), text[:tokens])
        for index, name in enumerate(one.hashes):
            self.meaning[name] = text[index * LAYOUT.block_size :][: LAYOUT.block_size]
        if not caching:
            one.hashes = ()
        try:
            self.schedule.add(one)
        except (InvalidJobError, QueueFullError):
            assert tokens > 4 * TOTAL or len(self.schedule) == 6
            return
        self.jobs.append(one)
        self.done[one] = []
        self.cached[one] = 0

    @rule()
    def step_begins(self) -> None:
        if not self.step:
            self.step = self.schedule.next_step()
            assert sum(chunk.count for chunk in self.step) <= 10
            assert len({chunk.job for chunk in self.step}) == len(self.step)
            for chunk in self.step:
                self.caught_up(chunk)
                assert chunk.job.state is S.COMPUTING
                assert chunk.count > 0
                self.compute(chunk)
                assert chunk.is_last or chunk.count % LAYOUT.block_size == 0

    def caught_up(self, chunk: Chunk) -> None:
        """Between what is computed and the chunk is what others have computed."""
        one, done = chunk.job, self.done[chunk.job]
        self.cached[one] += chunk.start - len(done)
        assert one.cached_tokens == self.cached[one]
        done.extend(one.prompt[len(done) : chunk.start])

    def compute(self, chunk: Chunk) -> None:
        """Reads all that came before and writes the chunk's KV, at any time of a step."""
        one = chunk.job
        before = [token for block in one.blocks for token in self.pool[block]][: chunk.start]
        assert before == one.prompt[: chunk.start], "the engine reads what is not its own"
        for position in range(chunk.start, chunk.start + chunk.count):
            block = one.blocks[position // LAYOUT.block_size]
            state = self.ledger.state(block)
            assert state in (B.OWNED, B.QUARANTINED), "a shared block is written"
            self.pool[block][position % LAYOUT.block_size] = one.prompt[position]

    @rule()
    def step_ends(self) -> None:
        for chunk in self.step:
            self.compute(chunk)
            self.done[chunk.job].extend(chunk.slice().tokens)
            self.schedule.computed(chunk)
        self.step = []

    @rule(data=st.data(), why=st.sampled_from(sorted(CAUSES, key=names)))
    def abort(self, data: st.DataObject, why: JobEvent) -> None:
        if self.jobs:
            self.schedule.abort(data.draw(st.sampled_from(self.jobs)).key, why)

    @rule(data=st.data())
    def quiet(self, data: st.DataObject) -> None:
        busy = {chunk.job for chunk in self.step}
        some = [j for j in self.jobs if j.state is S.ABORTING and j not in busy]
        if some:
            self.schedule.quiet(data.draw(st.sampled_from(some)))

    @rule(data=st.data())
    def acknowledged(self, data: st.DataObject) -> None:
        if some := [j for j in self.jobs if j.state is S.HANDING_OFF]:
            one = data.draw(st.sampled_from(some))
            pushed = [token for block in one.blocks for token in self.pool[block]]
            assert pushed[: len(one.prompt)] == one.prompt
            self.schedule.acknowledged(one)

    @invariant()
    def the_ledger_balances(self) -> None:
        self.schedule.cache.check()
        self.schedule._turns.check()
        assert self.schedule._waiting_tokens == sum(len(j.prompt) for j in self.schedule._waiting)
        held = {b for j in self.jobs if j.state not in (S.QUEUED, S.CLOSED) for b in j.blocks}
        assert self.ledger.available == TOTAL - len(held)

    @invariant()
    def every_cached_block_holds_what_its_name_says(self) -> None:
        for name, block in self.schedule.cache._block_of.items():
            assert self.pool[block] == self.meaning[name]

    @invariant()
    def every_job_is_computed_token_by_token_once(self) -> None:
        for one, tokens in self.done.items():
            assert tokens == one.prompt[: len(tokens)]
            if one.state is S.HANDING_OFF:
                assert tokens == one.prompt

    @invariant()
    def what_is_queued_is_what_is_left(self) -> None:
        left = [j for j in self.jobs if j.state in (S.QUEUED, S.COMPUTING)]
        assert self.schedule.queued_prompts == len(left)
        assert self.schedule.queued_tokens == sum(len(j.prompt) - j.computed for j in left)

    def teardown(self) -> None:
        """Whatever has been accepted and not aborted is served in the end."""
        self.step_ends()
        for _ in range(200):
            for one in self.jobs:
                if one.state is S.ABORTING:
                    self.schedule.quiet(one)
                elif one.state is S.HANDING_OFF:
                    assert self.done[one] == one.prompt
                    self.schedule.acknowledged(one)
            self.step_begins()
            self.step_ends()
        assert {one.state for one in self.jobs} <= {S.CLOSED}
        self.schedule.cache.check()
        assert self.ledger.available == TOTAL
        assert len(self.schedule) == 0


TestScheduleMachine = ScheduleMachine.TestCase
TestScheduleMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
