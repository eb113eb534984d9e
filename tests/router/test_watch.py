"""Which workers have said nothing for too long, and whose lateness that is."""

from router.watch import TICKS, Watch

SILENCE = 600.0
TICK = SILENCE / TICKS


def test_a_worker_is_found_silent_within_a_tick_of_its_limit_and_not_before():
    watch = Watch(SILENCE)
    watch.tick(0)
    watch.heard("w", 30)
    found_at = next(n * TICK for n in range(1, 20) if watch.tick(n * TICK) == ["w"])
    assert 30 + SILENCE < found_at <= 30 + SILENCE + TICK


def test_whatever_it_says_is_a_sign_of_life():
    watch = Watch(SILENCE)
    for n in range(50):
        watch.heard("talks", n * TICK)
        watch.heard("seldom", n // 5 * 5 * TICK)
        assert watch.tick(n * TICK) == []


def test_a_worker_that_is_gone_is_watched_no_more():
    watch = Watch(SILENCE)
    watch.heard("w", 0)
    watch.tick(0)
    watch.gone("w")
    watch.gone("never here")
    assert [watch.tick(n * TICK) for n in range(1, 20)] == [[]] * 19


def test_time_in_which_the_router_was_held_up_is_nobodys_silence():
    watch = Watch(SILENCE)
    watch.heard("w", 0)
    watch.tick(0)
    watch.tick(TICK)
    assert watch.tick(100 * TICK) == [], "what was said meanwhile has not been read yet"
    late = 100 * TICK
    watch.heard("w", late + 1)
    assert [watch.tick(late + n * TICK) for n in range(1, 7)] == [[]] * 6
    assert watch.tick(late + 8 * TICK) == ["w"]


def test_a_loop_that_is_always_a_little_late_still_finds_the_silent():
    watch = Watch(SILENCE)
    watch.heard("w", 0)
    watch.tick(0)
    found_at = next(n for n in range(1, 20) if watch.tick(n * 1.5 * TICK) == ["w"]) * 1.5 * TICK
    assert SILENCE < found_at <= SILENCE + 1.5 * TICK


def test_workers_that_come_before_the_first_tick_are_watched_from_it():
    watch = Watch(SILENCE)
    watch.heard("w", 5_000)
    assert watch.tick(90_000) == []
    assert watch.tick(90_000 + TICK) == []


def test_a_router_that_stood_still_knows_it_until_its_sessions_have_had_time_to_break():
    watch = Watch(SILENCE)
    assert not watch.was_held_up(100 * TICK), "not even the first tick has been"
    watch.tick(0)
    assert not watch.was_held_up(2 * TICK)
    assert watch.was_held_up(3 * TICK), "before the late tick comes, too"
    watch.tick(3 * TICK)
    for n in range(4, 9):
        assert watch.was_held_up(n * TICK)
        watch.tick(n * TICK)
    assert not watch.was_held_up(9 * TICK)
