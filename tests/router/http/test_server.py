"""The server's start and end."""

import asyncio
import re
import socket
import ssl

import httpx2
import pytest
from certificates import make_certificates
from http_router import HttpRouter, http_router
from router_cases import router_config
from waiting import until

from kvrelay.tls import server_context
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


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    folder = make_certificates(tmp_path_factory.mktemp("tls") / "cluster")
    client = ssl.create_default_context(cafile=folder / "ca.pem")
    return server_context(folder, client_certificates=False), client


def over_tls(router: HttpRouter, context: ssl.SSLContext) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=f"https://{router.server.address}", verify=context)


async def test_a_connection_without_a_handshake_is_closed(tls):
    async with http_router(tls=tls[0], http_tls_ms=50) as router, asyncio.timeout(DEADLINE_S):
        reader, _ = await router.connect()
        assert await reader.read() == b""
        async with over_tls(router, tls[1]) as client:
            assert (await client.get("/health")).status_code == 200


async def test_connections_without_a_handshake_count(tls):
    async with (
        http_router(tls=tls[0], http_tls_ms=60_000, http_connections_max=2) as router,
        asyncio.timeout(DEADLINE_S),
        over_tls(router, tls[1]) as client,
    ):
        assert (await client.get("/health")).status_code == 200  # and stays open
        _, silent = await router.connect()
        reader, _ = await router.connect()
        assert await reader.read() == b""
        silent.close()
        acceptor = router.server._acceptor
        await until(lambda: not acceptor._opening, within_s=DEADLINE_S)
        async with over_tls(router, tls[1]) as other:
            assert (await other.get("/health")).status_code == 200


async def test_a_handshake_does_not_hold_up_the_end(tls):
    async with http_router(tls=tls[0], http_tls_ms=60_000) as router:
        async with asyncio.timeout(DEADLINE_S):
            reader, _ = await router.connect()
            await until(lambda: router.server._acceptor._opening, within_s=DEADLINE_S)
            await router.server.stop()
            assert await reader.read() == b""


async def test_a_call_that_has_not_begun_is_told_of_the_end(caplog):
    async with http_router() as router, asyncio.timeout(DEADLINE_S):
        reader, writer = await router.connect()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\n\r\n{"
        )
        state = router.server._server.server_state
        await until(lambda: state.tasks, within_s=DEADLINE_S)
        await router.server.stop()
        answer = (await reader.read()).decode()
        assert answer.startswith("HTTP/1.1 503 ")
        assert "\r\nretry-after: 1\r\n" in answer
        assert '"message":"the router is shutting down"' in answer
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_all_addresses_are_those_of_both_families(host):
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    async with http_router(host=host) as router, asyncio.timeout(DEADLINE_S):
        port = router.server.address.rsplit(":", 1)[1]
        for address in ("127.0.0.1", "[::1]"):
            async with httpx2.AsyncClient(base_url=f"http://{address}:{port}") as client:
                assert (await client.get("/health")).status_code == 200
