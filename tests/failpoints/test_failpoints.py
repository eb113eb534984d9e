import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.cli import main
from kvrelay.config import WorkerConfig
from kvrelay.failpoints import Action, Failpoint, FailpointError, Failpoints, Point

ROOT = Path(__file__).parents[2]
WAIT_S = 60

# A process that hits a place on a thread, as engines do, and says what it has survived.
_HITS = """
import sys, threading
from kvrelay.failpoints import Failpoint, Failpoints

points = Failpoints([Failpoint.model_validate_json(sys.argv[1])])

def hit():
    for number in range(1, 4):
        points.hit(points._armed[0].point)
        print(number, flush=True)

thread = threading.Thread(target=hit)
thread.start()
thread.join()
"""


def config(**settings) -> WorkerConfig:
    return WorkerConfig(
        model_path=Path("m"), socket_dir=Path("s"), cluster_key="k" * 16, **settings
    )


def armed(action: Action, *, hit: int = 2, hang_ms: int = 0) -> Failpoint:
    return Failpoint(point=Point.DECODE_RECEIVED, action=action, hit=hit, hang_ms=hang_ms)


def process(failpoint: Failpoint) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _HITS, failpoint.model_dump_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_nothing_is_armed_unless_told():
    assert config().failpoints == ()
    points = Failpoints()
    for point in Point:
        points.hit(point)
    assert not points._hits


def test_it_fails_at_the_hit_that_is_armed_and_at_no_other():
    points = Failpoints([armed(Action.FAIL)])
    points.hit(Point.DECODE_RECEIVED)
    points.hit(Point.DECODE_FINISH)
    with pytest.raises(FailpointError, match=r"decode\.received, hit 2"):
        points.hit(Point.DECODE_RECEIVED)
    points.hit(Point.DECODE_RECEIVED)


def test_a_place_may_be_armed_for_several_hits():
    points = Failpoints([armed(Action.FAIL, hit=1), armed(Action.FAIL, hit=2)])
    for _ in range(2):
        with pytest.raises(FailpointError):
            points.hit(Point.DECODE_RECEIVED)
    points.hit(Point.DECODE_RECEIVED)


def test_a_hang_of_a_given_time_is_over_by_itself(monkeypatch):
    slept_s: list[float] = []
    monkeypatch.setattr("kvrelay.failpoints.time.sleep", slept_s.append)
    points = Failpoints([armed(Action.HANG, hit=1, hang_ms=250)])
    points.hit(Point.DECODE_RECEIVED)
    assert slept_s == [0.25]


def test_kill_ends_the_process_there():
    with process(armed(Action.KILL)) as ended:
        assert ended.communicate(timeout=WAIT_S)[0] == "1\n"
    assert ended.returncode == -signal.SIGKILL


def test_hang_stops_the_thread_there_until_somebody_continues_the_process():
    with process(armed(Action.HANG)) as stopped:
        limit = threading.Timer(WAIT_S, stopped.kill)
        limit.start()
        try:
            _until_it_stops(stopped)
            assert stopped.stdout is not None
            assert stopped.stdout.readline() == "1\n"
            stopped.send_signal(signal.SIGCONT)
            assert stopped.communicate()[0] == "2\n3\n"
        finally:
            limit.cancel()
    assert stopped.returncode == 0


def _until_it_stops(process: "subprocess.Popen[str]") -> None:
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)


def test_a_config_with_failpoints_goes_to_a_worker_as_json():
    given = config(failpoints=(armed(Action.KILL), armed(Action.HANG, hang_ms=5)))
    assert WorkerConfig.model_validate_json(given.model_dump_json()) == given


@pytest.mark.parametrize(
    "wrong", [{"point": "decode.lunch"}, {"action": "wait"}, {"hit": 0}, {"hang_ms": -1}, {"x": 1}]
)
def test_what_is_no_failpoint_is_refused(wrong):
    right = {"point": "decode.begin", "action": "fail"}
    with pytest.raises(ValidationError):
        config(failpoints=({**right, **wrong},))


def options() -> Iterator[str]:
    """Of every command, as they are written."""
    commands = [main]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        for parameter in command.params:
            yield from parameter.opts


def test_neither_a_message_nor_the_command_line_reaches_them():
    contracts = list((ROOT / "proto").glob("*.proto"))
    assert contracts
    for contract in contracts:
        assert "failpoint" not in contract.read_text().lower()
    named = list(options())
    assert "--transport" in named
    assert not [option for option in named if "fail" in option]
    sources = [*(ROOT / "cluster").glob("*.py"), *(ROOT / "router").rglob("*.py")]
    assert not [source for source in sources if "failpoint" in source.read_text()]
