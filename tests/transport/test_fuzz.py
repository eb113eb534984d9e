"""Anything at all comes in at the TCP port: no crash, no memory beyond the limits, every
connection ended with a reason, and the links of others go on.

A case is a few pieces of nonsense, some of it nearly right, said before the handshake, after it or
with leave to write; then the peer ends its side.
"""

import asyncio
import contextlib
import logging
import resource
import socket
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_fixtures import DEADLINE_S, LAYOUT, decode_end, key, prefill_end
from links import begun_by_hand, connected, greeting, hand_over, link_of, raw, sum_of

from decode_worker.reservation import ReservationEvent, ReservationState
from kvrelay.transport import frames as frames_module
from kvrelay.transport.frames import FRAME_BYTES_MAX, FrameSocket
from kvrelay.wire.transfer_pb2 import (
    Abort,
    Aborted,
    Begin,
    Begun,
    Blocks,
    Commit,
    Committed,
    Frame,
    KvLayout,
    PairEnded,
    PairOpen,
    Refused,
    Resend,
    Ticket,
    Welcome,
)

TICKET_BLOCKS = 3
_BLOCK = bytes(LAYOUT.block_bytes)
GROWTH_BYTES_MAX = 16 << 20  # of the process, by one case

# ---- what is said

_u32 = st.sampled_from([0, 1, 2, 3, 4, 255, 1 << 16, 2**31, 2**32 - 1])
_u64 = st.sampled_from([0, 1, 2, 2**32, 2**63, 2**64 - 1])
_text = st.sampled_from(
    ["", "asis", "bf16", "float32", "float16", "int4", "x" * 5000, "\0", "日本"]
)
_layouts = st.builds(
    KvLayout,
    model_fingerprint=st.sampled_from(["tiny", "", "other"]),
    dtype=_text,
    layers=_u32,
    block_size=_u32,
    kv_heads=_u32,
    head_dim=_u32,
)
_ACCEPTED = [replace(LAYOUT, dtype=dtype).to_wire() for dtype in ("float32", "float16")]
_THIS = "the ticket's transfer"  # its number is known only when a case runs
_ids = st.one_of(st.just(_THIS), st.just(_THIS), _u64)
_sums = st.one_of(
    st.lists(_u64, max_size=4),
    st.integers(0, 40_000).map(lambda count: [7] * count),  # the longest beyond a frame's limit
)
_MESSAGES = {
    "hello": st.builds(
        lambda **fields: greeting(LAYOUT, **fields).hello,
        protocol_version=st.one_of(st.just(2), _u32),
        layout=st.one_of(st.sampled_from(_ACCEPTED), _layouts),
        codec=st.one_of(st.just("asis"), _text),
        checksums=st.booleans(),
        instance_id=_text,
    ),
    "begin": st.builds(
        Begin,
        ticket=st.builds(
            Ticket,
            transfer_id=_u64,
            signature=st.binary(max_size=40),
            block_ids=st.lists(_u32, max_size=9),
            expires_ms=_u64,
        ),
    ),
    "blocks": st.builds(
        Blocks,
        first_index=_u32,
        count=st.one_of(st.integers(0, TICKET_BLOCKS), _u32),
        checksums=_sums,
        again=st.booleans(),
    ),
    "commit": st.builds(Commit, blocks=_u32, first_token_id=_u32),
    "abort": st.builds(Abort, reason=_text),
    "aborted": st.builds(Aborted),
    "welcome": st.builds(Welcome, instance_id=_text, pool_bytes=_u64, wire_dtype=_text),
    "refused": st.builds(Refused, reason=_text),
    "begun": st.builds(Begun),
    "committed": st.builds(Committed),
    "pair_open": st.builds(PairOpen, epoch=_u64, unique_id=st.binary(max_size=200)),
    "pair_ended": st.builds(PairEnded, epoch=_u64, reason=_text),
    "resend": st.builds(Resend, indexes=st.lists(_u32, max_size=50)),
}


@st.composite
def _deliveries(draw):
    """Blocks and, behind them, as many bytes as belong there."""
    count = draw(st.integers(0, TICKET_BLOCKS))
    blocks = Blocks(
        first_index=draw(st.integers(0, TICKET_BLOCKS)),
        count=count,
        checksums=[draw(st.sampled_from([0, sum_of(_BLOCK)]))] * count,
        again=draw(st.booleans()),
    )
    return (Frame(blocks=blocks), _THIS), lambda body: raw(len(body), body) + _BLOCK * count


@st.composite
def _frames(draw):
    """A frame of any kind; the number of its transfer is filled in by the case."""
    kind = draw(st.sampled_from(sorted(_MESSAGES)))
    return Frame(**{kind: draw(_MESSAGES[kind])}), draw(_ids)


