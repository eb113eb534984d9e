"""What a run came to: figures, verdict, the page; growth of memory; what is left."""

import json
import mmap
import os
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cluster.bench.plot import check_plot
from cluster.bench.report import BenchError
from cluster.chaos.asks import MIXES, make_asks
from cluster.chaos.faults import Strike
from cluster.chaos.goals import Goals, goals
from cluster.chaos.leaks import Leaks, _odd, pools_of
from cluster.chaos.outcome import Moment, Outcome
from cluster.chaos.page import write_page
from cluster.chaos.roll import Roll
from cluster.chaos.samples import Growth, Samples, growth_per_minute
from cluster.chaos.streams import Stream
from cluster.chaos.supervisor import supervised

NONE = {"prefill": 0, "decode": 0, "router": 0}
ASKS = [{"number": 0, "kind": "grpc chat greedy", "prompt": "x", "options": {}}]


def stream(number: int, **more) -> Stream:
    one = Stream(number, 0, 10.0 + number, outcome="answered", trouble="")
    one.came(10.5 + number, 3)
    one.end(11.0 + number)
    for name, value in more.items():
        setattr(one, name, value)
    return one


def outcome(*streams: Stream, **more) -> Outcome:
    moments = [
        Moment(float(at), 100 * at, 2, at, {"prefill": 2, "decode": 2, "router": 2})
        for at in range(10, 20)
    ]
    given = {"strikes": [Strike("kill-decode", 7, 11.2, 13.0)], **more}
    streams = streams or (stream(0),)
    return Outcome({"seed": 3}, "again", ASKS, streams, moments=moments, **given)


def rows(of: Outcome) -> dict[str, float]:
    return {row.name: row.value for row in of.report().rows}


def test_a_run_without_a_fault_of_ours_passes():
    router = Strike("kill-router", 8, 11.5, 12.9)
    struck = [Strike("kill-decode", 7, 11.2, 13.0), router]
    good = outcome(stream(0), stream(1, resumed=1), stream(2, asked_again=2), strikes=struck)
    assert list(good.failures()) == []
    assert good.passed
    figures = rows(good)
    assert figures["requests/answered"] == 3
    assert (figures["requests/resumed"], figures["requests/asked-again"]) == (1, 2)
    assert figures["tokens/streamed"] == 9
    assert figures["ttft/p50"] == pytest.approx(500)
    assert figures["faults/kill-decode"] == 1
    assert figures["restart/decode-max"] == pytest.approx(1.8)
    assert figures["stall/streams"] == 2  # the first had ended
    assert "stall-stop/max" not in figures
    assert figures["stall/max"] == pytest.approx(0.5)
    assert figures["stall-beyond/max"] == pytest.approx(0.2)
    assert any("goal met: stall-beyond/p99 is 0.20 s" in note for note in good.report().notes)


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (
            outcome(stream(4, outcome="wrong", trouble="token 2 is 9")),
            "request 4 (ask 0, grpc chat greedy) wrong: token 2 is 9",
        ),
        (outcome(stream(4, outcome="lost", trouble="UNAVAILABLE")), "lost: UNAVAILABLE"),
        (outcome(strikes=[Strike("kill-router", 7, 1.0)]), "not whole again after kill-router"),
        (outcome(leaks=Leaks({"decode worker a:1": 3})), "leaked: 3 blocks of decode worker a:1"),
        (outcome(leaks=Leaks(requests=2)), "leaked: 2 requests at routers"),
        (outcome(leaks=Leaks(pools=1)), "leaked: 1 KV pools in shared memory"),
        (outcome(leaks=Leaks(processes=["gcc 7 after the end"])), "a process: gcc 7 after the end"),
        (Outcome({}), "only 0 requests ended as they should, 1 at least"),
        (outcome(goals=Goals(answers_min=2)), "only 1 requests ended as they should, 2 at least"),
        (outcome(goals=Goals(strikes_min=2)), "only 1 faults were done, 2 at least"),
        (outcome(goals=Goals(growths={"decode": 2})), "growth is known of 0 decode processes only"),
        (outcome(deaths=["decode 9 ended by itself"]), "decode 9 ended by itself"),
        (outcome(stream(1, resumed=1)), "request 1 lost its router, which nobody had struck"),
        (outcome(stream(1, asked_again=1)), "request 1 lost its router, which nobody had struck"),
        (
            outcome(stream(0, resumed=1), strikes=[Strike("kill-router", 7, 30.0, 31.0)]),
            "request 0 lost its router, which nobody had struck",
        ),
        (outcome(leaks=Leaks(unread=["prefill worker a:1"])), "could not be read"),
    ],
)
def test_whatever_is_not_as_promised_fails_the_run_and_is_told(made, line):
    assert not made.passed
    assert any(line in failure for failure in made.failures())
    assert any(line in note for note in made.report().notes)


def slow(asked_s: float, silent_s: float, ask: int = 0) -> Stream:
    """Its first token takes so long."""
    one = Stream(1, ask, asked_s, outcome="answered", trouble="")
    one.came(asked_s + silent_s, 3)
    one.end(asked_s + silent_s)
    return one


