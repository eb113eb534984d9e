"""Every link under faults drawn from a seed: real processes, and every phase of a transfer.

A lane is one P and one D in processes of their own with a proxy between them (link_couple.py).
Several lanes run side by side. link_plans.py says in SHARES what is done to how many of a thousand
transfers: 58 kills and 25 SIGSTOPs of P or D, 25 wires that stand still, 52 tickets that have ended
(13 of them because D was killed and another is at its address), 160 flipped bytes, 360 frames sent
twice, out of order or cut short, 120 given up by either worker, 200 left alone. So the full form,
10,000 transfers on each link, kills at least 580 processes and stops 250.

After each: what was committed is equal to its source (blake2b, taken by both processes), nothing is
accepted that P did not commit, every wait ended within its own deadline and a second (and what the
machine kept us waiting), and no block, transfer, thread or descriptor is left. Half of
those that no process or wire is stopped for have another beside them on the same link, which must
commit unless the link broke.

Beside the lanes a healthy pair commits every one of its transfers. Its D is also the D of the first
lane, whose P is killed, stopped and spoiled like any other. Rounds without faults, of the same
transfers at the same times, come between; the p99 of the healthy pair is compared.

NCCL is a double (nccl_double.py). A failure prints its seed; KVRELAY_SEED plays it again.
"""

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from link_couple import Couple, Deadlines, Witness
from link_lane import Lane, Tally
from link_plans import Plan, draw
from link_process import End, Nursery

LINKS = ["shm", "tcp", "tls", "nccl"]
SEED = int(os.environ.get("KVRELAY_SEED", "1"))

_ROUND = 20  # transfers of a lane, at most
_SHARED = Deadlines(lease_ms=1500, connect_ms=5000, reply_ms=1000)  # of the healthy pair
_HEALTHY_S = 10.0  # only a broken test waits this long
_HEALTHY_PAUSE_S = 0.01  # it shall not be what keeps the machine busy
_CALM_EVERY = 4  # rounds
_RATIO_MAX = 1.2
_WARM_UP = 50


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvc-") as made:  # a socket's path must be short
        yield Path(made)


@pytest.mark.parametrize("link", LINKS)
async def test_transfers_under_faults(nursery, folder, ours, link):
    report = await conform(nursery, link, SEED, 150, folder, ours, lanes=8)
    print(report)
    assert report.tally.kills >= 8
    assert report.tally.stops >= 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("link", LINKS)
async def test_ten_thousand_transfers_under_faults(nursery, folder, ours, link):
    count = int(os.environ.get("KVRELAY_TRANSFERS", "10000"))
    report = await conform(nursery, link, SEED, count, folder, ours, lanes=16)
    print(report)
    assert report.tally.kills >= count * 50 // 1000
    assert report.tally.stops >= count * 20 // 1000
    assert report.p99_ratio() <= _RATIO_MAX, str(report)


@dataclass
class Report:
    link: str
    tally: Tally
    taken_s: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})

    def p99_ratio(self) -> float:
        """Of the healthy pair: in the rounds with faults, to those without."""
        calm, faults = (float(np.percentile(self.taken_s[at], 99)) for at in (False, True))
        return faults / calm

    def __str__(self) -> str:
        lines = [f"{self.link}: {self.tally.kills} kills, {self.tally.stops} stops"]
        lines += [f"  {' '.join(how)}: {n}" for how, n in sorted(self.tally.endings.items())]
        lines.append(f"  {self.tally.late} came too late for want of time, and were played again")
        for faults, taken in self.taken_s.items():
            p50, p99 = np.percentile(taken, [50, 99]) * 1000
            kind = "with" if faults else "without"
            lines.append(f"  healthy {kind} faults: {len(taken)}, p50 {p50:.2f} p99 {p99:.2f} ms")
        lines.append(f"  p99 ratio {self.p99_ratio():.2f}; {self.tally.over_nccl} pushes over nccl")
        return "\n".join(lines)


async def conform(
    nursery: Nursery, link: str, seed: int, count: int, folder: Path, certificates: Path, lanes: int
) -> Report:
    settings = {"head_dim": 32, "certificates": str(certificates)}
    async with _healthy(nursery, link, folder, settings) as healthy:
        report = healthy.report
        witness = Witness()
        watching = asyncio.ensure_future(witness.watch())
        made = _lanes(nursery, link, folder, report.tally, settings, lanes, healthy.decode, witness)
        try:
            for lane in made:
                await lane.ends.start()
            await _play_all(made, draw(seed, link, count), seed, healthy)
            for lane in made:
                await lane.ends.close()
        finally:
            for lane in made:
                await lane.ends.kill()
            watching.cancel()
    return report


