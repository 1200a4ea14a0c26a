"""The wire schema only grows: what an old peer reads or calls stays as it was.

proto/baseline.binpb is the schema of the last release, as protoc describes it.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "proto" / "baseline.binpb"
FILES = ("update.proto", "device.proto")
GENERATED = (
    *("update_pb2.py", "update_pb2.pyi"),
    *("device_pb2.py", "device_pb2.pyi", "device_pb2_grpc.py"),
)


def protoc(source: Path, *options: str) -> None:
    """Compile the schema in a folder, under the names that it has when it is installed."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-Icorolla/proto={source}", *options]
    names = [f"corolla/proto/{name}" for name in FILES]
    done = subprocess.run([*command, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def described(source: Path, scratch: Path) -> FileDescriptorSet:
    protoc(source, f"--descriptor_set_out={scratch / 'found.binpb'}")
    return FileDescriptorSet.FromString((scratch / "found.binpb").read_bytes())


def baseline() -> FileDescriptorSet:
    return FileDescriptorSet.FromString(BASELINE.read_bytes())


def messages(schema: FileDescriptorSet) -> dict[str, DescriptorProto]:
    """All messages by full name, nested ones too."""

    def walk(
        prefix: str, parts: Iterator[DescriptorProto]
    ) -> Iterator[tuple[str, DescriptorProto]]:
        for part in parts:
            yield f"{prefix}.{part.name}", part
            yield from walk(f"{prefix}.{part.name}", iter(part.nested_type))

    return {n: m for f in schema.file for n, m in walk(f.package, iter(f.message_type))}


def enums(schema: FileDescriptorSet) -> dict[str, EnumDescriptorProto]:
    outer = {f"{f.package}.{e.name}": e for f in schema.file for e in f.enum_type}
    inner = {f"{n}.{e.name}": e for n, m in messages(schema).items() for e in m.enum_type}
    return outer | inner


def methods(schema: FileDescriptorSet) -> dict[str, MethodDescriptorProto]:
    return {
        f"{file.package}.{service.name}.{method.name}": method
        for file in schema.file
        for service in file.service
        for method in service.method
    }


def breaking(old: FileDescriptorSet, new: FileDescriptorSet) -> list[str]:
    """What of an old schema is not the same in a new one, which may have more."""
    found: list[str] = []
    now_messages, now_enums, now_methods = messages(new), enums(new), methods(new)
    for name, message in messages(old).items():
        if name in now_messages:
            found += _fields(name, message, now_messages[name])
        else:
            found.append(f"message {name} is gone")
    for name, enum in enums(old).items():
        numbers = {v.name: v.number for v in now_enums[name].value} if name in now_enums else {}
        found += [
            f"{name}.{value.name} = {value.number} is {numbers.get(value.name)}"
            for value in enum.value
            if numbers.get(value.name) != value.number
        ]
    for name, method in methods(old).items():
        if name not in now_methods:
            found.append(f"method {name} is gone")
        elif now_methods[name] != method:
            found.append(f"method {name} has another form")
    return found


def _fields(name: str, old: DescriptorProto, new: DescriptorProto) -> list[str]:
    now: Mapping[int, FieldDescriptorProto] = {field.number: field for field in new.field}
    return [
        f"{name}.{field.name} = {field.number} is {_form(now[field.number], new)}, "
        f"was {_form(field, old)}"
        if field.number in now
        else f"{name}.{field.name} = {field.number} is gone"
        for field in old.field
        if field.number not in now or _form(now[field.number], new) != _form(field, old)
    ]


def _form(field: FieldDescriptorProto, owner: DescriptorProto) -> tuple[object, ...]:
    """What both sides must agree on: also the oneof, which decides what a value clears."""
    oneof = owner.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
    return field.name, field.type, field.label, field.type_name, oneof, field.proto3_optional


def test_the_schema_breaks_nothing(tmp_path: Path) -> None:
    assert breaking(baseline(), described(ROOT / "proto", tmp_path)) == []


def test_the_baseline_holds_both_files() -> None:
    assert [file.name for file in baseline().file] == [f"corolla/proto/{name}" for name in FILES]
    assert len(messages(baseline())) > 20
    assert {name.rpartition(".")[2] for name in methods(baseline())} >= {"Answer", "CheckIn"}


VIOLATIONS: Mapping[str, tuple[str, str, str, str]] = {
    "field removed": ("update.proto", "  uint32 seats = 13;", "", "Task.seats = 13 is gone"),
    "field removed and reserved": (
        *("update.proto", "  uint32 seats = 13;", "  reserved 13; reserved 'seats';"),
        "Task.seats = 13 is gone",
    ),
    "field renumbered": ("update.proto", "seats = 13;", "seats = 98;", "Task.seats = 13 is gone"),
    "field renamed": ("update.proto", "  string run_id = 2;", "  string run = 2;", ".run_id = 2"),
    "field retyped": ("update.proto", "uint32 round = 3;", "sint32 round = 3;", ".round = 3"),
    "field repeated": ("update.proto", "string config = 6;", "repeated string config = 6;", "= 6"),
    "field of another message": ("update.proto", "Log log = 11;", "Scalars log = 11;", ".log = 11"),
    "field into a oneof": (
        *(
            "device.proto",
            "  RetryWindow retry = 3;   //",
            "  oneof z { RetryWindow retry = 3; } //",
        ),
        "CheckInResponse.retry = 3",
    ),
    "field no longer optional": (
        *("update.proto", "optional float step", "float step", "Scalars.step = 9"),
    ),
    "numbers swapped": (
        *("device.proto", "bool accepted = 1;\n  string why = 2;"),
        *("bool accepted = 2;\n  string why = 1;", "Acknowledgement.accepted = 1"),
    ),
    "nested message removed": (
        *(
            "update.proto",
            "  message Entry {\n    bytes header = 1;",
            "  message Part {\n    bytes header = 1;",
        ),
        "message corolla.v1.Bundle.Entry is gone",
    ),
    "enum value renumbered": (
        *("update.proto", "KIND_EVALUATE = 3;", "KIND_EVALUATE = 4;", "KIND_EVALUATE = 3 is 4"),
    ),
    "enum value removed": ("update.proto", "  KIND_HELLO = 1;", "", "KIND_HELLO = 1 is None"),
    "nested enum value renamed": (
        *("device.proto", "REASON_NAME = 5;", "REASON_TAKEN = 5;", "REASON_NAME = 5 is None"),
    ),
    "method removed": (
        *("device.proto", "  rpc Heartbeat(HeartbeatRequest) returns (HeartbeatResponse);", ""),
        "method corolla.v1.Phones.Heartbeat is gone",
    ),
    "method of another service": (
        *("device.proto", "service Trainer {", "service Daemon {", "Trainer.Answer is gone"),
    ),
    "method answers otherwise": (
        *("device.proto", "rpc Answer(Packet) returns (Packet)"),
        *("rpc Answer(Packet) returns (Chunk)", "Trainer.Answer has another form"),
    ),
    "method streams": (
        *("device.proto", "rpc Upload(Chunk)", "rpc Upload(stream Chunk)"),
        "Phones.Upload has another form",
    ),
}


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_what_breaks_a_peer_is_found(tmp_path: Path, violation: str) -> None:
    file, old, new, wanted = VIOLATIONS[violation]
    for name in FILES:
        shutil.copy(ROOT / "proto" / name, tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    text = text.replace(old, new, 1)
    if violation == "nested message removed":
        text = text.replace("repeated Entry entries", "repeated Part entries")
    (tmp_path / file).write_text(text)
    before = described(ROOT / "proto", tmp_path)
    found = breaking(before, described(tmp_path, tmp_path))
    assert any(wanted in line for line in found), found


def test_what_is_added_breaks_nothing(tmp_path: Path) -> None:
    for name in FILES:
        shutil.copy(ROOT / "proto" / name, tmp_path)
    path = tmp_path / "update.proto"
    text = path.read_text().replace(
        "uint32 seats = 13;", "uint32 seats = 13;\n  bool more = 99;", 1
    )
    text = text.replace("KIND_HELLO = 1;", "KIND_HELLO = 1;\n  KIND_MORE = 99;", 1)
    path.write_text(text + "\nmessage More { bool more = 1; }\n")
    before = described(ROOT / "proto", tmp_path)
    assert breaking(before, described(tmp_path, tmp_path)) == []


def test_the_generated_code_is_that_of_the_schema(tmp_path: Path) -> None:
    kinds = ("python", "pyi", "grpc_python")
    protoc(ROOT / "proto", *(f"--{kind}_out={tmp_path}" for kind in kinds))
    for name in GENERATED:
        made = (tmp_path / "corolla" / "proto" / name).read_bytes()
        assert made == (ROOT / "proto" / name).read_bytes(), f"{name} is stale: make proto"


def test_buf_agrees_where_it_is_installed(tmp_path: Path) -> None:
    buf = shutil.which("buf")
    if buf is None:
        pytest.skip("buf is not installed")
    folder = tmp_path / "corolla" / "proto"
    folder.mkdir(parents=True)
    for name in FILES:
        shutil.copy(ROOT / "proto" / name, folder)
    (tmp_path / "buf.yaml").write_text("version: v2\nbreaking:\n  use: [WIRE_JSON]\n")
    done = subprocess.run(
        [buf, "breaking", "--against", str(BASELINE)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
