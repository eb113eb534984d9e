"""Settings, frozen and built once: by the command line, or from JSON in a worker or router process.

Every limit of the system has its name and default here. Unknown keys are refused.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvrelay.failpoints import Failpoint

PROTOCOL_VERSION = 4
TPOT_SHARE = 0.94  # of the target for answers: the rest is for the way of tokens to the client

Transport = Literal["auto", "shm", "tcp", "nccl"]
Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["cpu", "cuda"]
Quantize = Literal["none", "int8"]
LocalPrefill = Literal["auto", "never"]
WireCodec = Literal["asis", "bf16", "int8"]
KvDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]  # auto: as the model computes,
# and with quantize int8 in int8 too, where heads are whole lines of 64 values


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WorkerConfig(_Frozen):
    """One prefill or decode worker."""

    model_path: Path
    cluster_key: str = Field(min_length=16, repr=False)
    log_level: str = "WARNING"
    socket_dir: Path  # for the unix socket of the shm link
    host: str = "127.0.0.1"
    dtype: Dtype = "float32"
    device: Device = "cpu"
    quantize: Quantize = "none"
    kv_dtype: KvDtype = "auto"
    cache_dir: Path | None = None  # of prepared weights; None: `default_cache`
    threads: int = Field(default=1, ge=1)
    cores: tuple[int, ...] = ()  # the worker's own; empty: wherever the system puts it
    borrows: tuple[int, ...] = ()  # cores of another worker, used while that one computes nothing
    block_size: int = Field(default=16, ge=1)
    kv_bytes: int = Field(default=1 << 30, ge=1)
    transport: Transport = "auto"
    wire_codec: WireCodec = "asis"  # what KV travels as over tcp and nccl
    checksums: bool = True  # of every block that travels; on as soon as either end has it on
    certificates: Path | None = None  # folder with ca.pem, cert.pem, key.pem: TLS on tcp and nccl
    prefix_caching: bool = True  # blocks of ended requests are kept until their room is needed

    chunk_tokens: int = Field(default=256, ge=1)  # longest time a cancel waits for the engine
    failpoints: tuple[Failpoint, ...] = ()  # for tests alone: where the worker dies, hangs, fails

    @model_validator(mode="after")
    def _check_cores(self) -> Self:
        if self.borrows and not self.cores:
            raise ValueError("borrows: only a worker with cores of its own borrows others")
        if set(self.borrows) & set(self.cores):
            raise ValueError("borrows: these are its own cores")
        return self

    # Prefill
    jobs_max: int = 1024
    push_bytes_max: int = 16 << 20  # of blocks in one frame: others on the link wait for it

    # Decode
    batch_max: int = 64  # sequences in one step
    reservations_max: int = 4096
    claims_max: int = 256  # routers whose requests wait for more blocks than are free
    itl_target_ms: int = Field(default=150, ge=0)  # of steps with chunks of prompts; 0: no bound
    tpot_target_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # of every answer, on
    # average: chunks of prompts wait until all answers can afford them; 0: none
    local_prompts_max: int = Field(default=256, ge=1)  # to be computed here, begun or not
    kept_ms: int = Field(default=30_000, ge=1)  # an answer whose router is gone waits for another
    kept_max: int = Field(default=4096, ge=1)  # whole answers that no router has acknowledged
    links_max: int = 1024  # connections of prefill workers, shaken hands or not
    resends_max: int = 2  # of one block with a wrong checksum

    # Waits, each with its end
    step_ms_max: int = Field(default=120_000, ge=1)  # of the engine: one that takes longer hangs
    lease_ms: int = 120_000  # a reservation that makes no progress
    claim_ms: int = 1_000  # a claim to blocks that its router does not ask for again
    claim_hold_ms: int = 5_000  # so long a claim keeps blocks from other routers
    link_connect_ms: int = 5_000
    link_reply_ms: int = 15_000  # an answer on the KV link, or any progress of a frame on it
    nccl_operation_ms: int = 5_000  # a group of blocks in NCCL's hands
    nccl_pairs_max: int = 32  # communicators of one worker; the least used makes room
    session_events_max: int = 65_536  # events a router has not read yet
    heartbeat_ms: int = Field(default=400, ge=1)  # longest silence towards a router
    block_changes_ms: int = Field(default=20, ge=1)  # from one word on cached blocks to the next


class RouterConfig(_Frozen):
    """One router."""

    model_path: Path
    model_name: str
    cluster_key: str = Field(min_length=16, repr=False)
    log_level: str = "WARNING"
    control_socket: Path
    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65_535)
    api_keys: Path | None = None  # file of router/keys.py; None: anybody may call
    certificates: Path | None = None  # folder of tls.py: TLS on the public ports and to workers
    insecure: bool = False  # other addresses than loopback without what makes them safe

    keys_check_ms: int = Field(default=2_000, ge=1)  # between two looks at the file of API keys
    rpcs_max: int = Field(default=4096, ge=1)  # calls at once, before any of their work is done
    health_watches_max: int = Field(default=64, ge=1)  # open at once; they are rpcs too
    health_read_ms: int = Field(default=5_000, ge=1)  # the message of a check without a key
    queue_max: int = 1024  # requests waiting for a worker
    queue_wait_ms: int = 120_000
    queue_aging_ms: int = Field(default=500, ge=1)  # of waiting, for one step of priority
    queue_lookahead: int = Field(default=8, ge=1)  # requests that are tried in one go
    queue_scan_max: int = Field(default=128, ge=1)  # looked at in one go for some that may fit;
    # with a target for first tokens, as many late ones beside them
    queue_pump_ms: int = Field(default=4, ge=0)  # at least, between two goes
    queue_patience_ms: int = 2_000  # who has waited longer for room may have a worker kept for it
    queue_hold_ms: int = Field(default=5_000, ge=1)  # for so long, one worker at a time
    queue_hold_pause_ms: int = Field(default=1_000, ge=1)  # until the next may be kept
    template_ms: int = Field(default=1_000, ge=1)  # to render one chat
    worker_proof_ms: int = 10_000  # a worker's answer that it holds the cluster's key
    silence_ms: int = Field(default=1_500, ge=1)  # a worker that says nothing for longer is lost
    resume_ms: int = Field(default=2_000, ge=1)  # the workers' answers to Adopt
    resume_looks_max: int = Field(default=64, ge=1)  # Resumes of one API key that wait for these
    strikes_max: int = Field(default=2, ge=1)  # workers that died under one request
    acquit_ms: int = Field(default=1_000, ge=0)  # who goes on elsewhere for so long has no strikes
    reserve_ms: int = 10_000  # a decode worker's answer to Reserve
    attempts_max: int = 3  # placements of one request that failed; no room is no failure
    shun_ms: int = Field(default=500, ge=1)  # a worker that failed comes last; doubled each time
    shun_max_ms: int = Field(default=10_000, ge=1)
    prefill_backlog_tokens: int = 4096  # a worker with more waiting gets no new prompt
    local_prefill: LocalPrefill = "auto"  # prompts computed by decode workers: where it is
    # predicted to be better, or only when there are no prefill workers
    ttft_target_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # what a first token is
    # good for; 0: none. Who cannot have it in time any more waits for those who can
    tpot_target_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # as the workers' own
    late_wait_ms: int = Field(default=10_000, ge=1)  # who waits for longer goes first, late or not
    measured_fade_ms: int = Field(default=10_000, ge=0)  # a worker without work for longer: what it
    # has measured fades to what is usual, or one bad figure would keep work from it for ever
    index_names_max: int = 65_536  # cached blocks of one worker that the router remembers
    index_names_total_max: int = Field(default=4_194_304, ge=1)  # of all workers of a role; some
    # 200 bytes each
    drain_ms: int = 30_000  # running requests at shutdown

    # OpenAI's API over HTTP, on the same host
    http_port: int = Field(default=0, ge=0, le=65_535)  # 0: any free one
    http_connections_max: int = Field(default=4096, ge=1)
    http_requests_max: int = Field(default=2048, ge=1)  # under way at once
    http_body_bytes_max: int = Field(default=8 << 20, ge=1)
    http_header_bytes_max: int = Field(default=16 << 10, ge=1)  # of one request, all together
    http_headers_max: int = Field(default=100, ge=1)
    http_tls_ms: int = Field(default=5_000, ge=1)  # a TLS handshake, and a TLS goodbye
    http_read_ms: int = Field(default=30_000, ge=1)  # a request's body
    http_write_ms: int = Field(default=60_000, ge=1)  # a client that has stopped reading
    http_idle_ms: int = Field(default=30_000, ge=1)  # a connection without a whole request head
