"""Which transport is used, and what a listener opens and closes."""

import asyncio
import gc
import os

import pytest
from kv_fixtures import (
    LAYOUT,
    decode_end,
    prefill_end,
    worker_config,
)
from links import (
    by_hand,
    hand_over,
    is_closed,
)

from kvrelay.kv.pool import KVPool
from kvrelay.transport.errors import LinkError
from kvrelay.transport.listener import Listener
from kvrelay.wire.transfer_pb2 import (
    Endpoint,
)


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


async def test_the_listener_survives_an_accept_that_fails():
    async with (
        decode_end(transport="tcp") as end,
        prefill_end(transport="tcp", link_connect_ms=500) as writers,
    ):
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
            await hand_over(end, writers)