def test_a_stall_beyond_the_goal_fails_the_run():
    kill = [Strike("kill-decode", 7, 11.0, 13.0)]
    assert outcome(slow(10.0, 4.9), strikes=kill).passed  # 4.9 s, of which 2 in the restart
    missed = outcome(slow(10.0, 4.9), slow(12.0, 4.5), strikes=kill)
    assert list(missed.failures()) == ["stall-beyond/p99 is 3.50 s, 3 s at most"]


def test_a_stream_that_begins_just_after_a_restart_is_judged():
    kill = [Strike("kill-decode", 7, 11.0, 13.0)]
    assert not outcome(slow(14.0, 4.0), strikes=kill).passed


def test_a_hang_that_nobody_notices_fails_the_run():
    stop = [Strike("stop-decode", 7, 11.0, 17.0, woken_s=16.5)]
    assert outcome(slow(11.0, 4.0), strikes=stop).passed
    unnoticed = outcome(slow(11.0, 5.5), strikes=stop)
    assert set(unnoticed.failures()) == {
        "stall-beyond/p99 is 3.50 s, 3 s at most",
        "stall-stop/p99 is 5.50 s, 5 s at most",
    }
    assert rows(unnoticed)["stall-stop/max"] == pytest.approx(5.5)
    assert outcome(slow(11.0, 5.5), strikes=stop, goals=Goals(alone=frozenset({"decode"}))).passed


def test_a_run_owes_as_much_as_was_asked_for():
    counts = {"prefill": 2, "decode": 2, "router": 1}
    soak = goals(seconds=1200, rate=20, kill_every_s=0, soak=True, counts=counts)
    assert (soak.answers_min, soak.strikes_min) == (20_000, 0)
    assert soak.growths == {**counts, "serving": 1}
    struck = {"decode", "router"}
    chaos = goals(seconds=600, rate=4, kill_every_s=20, soak=False, counts=counts, struck=struck)
    assert (chaos.answers_min, chaos.strikes_min) == (600, 15)
    assert (chaos.growths, chaos.alone) == ({"prefill": 2}, {"router"})
    short = goals(seconds=3, rate=0.1, kill_every_s=3, soak=False, counts=counts)
    assert (short.answers_min, short.strikes_min) == (1, 1)


# ---- who was there


def test_a_process_that_ends_by_itself_is_told():
    roll = Roll()
    roll.look({5: "decode", 6: "decode", 7: "router"}, 10.0)
    roll.look({6: "decode", 7: "router"}, 12.0)
    roll.look({7: "router", 8: "decode"}, 13.0)
    roll.look({8: "decode"}, 14.0)
    strikes = [Strike("kill-decode", 6, 12.5, 15.0)]
    assert roll.deaths(strikes, 10.0) == [
        "decode 5 ended by itself, 2.0 s after the start",
        "router 7 ended by itself, 4.0 s after the start",
    ]


def test_a_process_that_was_woken_may_not_end_later():
    roll = Roll()
    roll.look({5: "decode"}, 10.0)
    roll.look({}, 20.0)
    stop = Strike("stop-decode", 5, 11.0, 13.0, woken_s=12.0)
    assert len(roll.deaths([stop], 0.0)) == 1
    assert roll.deaths([replace(stop, whole_s=22.0, woken_s=None, ended_s=19.9)], 0.0) == []
    assert len(roll.deaths([replace(stop, at_s=21.0, whole_s=None)], 0.0)) == 1


def test_a_supervisor_that_ends_is_told_whatever_has_ended_it():
    def watch(stopping: threading.Event) -> None:
        raise RuntimeError("a bug")

    with supervised(SimpleNamespace(watch=watch)) as supervisor:
        supervisor.thread.join()
        with pytest.raises(RuntimeError, match="a bug"):
            supervisor.check()


def test_the_object_has_what_a_program_needs_to_play_it_again():
    bad = outcome(stream(4, outcome="repeated", trouble="token 5 came before"))
    told = json.loads(bad.to_json())
    assert told["passed"] is False
    assert told["machine"]["seed"] == 3
    assert told["failed_asks"] == ASKS
    assert told["faults"][0]["kind"] == "kill-decode"
    assert {"name", "value", "unit"} <= told["rows"][0].keys()


def test_many_failures_are_told_shortly():
    bad = outcome(*(stream(n, outcome="lost", trouble="gone") for n in range(50)))
    assert "and 31 more" in bad.report().notes
    assert len(json.loads(bad.to_json())["failures"]) == 51  # and that none was answered


# ---- the page


def test_the_page_needs_nothing_else_and_shows_every_fault(tmp_path):
    file = tmp_path / "r.html"
    asked = outcome(stream(0), stream(1, outcome="lost", trouble="<b>"))
    write_page(asked, file)
    page = file.read_text()
    assert "<span class='failed'>" in page
    assert "&lt;b&gt;" in page
    assert page.count("<svg") == 1
    assert "kill-decode" in page
    assert "requests/lost" in page
    outside = re.findall(r"(?:src|href)=['\"](?!#)[^'\"]*", page)
    assert outside == []


