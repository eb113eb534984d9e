"""Threads of a step: every piece once, seen by all in the next phase, whoever comes late or not."""

import os
import threading

import numpy as np
import pytest
from numba import njit

from kvrelay.engine.kernels.threads import (
    Guest,
    Team,
    aligned,
    begin_step,
    end_step,
    next_phase,
    read_flag,
    sleep_us,
    take,
    write_flag,
)
from kvrelay.engine.shapes import LINE_BYTES

ROUNDS, PIECES = 300, 7
DEADLINE_S = 30
_LOOKS = 100_000


@njit(nogil=True)
def _share(thread, number, seats, counters, done, sums):
    """Each phase: threads take pieces and mark them; in the next, each sees them all."""
    seat = seats[thread]
    if not begin_step(thread, seat, number):
        return
    for phase in range(done.shape[0]):
        counter = counters + phase * LINE_BYTES
        next_phase(thread, seat, counter)
        if phase:
            total = 0
            for piece in range(done.shape[1]):
                total += done[phase - 1, piece]
            sums[thread, phase - 1] = total
        piece = take(counter, seat)
        while piece < done.shape[1]:
            done[phase, piece] += 1
            sums[thread, -1] += 1
            piece = take(counter, seat)
    next_phase(thread, seat, counters + done.shape[0] * LINE_BYTES)
    end_step(thread, seat)


def run(team: Team, *, with_guests: bool = False) -> np.ndarray:
    """Pieces that each thread did."""
    counters = aligned((ROUNDS + 1) * LINE_BYTES, np.uint8)
    done, sums = np.zeros((ROUNDS, PIECES), np.int64), np.zeros((team.size, ROUNDS), np.int64)
    arguments = (team.seats, counters.ctypes.data, done, sums)
    team.run(lambda thread, number: _share(thread, number, *arguments), with_guests=with_guests)
    assert (done == 1).all()
    assert (sums[0, :-1] == PIECES).all()
    assert np.isin(sums[1:, :-1], [0, PIECES]).all()  # 0: it was not there
    return sums[:, -1]


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_every_piece_is_done_once_and_seen_by_all_in_the_next_phase(threads):
    team = Team(threads)
    for _ in range(20):
        assert run(team).sum() == ROUNDS * PIECES
    team.close()


@njit(nogil=True)
def _wait_for_helper(thread, number, seats, counter, here):
    """Thread 0 ends nothing until a helper has been there, or does not come."""
    seat = seats[thread]
    if begin_step(thread, seat, number):
        next_phase(thread, seat, counter)
        if thread:
            write_flag(here, thread)
        else:
            for _ in range(_LOOKS):
                if read_flag(here):
                    break
                sleep_us(100)
        next_phase(thread, seat, counter + LINE_BYTES)
        end_step(thread, seat)


def helper_of(team: Team, *, with_guests: bool) -> int:
    """The number of one that takes part, 0 when none has in some seconds."""
    counters, here = aligned(2 * LINE_BYTES, np.uint8), np.zeros(1, np.int64)
    arguments = (team.seats, counters.ctypes.data, here.ctypes.data)
    team.run(
        lambda thread, number: _wait_for_helper(thread, number, *arguments), with_guests=with_guests
    )
    return int(here[0])


def test_a_helper_takes_part():
    team = Team(2)
    for _ in range(50):
        assert helper_of(team, with_guests=False) == 1
    team.close()


IDLE = np.zeros(2, np.int64)


def idle() -> tuple[int, int]:
    """Addresses of an owner that computes nothing, and of what the guest says."""
    return IDLE[:1].ctypes.data, IDLE[1:].ctypes.data


def core() -> int:
    return max(os.sched_getaffinity(0))


def test_a_guest_takes_part_while_the_owner_of_its_core_computes_nothing():
    busy, held = np.zeros(1, np.int64), np.zeros(1, np.int64)
    team = Team(1, [Guest(core(), busy.ctypes.data, held.ctypes.data)])
    assert helper_of(team, with_guests=True) == 1
    busy[0] = 1
    for _ in range(20):
        assert run(team, with_guests=True)[1] == 0
    busy[0] = 0
    assert helper_of(team, with_guests=True) == 1
    assert held[0] == 0
    team.close()


@njit(nogil=True)
def _until_owner_comes(thread, number, seats, counter, done, taken, busy):
    """The guest takes one piece, and its owner begins; thread 0 takes none before."""
    seat = seats[thread]
    if not begin_step(thread, seat, number):
        return
    next_phase(thread, seat, counter)
    if thread == 0:
        for _ in range(_LOOKS):
            if taken[1]:
                break
            sleep_us(100)
    piece = take(counter, seat)
    while piece < len(done):
        done[piece] += 1
        taken[thread] += 1
        if thread:
            write_flag(busy, 1)
        piece = take(counter, seat)
    next_phase(thread, seat, counter + LINE_BYTES)
    end_step(thread, seat)


def test_a_guest_leaves_after_the_piece_in_hand_and_the_others_are_done_without_it():
    flags = np.zeros(2, np.int64)
    busy, held = (flags[n:].ctypes.data for n in range(2))
    team = Team(1, [Guest(core(), busy, held)])
    counters = aligned(2 * LINE_BYTES, np.uint8)
    done, taken = np.zeros(PIECES, np.int64), np.zeros(2, np.int64)
    arguments = (team.seats, counters.ctypes.data, done, taken, busy)
    team.run(
        lambda thread, number: _until_owner_comes(thread, number, *arguments), with_guests=True
    )
    team.close()
    assert (done == 1).all()
    assert taken.tolist() == [PIECES - 1, 1]
    assert flags.tolist() == [1, 0]


def test_a_guest_takes_no_part_unasked():
    team = Team(1, [Guest(core(), *idle())])
    for _ in range(20):
        assert run(team)[1] == 0
    team.close()


def test_a_core_that_may_not_be_used_is_not(caplog):
    team = Team(1, [Guest(4095, *idle())])
    run(team, with_guests=True)
    team.close()
    assert "core 4095 of another worker is not used" in caplog.text


def test_a_step_waits_for_no_helper_that_does_not_come():
    team, stopped = Team(2), threading.Event()
    holding = threading.Event()

    def step(thread: int, number: int) -> None:
        if thread == 0:
            assert holding.wait(DEADLINE_S)
            return
        holding.set()  # and stays, beyond the end
        assert stopped.wait(DEADLINE_S)

    team.run(step)
    assert run(team)[0] == ROUNDS * PIECES
    stopped.set()
    assert helper_of(team, with_guests=False) == 1
    team.close()


def test_a_helper_that_comes_after_the_end_does_nothing():
    team = Team(2)
    late: list[int] = []
    team.run(lambda thread, number: late.append(number) if thread == 0 else None)
    assert not begin_step(1, team.seats[1], late[0])
    assert run(team).sum() == ROUNDS * PIECES
    team.close()


def test_a_closed_team_leaves_no_thread():
    before = threading.active_count()
    team = Team(3, [Guest(core(), *idle())])
    assert threading.active_count() == before + 3
    team.close()
    assert threading.active_count() == before


def test_what_a_step_raises_is_raised_and_the_team_goes_on():
    team = Team(2)

    def step(thread: int, number: int) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        team.run(step)
    try:  # what its helper raised, if that was late
        run(team)
    except ValueError:
        run(team)
    assert helper_of(team, with_guests=False) == 1
    team.close()
