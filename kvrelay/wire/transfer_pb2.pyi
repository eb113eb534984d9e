from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvLayout(_message.Message):
    __slots__ = ("model_fingerprint", "dtype", "layers", "block_size", "kv_heads", "head_dim")
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    model_fingerprint: str
    dtype: str
    layers: int
    block_size: int
    kv_heads: int
    head_dim: int
    def __init__(self, model_fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ..., layers: _Optional[int] = ..., block_size: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("request_id", "attempt", "decode_instance_id", "transfer_id", "signature", "block_ids", "layout", "endpoints", "lease_ms", "first_block", "expires_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DECODE_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    decode_instance_id: str
    transfer_id: int
    signature: bytes
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    layout: KvLayout
    endpoints: _containers.RepeatedCompositeFieldContainer[Endpoint]
    lease_ms: int
    first_block: int
    expires_ms: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., decode_instance_id: _Optional[str] = ..., transfer_id: _Optional[int] = ..., signature: _Optional[bytes] = ..., block_ids: _Optional[_Iterable[int]] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., endpoints: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ..., lease_ms: _Optional[int] = ..., first_block: _Optional[int] = ..., expires_ms: _Optional[int] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("transport", "address")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    transport: str
    address: str
    def __init__(self, transport: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("hello", "welcome", "refused", "begin", "begun", "blocks", "commit", "committed", "abort", "aborted", "resend", "pair_open", "pair_ended")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    RESEND_FIELD_NUMBER: _ClassVar[int]
    PAIR_OPEN_FIELD_NUMBER: _ClassVar[int]
    PAIR_ENDED_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    welcome: Welcome
    refused: Refused
    begin: Begin
    begun: Begun
    blocks: Blocks
    commit: Commit
    committed: Committed
    abort: Abort
    aborted: Aborted
    resend: Resend
    pair_open: PairOpen
    pair_ended: PairEnded
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ..., begun: _Optional[_Union[Begun, _Mapping]] = ..., blocks: _Optional[_Union[Blocks, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., aborted: _Optional[_Union[Aborted, _Mapping]] = ..., resend: _Optional[_Union[Resend, _Mapping]] = ..., pair_open: _Optional[_Union[PairOpen, _Mapping]] = ..., pair_ended: _Optional[_Union[PairEnded, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "instance_id", "layout", "codec", "checksums")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    instance_id: str
    layout: KvLayout
    codec: str
    checksums: bool
    def __init__(self, protocol_version: _Optional[int] = ..., instance_id: _Optional[str] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., codec: _Optional[str] = ..., checksums: _Optional[bool] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("instance_id", "pool_bytes", "wire_dtype", "checksums")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    pool_bytes: int
    wire_dtype: str
    checksums: bool
    def __init__(self, instance_id: _Optional[str] = ..., pool_bytes: _Optional[int] = ..., wire_dtype: _Optional[str] = ..., checksums: _Optional[bool] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ...) -> None: ...

class Begun(_message.Message):
    __slots__ = ("transfer_id",)
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: int
    def __init__(self, transfer_id: _Optional[int] = ...) -> None: ...

class Blocks(_message.Message):
    __slots__ = ("transfer_id", "first_index", "checksums", "count", "again", "pair_epoch")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    PAIR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    transfer_id: int
    first_index: int
    checksums: _containers.RepeatedScalarFieldContainer[int]
    count: int
    again: bool
    pair_epoch: int
    def __init__(self, transfer_id: _Optional[int] = ..., first_index: _Optional[int] = ..., checksums: _Optional[_Iterable[int]] = ..., count: _Optional[int] = ..., again: _Optional[bool] = ..., pair_epoch: _Optional[int] = ...) -> None: ...

class Resend(_message.Message):
    __slots__ = ("transfer_id", "indexes")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    INDEXES_FIELD_NUMBER: _ClassVar[int]
    transfer_id: int
    indexes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, transfer_id: _Optional[int] = ..., indexes: _Optional[_Iterable[int]] = ...) -> None: ...

class PairOpen(_message.Message):
    __slots__ = ("epoch", "unique_id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    UNIQUE_ID_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    unique_id: bytes
    def __init__(self, epoch: _Optional[int] = ..., unique_id: _Optional[bytes] = ...) -> None: ...

class PairEnded(_message.Message):
    __slots__ = ("epoch", "reason")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    reason: str
    def __init__(self, epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("transfer_id", "blocks", "first_token_id")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: int
    blocks: int
    first_token_id: int
    def __init__(self, transfer_id: _Optional[int] = ..., blocks: _Optional[int] = ..., first_token_id: _Optional[int] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("transfer_id",)
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: int
    def __init__(self, transfer_id: _Optional[int] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("transfer_id", "reason")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    transfer_id: int
    reason: str
    def __init__(self, transfer_id: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Aborted(_message.Message):
    __slots__ = ("transfer_id",)
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: int
    def __init__(self, transfer_id: _Optional[int] = ...) -> None: ...
