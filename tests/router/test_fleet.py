"""Sessions with workers and the carrying out of commands, without any worker."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvrelay.clock import now_ms
from kvrelay.config import PROTOCOL_VERSION, RouterConfig
from kvrelay.wire import transfer_pb2, worker_pb2
from router import fleet as fleet_module
from router import worker_session
from router.admission import Sampling
from router.commands import Deliver, Finished, ToDecode
from router.fleet import Fleet
from router.main import _NOT_SERVING, _SERVING, Router
from router.request import Ending, Request, RequestState, Times
from router.worker_calls import over_grpc

DEADLINE_S = 10.0  # only a broken test waits this long


@contextlib.asynccontextmanager
async def a_fleet(monkeypatch, connect=over_grpc) -> AsyncIterator[Fleet]:
    monkeypatch.setattr(fleet_module, "_REAP_EVERY_S", 0.001)
    fleet = Fleet(
        RouterConfig(
            model_path=Path("none"),
            model_name="tiny",
            cluster_key="k" * 16,
            control_socket=Path("none"),
        ),
        connect=connect,
    )
    yield fleet
    await fleet.close()


def request() -> Request:
    return Request("r1", [1, 2], Sampling(0.0, 0, 1.0, 0, 4, (), ()), Times(now_ms()))


async def test_a_command_that_fails_does_not_take_the_others_with_it(monkeypatch, caplog):
    async with a_fleet(monkeypatch) as fleet, asyncio.timeout(DEADLINE_S):
        asked = request()
        answer = fleet.submit(asked)
        lost = ToDecode("nobody", worker_pb2.DecodeCommand())
        fleet.carry_out([lost, Deliver(asked, 0, [7]), lost, Finished(asked, Ending.EOS)])
        assert await answer.next() == [7]
        assert await answer.next() is Ending.EOS
        assert caplog.text.count("not carried out") == 2


async def test_the_reaper_goes_on_after_a_failure(monkeypatch, caplog):
    async with a_fleet(monkeypatch) as fleet:
        calls = itertools.count(1)
        again = asyncio.Event()

        def expire(_: float) -> list[Any]:
            if next(calls) > 2:
                again.set()
                return []
            raise RuntimeError("broken")

        monkeypatch.setattr(fleet.dispatcher, "expire", expire)
        async with asyncio.timeout(DEADLINE_S):
            await again.wait()
        assert caplog.text.count("RuntimeError: broken") == 2


async def test_what_many_events_have_made_room_for_is_placed_in_one_go(monkeypatch):
    async with a_fleet(monkeypatch) as fleet, asyncio.timeout(DEADLINE_S):
        pumped: asyncio.Queue[float] = asyncio.Queue()
        goes = 5

        def pump(now_ms: float) -> list[Any]:
            nonlocal goes
            goes -= 1
            monkeypatch.setattr(type(fleet.dispatcher), "to_place", goes > 0)
            pumped.put_nowait(now_ms)
            return []

        monkeypatch.setattr(fleet.dispatcher, "pump", pump)
        monkeypatch.setattr(type(fleet.dispatcher), "to_place", True)
        for _ in range(10):
            fleet.carry_out([])
        assert pumped.empty(), "not before the pass of the event loop ends"
        began_ms = [await pumped.get() for _ in range(5)]
        assert pumped.empty()
        # Timers may come early by the resolution of the clock.
        assert min(later - sooner for sooner, later in itertools.pairwise(began_ms)) > 3


async def test_a_change_between_the_look_and_the_wait_is_not_missed(monkeypatch):
    async with a_fleet(monkeypatch) as fleet, asyncio.timeout(DEADLINE_S):
        change = fleet.next_change()
        fleet._announce()
        await change.wait()
        assert not fleet.next_change().is_set()


async def test_a_worker_that_comes_while_the_health_is_set_is_noticed(monkeypatch):
    async with a_fleet(monkeypatch) as fleet, asyncio.timeout(DEADLINE_S):
        told: asyncio.Queue[Any] = asyncio.Queue()

        async def set_health(status: Any) -> None:
            told.put_nowait(status)
            if told.qsize() == 1:
                fleet.worker_up(worker("decode"), info_of("d1"))

        router = SimpleNamespace(fleet=fleet, _set_health=set_health)
        health = asyncio.create_task(Router._keep_health(router))
        assert [await told.get(), await told.get()] == [_NOT_SERVING, _SERVING]
        health.cancel()


def info_of(instance_id: str) -> worker_pb2.WorkerInfo:
    return worker_pb2.WorkerInfo(
        protocol_version=PROTOCOL_VERSION,
        instance_id=instance_id,
        layout=transfer_pb2.KvLayout(model_fingerprint="m", block_size=4),
        blocks_total=100,
        max_model_tokens=400,
    )


def worker(role: str) -> Any:
    """Stands for a session that is up, and forgets what it is to send."""
    return SimpleNamespace(
        role=role, instance_id=role, draining=False, stopped=False, send=lambda _: None
    )


_LOADS = {
    "prefill": (worker_pb2.PrefillEvent, worker_pb2.PrefillLoad),
    "decode": (worker_pb2.DecodeEvent, worker_pb2.DecodeLoad),
}


@pytest.mark.parametrize("version", [PROTOCOL_VERSION, PROTOCOL_VERSION + 1])
async def test_only_a_worker_that_was_up_is_called_again_at_once(monkeypatch, version):
    sessions = asyncio.Semaphore(0)
    info = worker_pb2.WorkerInfo(protocol_version=version, instance_id="d1")

    async def who_it_is() -> AsyncIterator[Any]:
        yield worker_pb2.DecodeEvent(info=info)

    @contextlib.asynccontextmanager
    async def connect(*_: Any) -> AsyncIterator[AsyncIterator[Any]]:
        sessions.release()
        yield who_it_is()

    # Whoever comes to the wait for ever is never called again.
    refused = version != PROTOCOL_VERSION
    monkeypatch.setattr(worker_session, "_RECONNECT_S", (3600.0, 0.0) if refused else (0.0, 3600.0))
    async with a_fleet(monkeypatch, connect) as fleet, asyncio.timeout(DEADLINE_S):
        fleet.set_workers([], ["127.0.0.1:1"])
        for _ in range(3):
            await sessions.acquire()


@pytest.mark.parametrize(
    ("named", "connected", "able"),
    [
        (("p", "d"), ("prefill", "decode"), True),
        (("p", "d"), ("decode",), False),
        (("p", "d"), ("prefill",), False),
        (("d",), ("decode",), True),
        (("d",), (), False),
        ((), (), False),
    ],
)
async def test_a_prefill_worker_is_missed_only_where_one_was_named(
    monkeypatch, named, connected, able
):
    async with a_fleet(monkeypatch) as fleet:
        fleet.set_workers([n for n in named if n == "p"], [n for n in named if n == "d"])
        for role in connected:
            fleet.worker_up(worker(role), info_of(role))
        assert (not fleet.not_ready) == able


@pytest.mark.parametrize("drains", ["prefill", "decode"])
async def test_a_worker_that_drains_is_not_one_that_requests_can_be_served_by(monkeypatch, drains):
    async with a_fleet(monkeypatch) as fleet:
        fleet.set_workers(["p"], ["d"])
        workers = {role: worker(role) for role in ("prefill", "decode")}
        for its in workers.values():
            fleet.worker_up(its, info_of(its.instance_id))
        assert fleet.not_ready == ""
        for draining in (True, True, False):
            change = fleet.next_change()
            event, load = _LOADS[drains]
            fleet.worker_said(workers[drains], event(load=load(draining=draining)))
            assert bool(fleet.not_ready) == draining
            if draining:
                assert fleet.not_ready == f"no {drains} worker takes work"
                assert fleet.connected(drains) == 1
        assert change.is_set(), "who waits for readiness is told"


async def test_a_worker_that_is_up_again_before_its_end_was_noticed_has_lost_its_requests(
    monkeypatch,
):
    async with a_fleet(monkeypatch) as fleet:
        old, new = worker("decode"), worker("decode")
        fleet.worker_up(old, info_of("decode"))
        asked = request()
        fleet.submit(asked)
        assert (asked.state, asked.key) == (RequestState.RESERVING, 1)
        fleet.worker_up(new, info_of("decode"))
        assert asked.state is RequestState.QUEUED
        fleet.worker_down(old)
        assert fleet.connected("decode") == 1, "the new session is not the old one's"
        fleet.worker_down(new)
        assert fleet.connected("decode") == 0


async def test_a_worker_whose_session_swallows_the_cancel_is_let_go_of(monkeypatch):
    begun = asyncio.Event()

    async def session(_: Any) -> None:
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        raise ValueError("ended")

    monkeypatch.setattr(worker_session.WorkerSession, "_session", session)
    monkeypatch.setattr(worker_session, "_RECONNECT_S", (3600.0,))
    async with asyncio.timeout(DEADLINE_S), a_fleet(monkeypatch) as fleet:
        fleet.set_workers([], ["127.0.0.1:1"])
        await begun.wait()
