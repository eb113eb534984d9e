from random import Random

import pytest

from router.ranking import Ranking


def test_the_least_come_first_and_equal_ones_by_number():
    ranking = Ranking()
    for number, figure in ((3, 2.0), (1, 5.0), (2, 2.0), (4, 9.0)):
        ranking.put(number, figure)
    assert ranking.first(3) == [2, 3, 1]
    assert ranking.first(9) == [2, 3, 1, 4]


def test_a_figure_that_goes_away_and_comes_back_counts_once():
    ranking = Ranking()
    ranking.put(1, 1.0)
    ranking.put(2, 2.0)
    ranking.put(1, 3.0)
    ranking.put(1, 1.0)
    assert ranking.first(5) == [1, 2]
    assert ranking.first_of({1, 2}, 1) == [1]


def test_whoever_was_dropped_is_nowhere():
    ranking = Ranking()
    ranking.put(1, 1.0)
    ranking.put(2, 2.0)
    ranking.drop(1)
    assert ranking.first(5) == [2]


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_order_of_the_newest_figures(seed):
    dice, ranking, figures = Random(seed), Ranking(), {}
    for _ in range(3000):
        number, what = dice.randrange(30), dice.random()
        if what < 0.8:
            figures[number] = dice.choice((0.0, 1.0, 1.5, float("inf"), dice.random()))
            ranking.put(number, figures[number])
        elif number in figures:
            del figures[number]
            ranking.drop(number)
        count = dice.randrange(6)
        order = sorted(figures, key=lambda known: (figures[known], known))
        assert ranking.first(count) == order[:count]
        among = {known for known in order if known % 3 == 0}
        assert ranking.first_of(among, count) == [n for n in order if n in among][:count]


def test_old_figures_take_no_memory():
    ranking = Ranking()
    for figure in range(10_000):
        ranking.put(figure % 7, -float(figure))
    assert len(ranking._entries) < 100
