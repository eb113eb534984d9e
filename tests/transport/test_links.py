"""Both ends of the KV links, real sockets and real memory, in one event loop.

What is promised for one transport is promised for all: most tests run on each.
"""

import asyncio
import contextlib
import gc
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import numpy as np
import pytest
from kv_fixtures import (
    DEADLINE_S,
    LAYOUT,
    DecodeEnd,
    decode_end,
    key,
    prefill_end,
    same_bytes,
    worker_config,
)

from kvrelay.config import PROTOCOL_VERSION
from kvrelay.kv.pool import KVPool
from kvrelay.transport import movers, writer_pool
from kvrelay.transport.frames import FRAME_BYTES_MAX, FrameSocket, LinkError
from kvrelay.transport.listener import Listener
from kvrelay.transport.movers import checksum
from kvrelay.transport.writer import Transfer
from kvrelay.transport.writer_pool import WriterPool
from kvrelay.wire.transfer_pb2 import (
    Abort,
    Begin,
    Blocks,
    Commit,
    Committed,
    Endpoint,
    Frame,
    Hello,
)

REPLY_S = 2.0
LARGE = replace(LAYOUT, head_dim=1 << 14)  # 1 MiB a block: more than a socket buffers


@pytest.fixture(params=["shm", "tcp"])
def transport(request) -> str:
    return request.param


@pytest.fixture
async def decode(transport) -> AsyncIterator[DecodeEnd]:
    async with asyncio.timeout(4 * DEADLINE_S), decode_end(transport=transport) as end:
        yield end


@pytest.fixture
async def prefill(transport) -> AsyncIterator[WriterPool]:
    async with prefill_end(transport=transport) as writers:
        yield writers


async def hand_over(decode: DecodeEnd, writers: WriterPool, blocks: int = 2) -> None:
    """One whole transfer, as proof that a link works."""
    ticket = decode.ticket(blocks)
    transfer = await writers.begin(ticket)
    source = list(range(blocks))
    await transfer.push(source)
    await transfer.commit(1, REPLY_S)
    transfer.close()
    assert same_bytes(decode.pool, ticket.block_ids, writers.pool, source)


# ---- when all goes well


def link_of(writers):
    (connecting,) = writers._links.values()
    return connecting.result()


async def test_blocks_arrive_bit_equal_in_the_right_places(decode, prefill):
    decode.ticket(3)  # so that blocks differ from their index
    before = decode.pool.bytes.copy()
    ticket = decode.ticket(5)
    transfer = await prefill.begin(ticket)
    await transfer.push([9, 2])
    await transfer.push([4])
    await transfer.push([7, 15])
    await transfer.commit(11, REPLY_S)
    assert same_bytes(decode.pool, ticket.block_ids, prefill.pool, [9, 2, 4, 7, 15])
    untouched = [b for b in range(16) if b not in set(ticket.block_ids)]
    assert (decode.pool.bytes[untouched] == before[untouched]).all()


async def test_the_book_hears_begin_blocks_and_commit_in_order(decode, prefill, transport):
    transfer = await prefill.begin(decode.ticket(3))
    await transfer.push([0, 1])
    await transfer.push([2])
    await transfer.commit(42, REPLY_S)
    assert decode.book.events == [
        ("begin", 1),
        ("received", 1, 2),
        ("received", 1, 1),
        ("commit", 1, 42),
    ]
    assert transfer.committed
    assert transfer.transport == transport
    assert transfer.bytes_sent == 3 * LAYOUT.block_bytes
    assert transfer.busy_s > 0
    decode.finish(1)
    decode.check_all_free()


async def test_a_link_that_ends_after_commit_is_no_loss(decode, prefill):
    await hand_over(decode, prefill)
    await prefill.close()
    async with prefill_end(name="prefill-2", transport="auto") as other:
        await hand_over(decode, other)
    assert decode.book.lost_transfers() == []


async def test_transfers_interleave_on_one_link(decode, prefill):
    tickets = [decode.ticket(3) for _ in range(5)]

    async def run(number: int) -> None:
        transfer = await prefill.begin(tickets[number])
        for step in range(3):
            await transfer.push([number * 3 + step])
        await transfer.commit(number, REPLY_S)

    await asyncio.gather(*(run(number) for number in range(5)))
    for number, ticket in enumerate(tickets):
        source = [number * 3 + step for step in range(3)]
        assert same_bytes(decode.pool, ticket.block_ids, prefill.pool, source)
        decode.finish(number + 1)
    assert len(prefill._links) == 1
    decode.check_all_free()