async def _play_all(lanes: list[Lane], plans: list[Plan], seed: int, healthy: "Healthy") -> None:
    rounds = max(2, len(plans) // (len(lanes) * _ROUND))
    for number in range(rounds):
        parts = _shared_out(plans[number::rounds], len(lanes))
        work = list(zip(lanes, parts, strict=True))
        offsets: dict[int, float] = {}
        healthy.among_faults = True
        await _all(_play(lane, part, seed, offsets) for lane, part in work)
        if number % _CALM_EVERY == 0:
            healthy.among_faults = False
            await _all(_replay(lane, part, seed, offsets) for lane, part in work)
        healthy.check()


def _shared_out(plans: list[Plan], lanes: int) -> list[list[Plan]]:
    """By lane; the first, whose deadlines are longer, gets half as many as the others."""
    turns = [0, *range(1, lanes), *range(1, lanes)]
    parts: list[list[Plan]] = [[] for _ in range(lanes)]
    for at, plan in enumerate(plans):
        parts[turns[at % len(turns)]].append(plan)
    return parts


async def _play(lane: Lane, plans: list[Plan], seed: int, offsets: dict[int, float]) -> None:
    """offsets: when each began."""
    started = time.monotonic()
    for plan in plans:
        offsets[plan.number] = time.monotonic() - started
        try:
            await lane.play(plan)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {plan}: {error}") from error


async def _replay(lane: Lane, plans: list[Plan], seed: int, offsets: dict[int, float]) -> None:
    """The same pace, so that only the faults make a difference."""
    started = time.monotonic()
    for plan in plans:
        await asyncio.sleep(offsets[plan.number] - (time.monotonic() - started))
        await _play(lane, [plan.without_fault()], seed, {})


async def _all(works: Any) -> None:
    async with asyncio.TaskGroup() as tasks:
        for work in works:
            tasks.create_task(work)


def _lanes(
    nursery: Nursery,
    link: str,
    folder: Path,
    tally: Tally,
    settings: dict[str, Any],
    count: int,
    decode: End,
    witness: Witness,
) -> list[Lane]:
    """decode: the healthy pair's, shared with the first."""
    made = []
    for number in range(count):
        # The second moves blocks that no socket takes in at once.
        shape = {**settings, "head_dim": 1024 if number == 1 else 32}
        deadlines, shared = (Deadlines(), None) if number else (_SHARED, decode)
        own = _folder(folder, f"lane{number}")
        couple = Couple(nursery, link, f"{link}{number}", own, deadlines, witness, shape, shared)
        made.append(Lane(couple, tally))
    return made


def _folder(folder: Path, name: str) -> Path:
    made = folder / name
    made.mkdir()
    return made


# ---- the healthy pair


class Healthy:
    def __init__(self, prefill: End, decode: End, report: Report) -> None:
        self.prefill = prefill
        self.decode = decode
        self.report = report
        self.among_faults = True
        self._done = 0
        self._running = asyncio.ensure_future(self._run())

    def check(self) -> None:
        if self._running.done():
            self._running.result()

    def cancel(self) -> None:
        self._running.cancel()

    async def end(self) -> None:
        self.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running

    async def _run(self) -> None:
        while True:
            async with asyncio.timeout(_HEALTHY_S):
                await self._transfer()
            await asyncio.sleep(_HEALTHY_PAUSE_S)

    async def _transfer(self) -> None:
        among_faults = self.among_faults
        self.prefill.forget_events()
        reserved = await self.decode.ask("reserve", count=4)
        said = await self.prefill.ask(
            "transfer", ticket=reserved["ticket"], pieces=[2, 2], content=self._done
        )
        assert said["ending"] == "committed", said
        sums = (await self.prefill.told("sums"))["sums"]
        there = await self.decode.ask("finish", transfer=reserved["transfer"])
        assert there["sums"] == sums
        self._done += 1
        if self._done > _WARM_UP and among_faults == self.among_faults:
            self.report.taken_s[among_faults].append(said["taken_s"])


@contextlib.asynccontextmanager
async def _healthy(
    nursery: Nursery, link: str, folder: Path, settings: dict[str, Any]
) -> AsyncIterator[Healthy]:
    own = _folder(folder, "healthy")
    options = {
        "link": link,
        "socket_dir": str(own),
        "lease_ms": _SHARED.lease_ms,
        "connect_ms": _SHARED.connect_ms,
        "reply_ms": _SHARED.reply_ms,
        "blocks": 64,
        **settings,
    }
    decode = await nursery.fork("decode", "healthy-d", **options)
    prefill = await nursery.fork("prefill", "healthy-p", **options)
    healthy = Healthy(prefill, decode, Report(link, Tally()))
    try:
        yield healthy
        await healthy.end()
        for end in (prefill, decode):
            async with asyncio.timeout(_HEALTHY_S):
                await end.ask("close")
    finally:
        healthy.cancel()
        for end in (prefill, decode):
            await end.kill()
