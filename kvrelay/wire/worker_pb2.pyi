from kvrelay.wire import transfer_pb2 as _transfer_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FailureCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_CODE_UNSPECIFIED: _ClassVar[FailureCode]
    FAILURE_CODE_INVALID: _ClassVar[FailureCode]
    FAILURE_CODE_EXHAUSTED: _ClassVar[FailureCode]
    FAILURE_CODE_PEER_LOST: _ClassVar[FailureCode]
    FAILURE_CODE_EXPIRED: _ClassVar[FailureCode]
    FAILURE_CODE_INTERNAL: _ClassVar[FailureCode]
    FAILURE_CODE_NOT_KEPT: _ClassVar[FailureCode]
    FAILURE_CODE_TAKEN_OVER: _ClassVar[FailureCode]

class Ending(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENDING_NONE: _ClassVar[Ending]
    ENDING_EOS: _ClassVar[Ending]
    ENDING_LENGTH: _ClassVar[Ending]
FAILURE_CODE_UNSPECIFIED: FailureCode
FAILURE_CODE_INVALID: FailureCode
FAILURE_CODE_EXHAUSTED: FailureCode
FAILURE_CODE_PEER_LOST: FailureCode
FAILURE_CODE_EXPIRED: FailureCode
FAILURE_CODE_INTERNAL: FailureCode
FAILURE_CODE_NOT_KEPT: FailureCode
FAILURE_CODE_TAKEN_OVER: FailureCode
ENDING_NONE: Ending
ENDING_EOS: Ending
ENDING_LENGTH: Ending

class WorkerInfo(_message.Message):
    __slots__ = ("protocol_version", "instance_id", "layout", "blocks_total", "max_model_tokens", "itl_target_ms", "chunk_tokens")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ITL_TARGET_MS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    instance_id: str
    layout: _transfer_pb2.KvLayout
    blocks_total: int
    max_model_tokens: int
    itl_target_ms: int
    chunk_tokens: int
    def __init__(self, protocol_version: _Optional[int] = ..., instance_id: _Optional[str] = ..., layout: _Optional[_Union[_transfer_pb2.KvLayout, _Mapping]] = ..., blocks_total: _Optional[int] = ..., max_model_tokens: _Optional[int] = ..., itl_target_ms: _Optional[int] = ..., chunk_tokens: _Optional[int] = ...) -> None: ...

class StepCost(_message.Message):
    __slots__ = ("base_ms", "ms_per_prompt_token", "ms_per_sequence")
    BASE_MS_FIELD_NUMBER: _ClassVar[int]
    MS_PER_PROMPT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MS_PER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    base_ms: float
    ms_per_prompt_token: float
    ms_per_sequence: float
    def __init__(self, base_ms: _Optional[float] = ..., ms_per_prompt_token: _Optional[float] = ..., ms_per_sequence: _Optional[float] = ...) -> None: ...

class BlockChanges(_message.Message):
    __slots__ = ("number", "everything", "added", "removed")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    EVERYTHING_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    number: int
    everything: bool
    added: bytes
    removed: bytes
    def __init__(self, number: _Optional[int] = ..., everything: _Optional[bool] = ..., added: _Optional[bytes] = ..., removed: _Optional[bytes] = ...) -> None: ...

class Resync(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "seed", "max_tokens", "eos_token_ids", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    min_tokens: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., min_tokens: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: int
    def __init__(self, key: _Optional[int] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("key", "code", "message")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    key: int
    code: FailureCode
    message: str
    def __init__(self, key: _Optional[int] = ..., code: _Optional[_Union[FailureCode, str]] = ..., message: _Optional[str] = ...) -> None: ...

class PrefillCommand(_message.Message):
    __slots__ = ("prefill", "cancel", "resync")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RESYNC_FIELD_NUMBER: _ClassVar[int]
    prefill: Prefill
    cancel: Cancel
    resync: Resync
    def __init__(self, prefill: _Optional[_Union[Prefill, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., resync: _Optional[_Union[Resync, _Mapping]] = ...) -> None: ...

class Prefill(_message.Message):
    __slots__ = ("key", "prompt_token_ids", "sampling", "ticket", "block_hashes", "answered")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    key: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    ticket: _transfer_pb2.Ticket
    block_hashes: bytes
    answered: int
    def __init__(self, key: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., ticket: _Optional[_Union[_transfer_pb2.Ticket, _Mapping]] = ..., block_hashes: _Optional[bytes] = ..., answered: _Optional[int] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("info", "started", "first_token", "handed_off", "failed", "load", "blocks")
    INFO_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    HANDED_OFF_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    info: WorkerInfo
    started: PrefillStarted
    first_token: FirstToken
    handed_off: HandedOff
    failed: Failed
    load: PrefillLoad
    blocks: BlockChanges
    def __init__(self, info: _Optional[_Union[WorkerInfo, _Mapping]] = ..., started: _Optional[_Union[PrefillStarted, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., handed_off: _Optional[_Union[HandedOff, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., load: _Optional[_Union[PrefillLoad, _Mapping]] = ..., blocks: _Optional[_Union[BlockChanges, _Mapping]] = ...) -> None: ...

class PrefillLoad(_message.Message):
    __slots__ = ("queued_tokens", "cost", "queued_prompts", "draining", "blocks_free")
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    queued_tokens: int
    cost: StepCost
    queued_prompts: int
    draining: bool
    blocks_free: int
    def __init__(self, queued_tokens: _Optional[int] = ..., cost: _Optional[_Union[StepCost, _Mapping]] = ..., queued_prompts: _Optional[int] = ..., draining: _Optional[bool] = ..., blocks_free: _Optional[int] = ...) -> None: ...

class PrefillStarted(_message.Message):
    __slots__ = ("key", "cached_tokens")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    key: int
    cached_tokens: int
    def __init__(self, key: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("key", "token_id", "prefill_ms", "cached_tokens")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    key: int
    token_id: int
    prefill_ms: float
    cached_tokens: int
    def __init__(self, key: _Optional[int] = ..., token_id: _Optional[int] = ..., prefill_ms: _Optional[float] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class HandedOff(_message.Message):
    __slots__ = ("key", "kv_bytes", "kv_transfer_ms", "kv_exposed_ms", "transport")
    KEY_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    KV_EXPOSED_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    key: int
    kv_bytes: int
    kv_transfer_ms: float
    kv_exposed_ms: float
    transport: str
    def __init__(self, key: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., kv_transfer_ms: _Optional[float] = ..., kv_exposed_ms: _Optional[float] = ..., transport: _Optional[str] = ...) -> None: ...

class DecodeCommand(_message.Message):
    __slots__ = ("reserve", "cancel", "resync", "adopt", "acknowledge")
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RESYNC_FIELD_NUMBER: _ClassVar[int]
    ADOPT_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    reserve: Reserve
    cancel: Cancel
    resync: Resync
    adopt: Adopt
    acknowledge: Acknowledge
    def __init__(self, reserve: _Optional[_Union[Reserve, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., resync: _Optional[_Union[Resync, _Mapping]] = ..., adopt: _Optional[_Union[Adopt, _Mapping]] = ..., acknowledge: _Optional[_Union[Acknowledge, _Mapping]] = ...) -> None: ...

class Adopt(_message.Message):
    __slots__ = ("key", "tenant", "request_id", "nonce")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    key: int
    tenant: str
    request_id: str
    nonce: int
    def __init__(self, key: _Optional[int] = ..., tenant: _Optional[str] = ..., request_id: _Optional[str] = ..., nonce: _Optional[int] = ...) -> None: ...

class Acknowledge(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, keys: _Optional[_Iterable[int]] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("key", "request_id", "attempt", "prompt_tokens", "sampling", "block_hashes", "hash_root", "tail_token_ids", "prompt_token_ids", "answered", "prefill_here", "tenant", "stop", "priority", "min_tokens", "nonce")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    HASH_ROOT_FIELD_NUMBER: _ClassVar[int]
    TAIL_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_HERE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    key: int
    request_id: str
    attempt: int
    prompt_tokens: int
    sampling: Sampling
    block_hashes: bytes
    hash_root: bytes
    tail_token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    answered: int
    prefill_here: bool
    tenant: str
    stop: _containers.RepeatedScalarFieldContainer[str]
    priority: int
    min_tokens: int
    nonce: int
    def __init__(self, key: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., block_hashes: _Optional[bytes] = ..., hash_root: _Optional[bytes] = ..., tail_token_ids: _Optional[_Iterable[int]] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., answered: _Optional[int] = ..., prefill_here: _Optional[bool] = ..., tenant: _Optional[str] = ..., stop: _Optional[_Iterable[str]] = ..., priority: _Optional[int] = ..., min_tokens: _Optional[int] = ..., nonce: _Optional[int] = ...) -> None: ...

class DecodeEvent(_message.Message):
    __slots__ = ("info", "reserved", "step", "failed", "started", "first_token", "adopted", "load", "blocks")
    INFO_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    info: WorkerInfo
    reserved: Reserved
    step: StepOutput
    failed: Failed
    started: PrefillStarted
    first_token: FirstToken
    adopted: Adopted
    load: DecodeLoad
    blocks: BlockChanges
    def __init__(self, info: _Optional[_Union[WorkerInfo, _Mapping]] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., step: _Optional[_Union[StepOutput, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., started: _Optional[_Union[PrefillStarted, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., adopted: _Optional[_Union[Adopted, _Mapping]] = ..., load: _Optional[_Union[DecodeLoad, _Mapping]] = ..., blocks: _Optional[_Union[BlockChanges, _Mapping]] = ...) -> None: ...

class DecodeLoad(_message.Message):
    __slots__ = ("blocks_free", "running", "cost", "queued_tokens", "queued_prompts", "draining")
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    blocks_free: int
    running: int
    cost: StepCost
    queued_tokens: int
    queued_prompts: int
    draining: bool
    def __init__(self, blocks_free: _Optional[int] = ..., running: _Optional[int] = ..., cost: _Optional[_Union[StepCost, _Mapping]] = ..., queued_tokens: _Optional[int] = ..., queued_prompts: _Optional[int] = ..., draining: _Optional[bool] = ...) -> None: ...

class Adopted(_message.Message):
    __slots__ = ("key", "reserve", "token_ids", "ending")
    KEY_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ENDING_FIELD_NUMBER: _ClassVar[int]
    key: int
    reserve: Reserve
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    ending: Ending
    def __init__(self, key: _Optional[int] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., ending: _Optional[_Union[Ending, str]] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("key", "ticket")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    key: int
    ticket: _transfer_pb2.Ticket
    def __init__(self, key: _Optional[int] = ..., ticket: _Optional[_Union[_transfer_pb2.Ticket, _Mapping]] = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[SequenceOutput]
    def __init__(self, outputs: _Optional[_Iterable[_Union[SequenceOutput, _Mapping]]] = ...) -> None: ...

class SequenceOutput(_message.Message):
    __slots__ = ("key", "offset", "token_ids", "ending")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ENDING_FIELD_NUMBER: _ClassVar[int]
    key: int
    offset: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    ending: Ending
    def __init__(self, key: _Optional[int] = ..., offset: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., ending: _Optional[_Union[Ending, str]] = ...) -> None: ...
