"""What a person can choose of a serving cluster, and how it says that it cannot.

Light to import: the commands read it before they know that Ray and torch are needed.
"""

import os
from dataclasses import dataclass

from kvrelay.config import Device, Dtype, Transport

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"


class ServeError(Exception):
    """The cluster cannot start or go on; the text is for the person, one line."""


@dataclass(frozen=True)
class ServeOptions:
    """What a person can choose. `threads` 0 shares the cores out evenly among the workers."""

    prefill: int = 1
    decode: int = 1
    host: str = "127.0.0.1"
    port: int = 50051
    transport: Transport = "auto"
    device: Device = "cpu"
    dtype: Dtype = "float32"
    threads: int = 0
    kv_gib: float = 1.0
    chunk_tokens: int = 256
    block_size: int = 16
    drain_s: float = 30.0
    verbose: bool = False

    @property
    def log_level(self) -> str:
        return "INFO" if self.verbose else "WARNING"

    @property
    def threads_each(self) -> int:
        cores = len(os.sched_getaffinity(0))
        return self.threads or max(1, cores // (self.prefill + self.decode))
