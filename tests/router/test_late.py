"""Who is late at which time, and turns that are nobody's any more."""

from dispatcher_bench import make

from router.late import Key, Late


def key(number: int) -> Key:
    return (True, 0, 0.0, number)


def names(late: Late, now_ms: float, most: int = 1) -> str:
    return " ".join(request.request_id for request in late.first(most, now_ms))


def late_of(*spans: tuple[float, float]) -> Late:
    """One for each, by the letters."""
    late = Late()
    for number, (span, name) in enumerate(zip(spans, "abcdef", strict=False)):
        late.add(key(number), make(name), *span)
    return late


def test_late_after_one_moment_and_up_to_another():
    late = late_of((100, 200), (1000, 2000))
    for now_ms, is_late in ((100, False), (101, True), (200, True), (201, False)):
        assert names(late, now_ms) == ("a b" if is_late else "a")


def test_who_never_is_late_is_never_turned():
    late = late_of((300, 300), (400, 100), (1000, 2000))
    assert names(late, 350) == "a"
    assert not [turn for turn in late._turns if turn[1] != key(2)]


def test_a_turn_of_one_that_is_gone_does_nothing():
    late = late_of((100, 200), (150, 400))
    late.drop(key(0))
    assert names(late, 120) == "b"
    assert names(late, 160, most=9) == "b"
    late.drop(key(1))
    assert names(late, 500) == ""
    assert not late._turns
    late.check({})


def test_one_that_is_gone_while_it_is_late():
    late = late_of((100, 200), (150, 400))
    assert names(late, 110) == "a b"
    late.drop(key(0))
    assert names(late, 300) == "b"
    assert names(late, 401) == "b"
    assert not late._turns


def test_the_same_key_queued_again_is_late_by_its_new_wait():
    """Also when the first wait's turns come while the second lasts."""
    late = late_of((100, 200), (5000, 6000))
    again = make("again")
    late.drop(key(0))
    late.add(key(0), again, 150, 400)
    for now_ms, is_late in ((120, False), (160, True), (250, True), (401, False)):
        assert names(late, now_ms) == ("again b" if is_late else "again"), now_ms
    late.drop(key(0))
    assert names(late, 500) == "b"


def test_the_same_key_queued_again_while_it_was_late():
    late = late_of((100, 200), (5000, 6000))
    assert names(late, 150) == "a b"
    late.drop(key(0))
    late.add(key(0), make("again"), 300, 500)
    for now_ms, is_late in ((160, False), (250, False), (301, True), (501, False)):
        assert names(late, now_ms) == ("again b" if is_late else "again"), now_ms


def test_a_wait_whose_time_to_be_late_has_come_already_is_late_at_once():
    late = late_of((100, 900), (5000, 6000))
    late.drop(key(0))
    late.add(key(0), make("again"), 100, 900)
    assert names(late, 300) == "again b"
    assert names(late, 901) == "again"


def test_a_wait_that_was_late_all_its_time_between_two_looks_was_not_seen():
    late = late_of((100, 200), (5000, 6000))
    assert names(late, 300) == "a"
    assert [turn[1] for turn in late._turns] == [key(1)]


def test_both_are_in_the_order_of_the_queue():
    late = late_of((900, 1000), (100, 500), (900, 1000), (100, 500))
    assert names(late, 200, most=1) == "a b"
    assert names(late, 200, most=2) == "a b c d"
