"""Which workers take anything, and that one which begins to is noticed."""

from typing import Any

import pytest
from router_cases import decode_worker, router_config

from router.measured import MeasuredRates
from router.openings import Openings
from router.prediction import Rates
from router.worker import DecodeWorker, PrefillWorker, Worker


def openings_of(*workers: Worker, **config: Any) -> Openings:
    """Those that enter are not forgotten yet."""
    made = Openings(router_config(**{"prefill_backlog_tokens": 50, **config}))
    for worker in workers:
        made.note(worker)
    return made


def rates(sequence_ms: float) -> MeasuredRates:
    return MeasuredRates(Rates(base_ms=5.0, prompt_token_ms=0.5, sequence_ms=sequence_ms))


def p(number: int = 1, **more: Any) -> PrefillWorker:
    return PrefillWorker(
        worker_id=f"p{number}", number=number, block_size=4, blocks_total=100, **more
    )


def d(number: int = 2, **more: Any) -> DecodeWorker:
    return decode_worker(number, blocks_free=100, **more)


def any_of(openings: Openings, *, aimed: bool = False, local: bool = False) -> bool:
    return openings.any(aimed=aimed, local=local)


def test_it_takes_a_worker_of_each_role_or_one_that_does_both():
    assert not any_of(openings_of())
    assert not any_of(openings_of(p()), local=True)
    assert (any_of(openings_of(d())), any_of(openings_of(d()), local=True)) == (False, True)
    assert any_of(openings_of(p(), d()))


def test_a_backlog_of_a_prefill_worker_closes_it_until_it_is_shorter():
    worker = p()
    openings = openings_of(worker, d())
    openings.forget_entered()
    for queued, taken, entered in ((50, False, False), (49, True, True), (10, True, False)):
        worker.queued_tokens = queued
        openings.note(worker)
        assert (any_of(openings), openings.entered) == (taken, entered)
        openings.forget_entered()


@pytest.mark.parametrize("aimed", [False, True])
def test_a_worker_enters_by_its_rates(aimed):
    """It has as much room as before, and with targets answers are no more in each other's way."""
    worker = d(running=20, measured=rates(10.0))
    openings = openings_of(p(), worker, tpot_target_ms=100.0)
    openings.forget_entered()
    assert any_of(openings, aimed=True) is False
    assert any_of(openings), "one without an aim waits for nobody's targets"
    worker.measured = rates(1.0)
    assert not openings.entered, "nobody has said so"
    openings.note(worker)
    assert openings.entered
    assert any_of(openings, aimed=aimed)
    openings.check([p(), worker])


def test_a_worker_enters_as_one_that_computes_prompts_by_what_its_answers_leave():
    worker = d(running=18, queued_tokens=20, measured=rates(5.0))
    openings = openings_of(worker, tpot_target_ms=100.0)
    openings.forget_entered()
    assert not any_of(openings, aimed=True, local=True)
    worker.running = 2
    openings.note(worker)
    assert (openings.entered, any_of(openings, aimed=True, local=True)) == (True, True)


def test_who_enters_and_leaves_before_anybody_asks_was_never_there():
    worker = p(queued_tokens=60)
    openings = openings_of(worker, d())
    openings.forget_entered()
    for queued in (0, 60):
        worker.queued_tokens = queued
        openings.note(worker)
    assert not openings.entered


def test_who_leaves_after_it_has_entered_is_looked_for_all_the_same():
    worker = p(queued_tokens=60)
    openings = openings_of(worker, d())
    openings.forget_entered()
    worker.queued_tokens = 0
    openings.note(worker)
    assert openings.entered
    worker.queued_tokens = 60
    openings.note(worker)
    assert (openings.entered, any_of(openings)) == (True, False)


@pytest.mark.parametrize("looked", [False, True], ids=["before anybody looked", "after it"])
def test_a_worker_that_is_lost_is_in_no_set(looked):
    first, second = p(1), p(3)
    openings = openings_of(first, second, d())
    if looked:
        assert any_of(openings)
    openings.drop(first)
    assert any_of(openings)
    openings.drop(second)
    assert not any_of(openings)
    openings.check([d()])


@pytest.mark.parametrize("why", ["draining", "refused"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_drains_or_has_refused_takes_nothing_until_it_does_again(role, why):
    workers: dict[str, Worker] = {"prefill": p(), "decode": d()}
    openings = openings_of(*workers.values())
    worker = workers[role]
    for gone in (True, False):
        openings.forget_entered()
        setattr(worker, why, gone)
        openings.note(worker)
        assert (any_of(openings), openings.entered) == (not gone, not gone)


def test_a_change_that_nobody_was_told_of_is_found_by_the_check():
    worker = p()
    openings = openings_of(worker, d())
    openings.check([worker, d()])
    worker.queued_tokens = 60
    with pytest.raises(AssertionError):
        openings.check([worker, d()])