# ---- handshake


async def test_layouts_that_differ_are_refused_with_both_sides_told(decode, transport):
    async with prefill_end(replace(LAYOUT, block_size=8), transport=transport) as other:
        with pytest.raises(LinkError, match="KV layouts differ: block_size: 4 here, 8 there"):
            await other.begin(decode.ticket(1))
    assert decode.book.events == []


async def test_protocol_versions_that_differ_are_refused_with_both_told(
    decode, prefill, monkeypatch
):
    monkeypatch.setattr(writer_pool, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    with pytest.raises(
        LinkError, match=f"protocol {PROTOCOL_VERSION} here, {PROTOCOL_VERSION + 1}"
    ):
        await prefill.begin(decode.ticket(1))


async def test_another_worker_at_the_address_is_not_written_to(decode, prefill):
    with pytest.raises(LinkError, match="decode-1 answers there, not decode-0"):
        await prefill.begin(decode.ticket(1, decode_instance_id="decode-0"))
    assert decode.book.events == []


# ---- tickets


async def test_a_wrong_secret_is_refused_and_the_link_lives(decode, prefill):
    with pytest.raises(LinkError, match="secret is wrong"):
        await prefill.begin(decode.ticket(1, secret=b"x" * 16))
    await hand_over(decode, prefill)


async def test_a_ticket_used_twice_on_one_link_does_not_end_the_first_transfer(decode, prefill):
    ticket = decode.ticket(2)
    transfer = await prefill.begin(ticket)
    with pytest.raises(LinkError):
        await prefill.begin(ticket)
    await transfer.push([0, 1])
    await transfer.commit(1, 0.5)
    assert decode.book.lost_transfers() == []


async def test_a_ticket_used_twice_from_two_workers_is_refused_to_the_second(
    decode, prefill, transport
):
    ticket = decode.ticket(2)
    transfer = await prefill.begin(ticket)
    async with prefill_end(name="prefill-2", transport=transport) as other:
        with pytest.raises(LinkError, match="has been used"):
            await other.begin(ticket)
    await transfer.push([0, 1])
    await transfer.commit(1, REPLY_S)
    assert decode.book.lost_transfers() == []


# ---- a transfer fails, the link lives


@pytest.fixture
def wrong_sums(monkeypatch):
    """While entered, writers announce checksums that are wrong."""

    @contextlib.contextmanager
    def patched():
        right = movers.checksum
        with monkeypatch.context() as patch:
            patch.setattr(movers, "checksum", lambda block: right(block) ^ 1)
            yield

    return patched


async def test_a_wrong_checksum_ends_that_transfer_and_no_other(decode, prefill, wrong_sums):
    good = await prefill.begin(decode.ticket(2))
    bad = await prefill.begin(decode.ticket(2))
    with wrong_sums():
        await bad.push([0])
    await decode.book.until(lambda: 2 in decode.book.lost_transfers())
    with pytest.raises(LinkError, match="block 0 has a wrong checksum"):
        await bad.push([1])
    await good.push([0, 1])
    await good.commit(1, REPLY_S)
    assert decode.book.lost_transfers() == [2]
    assert [e[1] for e in decode.book.events if e[0] == "commit"] == [1]
    decode.finish(1)
    decode.check_all_free()


async def test_blocks_that_follow_a_wrong_one_at_once_do_not_cost_the_link(
    decode, prefill, wrong_sums
):
    good = await prefill.begin(decode.ticket(1))
    bad = await prefill.begin(decode.ticket(2))
    with wrong_sums():
        await bad.push([0])
    with contextlib.suppress(LinkError):
        await bad.push([1])  # on the wire before the refusal is here
    await decode.book.until(lambda: 2 in decode.book.lost_transfers())
    await good.push([3])
    await good.commit(1, REPLY_S)
    assert decode.book.lost_transfers() == [2]


async def test_a_commit_with_blocks_missing_ends_that_transfer_and_no_other(decode, prefill):
    transfer = await prefill.begin(decode.ticket(2))
    await transfer.push([0])
    with pytest.raises(LinkError, match="Commit of 1 blocks while 1 are missing"):
        await transfer.commit(1, REPLY_S)
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])
    decode.check_all_free()
    await hand_over(decode, prefill)


