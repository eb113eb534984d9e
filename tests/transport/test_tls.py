"""KV links under TLS: who is let in, what travels, and folders that cannot be used."""

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
from collections import Counter

import numpy as np
import pytest
from kv_fixtures import DEADLINE_S, decode_end, prefill_end, same_bytes
from links import (
    LARGE,
    REPLY_S,
    Wire,
    connected,
    greeting,
    hand_over,
    is_closed,
    link_of,
    raw,
    rounds,
    until,
)

from kvrelay.tls import CertificatesError, client_context, server_context
from kvrelay.transport.channel import Channel
from kvrelay.transport.errors import LinkError, Rejection
from kvrelay.transport.frames import FrameSocket


@contextlib.asynccontextmanager
async def both_ends(ours, layout=LARGE, blocks=24):
    async with (
        decode_end(layout, blocks, transport="tcp", certificates=ours) as end,
        prefill_end(layout, blocks, transport="tcp", certificates=ours) as writers,
    ):
        yield end, writers


# ---- what travels


async def test_a_link_with_certificates_is_tls_and_hands_over(ours):
    async with both_ends(ours, blocks=4) as (end, writers):
        await hand_over(end, writers)
        sock = link_of(writers)._frames.channel.sock
        assert isinstance(sock, ssl.SSLSocket)
        assert sock.version() == "TLSv1.3"
        assert not end.listener.rejected


async def test_large_transfers_arrive_bit_equal_while_answers_come_the_other_way(ours):
    async with both_ends(ours) as (end, writers):
        big = await writers.begin(end.ticket(16))
        wire = Wire(link_of(writers), end)
        wire.spoil.update((1, index) for index in range(0, 16, 2))

        async def send_big() -> None:
            for first in range(0, 16, 4):
                await big.push(list(range(first, first + 4)))
            await big.commit(1, DEADLINE_S)

        async def send_small(number: int) -> None:
            await hand_over(end, writers, blocks=1)
            end.finish(number)

        async def send_small_ones() -> None:
            for number in range(2, 12):
                await send_small(number)

        await asyncio.gather(send_big(), send_small_ones())
        assert same_bytes(end.pool, big.ticket.block_ids, writers.pool, range(16))
        assert sum(again for _, _, again in wire.sent()) == 8


async def tls_pair(ours):
    """Two channels, hands shaken."""
    here, there = socket.socketpair()
    client, server = Channel(here, REPLY_S), Channel(there, REPLY_S)
    await asyncio.gather(
        client.start_tls(client_context(ours), server_side=False),
        server.start_tls(server_context(ours), server_side=True),
    )
    return client, server


async def test_both_directions_of_a_channel_carry_megabytes_at_once(ours):
    one, other = await tls_pair(ours)
    rng = np.random.default_rng(3)
    there, back = (rng.integers(0, 256, 8 << 20, np.uint8) for _ in range(2))
    got_there, got_back = np.empty_like(there), np.empty_like(back)
    async with asyncio.timeout(4 * DEADLINE_S):
        await asyncio.gather(
            one.write([there[:100].data, there[100:].data]),
            other.write([back.data]),
            one.read_into([got_back[: 1 << 20].data, got_back[1 << 20 :].data]),
            other.read_into([got_there.data]),
        )
    assert (got_there == there).all()
    assert (got_back == back).all()
    one.close()
    other.close()


async def test_a_channel_closed_while_it_sends_stays_encrypted_to_its_end(ours):
    one, other = await tls_pair(ours)
    payload = memoryview(bytes(16 << 20))
    sending = asyncio.ensure_future(one.write([payload]))
    await until(lambda: one._operations == 1)
    await rounds()
    one.close()
    assert one.sock.fileno() >= 0, "the send under way is over: this test shows nothing"
    assert one.sock.version() == "TLSv1.3"
    with pytest.raises(LinkError):
        await sending
    assert one.sock.fileno() < 0
    other.close()


async def test_shm_links_need_no_tls(ours):
    async with (
        decode_end(certificates=ours) as end,
        prefill_end(certificates=ours) as writers,
    ):
        assert (await writers.begin(end.ticket(1))).transport == "shm"


# ---- who is let in


def no_certificate(ours, theirs):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(ours / "ca.pem")
    return context


def of_another_ca(ours, theirs):
    context = no_certificate(ours, theirs)
    context.load_cert_chain(theirs / "cert.pem", theirs / "key.pem")
    return context


def that_trusts_another_ca(ours, theirs):
    return client_context(theirs)


def of_an_older_tls(ours, theirs):
    context = client_context(ours)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


@pytest.mark.filterwarnings("ignore:.*TLSv1_2.*:DeprecationWarning")
@pytest.mark.parametrize(
    "stranger", [no_certificate, of_another_ca, that_trusts_another_ca, of_an_older_tls]
)
async def test_a_peer_without_our_certificates_is_refused_and_counted(ours, theirs, stranger):
    async with both_ends(ours, blocks=4) as (end, writers):
        with connected(end, "tcp") as sock:
            frames = FrameSocket(sock, 10)
            with contextlib.suppress(LinkError):  # a TLS 1.3 client is done before it is refused
                await frames.channel.start_tls(stranger(ours, theirs), server_side=False)
                await frames.send(greeting(LARGE))
            assert await is_closed(frames)
            frames.close()
        await until(lambda: end.listener._open == 0)
        assert end.listener.rejected == Counter([Rejection.HANDSHAKE])
        await hand_over(end, writers)


