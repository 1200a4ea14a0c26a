from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    KIND_HELLO: _ClassVar[Kind]
    KIND_TRAIN: _ClassVar[Kind]
    KIND_EVALUATE: _ClassVar[Kind]
KIND_UNSPECIFIED: Kind
KIND_HELLO: Kind
KIND_TRAIN: Kind
KIND_EVALUATE: Kind

class CachedGroup(_message.Message):
    __slots__ = ("group", "id")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    group: str
    id: str
    def __init__(self, group: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("schema", "run_id", "round", "base_version", "kind", "config", "payload_bytes", "payload_sha256", "cached")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    schema: int
    run_id: str
    round: int
    base_version: str
    kind: Kind
    config: str
    payload_bytes: int
    payload_sha256: str
    cached: _containers.RepeatedCompositeFieldContainer[CachedGroup]
    def __init__(self, schema: _Optional[int] = ..., run_id: _Optional[str] = ..., round: _Optional[int] = ..., base_version: _Optional[str] = ..., kind: _Optional[_Union[Kind, str]] = ..., config: _Optional[str] = ..., payload_bytes: _Optional[int] = ..., payload_sha256: _Optional[str] = ..., cached: _Optional[_Iterable[_Union[CachedGroup, _Mapping]]] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("schema", "run_id", "round", "base_version", "kind", "client", "num_examples", "metrics", "payload_bytes", "payload_sha256", "error", "missing")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    schema: int
    run_id: str
    round: int
    base_version: str
    kind: Kind
    client: str
    num_examples: int
    metrics: _containers.ScalarMap[str, float]
    payload_bytes: int
    payload_sha256: str
    error: str
    missing: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, schema: _Optional[int] = ..., run_id: _Optional[str] = ..., round: _Optional[int] = ..., base_version: _Optional[str] = ..., kind: _Optional[_Union[Kind, str]] = ..., client: _Optional[str] = ..., num_examples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., payload_bytes: _Optional[int] = ..., payload_sha256: _Optional[str] = ..., error: _Optional[str] = ..., missing: _Optional[_Iterable[str]] = ...) -> None: ...
