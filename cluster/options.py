"""What a person can choose of a serving cluster, and how it says that it cannot.

Light to import: the commands read it before they know that Ray and torch are needed.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from kvrelay.config import Device, Dtype, KvDtype, LocalPrefill, Quantize, Transport, WireCodec
from kvrelay.tls import CertificatesError, member_name
from router.exposure import ExposureError, bind_host, check_exposure
from router.keys import KeysError, KeySet

_PORT_MAX = 65_535
LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"


class ServeError(Exception):
    """The cluster cannot start or go on; the text is for the person, one line."""


@dataclass(frozen=True)
class ServeOptions:
    """What a person can choose. `threads` 0 shares the cores out evenly among the workers;
    `prefill` 0 leaves prompts to the decode workers. `port` and `http_port` are the first router's;
    the others have the next numbers, or with 0 any free ones.

    Raises ServeError for choices that do not go together.
    """

    prefill: int = 1
    decode: int = 1
    routers: int = 1
    host: str = "127.0.0.1"
    port: int = 50051
    http_port: int = 8000
    transport: Transport = "auto"
    device: Device = "cpu"
    dtype: Dtype = "float32"
    quantize: Quantize = "none"
    kv_dtype: KvDtype = "auto"
    decode_kv_dtype: KvDtype | None = None
    wire_codec: WireCodec = "asis"
    checksums: bool = True
    certificates: Path | None = None
    api_keys: Path | None = None
    insecure: bool = False
    threads: int = 0
    lend_cores: bool = True
    kv_gib: float = 1.0
    chunk_tokens: int = 256
    itl_target_ms: int = 150
    ttft_target_ms: float = 0.0
    tpot_target_ms: float = 0.0
    local_prefill: LocalPrefill = "auto"
    block_size: int = 16
    prefix_caching: bool = True
    drain_s: float = 30.0
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.quantize == "int8" and self.device != "cpu":
            raise ServeError(
                f"--quantize int8 runs on the CPU: drop it, or drop --device {self.device}"
            )
        if self.transport == "nccl" and self.device != "cuda":
            raise ServeError("--transport nccl moves KV between GPUs: add --device cuda")
        if self.certificates:
            try:
                member_name(self.certificates)
            except CertificatesError as error:
                raise ServeError(f"--certificates: {error}") from None
        self._check_callers()
        self._check_ports()
        if self.quantize == "int8" and self.dtype != "float32":
            raise ServeError(
                "--quantize int8 computes the rest in float32:"
                f" drop it, or drop --dtype {self.dtype}"
            )

    def _check_callers(self) -> None:
        try:
            if self.api_keys:
                KeySet.load(self.api_keys)
            check_exposure(
                bind_host(self.host),
                api_keys=self.api_keys is not None,
                certificates=self.certificates is not None,
                insecure=self.insecure,
            )
        except KeysError as error:
            raise ServeError(f"--api-keys: {error}") from None
        except ExposureError as error:
            raise ServeError(f"--host: {error}") from None

    def _check_ports(self) -> None:
        for name, port in (("--port", self.port), ("--http-port", self.http_port)):
            if port and port + self.routers - 1 > _PORT_MAX:
                raise ServeError(
                    f"{name} {port}: {self.routers} routers take that port and the next ones, "
                    f"{_PORT_MAX} at most: choose a lower one, or 0 for free ones"
                )

    @property
    def log_level(self) -> str:
        return "INFO" if self.verbose else "WARNING"

    @property
    def weights_are_packed(self) -> bool:
        """On GPUs and in half precision the engine reads the model's own."""
        return self.device == "cpu" and self.dtype == "float32"

    @property
    def threads_each(self) -> int:
        cores = len(os.sched_getaffinity(0))
        return self.threads or max(1, cores // (self.prefill + self.decode))