@pytest.mark.parametrize("words", [raw(0), b"GET / HTTP/1.1\r\n\r\n", None])
async def test_a_plain_peer_is_refused_and_counted(ours, words):
    if words is None:
        body = greeting(LARGE).SerializeToString()
        words = raw(len(body), body)
    async with both_ends(ours, blocks=4) as (end, writers):
        with connected(end, "tcp") as sock:
            frames = FrameSocket(sock, 10)
            sock.send(words)
            sock.shutdown(socket.SHUT_WR)
            assert await is_closed(frames)
            frames.close()
        assert end.listener.rejected == Counter([Rejection.HANDSHAKE])
        await hand_over(end, writers)


async def test_a_worker_without_certificates_gets_no_link_to_one_that_has_them(ours):
    async with (
        decode_end(transport="tcp", certificates=ours) as end,
        prefill_end(transport="tcp") as writers,
    ):
        with pytest.raises(LinkError, match="no way to decode-1: tcp"):
            await writers.begin(end.ticket(1))
        assert end.listener.rejected == Counter([Rejection.HANDSHAKE])


async def test_a_worker_with_certificates_does_not_talk_to_one_that_has_none(ours):
    async with (
        decode_end(transport="tcp", link_connect_ms=100) as end,
        prefill_end(transport="tcp", certificates=ours) as writers,
    ):
        with pytest.raises(LinkError, match="no way to decode-1: tcp"):
            await writers.begin(end.ticket(1))
        assert end.book.events == []


async def test_a_worker_does_not_talk_to_one_of_another_ca(ours, theirs):
    async with (
        decode_end(transport="tcp", certificates=theirs) as end,
        prefill_end(transport="tcp", certificates=ours) as writers,
    ):
        with pytest.raises(LinkError, match=r"(?i)certificate"):
            await writers.begin(end.ticket(1))
        await until(lambda: end.listener._open == 0)
        assert end.listener.rejected == Counter([Rejection.HANDSHAKE])


async def test_a_peer_that_stops_in_the_tls_handshake_is_given_up_in_time(ours):
    async with decode_end(transport="tcp", certificates=ours, link_connect_ms=30) as end:
        with connected(end, "tcp") as sock:
            frames = FrameSocket(sock, 10)
            sock.send(b"\x16\x03\x01\x02\x00\x01")  # the head of a ClientHello
            assert await is_closed(frames)
            frames.close()


# ---- folders


@pytest.fixture
def folder(ours, tmp_path):
    """A copy of our certificates to be spoiled."""
    return shutil.copytree(ours, tmp_path / "copy")


@pytest.fixture(params=[server_context, client_context])
def context(request):
    return request.param


def test_a_whole_folder_is_used(folder, context):
    assert context(folder).verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        (["ca.pem"], "has no ca.pem"),
        (["cert.pem", "key.pem"], "has no cert.pem and no key.pem"),
        (["ca.pem", "cert.pem", "key.pem"], "has no ca.pem and no cert.pem and no key.pem"),
    ],
)
def test_missing_files_are_named_in_one_line(folder, context, missing, text):
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(CertificatesError) as error:
        context(folder)
    assert str(error.value) == f"{folder} {text}"


def test_a_folder_that_is_not_there_is_named(tmp_path, context):
    with pytest.raises(CertificatesError, match=f"^{tmp_path}/none has no ca.pem and no cert.pem"):
        context(tmp_path / "none")


@pytest.mark.parametrize("name", ["ca.pem", "cert.pem", "key.pem"])
@pytest.mark.parametrize("words", [b"", b"not a certificate\n"], ids=["empty", "nonsense"])
def test_a_file_that_is_not_what_it_should_be_is_one_line(folder, context, name, words):
    (folder / name).write_bytes(words)
    with pytest.raises(CertificatesError, match=f"^the certificates in {folder} are not usable: "):
        context(folder)


def test_a_key_of_another_certificate_is_one_line(folder, theirs, context):
    shutil.copy(theirs / "key.pem", folder)
    with pytest.raises(CertificatesError, match=r"not usable: .*MISMATCH"):
        context(folder)


def test_a_key_with_a_passphrase_is_one_line_and_asks_nobody(folder, context):
    key = folder / "key.pem"
    subprocess.run(
        ["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:secret", "-out", key],
        check=True,
        capture_output=True,
    )
    with pytest.raises(CertificatesError, match="not usable"):
        context(folder)


async def test_a_listener_and_a_writer_pool_say_so_when_they_are_made(tmp_path):
    for end in (decode_end, prefill_end):
        with pytest.raises(CertificatesError, match="has no"):
            async with end(certificates=tmp_path):
                pass
