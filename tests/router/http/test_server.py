"""The server's start and end."""

import asyncio
import re

import httpx2
import pytest
from http_router import http_router, router_config

from router.http.server import HttpServer

DEADLINE_S = 20.0  # only a broken test waits this long


async def _no_app(*_: object) -> None:
    raise AssertionError("nobody calls")


async def test_a_port_that_is_taken():
    async with http_router() as router:
        port = int(router.server.address.split(":")[1])
        second = HttpServer(_no_app, router_config(http_port=port))
        told = f"HTTP port 127.0.0.1:{port} is taken; choose another with --http-port"
        with pytest.raises(OSError, match=re.escape(told)):
            await second.start()
        await second.stop()


async def test_what_runs_at_the_end_is_let_go_of():
    async with http_router() as router, asyncio.timeout(DEADLINE_S):
        call = asyncio.create_task(router.complete(stream=True))
        asked, answer = await router.fleet.asked.get()
        answer.put([65])
        await router.server.stop()
        assert await router.fleet.let_go_of.get() is asked
        with pytest.raises(httpx2.HTTPError):
            await call


async def test_an_idle_connection_does_not_hold_up_the_end():
    async with http_router() as router, asyncio.timeout(DEADLINE_S):
        await router.client.get("/health")
        reader, _ = await router.connect()
        await router.server.stop()
        assert await reader.read() == b""
        with pytest.raises(httpx2.HTTPError):
            await router.client.get("/health")
