"""What workers on one host tell each other of their cores."""

from pathlib import Path

import numpy as np
import pytest

from kvrelay.engine.cores import _GUEST_MS_MAX, _STEP_MS_MAX, CoreBoard, clock_ms, open_board
from kvrelay.engine.kernels.threads import write_flag


class Clock:
    def __init__(self) -> None:
        self.now_ms = 5000.0

    def __call__(self) -> float:
        return self.now_ms


def test_neighbours_see_each_other_compute(tmp_path: Path) -> None:
    path = tmp_path / "cores"
    prefill, decode = CoreBoard(path, [0, 1], [2, 3]), CoreBoard(path, [2, 3], [0, 1])
    other = CoreBoard(path, [4], [5])
    assert not decode.neighbour_computes
    prefill.claim()
    assert decode.neighbour_computes
    assert not prefill.neighbour_computes
    assert not other.neighbour_computes
    decode.claim()
    assert prefill.neighbour_computes
    prefill.release()
    assert not decode.neighbour_computes


def test_who_starts_anew_computes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cores"
    died, decode = CoreBoard(path, [0], [1]), CoreBoard(path, [1], [0])
    died.claim()
    assert decode.neighbour_computes
    CoreBoard(path, [0], [1])
    assert not decode.neighbour_computes


def test_nobody_goes_by_a_neighbour_that_stands_still(tmp_path: Path) -> None:
    path, clock = tmp_path / "cores", Clock()
    died, decode = CoreBoard(path, [0], [1], clock), CoreBoard(path, [1], [0], clock)
    died.claim()
    clock.now_ms += _STEP_MS_MAX - 1
    assert decode.neighbour_computes
    clock.now_ms += 2
    assert not decode.neighbour_computes


# ---- guests


def test_guests_are_on_the_neighbours_cores(tmp_path: Path) -> None:
    board = CoreBoard(tmp_path / "cores", [0], [1, 2])
    assert [guest.core for guest in board.guests()] == [1, 2]


def looks(board: CoreBoard, monkeypatch: pytest.MonkeyPatch) -> int:
    """At a guest that has something in hand, before a step begins."""
    slept: list[int] = []
    monkeypatch.setattr("kvrelay.engine.cores.sleep_us", slept.append)
    board.claim()
    return len(slept)


def test_an_owner_waits_for_a_guest_but_not_twice_for_one_that_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cores"
    owner = CoreBoard(path, [0], [1])
    borrower = CoreBoard(path, [1], [0])
    [guest] = borrower.guests()
    assert looks(owner, monkeypatch) == 0
    write_flag(guest.guest_at, 1)
    began_ms = clock_ms()
    assert looks(owner, monkeypatch) > 0
    assert clock_ms() - began_ms >= _GUEST_MS_MAX
    assert looks(owner, monkeypatch) == 0
    write_flag(guest.guest_at, 0)
    assert looks(owner, monkeypatch) == 0
    write_flag(guest.guest_at, 1)
    assert looks(owner, monkeypatch) > 0, "it has moved since"


def test_a_guest_of_a_worker_that_was_replaced_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cores"
    owner = CoreBoard(path, [0], [1])
    borrower = CoreBoard(path, [1], [0])
    [guest] = borrower.guests()
    write_flag(guest.guest_at, 1)
    CoreBoard(path, [1], [0])  # its replacement
    assert looks(owner, monkeypatch) == 0
    write_flag(guest.guest_at, -1)  # the old one leaves late
    assert looks(owner, monkeypatch) == 0


def test_what_cannot_be_had_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_board(tmp_path / "cores", [0], []) is None
    assert not caplog.messages
    assert open_board(tmp_path / "missing" / "cores", [0], [1]) is None
    assert open_board(tmp_path / "cores", [0], [100_000]) is None
    assert len(caplog.messages) == 2
    assert all("no cores are lent or borrowed" in text for text in caplog.messages)


def test_each_core_has_a_cache_line(tmp_path: Path) -> None:
    board = CoreBoard(tmp_path / "cores", [0], [1, 2])
    one, other = board.guests()
    assert np.diff([one.owner_at, other.owner_at]) == [64]
