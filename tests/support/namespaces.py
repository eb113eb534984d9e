"""Two network namespaces with one wire between them: two hosts, as far as sockets can tell.

Needs root and the `ip` command of iproute2. The names are this run's own, and all of it is gone
when the context ends.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_DEVICE = "kv0"  # in each of the two
_ADDRESSES = ("198.18.0.1", "198.18.0.2")  # of the range for tests of networks (RFC 2544)
_CARRIER_S = 10.0  # only a broken test waits so long


def why_not() -> str:
    """Why there can be no namespaces here; empty when there can."""
    if os.geteuid():
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the ip command (iproute2)"
    name = f"kvrelay-{os.getpid()}-try"
    made = _run("netns", "add", name)
    if made.returncode:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    _run("netns", "delete", name)
    return ""


@dataclass(frozen=True)
class Host:
    netns: str
    address: str


@dataclass(frozen=True)
class Wire:
    prefill: Host
    decode: Host

    def down(self) -> None:
        self._set("down")

    def up(self) -> None:
        """Returns when P sees the carrier, and has forgotten that D was out of reach."""
        self._set("up")
        deadline_s = time.monotonic() + _CARRIER_S
        while "state UP" not in _run("-n", self.prefill.netns, "link", "show", _DEVICE).stdout:
            assert time.monotonic() < deadline_s, "no carrier"
        _ip("-n", self.prefill.netns, "neigh", "flush", "dev", _DEVICE)

    def _set(self, state: str) -> None:
        """At D's end: P's sees no carrier any more, as when a cable is pulled."""
        _ip("-n", self.decode.netns, "link", "set", _DEVICE, state)


@contextlib.contextmanager
def two_hosts() -> Iterator[Wire]:
    run = f"kvrelay-{os.getpid()}-{os.urandom(3).hex()}"
    prefill, decode = (
        Host(f"{run}-{role}", address) for role, address in zip("pd", _ADDRESSES, strict=True)
    )
    with contextlib.ExitStack() as made:
        for host in (prefill, decode):
            made.callback(_run, "netns", "delete", host.netns)
            _ip("netns", "add", host.netns)
        ends = ["name", _DEVICE, "netns", decode.netns]
        _ip("link", "add", _DEVICE, "netns", prefill.netns, "type", "veth", "peer", *ends)
        for host in (prefill, decode):
            _ip("-n", host.netns, "address", "add", f"{host.address}/30", "dev", _DEVICE)
            for device in ("lo", _DEVICE):
                _ip("-n", host.netns, "link", "set", device, "up")
        yield Wire(prefill, decode)


def enter_namespace(netns: str) -> None:
    """The calling thread, and so a process that has no other yet, lives there from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", netns).open("rb") as entry:
        if libc.setns(entry.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {netns}")


def _ip(*arguments: str) -> None:
    done = _run(*arguments)
    assert not done.returncode, f"ip {' '.join(arguments)}: {done.stderr.strip()}"


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
