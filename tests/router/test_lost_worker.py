"""A worker that hangs is lost, and comes back as nobody's: over real sessions."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

from scripted_decode import ScriptedDecode, serving
from waiting import until

from kvrelay.config import RouterConfig
from kvrelay.wire import worker_pb2 as pb
from router.admission import Sampling
from router.fleet import Fleet, now_ms
from router.request import Ending, Request, RequestState, Times

DEADLINE_S = 20.0  # only a broken test waits this long
SILENCE_MS = 600
BEAT_S = 0.04


@contextlib.asynccontextmanager
async def a_fleet(*workers: ScriptedDecode) -> AsyncIterator[Fleet]:
    config = RouterConfig(
        model_path=Path("none"),
        model_name="tiny",
        cluster_key="k" * 16,
        control_socket=Path("none"),
        silence_ms=SILENCE_MS,
    )
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
        for worker in workers:
            await stack.enter_async_context(serving(worker, config.cluster_key))
        fleet = Fleet(config)
        stack.push_async_callback(fleet.close)
        fleet.set_workers([], [worker.address for worker in workers])
        await fleet.wait_ready()
        yield fleet


def request() -> Request:
    sampling = Sampling(0.0, 0, 1.0, 0, 4, (), ())
    return Request("r1", list(range(8)), sampling, Times(now_ms()))


def tokens(key: int, offset: int, *ids: int, ending: int = pb.ENDING_NONE) -> pb.StepOutput:
    output = pb.SequenceOutput(
        key=key, offset=offset, token_ids=ids, ending=pb.Ending.ValueType(ending)
    )
    return pb.StepOutput(outputs=[output])


async def test_a_worker_that_hangs_is_lost_and_fenced_when_it_comes_back():
    worker = ScriptedDecode("d1", BEAT_S)
    async with a_fleet(worker) as fleet:
        first = await worker.opened.get()
        asked = request()
        answer = fleet.submit(asked)
        _, reserve = await worker.reserve()
        worker.say(first, reserved=pb.Reserved(key=reserve.key))
        worker.say(first, step=tokens(reserve.key, 0, 10))
        assert await answer.next() == [10]

        worker.alive.clear()
        assert await worker.closed.get() is first
        again = await worker.opened.get()
        session, second = await worker.reserve()
        assert (session, second.request_id, second.key) == (again, "r1", reserve.key + 1)
        assert list(second.prompt_token_ids) == [*range(8), 10]
        assert asked.strikes == {}, "the same instance is back: it has not died"

        worker.alive.set()
        worker.say(again, reserved=pb.Reserved(key=second.key))
        worker.say(again, step=tokens(reserve.key, 1, 66))  # of the attempt before
        worker.say(again, step=tokens(second.key, 0, 11))
        assert await answer.next() == [11]
        worker.say(again, step=tokens(second.key, 1, 12, 13, ending=pb.ENDING_LENGTH))
        assert await answer.next() == [12, 13]
        assert await answer.next() is Ending.LENGTH
        fleet.dispatcher.check()


async def test_what_a_hung_worker_had_goes_on_elsewhere_at_once():
    workers = {f"d{n}": ScriptedDecode(f"d{n}", BEAT_S) for n in (1, 2)}
    async with a_fleet(*workers.values()) as fleet:
        asked = request()
        fleet.submit(asked)
        hung = workers.pop(asked.decode_id)
        await hung.reserve()
        (other,) = workers.values()
        hung.alive.clear()
        _, reserve = await other.reserve()
        assert reserve.request_id == "r1"
        assert asked.state is RequestState.RESERVING


async def test_a_worker_that_beats_is_kept_however_long_it_has_no_work():
    worker = ScriptedDecode("d1", BEAT_S)
    async with a_fleet(worker) as fleet:
        await worker.opened.get()
        await asyncio.sleep(2 * SILENCE_MS / 1000)
        assert (fleet.connected("decode"), worker.opened.empty()) == (1, True)


async def test_a_router_that_was_held_up_does_not_blame_its_workers():
    """They beat all the time, and it is the router that has not read it."""
    worker = ScriptedDecode("d1", BEAT_S)
    async with a_fleet(worker) as fleet:
        await worker.opened.get()
        time.sleep(2 * SILENCE_MS / 1000)  # noqa: ASYNC251
        await asyncio.sleep(SILENCE_MS / 1000)
        assert (fleet.connected("decode"), worker.opened.empty()) == (1, True)


async def test_a_session_that_breaks_just_after_the_router_was_held_up_strikes_nobody():
    """The worker lives, and may have taken the router for dead."""
    workers = {f"d{n}": ScriptedDecode(f"d{n}", BEAT_S) for n in (1, 2)}
    async with a_fleet(*workers.values()) as fleet:
        asked = request()
        fleet.submit(asked)
        left = workers.pop(asked.decode_id)
        session, reserve = await left.reserve()
        left.say(session, reserved=pb.Reserved(key=reserve.key))
        await until(lambda: asked.state is RequestState.PREFILLING, within_s=DEADLINE_S)
        time.sleep(2 * SILENCE_MS / 1000)  # noqa: ASYNC251
        session.end()
        (other,) = workers.values()
        _, again = await other.reserve()
        assert (again.request_id, asked.strikes) == ("r1", {})
