"""The cluster's processes as they are found: by who listens at the addresses that it names.

Made by run.py, used by siege.py, leaks.py and samples.py. Only descendants of this process are ever
looked at, so nobody else's is struck.
"""

import contextlib
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
from prometheus_client.parser import text_string_to_metric_families

from cluster.serving import Serving

ROLES = ("prefill", "decode", "router")
_METRICS_S = 1.0
_RAY = "ray::"
_RAY_IDLE = f"{_RAY}IDLE"  # Ray keeps a few, as it likes
WORKER_ACTOR = f"{_RAY}WorkerActor"  # cluster/actors.py: one for each worker


@dataclass(frozen=True)
class Member:
    role: str
    address: str
    process: psutil.Process


class Processes:
    """`counts`: how many there are to be of each role."""

    def __init__(self, serving: Serving, counts: Mapping[str, int]) -> None:
        self._serving = serving
        self._counts = counts
        self._by_address: dict[str, psutil.Process] = {}
        self._others: set[int] = set()
        self._ever: set[psutil.Process] = set()  # by id and time of birth
        self._roles: dict[psutil.Process, str] = {}

    def leave_out(self, pid: int) -> None:
        """It and its children are none of the cluster's."""
        self._others.add(pid)

    def members(self, role: str) -> list[Member]:
        """Those of `role` that run, or are stopped, now; in the order of their addresses."""
        found = [(each, self._find(each)) for each in sorted(self._addresses(role))]
        return [Member(role, address, process) for address, process in found if process]

    def alive(self) -> dict[str, int]:
        """How many of each role run; one that is stopped does not."""
        return {
            role: sum(_status(each.process) not in _STILL for each in self.members(role))
            for role in ROLES
        }

    def are_whole(self) -> bool:
        """All run, and every router is connected to all workers."""
        if self.alive() != dict(self._counts):
            return False
        for address in self.router_http:
            gauges = router_gauges(address)
            for role in ("prefill", "decode"):
                if gauges.get(f"kvrelay_workers/{role}") != self._counts[role]:
                    return False
        return True

    def living(self) -> dict[int, str]:
        """Roles, by id, of all members that were ever found and run, or are stopped, now."""
        for role in ROLES:
            self._roles |= {each.process: role for each in self.members(role)}
        return {process.pid: role for process, role in self._roles.items() if is_alive(process)}

    @property
    def counts(self) -> Mapping[str, int]:
        """How many there are to be of each role."""
        return self._counts

    def orphans(self) -> list[str]:
        """Processes that were once below this one, run, and are not below it any more."""
        below = set(self.descendants())
        return [_told(process) for process in self._ever - below if is_alive(process)]

    def survivors(self) -> list[str]:
        """All that were ever below this one and run, wherever they are now."""
        return [_told(process) for process in self._ever if is_alive(process)]

    @property
    def router_http(self) -> list[str]:
        return [each.http for each in self._serving.routers.addresses]

    def names(self) -> dict[int, str]:
        """What every process of the cluster is, by its id: a role, or its name for all others."""
        roles = {each.process.pid: role for role in ROLES for each in self.members(role)}
        found = {psutil.Process().pid: "serving"}
        for process in self.descendants():
            with contextlib.suppress(psutil.Error):
                found[process.pid] = roles.get(process.pid) or _name(process)
        return found

    def descendants(self) -> list[psutil.Process]:
        """All below this process, but for those left out."""
        own = psutil.Process()
        left_out = {pid for pid in self._others if psutil.pid_exists(pid)}
        below = [child for pid in left_out for child in _children(pid)]
        apart = left_out | {process.pid for process in below}
        found = [each for each in own.children(recursive=True) if each.pid not in apart]
        self._ever.update(found)
        return found

    def _addresses(self, role: str) -> Sequence[str]:
        if role == "router":
            return [each.grpc for each in self._serving.routers.addresses]
        return self._serving.worker_addresses(role)

    def _find(self, address: str) -> psutil.Process | None:
        process = self._by_address.get(address)
        if process is None or not is_alive(process):
            process = self._listener(int(address.rpartition(":")[2]))
            if process is None:
                self._by_address.pop(address, None)
                return None
            self._by_address[address] = process
        return process

    def _listener(self, port: int) -> psutil.Process | None:
        for process in self.descendants():
            with contextlib.suppress(psutil.Error):
                sockets = process.net_connections("tcp")
                if any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets):
                    return process
        return None


def router_gauges(http_address: str) -> dict[str, float]:
    """What /metrics of a router says, by name, and by name/role where there are several; nothing
    when it does not answer."""
    try:
        url = f"http://{http_address}/metrics"
        with urllib.request.urlopen(url, timeout=_METRICS_S) as response:
            page = response.read().decode()
    except OSError:
        return {}
    return {
        f"{sample.name}/{sample.labels['role']}" if "role" in sample.labels else sample.name: (
            sample.value
        )
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if set(sample.labels) <= {"role"}
    }


_STILL = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def _status(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD


def is_alive(process: psutil.Process) -> bool:
    """It runs or is stopped."""
    return process.is_running() and _status(process) not in (
        psutil.STATUS_ZOMBIE,
        psutil.STATUS_DEAD,
    )


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str:
    """What it runs: a module, Ray's name for its worker, or the program."""
    command = process.cmdline()
    if "-m" in command[:-1]:
        return command[command.index("-m") + 1]
    first = command[0] if command else process.name()
    if first.startswith(WORKER_ACTOR):  # and what it does just now
        return WORKER_ACTOR
    return _RAY_IDLE if first.startswith(_RAY) else first.rpartition("/")[2]


def _told(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{_name(process)} {process.pid}"
    return str(process.pid)