def _flipped(at):
    def words(body):
        if not body:
            return raw(0)
        spoiled = bytearray(body)
        spoiled[len(body) * at // 100] ^= 0x55
        return raw(len(body), bytes(spoiled))

    return words


_percent = st.integers(0, 99)
# What becomes of a frame's bytes on the way.
_ways = st.one_of(
    st.just(lambda body: raw(len(body), body)),
    st.just(lambda body: raw(len(body), body)),
    _percent.map(lambda at: lambda body: raw(len(body), body[: len(body) * at // 100])),
    _percent.map(lambda at: lambda body: raw(len(body) * at // 100, body)),
    _percent.map(_flipped),
    _u32.map(lambda length: lambda body: raw(length, body)),
)
_block_bytes = st.integers(0, TICKET_BLOCKS * LAYOUT.block_bytes + 9).map(bytes)
_pieces = st.one_of(
    st.binary(max_size=300),
    st.tuples(_frames(), _ways),
    st.tuples(_frames(), _ways),
    _deliveries(),
    _block_bytes,
)
_cases = st.tuples(
    st.sampled_from(["before", "after", "begun"]),
    st.booleans(),  # with checksums
    st.lists(_pieces, min_size=1, max_size=4),
)


def words_of(pieces, transfer_id):
    whole = b""
    for piece in pieces:
        if isinstance(piece, bytes):
            whole += piece
            continue
        (frame, number), way = piece
        frame = Frame.FromString(frame.SerializeToString())
        body = getattr(frame, frame.WhichOneof("body"))
        if isinstance(body, Begin):
            body = body.ticket
        if "transfer_id" in body.DESCRIPTOR.fields_by_name:
            body.transfer_id = transfer_id if number is _THIS else number
        whole += way(frame.SerializeToString())
    return whole


# ---- who hears it


class Log(logging.Handler):
    """What the listener says about the ends of links, and whether anything went wrong."""

    def __init__(self):
        super().__init__()
        self.ends = []
        self.errors = []

    def emit(self, record):
        text = record.getMessage()
        if record.levelno >= logging.ERROR:
            self.errors.append(f"{text}: {record.exc_info and record.exc_info[1]!r}")
        elif record.msg.startswith("link with"):
            self.ends.append(record.args[1])


@contextlib.contextmanager
def log_of_listener():
    logger, log = logging.getLogger("kvrelay.transport.listener"), Log()
    before = logger.level, logger.propagate
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # pytest would keep every line
    try:
        yield log
    finally:
        logger.removeHandler(log)
        logger.setLevel(before[0])
        logger.propagate = before[1]


async def one_case(end, log, stage, checksums, pieces):
    log.ends.clear()
    ticket = end.ticket(TICKET_BLOCKS)
    with connected(end, "tcp") as sock:
        frames = FrameSocket(sock, DEADLINE_S)
        if stage != "before":
            await frames.send(greeting(LAYOUT, checksums=checksums))
            await frames.receive()
        if stage == "begun":
            await begun_by_hand(frames, ticket)
        await say(sock, words_of(pieces, ticket.transfer_id))
    assert len(log.ends) == 1
    assert log.ends[0], "no reason was given"
    assert not log.errors
    for reservation in list(end.handoff._by_key.values()):
        if reservation.state is ReservationState.DECODING:  # a case that made no mistake
            end.handoff.finish(reservation.key)
        else:
            assert reservation.state is ReservationState.RESERVED, "its writer is gone"
            end.handoff.abort(reservation.key, ReservationEvent.CANCEL)
    end.book.events.clear()
    end.check_all_free()


async def say(sock, words):
    """And hears the other end out."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(DEADLINE_S):
        with contextlib.suppress(OSError):  # it may close before it has heard everything
            await loop.sock_sendall(sock, words)
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while await loop.sock_recv(sock, 1 << 16):
                pass


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def fuzz(cases, monkeypatch):
    sizes = []

    def counted(size):
        sizes.append(size)
        return bytearray(size)

    monkeypatch.setattr(frames_module, "bytearray", counted, raising=False)
    with asyncio.Runner() as runner, log_of_listener() as log:
        ends = contextlib.AsyncExitStack()

        async def open_ends():
            end = await ends.enter_async_context(decode_end(transport="tcp", checksums=False))
            writers = await ends.enter_async_context(prefill_end(transport="tcp"))
            await hand_over(end, writers)
            end.finish(1)
            return end, writers

        end, writers = runner.run(open_ends())
        healthy = link_of(writers)

        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=_cases)
        def nothing_breaks(case):
            before = peak_bytes()
            runner.run(one_case(end, log, *case))
            assert peak_bytes() - before < GROWTH_BYTES_MAX

        try:
            nothing_breaks()
            assert max(sizes) <= FRAME_BYTES_MAX
            runner.run(hand_over(end, writers))
            assert link_of(writers) is healthy
            assert not healthy.closed
            assert end.listener._open == 1
            assert not end.listener._links
            end.handoff.finish(key(end._keys))
            end.check_all_free()
        finally:
            runner.run(ends.aclose())


def test_300_malformed_conversations_at_the_tcp_port_break_nothing(monkeypatch):
    fuzz(300, monkeypatch)


@pytest.mark.slow
def test_20000_malformed_conversations_at_the_tcp_port_break_nothing(monkeypatch):
    fuzz(20_000, monkeypatch)