async def test_the_writer_gives_up_and_its_blocks_are_free(decode, prefill):
    transfer = await prefill.begin(decode.ticket(2))
    await transfer.push([0])
    await transfer.abort("cancelled")
    transfer.close()
    await decode.book.until(lambda: ("lost", 1, "cancelled") in decode.book.events)
    decode.check_all_free()
    with pytest.raises(LinkError):
        await transfer.push([1])
    await hand_over(decode, prefill)


async def test_the_decode_worker_gives_up_and_hears_when_the_writer_has_stopped(decode, prefill):
    transfer = await prefill.begin(decode.ticket(2))
    await transfer.push([0])
    decode.abort(1)
    assert decode.ledger.free == 14
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])
    decode.check_all_free()
    with pytest.raises(LinkError, match="gave up: not wanted"):
        await transfer.push([1])
    with pytest.raises(LinkError, match="gave up: not wanted"):
        await transfer.commit(1, REPLY_S)
    await hand_over(decode, prefill)


async def test_an_abort_while_the_writer_waits_for_commit_reaches_it(decode, prefill, monkeypatch):
    monkeypatch.setattr(decode.book, "committed", lambda transfer_id: None)
    transfer = await prefill.begin(decode.ticket(1))
    waiting = asyncio.ensure_future(transfer.commit(1, REPLY_S))
    with pytest.raises(LinkError, match="missing"):
        await waiting


async def test_a_commit_without_answer_ends_in_time(decode, prefill):
    decode.book.committed = lambda transfer_id: None
    transfer = await prefill.begin(decode.ticket(1))
    await transfer.push([0])
    with pytest.raises(LinkError, match=r"no answer to Commit within 0\.05 s"):
        await transfer.commit(1, 0.05)


async def test_an_abort_of_a_transfer_the_writer_has_closed_is_answered_too(decode, prefill):
    transfer = await prefill.begin(decode.ticket(2))
    transfer.close()
    decode.abort(1)
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])


class Gate:
    """Holds checksum() of the writer's pool in its thread until opened."""

    def __init__(self, monkeypatch, pool) -> None:
        self.entered = asyncio.Event()
        self.open = threading.Event()
        loop, right = asyncio.get_running_loop(), movers.checksum
        start, end = pool.bytes.ctypes.data, pool.bytes.ctypes.data + pool.bytes.nbytes

        def held(block):
            if start <= block.ctypes.data < end:
                loop.call_soon_threadsafe(self.entered.set)
                assert self.open.wait(DEADLINE_S)
            return right(block)

        monkeypatch.setattr(movers, "checksum", held)


@pytest.fixture
async def gate(prefill, monkeypatch):
    made = Gate(monkeypatch, prefill.pool)
    yield made
    made.open.set()


