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

class Scalars(_message.Message):
    __slots__ = ("group", "size", "fp32", "fp16", "fixed32", "varint", "bitmap", "seed", "step")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    FP32_FIELD_NUMBER: _ClassVar[int]
    FP16_FIELD_NUMBER: _ClassVar[int]
    FIXED32_FIELD_NUMBER: _ClassVar[int]
    VARINT_FIELD_NUMBER: _ClassVar[int]
    BITMAP_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    group: str
    size: int
    fp32: bytes
    fp16: bytes
    fixed32: bytes
    varint: bytes
    bitmap: bytes
    seed: int
    step: float
    def __init__(self, group: _Optional[str] = ..., size: _Optional[int] = ..., fp32: _Optional[bytes] = ..., fp16: _Optional[bytes] = ..., fixed32: _Optional[bytes] = ..., varint: _Optional[bytes] = ..., bitmap: _Optional[bytes] = ..., seed: _Optional[int] = ..., step: _Optional[float] = ...) -> None: ...

class Log(_message.Message):
    __slots__ = ("origin", "since", "version", "rows", "number", "start")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    origin: str
    since: str
    version: str
    rows: _containers.RepeatedCompositeFieldContainer[Scalars]
    number: int
    start: str
    def __init__(self, origin: _Optional[str] = ..., since: _Optional[str] = ..., version: _Optional[str] = ..., rows: _Optional[_Iterable[_Union[Scalars, _Mapping]]] = ..., number: _Optional[int] = ..., start: _Optional[str] = ...) -> None: ...

class Capabilities(_message.Message):
    __slots__ = ("memory_bytes", "cores", "accelerator", "accelerator_bytes", "runtime", "battery_percent", "charging", "metered", "idle", "storage_bytes")
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    BATTERY_PERCENT_FIELD_NUMBER: _ClassVar[int]
    CHARGING_FIELD_NUMBER: _ClassVar[int]
    METERED_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    STORAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    memory_bytes: int
    cores: int
    accelerator: str
    accelerator_bytes: int
    runtime: str
    battery_percent: int
    charging: bool
    metered: bool
    idle: bool
    storage_bytes: int
    def __init__(self, memory_bytes: _Optional[int] = ..., cores: _Optional[int] = ..., accelerator: _Optional[str] = ..., accelerator_bytes: _Optional[int] = ..., runtime: _Optional[str] = ..., battery_percent: _Optional[int] = ..., charging: _Optional[bool] = ..., metered: _Optional[bool] = ..., idle: _Optional[bool] = ..., storage_bytes: _Optional[int] = ...) -> None: ...

class Bundle(_message.Message):
    __slots__ = ("entries",)
    class Entry(_message.Message):
        __slots__ = ("header", "payload")
        HEADER_FIELD_NUMBER: _ClassVar[int]
        PAYLOAD_FIELD_NUMBER: _ClassVar[int]
        header: bytes
        payload: bytes
        def __init__(self, header: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[Bundle.Entry]
    def __init__(self, entries: _Optional[_Iterable[_Union[Bundle.Entry, _Mapping]]] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("schema", "run_id", "round", "base_version", "kind", "config", "payload_bytes", "payload_sha256", "cached", "scalars", "log", "model_sha256", "seats", "refusal")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    SCALARS_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    SEATS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    schema: int
    run_id: str
    round: int
    base_version: str
    kind: Kind
    config: str
    payload_bytes: int
    payload_sha256: str
    cached: _containers.RepeatedCompositeFieldContainer[CachedGroup]
    scalars: _containers.RepeatedCompositeFieldContainer[Scalars]
    log: Log
    model_sha256: str
    seats: int
    refusal: str
    def __init__(self, schema: _Optional[int] = ..., run_id: _Optional[str] = ..., round: _Optional[int] = ..., base_version: _Optional[str] = ..., kind: _Optional[_Union[Kind, str]] = ..., config: _Optional[str] = ..., payload_bytes: _Optional[int] = ..., payload_sha256: _Optional[str] = ..., cached: _Optional[_Iterable[_Union[CachedGroup, _Mapping]]] = ..., scalars: _Optional[_Iterable[_Union[Scalars, _Mapping]]] = ..., log: _Optional[_Union[Log, _Mapping]] = ..., model_sha256: _Optional[str] = ..., seats: _Optional[int] = ..., refusal: _Optional[str] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("schema", "run_id", "round", "base_version", "kind", "client", "num_examples", "metrics", "payload_bytes", "payload_sha256", "error", "missing", "scalars", "clients", "bundle", "seats", "model_sha256", "capabilities")
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
    SCALARS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    SEATS_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
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
    scalars: _containers.RepeatedCompositeFieldContainer[Scalars]
    clients: int
    bundle: bool
    seats: int
    model_sha256: str
    capabilities: Capabilities
    def __init__(self, schema: _Optional[int] = ..., run_id: _Optional[str] = ..., round: _Optional[int] = ..., base_version: _Optional[str] = ..., kind: _Optional[_Union[Kind, str]] = ..., client: _Optional[str] = ..., num_examples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., payload_bytes: _Optional[int] = ..., payload_sha256: _Optional[str] = ..., error: _Optional[str] = ..., missing: _Optional[_Iterable[str]] = ..., scalars: _Optional[_Iterable[_Union[Scalars, _Mapping]]] = ..., clients: _Optional[int] = ..., bundle: _Optional[bool] = ..., seats: _Optional[int] = ..., model_sha256: _Optional[str] = ..., capabilities: _Optional[_Union[Capabilities, _Mapping]] = ...) -> None: ...
