from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Picture(_message.Message):
    __slots__ = ("data", "max_slice_nums")
    DATA_FIELD_NUMBER: _ClassVar[int]
    MAX_SLICE_NUMS_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    max_slice_nums: int
    def __init__(self, data: _Optional[bytes] = ..., max_slice_nums: _Optional[int] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("request_id", "pictures", "reader")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PICTURES_FIELD_NUMBER: _ClassVar[int]
    READER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    pictures: _containers.RepeatedCompositeFieldContainer[Picture]
    reader: str
    def __init__(self, request_id: _Optional[str] = ..., pictures: _Optional[_Iterable[_Union[Picture, _Mapping]]] = ..., reader: _Optional[str] = ...) -> None: ...

class EncodeReply(_message.Message):
    __slots__ = ("index", "handle", "inline", "error", "cached", "timings")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    index: int
    handle: Handle
    inline: Inline
    error: Error
    cached: bool
    timings: Timings
    def __init__(self, index: _Optional[int] = ..., handle: _Optional[_Union[Handle, _Mapping]] = ..., inline: _Optional[_Union[Inline, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., cached: _Optional[bool] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class Handle(_message.Message):
    __slots__ = ("arena", "offset", "generation", "num_tokens", "hidden_size", "dtype", "digest", "lease")
    ARENA_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    arena: str
    offset: int
    generation: int
    num_tokens: int
    hidden_size: int
    dtype: str
    digest: bytes
    lease: int
    def __init__(self, arena: _Optional[str] = ..., offset: _Optional[int] = ..., generation: _Optional[int] = ..., num_tokens: _Optional[int] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[str] = ..., digest: _Optional[bytes] = ..., lease: _Optional[int] = ...) -> None: ...

class Inline(_message.Message):
    __slots__ = ("rows", "num_tokens", "hidden_size", "dtype", "digest")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    rows: bytes
    num_tokens: int
    hidden_size: int
    dtype: str
    digest: bytes
    def __init__(self, rows: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[str] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "status", "retry_after")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    status: int
    retry_after: float
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., status: _Optional[int] = ..., retry_after: _Optional[float] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("decode", "slice", "queue", "encode", "write")
    DECODE_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    WRITE_FIELD_NUMBER: _ClassVar[int]
    decode: float
    slice: float
    queue: float
    encode: float
    write: float
    def __init__(self, decode: _Optional[float] = ..., slice: _Optional[float] = ..., queue: _Optional[float] = ..., encode: _Optional[float] = ..., write: _Optional[float] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ("pictures",)
    PICTURES_FIELD_NUMBER: _ClassVar[int]
    pictures: int
    def __init__(self, pictures: _Optional[int] = ...) -> None: ...

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthReply(_message.Message):
    __slots__ = ("ready", "identity", "device", "dtype", "hidden_size", "version", "offer")
    READY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    identity: str
    device: str
    dtype: str
    hidden_size: int
    version: str
    offer: Offer
    def __init__(self, ready: _Optional[bool] = ..., identity: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., hidden_size: _Optional[int] = ..., version: _Optional[str] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("arena", "address", "host", "device")
    ARENA_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    arena: str
    address: str
    host: str
    device: str
    def __init__(self, arena: _Optional[str] = ..., address: _Optional[str] = ..., host: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, float]
    def __init__(self, values: _Optional[_Mapping[str, float]] = ...) -> None: ...