async def rounds(count: int = 20) -> None:
    """Lets everything run that can run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0)


async def test_blocks_stay_in_quarantine_until_the_push_under_way_has_ended(decode, prefill, gate):
    transfer = await prefill.begin(decode.ticket(2))
    push = asyncio.ensure_future(transfer.push([0]))
    await gate.entered.wait()
    decode.abort(1)
    await until(transfer.answer.done)  # the writer knows
    await rounds()
    assert decode.book.lost_transfers() == []
    assert decode.ledger.free == 14
    gate.open.set()
    await push
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])
    decode.check_all_free()
    await hand_over(decode, prefill)


async def test_the_writers_own_abort_waits_for_its_push_too(decode, prefill, gate):
    transfer = await prefill.begin(decode.ticket(2))
    push = asyncio.ensure_future(transfer.push([0]))
    await gate.entered.wait()
    abort = asyncio.ensure_future(transfer.abort("cancelled"))
    await rounds()
    assert not abort.done()
    gate.open.set()
    await asyncio.gather(push, abort)
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancelled_push_ends_only_when_nothing_more_is_written(
    decode, prefill, gate, times
):
    transfer = await prefill.begin(decode.ticket(2))
    push = asyncio.ensure_future(transfer.push([0]))
    await gate.entered.wait()
    for _ in range(times):
        push.cancel()
        await rounds()
        assert not push.done(), "it may still write"
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await push
    await transfer.abort("cancelled")
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])
    await hand_over(decode, prefill)


# ---- an end dies


async def test_a_writer_that_dies_is_lost_to_all_its_transfers_and_to_no_others(
    decode, prefill, transport
):
    async with prefill_end(name="prefill-2", transport=transport) as other:
        doomed = [await other.begin(decode.ticket(2)) for _ in range(3)]
        await doomed[1].push([0])
        living = await prefill.begin(decode.ticket(2))
        link = link_of(other)
        link._frames.sock.shutdown(socket.SHUT_RDWR)
        await decode.book.until(lambda: len(decode.book.lost_transfers()) == 3)
        assert sorted(decode.book.lost_transfers()) == [1, 2, 3]
        await living.push([0, 1])
        await living.commit(1, REPLY_S)
    decode.finish(4)
    decode.check_all_free()


async def test_a_dead_decode_worker_fails_commit_and_the_next_begin_reconnects(prefill, transport):
    async with decode_end(transport=transport) as first:
        transfer = await prefill.begin(first.ticket(1))
        await transfer.push([0])
    with pytest.raises(LinkError):
        await transfer.commit(1, REPLY_S)
    async with decode_end(transport=transport) as second:
        await hand_over(second, prefill)


async def test_a_push_after_the_decode_worker_died_is_a_link_error(prefill, transport):
    async with decode_end(transport=transport) as end:
        transfer = await prefill.begin(end.ticket(2))
    link = link_of(prefill)
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.wait([link._reader])
    with pytest.raises(LinkError):
        await transfer.push([0])


async def test_begin_fails_when_the_decode_worker_dies_before_its_answer(prefill, transport):
    async with decode_end(transport=transport) as end:
        await hand_over(end, prefill)
        ticket = end.ticket(1)
        end.listener.committed = lambda transfer_id: None
        for task in end.listener._tasks:
            task.cancel()
        with pytest.raises(LinkError):
            await prefill.begin(ticket)


async def test_nobody_there_is_a_link_error_that_names_the_address(prefill, transport):
    address = "/nowhere/at-all.sock" if transport == "shm" else "127.0.0.1:1"
    async with decode_end(transport=transport) as end:
        ticket = end.ticket(1, endpoints=[Endpoint(transport=transport, address=address)])
        with pytest.raises(LinkError, match=f"no way to decode-1: {transport}: {address}: .+"):
            await prefill.begin(ticket)


async def test_a_peer_that_says_nothing_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        endpoint = Endpoint(transport="tcp", address=address)
        async with decode_end() as end, prefill_end(link_connect_ms=30) as writers:
            with pytest.raises(LinkError, match="no answer in time"):
                await writers.begin(end.ticket(1, endpoints=[endpoint]))


@contextlib.asynccontextmanager
async def stalled_peer(layout=LARGE) -> AsyncIterator[tuple[Transfer, WriterPool]]:
    """A transfer over tcp to a decode worker that gives leave to write and then reads nothing."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        async with (
            decode_end(layout, blocks=32) as end,
            prefill_end(layout, 32, transport="tcp", link_reply_ms=300) as writers,
        ):
            endpoint = Endpoint(transport="tcp", address=address)
            ticket = end.ticket(16, endpoints=[endpoint])
            begin = asyncio.ensure_future(writers.begin(ticket))
            peer, _ = await loop.sock_accept(server)
            with peer:
                frames = FrameSocket(peer, 10)
                await frames.receive()
                welcome = Frame()
                welcome.welcome.instance_id = end.instance_id
                await frames.send(welcome)
                await frames.receive()
                begun = Frame()
                begun.begun.transfer_id = ticket.transfer_id
                await frames.send(begun)
                yield await begin, writers


async def finishes(task: "asyncio.Future[None]") -> bool:
    """Whether it ends by itself within five times the reply deadline of `stalled_peer`."""
    done, _ = await asyncio.wait([task], timeout=1.5)
    task.cancel()
    return bool(done)


async def test_a_push_to_a_peer_that_reads_nothing_ends_in_time():
    async with stalled_peer() as (transfer, writers):
        push = asyncio.ensure_future(transfer.push(list(range(16))))
        ended = await finishes(push)
        link = link_of(writers)
        link._frames.close()  # or a broken test would hang here
        with contextlib.suppress(asyncio.CancelledError, LinkError):
            await push
        assert ended, "a push waited without a deadline"


async def test_a_push_under_way_ends_when_its_link_is_closed():
    async with stalled_peer() as (transfer, writers):
        push = asyncio.ensure_future(transfer.push(list(range(16))))
        await rounds(200)
        link = link_of(writers)
        await until(link._frames._sending.locked)
        await rounds()
        await writers.close()
        assert await finishes(push), "a push on a closed link never ended"
        with pytest.raises(LinkError):
            await push


