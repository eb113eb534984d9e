"""Which answers another router may adopt, and whose each is: the table, and `Kept` over it."""

import itertools
import random

import pytest

from decode_worker import messages
from decode_worker.batch import Ending
from decode_worker.kept import TRANSITIONS, Kept, KeptAnswer, KeptEvent, KeptState, Name
from kvrelay.lifecycle import IllegalTransitionError
from kvrelay.wire import worker_pb2

KEPT_MS = 1000
NAME = ("somebody", "r1", 7)


def names(value: object) -> str:
    return getattr(value, "name", str(value))


@pytest.mark.parametrize(
    ("state", "event"), list(itertools.product(KeptState, KeptEvent)), ids=names
)
def test_every_event_in_every_state_is_in_the_table_or_raises(state, event):
    answer = KeptAnswer(("a", 1), ("a", 1), worker_pb2.Reserve(), state)
    if (state, event) in TRANSITIONS:
        answer.on(event)
        assert answer.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=f"{event.name} while {state.name}"):
            answer.on(event)
        assert answer.state is state


def make(kept_max: int = 10) -> Kept:
    return Kept(kept_ms=KEPT_MS, kept_max=kept_max)


def reserve(name: Name = NAME, **more: object) -> worker_pb2.Reserve:
    tenant, request_id, nonce = name
    return worker_pb2.Reserve(
        tenant=tenant,
        request_id=request_id,
        nonce=nonce,
        prompt_tokens=2,
        prompt_token_ids=[5, 6],
        **more,
    )


def begin(kept: Kept, key: tuple[str, int], name: Name = NAME) -> list[int]:
    """The answer's tokens, the first one there."""
    tokens = [10]
    kept.reserved(key, reserve(name))
    kept.begun(key, tokens)
    return tokens


def test_what_was_reserved_is_told_without_the_names_of_blocks():
    kept = make()
    asked = reserve(block_hashes=b"h" * 16, hash_root=b"r", tail_token_ids=[6], stop=["x"])
    kept.reserved(("a", 1), asked)
    kept.begun(("a", 1), [10])
    answer, before = kept.adopt(NAME, ("b", 7))
    told = messages.adopted(7, answer).adopted
    assert (told.key, told.reserve, list(told.token_ids)) == (7, reserve(stop=["x"]), [10])
    assert before == ("a", 1)


def test_an_orphan_goes_on_and_whoever_adopts_it_gets_what_it_has_by_then():
    kept = make()
    tokens = begin(kept, ("a", 1))
    kept.session_ended("a", 0.0)
    assert kept.holder(("a", 1)) is None
    tokens.append(11)
    answer, before = kept.adopt(NAME, ("b", 7))
    assert (answer.token_ids, answer.ending, before) == ([10, 11], Ending.NONE, None)
    assert (kept.holder(("a", 1)), kept.key_of(("b", 7))) == (("b", 7), ("a", 1))
    assert kept.expired(10 * KEPT_MS) == []
    kept.check()


def test_orphans_are_those_that_run_and_who_lost_its_router_first_comes_first():
    kept = make()
    for number, session in enumerate(("a", "b", "c", "d")):
        begin(kept, (session, number))
    kept.ended(("d", 3), Ending.EOS)
    for at_ms, (session, router) in enumerate((("c", "R"), ("a", ""), ("d", "R"), ("b", "R"))):
        kept.session_ended(session, at_ms, router)
    assert kept.orphans() == [("c", 2), ("a", 0), ("b", 1)]
    assert kept.orphans("R") == [("c", 2), ("b", 1)]
    kept.let_go(("c", 2))
    assert kept.orphans("R") == [("b", 1)]
    kept.check()


def test_a_prompt_that_is_not_here_yet_is_not_adopted_and_ends_with_its_router():
    kept = make()
    kept.reserved(("a", 1), reserve())
    assert kept.adopt(NAME, ("b", 7)) is None
    assert not kept.may_be_adopted(("a", 1))
    kept.session_ended("a", 0.0)
    assert len(kept) == 0


def test_another_client_that_chose_the_same_id_at_another_router_is_left_alone():
    kept = make()
    begin(kept, ("a", 1))
    begin(kept, ("b", 1), ("somebody", "r1", 8))
    kept.session_ended("a", 0.0)
    answer, before = kept.adopt(NAME, ("c", 7))
    assert (answer.key, before) == (("a", 1), None)
    assert kept.holder(("b", 1)) == ("b", 1)
    assert kept.adopt(("somebody", "r1", 9), ("c", 8)) is None
    kept.check()


def test_of_several_attempts_the_one_that_has_come_farthest_is_adopted():
    kept = make()
    begin(kept, ("a", 1)).append(11)
    kept.session_ended("a", 0.0)
    kept.reserved(("b", 1), reserve(answered=1))
    tokens = [11]
    kept.begun(("b", 1), tokens)
    assert kept.adopt(NAME, ("c", 7))[0].key == ("b", 1)  # as far, and newer
    kept.let_go(("b", 1))
    begin(kept, ("b", 2))
    assert kept.adopt(NAME, ("c", 8))[0].key == ("a", 1)


