"""Native optimisers step as torch's, schedules are Corolla's, scalars travel as in Python."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from corolla.config import schedule
from corolla.config.run import RunConfig
from corolla.errors import WireError
from corolla.proto import update_pb2 as pb
from corolla.server.rounds.tasks import run_settings
from corolla.tensors import tree
from corolla.types import Params
from corolla.wire import scalar_groups
from tests.client.native.core_tasks import call, config


@pytest.fixture(scope="session")
def check(native_build: Path) -> Path:
    return native_build / "corolla-native-check"


@pytest.mark.parametrize("clip", [0.0, 0.05, 100.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_twenty_steps_are_those_of_torch(
    check: Path, tmp_path: Path, name: str, decay: float, clip: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(300, generator=generator)
    gradients = torch.randn(20, 300, generator=generator) * torch.logspace(-9, 0, 300)
    rates = [1e-2 / (i + 1) for i in range(20)]
    weights = nn.Parameter(start.clone())
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    optimizer = kind([weights], lr=1.0, weight_decay=decay)
    for gradient, lr in zip(gradients, rates, strict=True):
        weights.grad = gradient.clone()
        if clip:
            nn.utils.clip_grad_norm_([weights], clip)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    told = {"weights": start.tolist(), "gradients": gradients.tolist(), "rates": rates}
    (tmp_path / "told").write_text(json.dumps(told))
    done = call(check, "optimiser", name, decay, clip, tmp_path / "told")
    found = torch.tensor(json.loads(done.stdout))
    assert (found - start).abs().max() > 1e-4
    torch.testing.assert_close(found, weights.detach(), rtol=1e-6, atol=1e-6)


CASES: list[dict[str, Any]] = [
    {},
    {"schedule": "linear", "warmup_rounds": 1.5},
    {"schedule": "constant", "local_epochs": 2, "batch_size": 4},
    {"local_epochs": 1, "batch_size": 64, "queries": 3},
    {"local_steps": 7, "batch_size": 5, "warmup_rounds": 0.3, "lr": 0.123},
]


@pytest.mark.parametrize("round", [1, 3])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_steps_and_rates_are_those_of_python(
    check: Path, tmp_path: Path, changes: dict[str, Any], round: int
) -> None:
    run, sequences, seed = config(**{"micro_batch_size": None, **changes}), 11, 77
    told = {"run": run_settings(run, True), "sequences": sequences, "seed": seed, "round": round}
    (tmp_path / "told").write_text(json.dumps(told))
    found = json.loads(call(check, "schedule", tmp_path / "told").stdout)
    steps = schedule.steps_per_round(run, sequences)
    assert found["batches"] == list(schedule.batches(run, sequences, seed))
    wanted = [schedule.rate(run, round, steps, step) for step in range(steps)]
    assert found["rates"] == pytest.approx(wanted, rel=1e-15, abs=1e-15)
    assert found["step"] == pytest.approx(schedule.step_size(run, round, sequences), rel=1e-7)


def test_a_class_has_settings_of_its_own(check: Path, tmp_path: Path) -> None:
    own = {"trainer": "zeroth_order", "lr": 0.5, "local_steps": 2, "batch_size": 1, "queries": 2}
    run = RunConfig(strategy="mixed", classes={"a": {}, "b": own}, rounds=2)
    told = {"run": run_settings(run, True), "sequences": 5, "seed": 1, "round": 1, "class": "b"}
    (tmp_path / "told").write_text(json.dumps(told))
    found = json.loads(call(check, "schedule", tmp_path / "told").stdout)
    assert found["batches"] == list(schedule.batches(run.of_class("b"), 5, 1))
    assert found["step"] == pytest.approx(schedule.step_size(run.of_class("b"), 1, 5))


def scalars(*values: float, half: bool = False, **more: Any) -> Params:
    kind = torch.float16 if half else torch.float32
    return {"scalars": torch.tensor(values, dtype=kind), **more}


GROUPS: dict[str, Params] = {
    "dense": scalars(1.0, -2.0, 3.0, step=torch.tensor(0.5), seed=torch.tensor(4_000_000_000)),
    "half": scalars(1.0, 65504.0, -0.0, half=True),
    "bitmap": scalars(*([0.0] * 20 + [1.0, 2.0]), half=True),
    "varint": scalars(*([0.0] * 400 + [1.0] + [0.0] * 600 + [2.0])),
    "far": scalars(*([1.0] + [0.0] * 20_000 + [1.0] + [0.0] * 200 + [1.0])),
    "zeros": scalars(*[0.0] * 64, step=torch.tensor(1.0)),
    "named": scalars(1.0, 2.0, 3.0, directions=torch.tensor([5, 65535, 5], dtype=torch.int32)),
    "not finite": scalars(float("nan"), float("inf"), 0.0),
    "empty": scalars(),
}


@pytest.mark.parametrize("name", GROUPS)
def test_scalar_groups_travel_as_in_python(check: Path, tmp_path: Path, name: str) -> None:
    entry = scalar_groups.pack_group(GROUPS[name], "group")
    (tmp_path / "entry").write_bytes(entry.SerializeToString())
    found = json.loads(call(check, "scalars", tmp_path / "entry").stdout)
    assert found["digest"] == tree.digest(GROUPS[name])
    again = pb.Scalars.FromString(bytes.fromhex(found["packed"]))
    assert again == entry, "another form than Python's"


def test_a_hostile_scalar_group_is_one_line(check: Path, tmp_path: Path) -> None:
    hostile = [
        pb.Scalars(size=65537, fp32=b""),
        pb.Scalars(size=2),
        pb.Scalars(size=2, fp32=bytes(7)),
        pb.Scalars(size=2, fp32=bytes(8), fixed32=bytes(7)),
        pb.Scalars(size=1, fp32=bytes(4), fixed32=(65536).to_bytes(4, "little")),
        pb.Scalars(size=4, fp32=bytes(4), bitmap=b""),
        pb.Scalars(size=4, fp32=bytes(4), bitmap=b"\x10"),
        pb.Scalars(size=4, fp32=bytes(8), varint=b"\x01\x00"),
        pb.Scalars(size=4, fp32=bytes(4), varint=b"\x04"),
        pb.Scalars(size=4, fp32=bytes(4), varint=b"\x81"),
        pb.Scalars(size=4, fp32=bytes(4), varint=b"\xff\xff\xff\xff\xff\x01"),
        pb.Scalars(size=4, fp32=bytes(4), varint=bytes(21)),
        pb.Scalars(size=1, fp32=bytes(4), step=float("inf")),
    ]
    for entry in hostile:
        with pytest.raises(WireError):
            scalar_groups.unpack_group(entry, "group")
        (tmp_path / "entry").write_bytes(entry.SerializeToString())
        done = call(check, "scalars", tmp_path / "entry")
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), entry
