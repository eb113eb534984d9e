"""Who could reach the public ports, and what is asked for then."""

import asyncio
import socket

import pytest

from router.exposure import ExposureError, bind_host, check_exposure, is_loopback, listen_address
from router.main import _address

LOOPBACK = ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "::ffff:127.0.0.1"]
OPEN = ["0.0.0.0", "::", "[::]", "10.0.0.1", "example.com", "127.0.0.1.example.com", "::ffff:1"]


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_is_open_to_anybody(host):
    assert is_loopback(host)
    for keys in (True, False):
        check_exposure(host, api_keys=keys, certificates=False, insecure=False)


@pytest.mark.parametrize("host", OPEN)
def test_elsewhere_callers_are_known_and_keys_do_not_travel_in_clear_text(host):
    assert not is_loopback(host)
    with pytest.raises(ExposureError, match="strangers: add --certificates DIR"):
        check_exposure(host, api_keys=False, certificates=False, insecure=False)
    with pytest.raises(ExposureError, match="clear text: add --certificates DIR"):
        check_exposure(host, api_keys=True, certificates=False, insecure=False)
    for keys in (True, False):
        check_exposure(host, api_keys=keys, certificates=True, insecure=False)
        check_exposure(host, api_keys=keys, certificates=False, insecure=True)


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1:5"), ("::1", "[::1]:5"), ("[::1]", "[::1]:5"), ("h", "h:5")],
)
def test_listen_address(host, address):
    assert listen_address(host, 5) == address


@pytest.mark.parametrize(
    ("host", "bound"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("[::1]", "::1"),
        ("::", "::"),
        ("[::]", "::"),
        ("0.0.0.0", "0.0.0.0"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("node-1.example.com", "node-1.example.com"),
    ],
)
def test_both_servers_bind_the_same(host, bound):
    assert bind_host(host) == bound


@pytest.mark.parametrize("host", ["", " ", "[]"])
def test_no_host_is_not_all_of_them(host):
    with pytest.raises(ExposureError, match="empty: say"):
        bind_host(host)


async def test_a_name_is_looked_up_once_for_both_servers(monkeypatch):
    async def found(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host != "node-1":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(0, 0, 0, "", ("10.0.0.1", 0)), (0, 0, 0, "", ("fd00::1", 0))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found)
    assert await _address("::1") == "::1"
    assert await _address("node-1") == "10.0.0.1"
    with pytest.raises(OSError, match="--host node-2 has no address: Name or service not known"):
        await _address("node-2")