def test_only_the_same_tenant_finds_it():
    kept = make()
    begin(kept, ("a", 1))
    assert kept.adopt(("other", "r1", 7), ("b", 7)) is None
    assert kept.adopt(("somebody", "r2", 7), ("b", 7)) is None
    assert kept.holder(("a", 1)) == ("a", 1)


def test_the_newest_attempt_is_adopted():
    kept = make()
    begin(kept, ("a", 1))
    begin(kept, ("a", 2))
    kept.reserved(("a", 3), reserve())
    answer, _ = kept.adopt(NAME, ("b", 7))
    assert answer.key == ("a", 2)
    kept.let_go(("a", 2))
    answer, _ = kept.adopt(NAME, ("b", 8))
    assert answer.key == ("a", 1)
    kept.check()


def test_who_was_adopted_from_has_no_say_in_it_any_more():
    kept = make()
    begin(kept, ("a", 1))
    kept.adopt(NAME, ("b", 7))
    assert kept.key_of(("a", 1)) is None
    kept.session_ended("a", 0.0)
    assert kept.holder(("a", 1)) == ("b", 7)
    kept.session_ended("b", 5.0)
    assert kept.holder(("a", 1)) is None
    assert kept.expired(5.0 + KEPT_MS) == [("a", 1)]
    assert len(kept) == 0


def test_nobody_comes_for_it():
    kept = make()
    begin(kept, ("a", 1))
    begin(kept, ("a", 2), ("somebody", "r2", 7))
    kept.session_ended("a", 100.0)
    kept.ended(("a", 2), Ending.EOS)
    assert kept.expired(99.0 + KEPT_MS) == []
    assert kept.expired(100.0 + KEPT_MS) == [("a", 1)]  # the other one runs no more
    assert len(kept) == 0
    kept.check()


def test_a_whole_answer_is_kept_until_it_is_acknowledged():
    kept = make()
    tokens = begin(kept, ("a", 1))
    kept.acknowledge("a", [1])  # not whole yet
    tokens.append(11)
    kept.ended(("a", 1), Ending.LENGTH)
    assert kept.expired(1e9) == []
    answer, before = kept.adopt(NAME, ("b", 7))
    assert (answer.token_ids, answer.ending, before) == ([10, 11], Ending.LENGTH, ("a", 1))
    kept.acknowledge("a", [1, 2, 3])  # too late
    assert len(kept) == 1
    kept.acknowledge("b", [7])
    assert len(kept) == 0
    kept.check()


def test_whole_answers_make_room_oldest_first():
    kept = make(kept_max=2)
    for number in (1, 2, 3):
        begin(kept, ("a", number), ("somebody", f"r{number}", 7))
    for number in (2, 1, 3):
        kept.ended(("a", number), Ending.EOS)
    assert kept.crowded_out == 1
    assert kept.adopt(("somebody", "r2", 7), ("b", 7)) is None
    assert [kept.may_be_adopted(("a", n)) for n in (1, 2, 3)] == [True, False, True]
    kept.check()


def test_what_is_let_go_of_is_found_by_nobody():
    kept = make()
    begin(kept, ("a", 1))
    kept.let_go(("a", 1))
    kept.let_go(("a", 1))
    assert kept.adopt(NAME, ("b", 7)) is None
    assert kept.holder(("a", 1)) == ("a", 1)  # as one that was never kept


@pytest.mark.parametrize("seed", range(20))
def test_its_indexes_agree_whatever_happens(seed):
    dice = random.Random(seed)
    kept = make(kept_max=3)
    numbers, now_ms = itertools.count(1), 0.0
    pending: set = set()
    running: set = set()
    for _ in range(300):
        now_ms += dice.randrange(100)
        session = dice.choice("abc")
        name = ("somebody", f"r{dice.randrange(2)}", dice.randrange(2))
        match dice.randrange(8):
            case 0 | 1:
                key = (session, next(numbers))
                kept.reserved(key, reserve(name))
                pending.add(key)
            case 2 | 3 if pending:
                key = dice.choice(sorted(pending))
                pending.remove(key)
                kept.begun(key, [1])
                running.add(key)
            case 4 if running:
                key = dice.choice(sorted(running))
                running.remove(key)
                kept.ended(key, Ending.EOS)
            case 5:
                kept.adopt(name, (session, next(numbers)))
            case 6:
                kept.session_ended(session, now_ms)
                pending = {key for key in pending if key[0] != session}
            case 7 if running or pending:
                key = dice.choice(sorted(running | pending))
                kept.let_go(key)
                running.discard(key)
                pending.discard(key)
        running.difference_update(kept.expired(now_ms))
        kept.check()
        assert all(map(kept.may_be_adopted, running))
        assert not any(map(kept.may_be_adopted, pending))
