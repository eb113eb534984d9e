from math import inf

import pytest
from dispatcher_bench import make
from router_cases import router_config

from router.targets import any_targets, due_ms, waits_for_others_until_ms


def test_either_target_is_one():
    assert not any_targets(router_config())
    assert any_targets(router_config(ttft_target_ms=1000.0))
    assert any_targets(router_config(tpot_target_ms=100.0))


@pytest.mark.parametrize(
    ("target_ms", "deadline_ms", "due"),
    [
        (0.0, 0, inf),
        (1000.0, 0, 50 + 950),
        (0.0, 300, 350),
        (1000.0, 300, 350),
        (1000.0, 5000, 1000),
    ],
)
def test_a_first_token_is_due_by_the_target_or_the_deadline_if_that_is_sooner(
    target_ms, deadline_ms, due
):
    request = make(now=50, ttft_deadline_ms=deadline_ms)
    assert due_ms(request, router_config(ttft_target_ms=target_ms)) == due


def test_a_first_token_that_is_there_is_not_due():
    request = make(ttft_deadline_ms=300)
    request.times.first_token_at_ms = 20.0
    assert due_ms(request, router_config(ttft_target_ms=1000.0)) == inf


def test_a_wait_for_others_is_that_of_the_present_wait():
    request = make(now=50)
    request.queued_at_ms = 4000.0
    assert waits_for_others_until_ms(request, router_config(late_wait_ms=700)) == 4700
