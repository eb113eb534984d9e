from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerSet(_message.Message):
    __slots__ = ("prefill_addresses", "decode_addresses")
    PREFILL_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    DECODE_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    prefill_addresses: _containers.RepeatedScalarFieldContainer[str]
    decode_addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, prefill_addresses: _Optional[_Iterable[str]] = ..., decode_addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class WaitReadyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RouterState(_message.Message):
    __slots__ = ("public_address", "prefill_connected", "decode_connected", "http_address")
    PUBLIC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    public_address: str
    prefill_connected: int
    decode_connected: int
    http_address: str
    def __init__(self, public_address: _Optional[str] = ..., prefill_connected: _Optional[int] = ..., decode_connected: _Optional[int] = ..., http_address: _Optional[str] = ...) -> None: ...
