"""How a worker's figures come and fade; who goes where by them is in test_workers.py."""

import pytest

from kvrelay.wire.worker_pb2 import StepCost
from router.measured import HandOffs, MeasuredRates, usual_of
from router.prediction import NEUTRAL, NEUTRAL_BLOCK_MS, Rates

USUAL = Rates(10, 1, 2)
FADE_MS = 10_000


def cost(*figures: float) -> StepCost:
    return StepCost(**dict(zip(StepCost.DESCRIPTOR.fields_by_name, figures, strict=True)))


def measured(*figures: float) -> MeasuredRates:
    one = MeasuredRates(USUAL)
    one.hear(cost(*figures), USUAL)
    return one


def looks(one: MeasuredRates | HandOffs, seconds: range, usual: Rates = USUAL) -> None:
    for second in seconds:
        if isinstance(one, HandOffs):
            one.look(second * 1000, FADE_MS)
        else:
            one.look(usual, second * 1000, FADE_MS)


# ---- rates


def test_what_was_never_measured_is_what_is_usual_now():
    one = measured(20, 4, 0)
    assert one.rates == (20, 4, 2)
    one.look(Rates(1, 1, 7), 0, FADE_MS)
    assert one.rates == (20, 4, 7)
    nothing = MeasuredRates(NEUTRAL)
    nothing.hear(StepCost(), USUAL)
    looks(nothing, range(3), NEUTRAL)
    assert nothing.rates is NEUTRAL, "by which who predicts knows that nobody has measured"


def test_figures_fade_to_the_usual_ones_when_there_was_no_work_for_long():
    one = measured(100, 100, 100)
    looks(one, range(11))
    assert one.rates == (100, 100, 100)
    looks(one, range(11, 13))
    assert all(usual < now < 100 for usual, now in zip(USUAL, one.rates, strict=True))
    looks(one, range(13, 200))
    assert one.rates == pytest.approx(USUAL)


def test_work_of_a_kind_keeps_its_figures():
    prompts, answers = measured(100, 100, 100), measured(100, 100, 100)
    for second in range(200):
        prompts.prompts.note()
        answers.answers.note()
        looks(prompts, range(second, second + 1))
        looks(answers, range(second, second + 1))
    assert prompts.rates == pytest.approx((100, 100, 2))
    assert answers.rates == pytest.approx((100, 1, 100))


def test_without_work_what_a_worker_says_is_no_news_and_with_work_it_is():
    one = measured(100, 100, 100)
    looks(one, range(100))
    faded = one.rates
    one.hear(cost(101, 101, 101), USUAL)
    assert one.rates == faded
    one.prompts.note()
    one.hear(cost(102, 102, 102), USUAL)
    assert one.rates == (102, 102, faded.sequence_ms)


def test_a_figure_that_cannot_be_changes_nothing():
    one = measured(20, 4, 3)
    one.hear(cost(float("nan"), float("inf"), 1e-320), USUAL)
    assert one.rates == (20, 4, 3)


def test_the_usual_is_the_middle_of_what_is_measured_now():
    fleet = [measured(10, ms, 0) for ms in (1, 2, 90)]
    assert usual_of(fleet, NEUTRAL) == (10, 2, NEUTRAL.sequence_ms)
    assert usual_of(fleet[1:], NEUTRAL).prompt_token_ms == 2, "of two the lower"
    for one in fleet:
        looks(one, range(100))
    assert usual_of(fleet, USUAL) is USUAL, "nobody measures"


# ---- hand-offs


def test_one_hiccup_is_nothing():
    costs = HandOffs()
    costs.note(50, 2000)
    assert (costs.hand_off_ms, costs.block_ms) == (0, NEUTRAL_BLOCK_MS)


def test_small_hand_offs_say_nothing_of_the_cost_of_a_block():
    costs = HandOffs()
    for _ in range(30):
        costs.note(2, 4)
    assert costs.block_ms == NEUTRAL_BLOCK_MS
    assert costs.hand_off_ms == pytest.approx(4 - 2 * NEUTRAL_BLOCK_MS)


def test_what_all_hand_offs_cost_is_no_cost_of_blocks():
    costs = HandOffs()
    for _ in range(10):
        costs.note(2, 4 + 2 * 0.5)
        costs.note(100, 4 + 100 * 0.5)
    assert costs.block_ms == pytest.approx(0.5, rel=0.05)
    assert costs.hand_off_ms == pytest.approx(4, rel=0.05)


def test_slow_hand_offs_are_forgotten_when_none_has_come_for_long():
    costs = HandOffs()
    for _ in range(9):
        costs.note(100, 1000)
    looks(costs, range(11))
    assert costs.block_ms == 10
    for second in range(11, 20):
        costs.note(2, 1)  # of another size
        looks(costs, range(second, second + 1))
    assert costs.block_ms == NEUTRAL_BLOCK_MS


@pytest.mark.parametrize(
    ("blocks", "exposed_ms"),
    [(0, 5), (-1, 5), (99, float("nan")), (99, float("inf")), (99, -1), (1, float("nan"))],
)
def test_a_hand_off_that_cannot_be_says_nothing(blocks, exposed_ms):
    costs = HandOffs()
    for _ in range(9):
        costs.note(blocks, exposed_ms)
    assert (costs.hand_off_ms, costs.block_ms) == (0, NEUTRAL_BLOCK_MS)