# ---- which transport


@pytest.mark.parametrize(
    ("there", "here", "used"),
    [
        ("auto", "auto", "shm"),
        ("shm", "auto", "shm"),
        ("tcp", "auto", "tcp"),
        ("auto", "shm", "shm"),
        ("auto", "tcp", "tcp"),
        ("tcp", "tcp", "tcp"),
    ],
)
async def test_both_ends_configs_choose_the_transport(there, here, used):
    async with decode_end(transport=there) as end, prefill_end(transport=here) as writers:
        assert (await writers.begin(end.ticket(1))).transport == used


@pytest.mark.parametrize(("there", "here"), [("tcp", "shm"), ("shm", "tcp")])
async def test_configs_that_exclude_each_other_are_a_link_error(there, here):
    async with decode_end(transport=there) as end, prefill_end(transport=here) as writers:
        with pytest.raises(LinkError, match="no way to decode-1: none fits"):
            await writers.begin(end.ticket(1))


async def test_a_config_offers_only_its_endpoints():
    for transport, offered in (("auto", ["shm", "tcp"]), ("shm", ["shm"]), ("tcp", ["tcp"])):
        async with decode_end(transport=transport) as end:
            assert [e.transport for e in end.listener.endpoints] == offered


async def test_auto_falls_back_to_tcp_where_the_unix_socket_cannot_be_reached():
    async with decode_end() as end, prefill_end() as writers:
        endpoints = list(end.listener.endpoints)
        endpoints[0] = Endpoint(transport="shm", address="/nowhere/at-all.sock")
        assert (await writers.begin(end.ticket(1, endpoints=endpoints))).transport == "tcp"


async def test_close_takes_the_unix_socket_away():
    async with decode_end(transport="shm") as end:
        folder, _, path = end.address("shm").rpartition("/")
        assert path in {entry.name for entry in os.scandir(folder)}
        await end.listener.close()
        assert path not in {entry.name for entry in os.scandir(folder)}


async def test_a_listener_closed_as_soon_as_started_leaves_nothing_behind(tmp_path):
    pool = KVPool(LAYOUT, 1, shared=True)
    listener = Listener(worker_config(tmp_path, transport="tcp"), "decode-1", pool, None)
    await listener.start()
    await listener.close()
    pool.close()
    gc.collect()  # a coroutine that was never awaited is an error


# ---- peers that break the protocol, by hand


@contextlib.asynccontextmanager
async def by_hand(end: DecodeEnd, transport: str, hello: bool = True) -> AsyncIterator[FrameSocket]:
    """A connection to the decode end; with `hello`, hands are shaken already."""
    if transport == "tcp":
        host, port = end.address("tcp").split(":")
        sock = socket.create_connection((host, int(port)))
    else:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(end.address("shm"))
    with sock:
        frames = FrameSocket(sock, 10)
        if hello:
            greeting = Hello(
                protocol_version=PROTOCOL_VERSION,
                instance_id="by-hand",
                layout=end.pool.layout.to_wire(),
            )
            await frames.send(Frame(hello=greeting))
            welcome = (await frames.receive()).welcome
            assert welcome.pool_bytes == end.pool.size_bytes
            if transport == "shm":
                async with asyncio.timeout(DEADLINE_S):
                    os.close(await movers.receive_fd(sock))
        yield frames


async def is_closed(frames: FrameSocket) -> bool:
    """Reads whatever the other end still says; True once it has closed."""
    async with asyncio.timeout(DEADLINE_S):
        try:
            while True:
                await frames.receive()
        except LinkError:
            return True


def raw(length: int, body: bytes = b"") -> bytes:
    return struct.pack("<I", length) + body


FIRST_WORDS = {
    "garbage": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a frame too long": raw(FRAME_BYTES_MAX + 1),
    "not protobuf": raw(4, b"\xff\xff\xff\xff"),
    "an empty frame": raw(0),
    "begin before hello": raw(2, b"\x22\x00"),
}


