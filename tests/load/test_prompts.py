"""Prompts share what their prefixes say, and nothing else."""

from cluster.load.prompts import Prompts, words
from cluster.load.reading import Reading
from cluster.workload.asks import Ask

PROMPTS = Prompts(seed=1, block_tokens=16, ids_end=5000)


def tokens(prompt_tokens: int, prefix: tuple[int, ...], number: int) -> list[int]:
    return PROMPTS.tokens(Ask(0.0, prompt_tokens, 1, prefix), number).tolist()


def test_equal_ids_give_equal_tokens_and_others_differ() -> None:
    one, other = tokens(50, (7, 8), 0), tokens(60, (7, 9), 1)
    assert (len(one), len(other)) == (50, 60)
    assert one[:16] == other[:16]
    assert one[16:32] != other[16:32]
    assert one[32:] != tokens(50, (7, 8), 1)[32:]  # beyond its prefix, each request's own
    assert one == tokens(50, (7, 8), 0)
    assert one != Prompts(2, 16, 5000).tokens(Ask(0.0, 50, 1, (7, 8)), 0).tolist()


def test_the_last_id_may_stand_for_part_of_a_block() -> None:
    assert tokens(20, (7, 8), 0) == tokens(32, (7, 8), 1)[:20]
    assert tokens(3, (-7,), 0) != tokens(3, (7,), 0)
    assert len(tokens(3, (1 << 80,), 0)) == 3


def test_ids_are_within_the_vocabulary_and_beyond_its_special_tokens() -> None:
    drawn = tokens(5000, (), 0)
    assert min(drawn) >= 100
    assert max(drawn) < 5000
    assert max(Prompts(0, 16, 40).tokens(Ask(0.0, 500, 1), 0)) < 40


def test_words_are_many_and_plain() -> None:
    assert len(words()) > 200
    assert all(word.isalpha() for word in words())


def test_a_message_shares_its_gap_out_over_its_tokens() -> None:
    reading = Reading(Ask(1.0, 10, 7), sent_s=1.0)
    for now_s, count in ((2.0, 2), (2.5, 1), (3.5, 4)):
        reading.came(now_s, count)
    reading.ended(7, cached_tokens=8)
    outcome = reading.outcome
    assert list(outcome.gaps_s) == [0.5, 0.25, 0.25, 0.25, 0.25]
    assert (outcome.ttft_ms, outcome.tokens, outcome.cached_tokens) == (1000, 7, 8)
    assert outcome.tpot_ms == 1500 / 6


def test_an_answer_without_tokens_has_failed() -> None:
    reading = Reading(Ask(0.0, 1, 1), 0.0)
    reading.ended(0)
    assert reading.outcome.error
    assert not reading.outcome.ended
