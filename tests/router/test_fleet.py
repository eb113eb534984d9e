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
from kvrelay.wire import worker_pb2
from router import fleet as fleet_module
from router.admission import Sampling
from router.commands import Deliver, Finished, ToDecode
from router.fleet import Fleet
from router.main import _NOT_SERVING, _SERVING, Router
from router.request import Ending, Request, Times
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
                monkeypatch.setattr(fleet, "connected", lambda role: 1)
                fleet._announce()

        router = SimpleNamespace(fleet=fleet, _set_health=set_health)
        health = asyncio.create_task(Router._keep_health(router))
        assert [await told.get(), await told.get()] == [_NOT_SERVING, _SERVING]
        health.cancel()


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
    monkeypatch.setattr(fleet_module, "_RECONNECT_S", (3600.0, 0.0) if refused else (0.0, 3600.0))
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
        monkeypatch.setattr(fleet, "connected", lambda role: connected.count(role))
        assert (not fleet.not_ready) == able


async def test_a_worker_whose_session_swallows_the_cancel_is_let_go_of(monkeypatch):
    begun = asyncio.Event()

    async def session(_: Any) -> None:
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        raise ValueError("ended")

    monkeypatch.setattr(fleet_module._Worker, "_session", session)
    monkeypatch.setattr(fleet_module, "_RECONNECT_S", (3600.0,))
    async with asyncio.timeout(DEADLINE_S), a_fleet(monkeypatch) as fleet:
        fleet.set_workers([], ["127.0.0.1:1"])
        await begun.wait()
