"""What both kinds of ends of link_ends.py share: their settings, and sums of blocks.

Sums are blake2b: not the checksums of the links.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvrelay.config import WorkerConfig
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.pool import KVPool

REAP_EVERY_S = 0.02  # by D, of leases that have run out

Say = Callable[..., None]  # tells the test an event


def layout(head_dim: int) -> KVLayout:
    """256 bytes of float32 a block for each value of a head."""
    return KVLayout("conformance", "float32", layers=2, block_size=4, kv_heads=4, head_dim=head_dim)


def block_sums(pool: KVPool, blocks: Sequence[int]) -> list[str]:
    return [hashlib.blake2b(pool.bytes[b].data, digest_size=16).hexdigest() for b in blocks]


def worker_config(settings: dict[str, Any]) -> WorkerConfig:
    link = settings["link"]
    certificates = settings.get("certificates")
    return WorkerConfig(
        model_path=Path("none"),
        cluster_key="k" * 16,
        socket_dir=Path(settings["socket_dir"]),
        host=settings.get("host", "127.0.0.1"),
        transport="tcp" if link == "tls" else link,
        certificates=Path(certificates) if link == "tls" and certificates else None,
        lease_ms=settings["lease_ms"],
        link_connect_ms=settings["connect_ms"],
        link_reply_ms=settings["reply_ms"],
        nccl_operation_ms=settings["reply_ms"],
    )


def own_state() -> dict[str, Any]:
    return {"fds": len(list(Path("/proc/self/fd").iterdir())), "threads": threading.active_count()}


def now_ms() -> float:
    return time.monotonic() * 1000
