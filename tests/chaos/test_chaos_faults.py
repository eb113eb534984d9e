"""Which faults come when, and whom they meet."""

from itertools import islice

import psutil
import pytest

from cluster.chaos.excuses import AFTER_S, NOTICED_S, excused, router_losses, spans
from cluster.chaos.faults import KINDS, Course, Strike, faults
from cluster.chaos.processes import Member
from cluster.chaos.siege import Siege
from kvrelay.lifecycle import IllegalTransitionError

EVERY_S = 20.0


def first(count: int, seed: int = 1):
    return list(islice(faults(KINDS, EVERY_S, seed), count))


def test_the_same_seed_brings_the_same_faults():
    assert first(30) == first(30)
    assert first(30) != first(30, seed=2)


def test_every_kind_comes_once_before_any_comes_twice():
    kinds = [fault.kind for fault in first(18)]
    assert all(sorted(kinds[at : at + 6]) == sorted(KINDS) for at in (0, 6, 12))


def test_faults_are_about_as_far_apart_as_was_asked():
    waits = [fault.wait_s for fault in first(100)]
    assert 15 <= min(waits) < 17
    assert 23 < max(waits) <= 25


def test_some_processes_are_stopped_for_so_long_that_they_are_given_up():
    stops = [fault.stop_s for fault in first(200)]
    assert 30 < stops.count(20.0) < 70
    assert max(seconds for seconds in stops if seconds != 20.0) <= 5.0


def course(kind: str, whole_max_s: float = 30.0) -> Course:
    return Course(faults([kind], EVERY_S, 1), 0.0, whole_max_s)


def test_a_kill_is_over_when_the_cluster_has_been_whole_for_a_while():
    one = course("kill-decode")
    assert one.due(10.0) is None
    fault = one.due(25.0)
    assert (fault.kills, fault.role) == (True, "decode")
    one.struck(77, 25.0)
    one.looked(False, 26.0)
    one.looked(True, 29.0)
    one.looked(False, 29.5)  # it only seemed so
    one.looked(True, 31.0)
    assert one.due(90.0) is None
    one.looked(True, 32.0)
    assert one.strikes == [Strike("kill-decode", 77, 25.0, 31.0)]
    assert one.due(90.0) is not None


def test_a_process_that_was_stopped_is_woken_before_anything_else_comes():
    one = course("stop-router")
    one.struck(77, 25.0)
    one.looked(True, 26.0)
    assert not one.wake_due(25.1)
    assert one.due(99.0) is None
    assert one.wake_due(30.1)
    one.woken(30.1)
    one.looked(True, 31.0)
    one.looked(True, 32.0)
    assert (one.strikes[0].whole_s, one.strikes[0].woken_s) == (31.0, 30.1)


def test_a_cluster_that_is_not_whole_in_time_is_told():
    one = course("kill-router", whole_max_s=5.0)
    one.struck(77, 25.0)
    one.looked(False, 29.0)
    assert one.due(60.0) is None
    one.looked(False, 30.0)
    assert one.strikes[0].whole_s is None
    assert one.due(60.0) is not None


def test_what_cannot_be_is_refused():
    with pytest.raises(IllegalTransitionError):
        course("kill-router").woken(1.0)


def test_restarts_that_meet_are_one_window():
    strikes = [Strike("", 1, 1.0, 3.0), Strike("", 1, 2.0, 2.5), Strike("", 1, 5.0)]
    assert spans(strikes, 9.0) == [(1.0, 3.0), (5.0, 9.0)]
    assert spans(strikes, 9.0, 2.5) == [(1.0, 11.5)]


WOKEN = Strike("stop-decode", 1, 10.0, 16.0, woken_s=15.0)
ENDED = Strike("stop-decode", 1, 10.0, 26.0, ended_s=20.0)


def test_a_stop_excuses_no_more_than_the_time_that_it_takes_to_notice():
    assert excused([WOKEN], 99.0, "grpc") == [(10.0, 10.0 + NOTICED_S)]
    assert excused([ENDED], 99.0, "grpc") == [(10.0, 10.0 + NOTICED_S), (20.0, 26.0)]
    short = Strike("stop-decode", 1, 10.0, 11.0, woken_s=10.8)
    assert excused([short], 99.0, "grpc") == [(10.0, 11.0)]