def test_a_page_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(BenchError, match=r"--report .*Is a directory"):
        write_page(outcome(), tmp_path)


def test_a_page_has_a_name_that_says_so(tmp_path):
    with pytest.raises(BenchError, match=r"--report .*ends? in \.html"):
        check_plot(tmp_path / "r.png", option="--report", suffix=".html")


# ---- growth


def test_growth_is_that_of_most_points_whatever_a_few_are():
    at_s = [5.0 * n for n in range(60)]
    steady = [100 + at / 60 * 0.5 for at in at_s]
    steady[::9] = [300.0] * len(steady[::9])
    assert growth_per_minute(at_s, steady) == pytest.approx(0.5, abs=0.05)
    assert growth_per_minute(at_s, [7.0] * 60) == 0
    assert growth_per_minute(at_s[:3], steady[:3]) == 0


GROWN = Growth("decode", 7, {"MB": 0.3, "fds": 0.0, "threads": 0.0}, {"MB": 99.0}, 10.0)


def test_growth_beyond_the_goal_fails_the_run():
    assert list(outcome(growth=[GROWN]).failures()) == [
        "decode 7 grows by 0.30 MB/min, 0.2 at most"
    ]
    more = {"MB": 0.1, "fds": 0.15, "threads": 0.25}
    assert list(outcome(growth=[replace(GROWN, per_minute=more)]).failures()) == [
        "decode 7 grows by 0.25 threads/min, 0.2 at most"
    ]
    assert outcome(growth=[replace(GROWN, minutes=1.0)]).passed  # too short to say of memory
    short = replace(GROWN, minutes=0.5, per_minute={"MB": 9.0, "fds": 17.0, "threads": 15.0})
    assert list(outcome(growth=[short]).failures()) == [
        "decode 7 grows by 17.00 fds/min, 16 at most"
    ]
    assert not outcome(growth=[replace(GROWN, minutes=0.0)]).passed  # nothing is known
    struck = replace(GROWN, of_memory=False)
    assert outcome(growth=[struck]).passed
    leaking = replace(struck, per_minute={"MB": 0.0, "fds": 0.9, "threads": 0.0})
    assert not outcome(growth=[leaking]).passed
    assert outcome(growth=[replace(GROWN, name="raylet")]).passed  # Ray's own


def test_only_who_was_there_all_the_time_is_measured():
    samples = Samples()
    own, gone, late = os.getpid(), (1 << 22) + 1, os.getppid()  # Linux has no process of 2**22
    for at_s in range(20):
        names = {own: "serving", gone: "decode"}
        samples.take({**names, late: "decode"} if at_s > 6 else names, float(at_s))
    (growth,) = samples.growth(5.0)
    assert (growth.name, growth.pid) == ("serving", own)
    assert growth.last["MB"] > 1
    assert growth.minutes == pytest.approx(14 / 60)
    assert samples.growth(16.0)[0].minutes == 0


# ---- what is left, what is asked


def test_more_processes_than_before_are_a_leak_but_for_those_ray_keeps():
    then = {1: "router", 2: "router.template", 3: "ray::IDLE"}
    now = {4: "router", 5: "router.template", 6: "router.template", 7: "ray::IDLE", 8: "ray::IDLE"}
    assert _odd(then, now, NONE) == ["router.template"]
    assert _odd(now, then, NONE) == []


def test_a_worker_too_many_and_one_too_few_are_leaks():
    then = {1: "decode", 2: "ray::IDLE"}
    twice = {1: "decode", 3: "ray::WorkerActor"}  # one that the cluster does not know any more
    assert _odd(then, twice, {**NONE, "decode": 1}) == ["ray::WorkerActor"]
    assert _odd(then, {2: "ray::IDLE"}, {**NONE, "decode": 1}) == ["1 decode too few"]


def test_shared_pools_are_seen_open_and_mapped():
    before = set(pools_of(os.getpid()))
    descriptor = os.memfd_create("kvrelay-kv")
    os.ftruncate(descriptor, 4096)
    inode = os.fstat(descriptor).st_ino
    assert set(pools_of(os.getpid())) - before == {inode}
    mapped = mmap.mmap(descriptor, 4096)
    os.close(descriptor)
    assert set(pools_of(os.getpid())) - before == {inode}
    mapped.close()
    assert set(pools_of(os.getpid())) == before


def asks(seed: int = 1, **more):
    given = {"vocab_size": 300, "tokens_max": 4096, "chats": True, "http_share": 0.2, **more}
    return make_asks(64, seed, MIXES["chaos"], **given)


def test_the_same_seed_asks_the_same_and_all_kinds_are_asked():
    assert asks() == asks()
    assert asks() != asks(seed=2)
    kinds = {ask.kind for ask in asks()}
    assert {"grpc chat sampled", "grpc completion greedy", "http completion sampled"} <= kinds
    assert any("stop strings" in kind for kind in kinds)


def test_what_is_asked_fits_the_model():
    for ask in asks(tokens_max=256, chats=False):
        assert not ask.chat
        assert ask.options["max_tokens"] <= 64
        assert isinstance(ask.prompt, str) or len(ask.prompt) <= 72
