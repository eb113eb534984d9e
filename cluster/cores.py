"""Which cores each worker has to itself, so that workers on one host do not slow each other down;
and whose it may use besides, while these compute nothing.

Shared out once, before any worker starts: cluster/serving.py asks for the `slots`, cluster/pools.py
fills each with a worker, and with another when that one dies, and cluster/actors.py calls `pin`.
"""

import contextlib
import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.options import ServeOptions

log = logging.getLogger(__name__)

_OWN_THREADS = Path("/proc/self/task")


@dataclass(frozen=True)
class Slot:
    """A place for one worker. Without cores it runs wherever the system puts it. borrows: cores of
    another slot."""

    role: str
    cores: tuple[int, ...] = ()
    borrows: tuple[int, ...] = ()


def share_out(roles: Sequence[str], threads: int, allowed: Collection[int]) -> list[Slot]:
    """A slot for each of `roles`, in their order: `threads` cores of `allowed`, lowest ids first,
    and no core in two slots. When there are not enough for all, nobody gets any."""
    if len(roles) * threads > len(allowed):
        return [Slot(role) for role in roles]
    cores = sorted(allowed)
    return [
        Slot(role, tuple(cores[i * threads : (i + 1) * threads])) for i, role in enumerate(roles)
    ]


def lend(shared: Sequence[Slot]) -> list[Slot]:
    """The first prefill worker and the first decode worker borrow each other's cores, and so on:
    hardly ever has either phase just as much to do as it has cores for."""
    prefill, decode = ([s.cores for s in shared if s.role == r] for r in ("prefill", "decode"))
    partners = dict(zip(prefill, decode, strict=False)) | dict(zip(decode, prefill, strict=False))
    return [replace(slot, borrows=partners.get(slot.cores, ())) for slot in shared]


def slots(options: ServeOptions) -> list[Slot]:
    """One for each worker, prefill first; the log says who got which cores, or why nobody did."""
    roles = ["prefill"] * options.prefill + ["decode"] * options.decode
    if options.device == "cuda":
        log.info("no worker is pinned to cores: they compute on GPUs")
        return [Slot(role) for role in roles]
    threads, allowed = options.threads_each, os.sched_getaffinity(0)
    shared = share_out(roles, threads, allowed)
    if all(slot.cores for slot in shared):
        each = ", ".join(f"{slot.role} {shown(slot.cores)}" for slot in shared)
        log.info("cores of the workers: %s", each)
        if options.lend_cores:
            return lend(shared)
    else:
        asked = logging.WARNING if options.threads else logging.INFO
        text = "no worker is pinned to cores: %s; choose fewer threads or workers"
        need = f"{len(roles)} workers of {threads} threads need {len(roles) * threads}"
        log.log(asked, text, f"{need}, there are {len(allowed)}")
    return shared


def pin(cores: Collection[int]) -> None:
    """Keeps this process on `cores`: its threads, and those they start from now on.

    Raises OSError when the system refuses, as it does for a core taken away meanwhile.
    """
    pinned: set[int] = set()
    # A thread that is not pinned yet may start one after the look, so until a look shows no other.
    while fresh := {int(thread.name) for thread in _OWN_THREADS.iterdir()} - pinned:
        for thread_id in fresh:
            with contextlib.suppress(ProcessLookupError):  # ended since
                os.sched_setaffinity(thread_id, cores)
        pinned |= fresh


def shown(cores: Sequence[int]) -> str:
    """As taskset lists them."""
    return ",".join(map(str, cores))
