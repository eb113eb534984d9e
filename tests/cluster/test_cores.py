"""Cores: who gets which, what the log says of it, and that a process really stays on its own."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import cores
from cluster.cores import Slot, lend, share_out, slots
from cluster.options import ServeOptions

ROLES = ["prefill", "decode", "decode"]


# ---- sharing out


def test_prefill_comes_first_and_neighbours_stay_together():
    assert share_out(ROLES, 2, range(7)) == [
        Slot("prefill", (0, 1)),
        Slot("decode", (2, 3)),
        Slot("decode", (4, 5)),
    ]


def test_only_allowed_cores_are_given():
    shared = share_out(["prefill", "decode"], 2, {9, 3, 11, 4})
    assert [slot.cores for slot in shared] == [(3, 4), (9, 11)]


def test_nobody_is_pinned_when_there_are_too_few():
    assert share_out(ROLES, 2, range(5)) == [Slot(role) for role in ROLES]


@given(
    workers=st.integers(1, 6),
    threads=st.integers(1, 6),
    allowed=st.lists(st.integers(0, 100), unique=True),
)
def test_cores_are_disjoint_allowed_and_the_same_every_time(workers, threads, allowed):
    roles = ["decode"] * workers
    shared = share_out(roles, threads, allowed)
    given_out = [core for slot in shared for core in slot.cores]
    assert len(given_out) == len(set(given_out))
    assert set(given_out) <= set(allowed)
    assert {len(slot.cores) for slot in shared} in ({threads}, {0})
    assert bool(given_out) == (workers * threads <= len(allowed))
    assert shared == share_out(roles, threads, allowed[::-1])


def test_workers_of_a_pair_borrow_from_each_other_and_one_without_a_partner_from_nobody():
    assert lend(share_out(ROLES, 2, range(6))) == [
        Slot("prefill", (0, 1), borrows=(2, 3)),
        Slot("decode", (2, 3), borrows=(0, 1)),
        Slot("decode", (4, 5)),
    ]


# ---- the choices of a person


@pytest.fixture
def four_cores(monkeypatch, caplog):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 6, 7})
    caplog.set_level("INFO")


def test_by_default_all_cores_are_shared_out(four_cores, caplog):
    assert slots(ServeOptions(lend_cores=False)) == [
        Slot("prefill", (2, 3)),
        Slot("decode", (6, 7)),
    ]
    assert caplog.messages == ["cores of the workers: prefill 2,3, decode 6,7"]


def test_by_default_a_pair_lends_cores(four_cores):
    assert [slot.borrows for slot in slots(ServeOptions())] == [(6, 7), (2, 3)]
    assert [slot.borrows for slot in slots(ServeOptions(prefill=0, decode=2))] == [(), ()]


def test_decode_workers_that_are_alone_get_all_cores(four_cores):
    assert slots(ServeOptions(prefill=0)) == [Slot("decode", (2, 3, 6, 7))]
    assert slots(ServeOptions(prefill=0, decode=2)) == [
        Slot("decode", (2, 3)),
        Slot("decode", (6, 7)),
    ]


@pytest.mark.parametrize(
    ("options", "level"),
    [({"prefill": 3, "decode": 2}, "INFO"), ({"threads": 3}, "WARNING")],
)
def test_a_shortage_is_a_warning_only_where_threads_were_asked_for(
    four_cores, caplog, options, level
):
    assert not any(slot.cores for slot in slots(ServeOptions(**options)))
    assert [record.levelname for record in caplog.records] == [level]
    assert "there are 4" in caplog.text


def test_workers_on_gpus_are_not_pinned(four_cores, caplog):
    assert slots(ServeOptions(device="cuda")) == [Slot("prefill"), Slot("decode")]
    assert "GPU" in caplog.text


# ---- pinning; in a process of its own, for it lasts


def test_threads_that_are_there_and_those_that_come_stay_on_the_core():
    core = max(os.sched_getaffinity(0))
    code = f"""
import os, threading
from cluster.cores import pin

def where():
    seen.append(os.sched_getaffinity(threading.get_native_id()))

def early():
    pinned.wait()
    where()
    late = threading.Thread(target=where)
    late.start()
    late.join()

seen, pinned = [], threading.Event()
thread = threading.Thread(target=early)
thread.start()
pin(({core},))
pinned.set()
thread.join()
where()
assert seen == [{{{core}}}] * 3, seen
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_thread_that_has_ended_does_no_harm(monkeypatch, tmp_path):
    tried = []

    def refuse(thread_id: int, allowed: object) -> None:
        tried.append(thread_id)
        raise ProcessLookupError

    (tmp_path / "7").touch()
    monkeypatch.setattr(cores, "_OWN_THREADS", tmp_path)
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    cores.pin((0,))
    assert tried == [7]


def test_a_core_that_is_not_ours_is_refused():
    code = "from cluster.cores import pin; pin((1_000_000,))"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "OSError" in done.stderr
