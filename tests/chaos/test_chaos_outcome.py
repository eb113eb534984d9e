"""What a run came to: figures, verdict, the page; growth of memory; what is left."""

import json
import os
import re
from dataclasses import replace

import pytest

from cluster.bench.plot import check_plot
from cluster.bench.report import BenchError
from cluster.chaos.asks import MIXES, make_asks
from cluster.chaos.faults import Strike
from cluster.chaos.leaks import Leaks, _too_many
from cluster.chaos.outcome import Moment, Outcome
from cluster.chaos.page import write_page
from cluster.chaos.samples import Growth, Samples, growth_per_minute
from cluster.chaos.streams import Stream

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
    return Outcome({"seed": 3}, "again", ASKS, streams, moments=moments, **given)


def rows(of: Outcome) -> dict[str, float]:
    return {row.name: row.value for row in of.report().rows}


def test_a_run_without_a_fault_of_ours_passes():
    good = outcome(stream(0), stream(1, resumed=1), stream(2, asked_again=2))
    assert good.passed
    figures = rows(good)
    assert figures["requests/answered"] == 3
    assert (figures["requests/resumed"], figures["requests/asked-again"]) == (1, 2)
    assert figures["tokens/streamed"] == 9
    assert figures["ttft/p50"] == pytest.approx(500)
    assert figures["faults/kill-decode"] == 1
    assert figures["restart/decode-max"] == pytest.approx(1.8)
    assert figures["stall/streams"] == 2  # the first had ended
    assert figures["stall/max"] == pytest.approx(0.5)
    assert figures["stall-beyond/max"] == pytest.approx(0.2)
    assert any("goal met: stall-beyond/p99 0.20 s" in note for note in good.report().notes)


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
        (outcome(leaks=Leaks(shm=["psm_1"])), "leaked: /dev/shm/psm_1"),
        (outcome(leaks=Leaks(unread=["prefill worker a:1"])), "could not be read"),
    ],
)
def test_whatever_is_not_as_promised_fails_the_run_and_is_told(made, line):
    assert not made.passed
    assert any(line in failure for failure in made.failures())
    assert any(line in note for note in made.report().notes)


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
    assert "and 30 more" in bad.report().notes
    assert len(json.loads(bad.to_json())["failures"]) == 50


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
    assert outcome(growth=[replace(GROWN, minutes=1.0)]).passed  # too short to say
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


# ---- what is left, what is asked


def test_more_processes_than_before_are_a_leak_but_for_those_ray_keeps():
    then = {1: "router", 2: "router.template", 3: "ray::IDLE"}
    now = {4: "router", 5: "router.template", 6: "router.template", 7: "ray::IDLE", 8: "ray::IDLE"}
    assert _too_many(then, now) == ["router.template"]
    assert _too_many(now, then) == []


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
