"""Messages of every kind, byte for byte as they were recorded in recorded.json.

All values are small whole numbers, so that no processor rounds them in its own way. To record
messages anew, which only a new schema is a reason for: python tests/corolla/wire/test_recorded.py
"""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.types import Params, Payload
from corolla.wire import codec, compression, messages, scalar_groups
from corolla.wire.envelope import Envelope
from corolla.wire.messages import Capabilities, Kind, Log, Reply, Task
from corolla.wire.packet import Packet

FILE = Path(__file__).with_name("recorded.json")
RUN, VERSION, ID, MODEL = "0123456789abcdef" * 2, "v" * 64, "fedcba9876543210" * 2, "5a" * 32
LIMIT = 1 << 20


def numbers(*shape: int, dtype: torch.dtype = torch.float32, first: int = -3) -> torch.Tensor:
    """Small whole numbers, first, first + 1, …, from -3 to 3 over and over."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    return ((torch.arange(count) + first + 3) % 7 - 3).reshape(shape).to(dtype)


DENSE: Payload = {
    "adapter": {"m.lora_A": numbers(2, 3), "m.lora_B": numbers(4, 2, first=1)},
    "types": {
        "double": numbers(3, dtype=torch.float64),
        "half": numbers(3, dtype=torch.float16),
        "brain": numbers(3, dtype=torch.bfloat16),
        "int": numbers(3, dtype=torch.int32),
        "long": torch.tensor(7),
        "bytes": torch.tensor([0, 127, 255], dtype=torch.uint8),
        "none": torch.zeros(0, 2),
    },
    "Gruppe/ä": {},
}


def sparse(size: int, *places: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.zeros(size, dtype=dtype)
    values[list(places)] = torch.arange(1, len(places) + 1).to(dtype)
    return values


SCALARS: Mapping[str, Params] = {
    "all": {"scalars": torch.arange(1, 6).float()},
    "halves": {"scalars": torch.arange(1, 6).half()},
    "gaps": {"scalars": sparse(7_000, 3, 150, 6_900)},
    "bitmap": {"scalars": sparse(40, *range(0, 40, 2))},
    "half gaps": {"scalars": sparse(9_000, 2, 8_999, dtype=torch.float16)},
    "half bitmap": {"scalars": sparse(64, *range(0, 64, 2), dtype=torch.float16)},
    "directions": {
        "scalars": torch.arange(4).float(),
        "directions": torch.tensor([65_535, 0, 7, 7], dtype=torch.int32),
    },
    "nothing": {"scalars": torch.zeros(0)},
    "seed": {"scalars": torch.ones(2), "seed": torch.tensor((1 << 32) - 1)},
    "step": {"scalars": torch.ones(2), "seed": torch.tensor(0), "step": torch.tensor(0.25)},
    "not finite": {"scalars": torch.tensor([float("nan"), float("-inf"), 0.0])},
}


def factors(steps: str) -> Payload:
    """Returns a payload whose largest value is the number of levels, so that all are levels."""

    def peaked(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[4] = 7.0 if "int4" in steps else 127.0
        return tensor

    return {
        "factors": {
            "m.lora_A": peaked(numbers(2, 60)),
            "m.lora_B": peaked(numbers(5, 2, first=1)),
            "score.weight": peaked(numbers(2, 5, first=-1)),
        },
        "counts": {"n": torch.tensor(3), "which": torch.arange(4)},
        "scalars": SCALARS["seed"],
    }


LOSSLESS = ("rank:2", "fp16", "bf16", "int8", "int4", "rank:2 int8")
"""Steps through which `factors` comes unchanged."""
SPARSE = ("top_k:0.25", "top_k:0.02", "top_k:0.25 fp16", "top_k:0.1 int4", "rank:2 top_k:0.5 int8")
FRAMES = ("zstd", "fp16 zstd")
"""Steps whose bytes follow from the version of a library."""


def sealed(payload: Payload, steps: str = "") -> tuple[bytes, Payload]:
    """Returns the bytes and the scalar groups of a payload that went through steps."""
    made = Envelope(compression.pipeline(steps.split())).seal(payload, seed=11)
    return made.data, made.scalars


def opened(message: Task | Reply, steps: str = "", like: Payload | None = None) -> Payload:
    """The payload of a message again."""
    return Envelope(compression.pipeline(steps.split())).open(message, like)


def task(kind: Kind = Kind.TRAIN, payload: Payload | None = None, **changes: Any) -> Task:
    data, scalars = sealed(payload or {})
    values: dict[str, Any] = {"config": '{"run": {}}', "payload": data, "scalars": scalars}
    return Task(RUN, 7, VERSION, kind, **{**values, **changes})


def reply(payload: Payload | None = None, steps: str = "", **changes: Any) -> Reply:
    data, scalars = sealed(payload or {}, steps)
    values: dict[str, Any] = {"num_examples": 12, "metrics": {"loss": 0.5}}
    values |= {"missing": [], "payload": data, "scalars": scalars}
    return Reply(RUN, 7, VERSION, Kind.TRAIN, "Ängström/日本", **{**values, **changes})


def compressed(steps: str) -> Reply:
    return reply(factors(steps), steps)


def bundle() -> Reply:
    each = [messages.pack_reply(reply(own)) for own in (DENSE, dict(SCALARS))]
    packets = [*each, messages.pack_reply(reply(error="no")), Packet(b"junk", b"junk")]
    return Reply(
        *(RUN, 7, VERSION, Kind.TRAIN, "gate", 24),
        missing=[],
        payload=messages.pack_bundle(packets),
        clients=4,
        bundle=True,
    )


ROWS = [SCALARS[name] for name in ("all", "gaps", "directions", "step")]
TASKS: Mapping[str, Callable[[], Task]] = {
    "hello": lambda: task(Kind.HELLO, config="", model_sha256=MODEL),
    "evaluate": lambda: task(Kind.EVALUATE, DENSE),
    "dense": lambda: task(payload=DENSE, cached={"base": ID, "types": RUN}),
    "scalars": lambda: task(payload=dict(SCALARS)),
    "both": lambda: task(payload={**DENSE, **SCALARS}),
    "log": lambda: task(log=Log(RUN, ID, RUN, ROWS, 9)),
    "empty log": lambda: task(log=Log(RUN, RUN, RUN)),
    "snapshot": lambda: task(
        payload={"start": DENSE["adapter"]}, log=Log(RUN, ID, ID, (), 9, start=ID)
    ),
    "of a gateway": lambda: task(payload=DENSE, seats=5, model_sha256=MODEL),
}
REPLIES: Mapping[str, Callable[[], Reply]] = {
    "dense": lambda: reply(DENSE),
    "scalars": lambda: reply(dict(SCALARS)),
    "both": lambda: reply({**DENSE, **SCALARS}),
    "error": lambda: reply(error="this device fails: no space left", metrics={}),
    "missing": lambda: reply(error="base: not held here", missing=["base", "log"]),
    "hello": lambda: reply(
        model_sha256=MODEL,
        capabilities=Capabilities(
            1 << 33, 8, "NVIDIA X", 1 << 34, "3.11", 55, False, True, False, 9
        ),
    ),
    "hello of a gateway": lambda: reply(seats=64),
    "sums": lambda: reply({"sums": {"m.lora_A": numbers(2, 3, dtype=torch.float64)}}, clients=3),
    "bundle": bundle,
    **{steps: partial(compressed, steps) for steps in (*LOSSLESS, *SPARSE, *FRAMES)},
}


def recorded(name: str) -> Packet:
    header, payload = json.loads(FILE.read_text())[name]
    return Packet(base64.b64decode(header), base64.b64decode(payload))


def same(found: Payload, wanted: Payload) -> bool:
    """Bit for bit, NaN included."""
    return codec.encode(found) == codec.encode(wanted)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_the_bytes_it_had(name: str) -> None:
    assert messages.pack_task(TASKS[name]()) == recorded(f"task: {name}")


@pytest.mark.parametrize("name", [name for name in REPLIES if name not in FRAMES])
def test_a_reply_has_the_bytes_it_had(name: str) -> None:
    assert messages.pack_reply(REPLIES[name]()) == recorded(f"reply: {name}")


@pytest.mark.parametrize("name", TASKS)
def test_a_recorded_task_is_read_as_what_it_was(name: str) -> None:
    found, wanted = messages.unpack_task(recorded(f"task: {name}")), TASKS[name]()
    assert same(opened(found), opened(wanted))
    assert same(named(found.log), named(wanted.log))
    assert replace(found, scalars={}, log=None) == replace(wanted, scalars={}, log=None)


@pytest.mark.parametrize("name", [name for name in REPLIES if name not in FRAMES])
def test_a_recorded_reply_is_read_as_what_it_was(name: str) -> None:
    found = messages.unpack_reply(recorded(f"reply: {name}"), LIMIT)
    wanted = REPLIES[name]()
    assert same(found.scalars, wanted.scalars)
    assert replace(found, scalars={}) == replace(wanted, scalars={})


@pytest.mark.parametrize("steps", [*LOSSLESS, *FRAMES])
def test_a_recorded_update_comes_back_from_its_steps(steps: str) -> None:
    found = messages.unpack_reply(recorded(f"reply: {steps}"), LIMIT)
    assert same(opened(found, steps, factors(steps)), in_order(factors(steps)))


@pytest.mark.parametrize("steps", SPARSE)
def test_a_recorded_sparse_update_has_the_largest_values(steps: str) -> None:
    sent = factors(steps)
    found = opened(messages.unpack_reply(recorded(f"reply: {steps}"), LIMIT), steps, sent)
    pairs = [(found["factors"][name], own) for name, own in sent["factors"].items()]
    assert all(bool(((own == whole) | (own == 0)).all()) for own, whole in pairs)
    left = max(float(whole[own == 0].abs().max()) for own, whole in pairs)
    assert left <= min(float(own[own != 0].abs().min()) for own, _ in pairs if own.any())


def test_a_recorded_bundle_holds_its_replies() -> None:
    found = messages.unpack_reply(recorded("reply: bundle"), LIMIT)
    inner = messages.unpack_bundle(found.payload, found.clients)
    assert inner[:2] == [recorded("reply: dense"), recorded("reply: scalars")]
    assert inner[3] == Packet(b"junk", b"junk")


def named(log: Log | None) -> Payload:
    return {str(number): row for number, row in enumerate(log.rows)} if log else {}


def in_order(payload: Payload) -> Payload:
    """As a message has them: dense groups first, then scalar groups."""
    dense, scalars = scalar_groups.split(payload)
    return {**dense, **scalars}


def record() -> None:
    tasks = {f"task: {name}": messages.pack_task(make()) for name, make in TASKS.items()}
    replies = {f"reply: {name}": messages.pack_reply(make()) for name, make in REPLIES.items()}
    lines = [
        f"  {json.dumps(name)}: {json.dumps([base64.b64encode(p).decode() for p in parts])}"
        for name, parts in ((n, (p.header, p.payload)) for n, p in {**tasks, **replies}.items())
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record()