def test_a_kill_excuses_its_restart_and_so_does_a_stop_of_the_only_one_of_its_role():
    assert excused([Strike("kill-decode", 1, 10.0, 16.0)], 99.0, "grpc") == [(10.0, 16.0)]
    assert excused([WOKEN], 99.0, "grpc", {"decode"}) == [(10.0, 16.0)]


def test_over_http_nobody_notices_that_a_router_hangs():
    router = Strike("stop-router", 1, 10.0, 16.0, woken_s=15.0)
    assert excused([router], 99.0, "http") == [(10.0, 16.0)]
    assert excused([router], 99.0, "grpc") == [(10.0, 12.0)]
    assert excused([WOKEN], 99.0, "http") == [(10.0, 12.0)]


def test_a_router_may_be_lost_only_when_one_was_struck():
    assert router_losses([WOKEN, Strike("kill-prefill", 2, 1.0, 2.0)], 99.0) == []
    assert router_losses([Strike("kill-router", 3, 1.0, 2.0)], 99.0) == [(1.0, 2.0 + AFTER_S)]


# ---- carried out


class Double:
    """A process, and the cluster of it."""

    def __init__(self, *, gone: bool = False) -> None:
        self.pid = 77
        self.done: list[str] = []
        self.whole = False
        self._gone = gone

    def members(self, role: str) -> list[Member]:
        return [Member(role, "a:1", self)]

    def are_whole(self) -> bool:
        return self.whole

    def is_running(self) -> bool:
        return not self._gone

    def status(self) -> str:
        return "stopped"

    def _note(self, what: str) -> None:
        if self._gone:
            raise psutil.NoSuchProcess(self.pid)
        self.done.append(what)

    def kill(self) -> None:
        self._note("kill")

    def suspend(self) -> None:
        self._note("stop")

    def resume(self) -> None:
        self._note("wake")


def besiege(double: Double, kind: str, seconds: int) -> Siege:
    siege = Siege(double, course(kind))
    for at_s in range(seconds):
        siege.step(float(at_s), lambda: 9)
    return siege


def test_a_kill_waits_for_the_cluster_to_be_whole():
    double = Double()
    siege = besiege(double, "kill-prefill", 40)
    assert double.done == ["kill"]
    assert not siege.is_over
    double.whole = True
    for at_s in (40.0, 42.0):
        siege.step(at_s, None)
    assert siege.is_over
    assert siege.strikes[0].whole_s == 40.0


def test_a_stop_ends_by_itself():
    double = Double()
    besiege(double, "stop-decode", 32)
    assert double.done == ["stop", "wake"]


def test_a_process_that_is_ended_while_it_is_stopped_need_not_be_woken():
    double = Double()
    siege = Siege(double, course("stop-decode"))
    siege.step(30.0, lambda: 9)
    double._gone = double.whole = True
    for at_s in (30.1, 31.0, 33.0):
        siege.step(at_s, lambda: 9)
    assert double.done == ["stop"]
    strike = siege.strikes[0]
    assert (strike.whole_s, strike.woken_s, strike.ended_s) == (31.0, None, 30.1)


def test_nobody_stays_stopped_when_the_run_is_broken_off():
    double = Double()
    siege = Siege(double, course("stop-decode"))
    siege.step(30.0, lambda: 9)
    siege.close()
    siege.close()
    assert double.done == ["stop", "wake"]


def test_who_has_gone_meanwhile_is_no_strike():
    siege = besiege(Double(gone=True), "kill-decode", 60)
    assert siege.strikes == []
    assert siege.is_over


def test_a_fault_waits_a_while_for_streams_that_it_can_meet():
    double = Double()
    siege = Siege(double, course("kill-decode"))
    due_s = next(faults(["kill-decode"], EVERY_S, 1)).wait_s
    siege.step(due_s, lambda: 3)
    siege.step(due_s + 4.9, lambda: 3)
    assert double.done == []
    siege.step(due_s + 5.1, lambda: 3)
    assert double.done == ["kill"]


def test_nothing_is_struck_when_the_time_is_over():
    siege = Siege(Double(), course("kill-decode"))
    siege.step(99.0, None)
    assert siege.strikes == []
