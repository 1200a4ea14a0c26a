from corolla.proto import update_pb2 as _update_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Packet(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: bytes
    payload: bytes
    def __init__(self, header: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class RetryWindow(_message.Message):
    __slots__ = ("min_seconds", "max_seconds")
    MIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    min_seconds: float
    max_seconds: float
    def __init__(self, min_seconds: _Optional[float] = ..., max_seconds: _Optional[float] = ...) -> None: ...

class CheckInRequest(_message.Message):
    __slots__ = ("protocol", "device", "capabilities", "num_examples", "own_model", "manifest", "log_version", "native")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    OWN_MODEL_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    LOG_VERSION_FIELD_NUMBER: _ClassVar[int]
    NATIVE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    device: str
    capabilities: _update_pb2.Capabilities
    num_examples: int
    own_model: bool
    manifest: str
    log_version: str
    native: Native
    def __init__(self, protocol: _Optional[int] = ..., device: _Optional[str] = ..., capabilities: _Optional[_Union[_update_pb2.Capabilities, _Mapping]] = ..., num_examples: _Optional[int] = ..., own_model: _Optional[bool] = ..., manifest: _Optional[str] = ..., log_version: _Optional[str] = ..., native: _Optional[_Union[Native, _Mapping]] = ...) -> None: ...

class Native(_message.Message):
    __slots__ = ("methods", "strategies", "signs", "runtime", "length", "timings")
    METHODS_FIELD_NUMBER: _ClassVar[int]
    STRATEGIES_FIELD_NUMBER: _ClassVar[int]
    SIGNS_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    methods: _containers.RepeatedScalarFieldContainer[str]
    strategies: _containers.RepeatedScalarFieldContainer[str]
    signs: int
    runtime: str
    length: int
    timings: _containers.RepeatedCompositeFieldContainer[Timing]
    def __init__(self, methods: _Optional[_Iterable[str]] = ..., strategies: _Optional[_Iterable[str]] = ..., signs: _Optional[int] = ..., runtime: _Optional[str] = ..., length: _Optional[int] = ..., timings: _Optional[_Iterable[_Union[Timing, _Mapping]]] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("program", "method", "length", "seconds")
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    program: str
    method: str
    length: int
    seconds: float
    def __init__(self, program: _Optional[str] = ..., method: _Optional[str] = ..., length: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("kind", "program", "method", "rank", "length", "planned_bytes")
    KIND_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    PLANNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    program: str
    method: str
    rank: int
    length: int
    planned_bytes: int
    def __init__(self, kind: _Optional[str] = ..., program: _Optional[str] = ..., method: _Optional[str] = ..., rank: _Optional[int] = ..., length: _Optional[int] = ..., planned_bytes: _Optional[int] = ...) -> None: ...

class CheckInResponse(_message.Message):
    __slots__ = ("lease", "refusal", "retry", "policy")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    lease: Lease
    refusal: Refusal
    retry: RetryWindow
    policy: Policy
    def __init__(self, lease: _Optional[_Union[Lease, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., retry: _Optional[_Union[RetryWindow, _Mapping]] = ..., policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "text", "base_model", "assignment")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[Refusal.Reason]
        REASON_NO_TASK: _ClassVar[Refusal.Reason]
        REASON_NOT_ELIGIBLE: _ClassVar[Refusal.Reason]
        REASON_MODEL: _ClassVar[Refusal.Reason]
        REASON_PROTOCOL: _ClassVar[Refusal.Reason]
        REASON_NAME: _ClassVar[Refusal.Reason]
    REASON_UNSPECIFIED: Refusal.Reason
    REASON_NO_TASK: Refusal.Reason
    REASON_NOT_ELIGIBLE: Refusal.Reason
    REASON_MODEL: Refusal.Reason
    REASON_PROTOCOL: Refusal.Reason
    REASON_NAME: Refusal.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    reason: Refusal.Reason
    text: str
    base_model: Blob
    assignment: Assignment
    def __init__(self, reason: _Optional[_Union[Refusal.Reason, str]] = ..., text: _Optional[str] = ..., base_model: _Optional[_Union[Blob, _Mapping]] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ...) -> None: ...

class Policy(_message.Message):
    __slots__ = ("charging", "unmetered", "idle", "battery_percent", "thermal", "storage_bytes", "examples", "separation", "period_seconds", "daily_bytes", "daily_seconds", "daily_battery_percent")
    CHARGING_FIELD_NUMBER: _ClassVar[int]
    UNMETERED_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    BATTERY_PERCENT_FIELD_NUMBER: _ClassVar[int]
    THERMAL_FIELD_NUMBER: _ClassVar[int]
    STORAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    SEPARATION_FIELD_NUMBER: _ClassVar[int]
    PERIOD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DAILY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DAILY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DAILY_BATTERY_PERCENT_FIELD_NUMBER: _ClassVar[int]
    charging: bool
    unmetered: bool
    idle: bool
    battery_percent: int
    thermal: int
    storage_bytes: int
    examples: int
    separation: int
    period_seconds: float
    daily_bytes: int
    daily_seconds: float
    daily_battery_percent: float
    def __init__(self, charging: _Optional[bool] = ..., unmetered: _Optional[bool] = ..., idle: _Optional[bool] = ..., battery_percent: _Optional[int] = ..., thermal: _Optional[int] = ..., storage_bytes: _Optional[int] = ..., examples: _Optional[int] = ..., separation: _Optional[int] = ..., period_seconds: _Optional[float] = ..., daily_bytes: _Optional[int] = ..., daily_seconds: _Optional[float] = ..., daily_battery_percent: _Optional[float] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("id", "client", "task", "payload", "cached", "strategy", "phase", "policy", "seconds", "deadline_seconds", "max_upload_bytes", "assignment")
    ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    id: str
    client: str
    task: Blob
    payload: Blob
    cached: _containers.RepeatedCompositeFieldContainer[Blob]
    strategy: str
    phase: str
    policy: Policy
    seconds: float
    deadline_seconds: float
    max_upload_bytes: int
    assignment: Assignment
    def __init__(self, id: _Optional[str] = ..., client: _Optional[str] = ..., task: _Optional[_Union[Blob, _Mapping]] = ..., payload: _Optional[_Union[Blob, _Mapping]] = ..., cached: _Optional[_Iterable[_Union[Blob, _Mapping]]] = ..., strategy: _Optional[str] = ..., phase: _Optional[str] = ..., policy: _Optional[_Union[Policy, _Mapping]] = ..., seconds: _Optional[float] = ..., deadline_seconds: _Optional[float] = ..., max_upload_bytes: _Optional[int] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("sha256", "size", "group", "content", "inline")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    size: int
    group: str
    content: str
    inline: bytes
    def __init__(self, sha256: _Optional[str] = ..., size: _Optional[int] = ..., group: _Optional[str] = ..., content: _Optional[str] = ..., inline: _Optional[bytes] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("files",)
    class File(_message.Message):
        __slots__ = ("path", "blob", "chunks")
        PATH_FIELD_NUMBER: _ClassVar[int]
        BLOB_FIELD_NUMBER: _ClassVar[int]
        CHUNKS_FIELD_NUMBER: _ClassVar[int]
        path: str
        blob: Blob
        chunks: bytes
        def __init__(self, path: _Optional[str] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ..., chunks: _Optional[bytes] = ...) -> None: ...
    FILES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[Manifest.File]
    def __init__(self, files: _Optional[_Iterable[_Union[Manifest.File, _Mapping]]] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("sha256", "offset")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    offset: int
    def __init__(self, sha256: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("lease", "offset", "content", "crc32", "size")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    lease: str
    offset: int
    content: bytes
    crc32: int
    size: int
    def __init__(self, lease: _Optional[str] = ..., offset: _Optional[int] = ..., content: _Optional[bytes] = ..., crc32: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

class UploadStatus(_message.Message):
    __slots__ = ("received", "problem")
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    received: int
    problem: str
    def __init__(self, received: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("lease", "reply")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    lease: str
    reply: bytes
    def __init__(self, lease: _Optional[str] = ..., reply: _Optional[bytes] = ...) -> None: ...

class Acknowledgement(_message.Message):
    __slots__ = ("accepted", "why", "retry")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    why: str
    retry: RetryWindow
    def __init__(self, accepted: _Optional[bool] = ..., why: _Optional[str] = ..., retry: _Optional[_Union[RetryWindow, _Mapping]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: str
    def __init__(self, lease: _Optional[str] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("wanted", "seconds")
    WANTED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    wanted: bool
    seconds: float
    def __init__(self, wanted: _Optional[bool] = ..., seconds: _Optional[float] = ...) -> None: ...