@pytest.mark.parametrize("words", FIRST_WORDS.values(), ids=FIRST_WORDS)
async def test_a_stranger_is_shut_out_and_others_go_on(decode, prefill, transport, words):
    living = await prefill.begin(decode.ticket(1))
    async with by_hand(decode, transport, hello=False) as frames:
        await asyncio.get_running_loop().sock_sendall(frames.sock, words)
        assert await is_closed(frames)
    await living.push([0])
    await living.commit(1, REPLY_S)
    assert decode.book.lost_transfers() == []


async def test_a_stranger_that_says_nothing_is_shut_out_in_time(transport):
    async with (
        decode_end(transport=transport, link_connect_ms=30) as end,
        by_hand(end, transport, hello=False) as frames,
    ):
        assert await is_closed(frames)


async def test_a_link_idle_after_its_handshake_is_kept(transport):
    async with (
        decode_end(transport=transport, link_connect_ms=30) as end,
        by_hand(end, transport, hello=False) as stranger,
        by_hand(end, transport) as frames,
    ):
        assert await is_closed(stranger)  # so its time is up as well
        await frames.send(Frame(begin=Begin(transfer_id=9)))
        assert (await frames.receive()).abort.reason.startswith("no such transfer")


BROKEN = {
    "committed": Frame(committed=Committed(transfer_id=1)),
    "hello again": Frame(hello=Hello()),
    "blocks of another link": Frame(blocks=Blocks(transfer_id=1, checksums=[0])),
    "blocks of nobody": Frame(blocks=Blocks(transfer_id=77, checksums=[0])),
}


@pytest.mark.parametrize("frame", BROKEN.values(), ids=BROKEN)
async def test_a_peer_that_breaks_the_protocol_loses_its_link_and_no_other(
    decode, prefill, transport, frame
):
    living = await prefill.begin(decode.ticket(1))
    async with by_hand(decode, transport) as frames:
        ticket = decode.ticket(1)
        await frames.send(Frame(begin=Begin(transfer_id=2, secret=ticket.secret)))
        assert (await frames.receive()).begun.transfer_id == 2
        await frames.send(frame)
        assert await is_closed(frames)
    await decode.book.until(lambda: decode.book.lost_transfers() == [2])
    await living.push([0])
    await living.commit(1, REPLY_S)


@pytest.mark.parametrize(
    ("first", "count"), [(1, 1), (0, 3)], ids=["out of order", "more than the ticket has"]
)
async def test_blocks_without_leave_never_reach_the_pool(decode, transport, first, count):
    async with by_hand(decode, transport) as frames:
        ticket = decode.ticket(2)
        await frames.send(Frame(begin=Begin(transfer_id=1, secret=ticket.secret)))
        await frames.receive()
        header = Blocks(transfer_id=1, first_index=first, checksums=[0] * count)
        payload = [memoryview(bytes([7]) * LAYOUT.block_bytes)] * (count * (transport == "tcp"))
        with contextlib.suppress(LinkError):
            await frames.send(Frame(blocks=header), payload)
        assert await is_closed(frames)
    await decode.book.until(lambda: decode.book.lost_transfers() == [1])
    assert not decode.pool.bytes.any()
    decode.check_all_free()


async def test_another_links_transfer_can_be_neither_committed_nor_aborted(
    decode, prefill, transport
):
    living = await prefill.begin(decode.ticket(1))
    async with by_hand(decode, transport) as frames:
        await frames.send(Frame(abort=Abort(transfer_id=1, reason="malice")))
        await frames.send(Frame(commit=Commit(transfer_id=1, blocks=1)))
        assert (await frames.receive()).abort.reason == "this link has no such transfer"
    await living.push([0])
    await living.commit(1, REPLY_S)
    assert decode.book.lost_transfers() == []


async def test_a_byte_flipped_on_the_wire_is_found():
    async with decode_end(transport="tcp") as end, by_hand(end, "tcp") as frames:
        ticket = end.ticket(2)
        await frames.send(Frame(begin=Begin(transfer_id=1, secret=ticket.secret)))
        await frames.receive()
        good = bytes(range(LAYOUT.block_bytes))
        bad = bytes([good[0] ^ 1]) + good[1:]
        header = Blocks(transfer_id=1, checksums=[_sum(good), _sum(good)])
        await frames.send(Frame(blocks=header), [memoryview(good), memoryview(bad)])
        assert (await frames.receive()).abort.reason == "block 1 has a wrong checksum"


