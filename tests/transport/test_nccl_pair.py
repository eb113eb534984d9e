"""One NCCL pair: what it does when all is well, over the double and over NCCL itself (-m gpu), and
how each failure ends, over the double."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import nccl_double
import pytest
import torch
from nccl_ends import DEADLINE_S, Ends, double_ends, longest_stall
from waiting import until

from kvrelay.lifecycle import IllegalTransitionError, advance
from kvrelay.transport.nccl_errors import NcclError
from kvrelay.transport.nccl_library import NvidiaNccl
from kvrelay.transport.nccl_pair import TRANSITIONS, PairEvent, PairState

SOON_S = 0.15  # a deadline that is meant to pass
STALL_MAX_S = 0.5  # of the loop, on a busy machine; a call that hangs stalls for ever


@pytest.fixture(params=["double", pytest.param("nccl", marks=pytest.mark.gpu)])
async def ends(request):
    if request.param == "double":
        both = double_ends()
    else:
        if torch.cuda.device_count() < 2:
            pytest.skip("NCCL refuses two ranks on one GPU: needs two CUDA devices")
        both = Ends(NvidiaNccl.load(), (0, 1))
    yield both
    await both.close()


@pytest.fixture
async def double():
    both = double_ends()
    yield both
    await both.close()


def data(size: int, seed: int = 1) -> bytes:
    return bytes((seed * 131 + i * 7) % 251 for i in range(size))


# ---- conformance: the double and NCCL


async def test_both_ends_open_and_close(ends):
    prefill, decode = await ends.both()
    assert prefill.state is decode.state is PairState.READY
    await asyncio.gather(prefill.close(DEADLINE_S), decode.close(DEADLINE_S))
    assert prefill.state is decode.state is PairState.CLOSED


async def test_a_group_of_regions_arrives_where_it_should(ends):
    prefill, decode = await ends.both()
    sizes = [1, 4096, 100_000, 8]
    source = ends.memory(0, data(sum(sizes)))
    target = ends.memory(1, bytes(sum(sizes) + 16))
    await asyncio.gather(
        prefill.send(source.regions(*sizes), DEADLINE_S),
        decode.receive(target.regions(*sizes), DEADLINE_S),
    )
    assert target.read() == source.read() + bytes(16)
    assert prefill.memory_safe
    assert decode.memory_safe


async def test_regions_need_not_be_next_to_each_other_or_in_order(ends):
    prefill, decode = await ends.both()
    source, target = ends.memory(0, data(300)), ends.memory(1, bytes(300))
    first, second, third = source.regions(100, 100, 100)
    a, b, c = target.regions(100, 100, 100)
    await asyncio.gather(
        prefill.send([third, first], DEADLINE_S), decode.receive([a, c], DEADLINE_S)
    )
    assert target.read() == source.read()[200:] + bytes(100) + source.read()[:100]
    assert second != b


async def test_operations_are_carried_out_in_the_order_of_the_calls(ends):
    prefill, decode = await ends.both()
    sources = [ends.memory(0, data(1000, seed)) for seed in range(20)]
    targets = [ends.memory(1, bytes(1000)) for _ in sources]
    await asyncio.gather(
        *(prefill.send(source.regions(), DEADLINE_S) for source in sources),
        *(decode.receive(target.regions(), DEADLINE_S) for target in targets),
    )
    assert [target.read() for target in targets] == [source.read() for source in sources]


async def test_a_large_block_is_sent_while_the_loop_goes_on(ends):
    prefill, decode = await ends.both()
    source, target = ends.memory(0, data(1000) * 8000), ends.memory(1, bytes(8_000_000))
    async with longest_stall() as stall:
        await asyncio.gather(
            prefill.send(source.regions(), DEADLINE_S),
            decode.receive(target.regions(), DEADLINE_S),
        )
        assert stall() < STALL_MAX_S
    assert target.read() == source.read()


async def test_two_pairs_do_not_mix(ends):
    pairs = [await ends.both() for _ in range(2)]
    sources = [ends.memory(0, data(5000, seed)) for seed in (1, 2)]
    targets = [ends.memory(1, bytes(5000)) for _ in sources]
    # The second pair's first, so that order of posting alone cannot make this pass.
    sends = [
        pair.send(s.regions(), DEADLINE_S) for (pair, _), s in zip(pairs, sources, strict=True)
    ]
    receives = [
        pair.receive(t.regions(), DEADLINE_S) for (_, pair), t in zip(pairs, targets, strict=True)
    ]
    await asyncio.gather(*reversed(receives), *sends)
    assert [target.read() for target in targets] == [source.read() for source in sources]


async def test_a_receive_that_nobody_serves_ends_at_its_deadline_and_ends_the_pair(ends):
    prefill, decode = await ends.both()
    target = ends.memory(1, bytes(100))
    with pytest.raises(NcclError, match=r"RECEIVE of 1 regions was not done within 0.15 s"):
        await decode.receive(target.regions(), SOON_S)
    await decode.wait_closed()
    assert decode.state is PairState.CLOSED
    assert decode.memory_safe
    with pytest.raises(NcclError, match="the pair is CLOSED: RECEIVE of 1 regions"):
        await decode.receive(target.regions(), DEADLINE_S)
    prefill.fail("the decode worker said so")
    await prefill.wait_closed()


async def test_an_end_without_its_peer_does_not_open_and_ends(ends):
    alone = ends.end(ends.library.unique_id(), 0)
    with pytest.raises(NcclError, match=r"the pair did not open within 0.15 s"):
        await alone.opened(SOON_S)
    await alone.wait_closed()
    assert alone.state is PairState.CLOSED


async def test_after_a_failure_a_new_pair_works(ends):
    prefill, decode = await ends.both()
    for pair in (prefill, decode):
        pair.fail("told to")
        await pair.wait_closed()
    prefill, decode = await ends.both()
    source, target = ends.memory(0, data(100)), ends.memory(1, bytes(100))
    await asyncio.gather(
        prefill.send(source.regions(), DEADLINE_S), decode.receive(target.regions(), DEADLINE_S)
    )
    assert target.read() == source.read()


# ---- the state machine


def test_every_event_that_the_table_does_not_have_raises():
    for state in PairState:
        for event in PairEvent:
            if (state, event) not in TRANSITIONS:
                with pytest.raises(IllegalTransitionError):
                    advance(TRANSITIONS, state, event)


def test_closed_is_the_end_and_reached_from_everywhere():
    assert not [event for state, event in TRANSITIONS if state is PairState.CLOSED]
    reached = {PairState.CLOSED}
    for _ in PairState:
        reached |= {state for (state, _), target in TRANSITIONS.items() if target in reached}
    assert reached == set(PairState)


# ---- failures


async def test_fail_ends_every_operation_under_way_with_the_reason(double):
    reasons = []
    _, decode = await double.both(lost=reasons.append)
    target = double.memory(1, bytes(300))
    receives = [
        asyncio.ensure_future(decode.receive([region], DEADLINE_S))
        for region in target.regions(100, 100, 100)
    ]
    await asyncio.sleep(0)
    assert not decode.memory_safe
    decode.fail("the control link ended")
    decode.fail("and again")
    for receive in receives:
        with pytest.raises(NcclError, match="the control link ended"):
            await receive
    assert reasons == ["the control link ended"]
    await decode.wait_closed()
    assert decode.memory_safe


async def test_a_failed_pair_is_aborted_and_not_closed_in_good_order(double):
    prefill, _ = await double.both()
    double.library.faults.hang |= {"finalize", "destroy"}
    prefill.fail("told to")
    await asyncio.wait_for(prefill.wait_closed(), DEADLINE_S)


async def test_an_abort_that_ended_in_time_is_not_overdue_later(double):
    errors = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    prefill, _ = await double.both(abort_s=SOON_S)
    prefill.fail("told to")
    await prefill.wait_closed()
    await asyncio.sleep(2 * SOON_S)
    assert prefill.state is PairState.CLOSED
    assert errors == []


async def test_regions_of_another_size_are_never_done(double):
    prefill, decode = await double.both()
    source, target = double.memory(0, data(100)), double.memory(1, bytes(100))
    results = await asyncio.gather(
        prefill.send(source.regions(100), SOON_S),
        decode.receive(target.regions(60), SOON_S),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [NcclError, NcclError]
    assert target.read() == bytes(100)


async def test_an_error_that_nccl_reports_ends_the_pair_at_once(double):
    prefill, decode = await double.both()
    double.library.faults.remote_error = True
    target = double.memory(1, bytes(100))
    receive = asyncio.ensure_future(decode.receive(target.regions(), DEADLINE_S))
    await asyncio.sleep(0)
    prefill.fail("it dies")
    with pytest.raises(NcclError, match=r"the peer is gone, or the network to it \(result 6\)"):
        await receive
    await decode.wait_closed()


@pytest.mark.parametrize("call", ["communicator", "ready", "post"])
async def test_an_error_of_any_call_ends_the_pair_with_what_nccl_said(double, call):
    expected = rf"NCCL {call}: a system call or the network failed \(result 2\): told to"
    if call == "post":
        prefill, _ = await double.both()
        double.library.faults.fail[call] = 2
        with pytest.raises(NcclError, match=expected):
            await prefill.send(double.memory(0, data(10)).regions(), DEADLINE_S)
    else:
        double.library.faults.fail[call] = 2
        prefill = double.end(double.library.unique_id(), 0)
        with pytest.raises(NcclError, match=expected):
            await prefill.opened(DEADLINE_S)
    await prefill.wait_closed()


async def test_a_bug_in_the_thread_ends_the_pair_and_is_logged(double, caplog, monkeypatch):
    prefill, _ = await double.both()
    monkeypatch.setattr(double.library.newest(rank=0), "post", None)
    with pytest.raises(NcclError, match="not callable"):
        await prefill.send(double.memory(0, data(10)).regions(), DEADLINE_S)
    await prefill.wait_closed()
    assert "the thread of an NCCL pair failed" in caplog.text


async def test_a_cancel_takes_effect_when_the_operation_has_ended(double):
    prefill, decode = await double.both()
    source, target = double.memory(0, data(100)), double.memory(1, bytes(100))
    receive = asyncio.ensure_future(decode.receive(target.regions(), DEADLINE_S))
    await asyncio.sleep(0)
    receive.cancel()
    await prefill.send(source.regions(), DEADLINE_S)
    with pytest.raises(asyncio.CancelledError):
        await receive
    assert target.read() == source.read()
    assert decode.state is PairState.READY


async def test_a_cancel_of_what_is_never_done_ends_at_the_deadline_and_fails_the_pair(double):
    _, decode = await double.both()
    receive = asyncio.ensure_future(decode.receive(double.memory(1, bytes(9)).regions(), SOON_S))
    await asyncio.sleep(0)
    receive.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receive
    assert "was not done within" in decode.reason
    await decode.wait_closed()


async def test_close_finishes_what_is_under_way_and_takes_nothing_more(double):
    prefill, decode = await double.both()
    source, target = double.memory(0, data(100)), double.memory(1, bytes(100))
    receive = asyncio.ensure_future(decode.receive(target.regions(), DEADLINE_S))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(decode.close(DEADLINE_S))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(NcclError, match="the pair is CLOSING"):
        await decode.receive(target.regions(), DEADLINE_S)
    await prefill.send(source.regions(), DEADLINE_S)
    await asyncio.gather(receive, closing)
    assert target.read() == source.read()
    assert decode.state is PairState.CLOSED


async def test_close_aborts_at_its_deadline(double):
    _, decode = await double.both()
    receive = asyncio.ensure_future(
        decode.receive(double.memory(1, bytes(100)).regions(), DEADLINE_S)
    )
    await asyncio.sleep(0)
    await decode.close(SOON_S)
    with pytest.raises(NcclError, match=r"did not close within 0.15 s"):
        await receive
    assert decode.state is PairState.CLOSED


async def test_close_of_a_pair_that_is_not_open_yet(double):
    alone = double.end(double.library.unique_id(), 1)
    await alone.close(DEADLINE_S)
    assert alone.state is PairState.CLOSED
    with pytest.raises(NcclError, match="closed before it was open"):
        await alone.opened(DEADLINE_S)


# ---- calls that never return


async def test_a_hung_abort_leaves_the_thread_behind_and_its_blocks_unsafe(double, caplog):
    prefill, decode = await double.both(abort_s=SOON_S)
    source, target = double.memory(0, data(100)), double.memory(1, bytes(100))
    with contextlib.suppress(NcclError):
        double.library.faults.hang.add("abort")
        await decode.receive(target.regions(), SOON_S)
    await decode.close(DEADLINE_S)
    assert decode.state is PairState.HUNG
    assert not decode.memory_safe
    assert "its thread is left behind" in caplog.text

    # And they are unsafe: the peer may send yet, and the device takes it.
    await prefill.send(source.regions(), DEADLINE_S)
    double.library.newest(rank=1).progress()
    assert target.read() == source.read()

    double.library.faults.release.set()  # the abort returns after all
    await decode.wait_closed()
    assert decode.state is PairState.CLOSED
    assert decode.memory_safe


async def test_a_device_that_never_lets_go_keeps_the_blocks_unsafe_though_abort_returned(double):
    _, decode = await double.both(abort_s=SOON_S)
    double.library.faults.stream_hangs = True
    with pytest.raises(NcclError):
        await decode.receive(double.memory(1, bytes(100)).regions(), SOON_S)
    await decode.close(DEADLINE_S)
    assert decode.state is PairState.HUNG
    assert not decode.memory_safe
    double.library.faults.release.set()
    await decode.wait_closed()
    assert decode.memory_safe


async def test_an_abort_that_fails_leaves_the_blocks_unsafe(double):
    _, decode = await double.both(abort_s=SOON_S)
    double.library.faults.fail["abort"] = 1
    with pytest.raises(NcclError):
        await decode.receive(double.memory(1, bytes(100)).regions(), SOON_S)
    await decode.close(DEADLINE_S)
    assert decode.state is PairState.HUNG
    assert not decode.memory_safe
    double.pairs.remove(decode)  # it will never be CLOSED


async def test_a_hung_pair_that_had_nothing_under_way_keeps_no_block(double):
    prefill, _ = await double.both(abort_s=SOON_S)
    double.library.faults.hang.add("abort")
    prefill.fail("told to")
    await prefill.close(DEADLINE_S)
    assert prefill.state is PairState.HUNG
    assert prefill.memory_safe


@pytest.mark.parametrize("call", ["communicator", "ready", "post", "idle", "finalize", "destroy"])
async def test_any_call_that_never_returns_stalls_neither_the_loop_nor_another_pair(double, call):
    faulty = double_ends()  # with a library of its own: only its calls hang
    healthy = await double.both()
    source, target = double.memory(0, data(1000)), double.memory(1, bytes(1000))
    try:
        async with longest_stall() as stall:
            if call in ("communicator", "ready"):
                faulty.library.faults.hang.add(call)
                pair = faulty.end(b"x" * 128, 1, abort_s=SOON_S)
                with pytest.raises(NcclError, match="did not open within"):
                    await pair.opened(SOON_S)
            else:
                pair, _ = await faulty.both(abort_s=SOON_S)
                faulty.library.faults.hang.add(call)
                if call in ("post", "idle"):
                    with pytest.raises(NcclError, match="not done within"):
                        await pair.send(faulty.memory(0, data(9)).regions(), SOON_S)
            closing = asyncio.ensure_future(pair.close(SOON_S))
            for _ in range(10):
                await asyncio.gather(
                    healthy[0].send(source.regions(), DEADLINE_S),
                    healthy[1].receive(target.regions(), DEADLINE_S),
                )
            await closing
            assert pair.state is PairState.HUNG
            assert stall() < STALL_MAX_S
        assert target.read() == source.read()
        assert all(pair.state is PairState.READY for pair in healthy)
    finally:
        await faulty.close()


# ---- a peer in another process


class Peer:
    """nccl_double.py as a process: a real peer to kill or stop."""

    def __init__(self, rank: int, unique_id: bytes) -> None:
        command = [sys.executable, nccl_double.__file__, str(rank), unique_id.hex()]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )

    async def says(self) -> str:
        async with asyncio.timeout(DEADLINE_S):
            return (await asyncio.to_thread(self.process.stdout.readline)).strip()

    def do(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


@contextlib.asynccontextmanager
async def peer_process(double, rank):
    """An open pair of this process and one at `rank` in another."""
    unique_id = double.library.unique_id()
    peer = Peer(rank, unique_id)
    try:
        pair = double.end(unique_id, 1 - rank)
        await pair.opened(DEADLINE_S)
        assert await peer.says() == "open"
        yield pair, peer
    finally:
        peer.end()


async def test_blocks_go_between_two_processes(double):
    async with peer_process(double, 0) as (decode, peer):
        peer.do("send 70000")
        target = double.memory(1, bytes(70_000))
        await decode.receive(target.regions(), DEADLINE_S)
        assert target.read() == b"\x01" * 70_000
        assert [await peer.says(), await peer.says()] == ["posted", "done 70000"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("direction", ["send", "receive"])
async def test_a_peer_that_dies_or_stops_ends_the_operation_at_its_deadline(double, direction, how):
    async with peer_process(double, 1 if direction == "send" else 0) as (pair, peer):
        peer.process.send_signal(how)
        if how is signal.SIGKILL:
            await asyncio.to_thread(peer.process.wait)
        memory = double.memory(0, data(100))
        async with longest_stall() as stall:
            with pytest.raises(NcclError, match=r"was not done within 0.15 s"):
                await getattr(pair, direction)(memory.regions(), SOON_S)
            await pair.wait_closed()
            assert stall() < STALL_MAX_S
        assert pair.memory_safe


async def test_a_send_is_not_done_before_the_peer_has_posted_its_receive(double):
    async with peer_process(double, 1) as (prefill, peer):
        send = asyncio.ensure_future(
            prefill.send(double.memory(0, b"\x02" * 50).regions(), DEADLINE_S)
        )
        await until(lambda: double.library.newest(rank=0)._sends, within_s=DEADLINE_S)
        assert not send.done()
        peer.do("receive 50")
        await send
        assert [await peer.says(), await peer.says()] == ["posted", "done 100"]