async def test_a_byte_flipped_in_shared_memory_is_found(monkeypatch):
    async with decode_end(transport="shm") as end, prefill_end(transport="shm") as writers:
        ticket = end.ticket(1)
        transfer = await writers.begin(ticket)
        written = movers.ShmSender._write

        def write_and_flip(peer, pool, source, target):
            sums = written(peer, pool, source, target)
            end.pool.bytes[target[0], 5] ^= 1
            return sums

        monkeypatch.setattr(movers.ShmSender, "_write", staticmethod(write_and_flip))
        await transfer.push([0])
        with pytest.raises(LinkError):
            await transfer.commit(1, REPLY_S)
        await end.book.until(lambda: end.book.lost_transfers() == [1])
        end.check_all_free()


def _sum(block: bytes) -> int:
    return checksum(np.frombuffer(block, np.uint8))


# ---- cancelled in the middle of a socket


async def test_a_push_cancelled_in_the_middle_of_its_bytes_leaves_the_stream_whole():
    async with (
        decode_end(LARGE, blocks=24, transport="tcp") as end,
        prefill_end(LARGE, blocks=24, transport="tcp") as writers,
    ):
        big = await writers.begin(end.ticket(16))
        small_ticket = end.ticket(1)
        small = await writers.begin(small_ticket)
        push = asyncio.ensure_future(big.push(list(range(16))))
        link = link_of(writers)
        await until(link._frames._sending.locked)  # bytes are on their way
        await rounds(3)
        push.cancel()
        with pytest.raises(asyncio.CancelledError):
            await push
        await big.abort("cancelled")
        await small.push([20])
        await small.commit(1, REPLY_S)
        assert same_bytes(end.pool, small_ticket.block_ids, writers.pool, [20])
        await end.book.until(lambda: end.book.lost_transfers() == [1])
        assert not end.handoff.is_aborting(key(1))


async def test_a_commit_cancelled_in_the_middle_of_its_bytes_leaves_the_stream_whole():
    """The Commit frame is cut by a socket that takes three bytes and then no more for a while."""
    async with decode_end(transport="tcp") as end, prefill_end(transport="tcp") as writers:
        transfer = await writers.begin(end.ticket(1))
        await transfer.push([0])
        link = link_of(writers)
        sock, cut, go_on = link._frames.sock, asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        whole = loop.sock_sendall

        async def three_bytes_first(sock_, data):
            if sock_ is not sock:
                return await whole(sock_, data)
            await whole(sock_, bytes(data)[:3])
            cut.set()
            await go_on.wait()
            return await whole(sock_, bytes(data)[3:])

        loop.sock_sendall = three_bytes_first
        commit = asyncio.ensure_future(transfer.commit(1, REPLY_S))
        await cut.wait()
        del loop.sock_sendall
        commit.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await commit
        await hand_over(end, writers)


async def test_the_listener_survives_an_accept_that_fails():
    async with decode_end(transport="tcp") as end, prefill_end(transport="tcp") as writers:
        loop = asyncio.get_running_loop()
        right, failed = loop.sock_accept, asyncio.Event()

        async def out_of_files(sock):
            result = await right(sock)
            if not failed.is_set():
                failed.set()
                result[0].close()
                raise OSError(24, "Too many open files")
            return result

        # The accept under way is the right one: the second one fails.
        loop.sock_accept = out_of_files
        async with by_hand(end, "tcp"), by_hand(end, "tcp", hello=False) as refused:
            assert await is_closed(refused)
            assert failed.is_set()
            writers._config = writers._config.model_copy(update={"link_connect_ms": 500})
            await hand_over(end, writers)


async def test_a_link_ends_only_when_no_copy_into_the_peers_pool_is_under_way(monkeypatch):
    async with decode_end(transport="shm") as end, prefill_end(transport="shm") as writers:
        transfer = await writers.begin(end.ticket(1))
        began, go_on = threading.Event(), threading.Event()
        written = movers.ShmSender._write

        def held(*args):
            began.set()
            assert go_on.wait(REPLY_S)
            return written(*args)

        monkeypatch.setattr(movers.ShmSender, "_write", staticmethod(held))
        push = asyncio.ensure_future(transfer.push([0]))
        await asyncio.to_thread(began.wait, REPLY_S)
        closing = asyncio.ensure_future(link_of(writers).close())
        await asyncio.sleep(0)
        assert end.book.lost_transfers() == []
        go_on.set()
        with pytest.raises(LinkError):
            await push
        await closing
        await end.book.until(lambda: end.book.lost_transfers() == [1])
        end.check_all_free()
