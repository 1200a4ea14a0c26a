"""A server chooses a clip at which a sum of gradients overflows for one number of rows.

Noise that is added to what has overflowed hides nothing: whether there was an answer told, at the
cost of however little the server's noise multiplier says, how many rows are alike.
"""

import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from corolla.client.device import daemon
from corolla.client.device.daemon import Trainer
from corolla.client.training import dpsgd, private
from corolla.client.training.first_order import FirstOrder
from corolla.config import load
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoder
from corolla.data.rows import Example
from corolla.errors import ConfigError, DivergedError
from corolla.privacy.example_level import ExampleLevel
from corolla.privacy.randomness import clip_factors
from corolla.types import Fit, Params
from corolla.wire import messages, ranges
from corolla.wire.messages import Reply
from tests.attacks.devices import Server, answer, device

ROW = {"prompt": "asyncio.run(main)", "response": "Module: asyncio"}
FEWER, MORE = 74, 75
LARGEST = torch.finfo(torch.float32).max
SEEDS, NOISES = range(20), (0.3, 1.0, 10.0, 100.0)
CLIPS = [float(f"1e{power}") for power in range(-30, 39)]


@pytest.fixture
def server(tiny_model: Path) -> Server:
    return Server.of(tiny_model)


@pytest.fixture
def devices(tiny_model: Path, tmp_path: Path) -> dict[int, Trainer]:
    """Two devices that differ in the number of their rows alone."""
    return {n: device(tmp_path / str(n), tiny_model, [ROW] * n) for n in (FEWER, MORE)}


def query(server: Server) -> dict[str, Any]:
    """Settings at which one clip more overflows in fp32, found on a row that the server knows."""
    row = Example(ROW["response"], prompt=ROW["prompt"])
    [own] = private.sequences(Encoder(server.model.base.tokenizer, (), 32), [row])
    start = {n: 100 * t if n.endswith("lora_A") else t for n, t in server.start.items()}
    gradient = server.gradient(own.input_ids, own.targets, start)
    size = float(torch.cat([g.double().flatten() for g in gradient.values()]).norm())
    peak = max(float(g.double().abs().max()) for g in gradient.values())
    clip = LARGEST / ((FEWER + 0.5) * peak / size)
    return {"clip": clip, "alpha": 2 * clip / size, "start": start}


def in_fp32(total: dict[str, Tensor], gradients: Params, clip: float) -> None:
    """As clipped gradients were summed: in their own type, at the clip that was chosen."""
    flat = torch.cat([g.double().flatten(1) for g in gradients.values()], dim=1)
    factors = clip_factors(flat.norm(dim=1), clip).float()
    for name, rows in gradients.items():
        summed = (total[name] * clip).float()
        for factor, row in zip(factors, rows, strict=True):
            summed = summed + factor * row
        total[name].copy_(summed.double() / clip)


@pytest.fixture
def defenceless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ranges, without sums in fp64, and with errors that depend on rows."""
    real = load.validate

    def validate(values: Mapping[str, Any]) -> RunConfig:
        wild = {key: values[key] for key in ("clip", "alpha") if key in values}
        return real({k: v for k, v in values.items() if k not in wild}).model_copy(update=wild)

    fit = FirstOrder.fit

    def strict(trainer: FirstOrder, start: Params, **named: Any) -> Fit:
        found = fit(trainer, start, **named)
        if all(torch.equal(found.params[name], tensor) for name, tensor in start.items()):
            raise DivergedError("weights are not finite after local training: lower lr")
        return found

    def told(with_rows: Any, without: Any) -> Any:
        with private.withheld():
            return with_rows()

    monkeypatch.setattr(daemon, "validate", validate)
    monkeypatch.setattr(ranges, "check", lambda *_: None)
    monkeypatch.setattr(ranges, "check_tensors", lambda *_: None)
    monkeypatch.setattr(dpsgd, "_add_clipped", in_fp32)
    monkeypatch.setattr(FirstOrder, "fit", strict)
    monkeypatch.setattr(private, "answered", told)


@pytest.mark.usefixtures("defenceless")
def test_without_defences_one_row_more_is_seen_whatever_the_noise(
    server: Server, devices: dict[int, Trainer]
) -> None:
    asked = query(server)
    for noise in (1.0, 100.0):
        task = server.task(noise_multiplier=noise, **asked)
        assert answer(devices[FEWER], task).error == ""
        assert "could not train" in answer(devices[MORE], task).error


def shown(reply: Reply) -> tuple[object, ...]:
    """All of a reply that noise is not on."""
    tensors = messages.content(reply) if reply.payload else {}
    forms = [
        (group, name, tensor.shape, tensor.dtype, bool(tensor.isfinite().all()))
        for group, params in tensors.items()
        for name, tensor in sorted(params.items())
    ]
    metrics = reply.metrics.keys()
    return reply.error, len(reply.payload), len(reply.scalars), tuple(metrics), tuple(forms)


def test_the_same_query_is_refused_before_a_row_is_looked_at(
    server: Server, devices: dict[int, Trainer]
) -> None:
    asked = query(server)
    for trainer in devices.values():
        reply = answer(trainer, server.task(**asked))
        assert "alpha: expected a number from 1e-06 to 1e+06, found" in reply.error
        assert not (trainer.own.state / "ledger.jsonl").exists()


WHOLE = "COROLLA_TESTS_WHOLE_GRID"
"""Variable of the environment with which devices are asked every combination: most of an hour."""


def asked_for(dtype: str) -> Iterable[tuple[int, float, float]]:
    """Seed, clip and noise multiplier of each query of devices: every clip, the others in turn.

    Of a base in half precision, which is read anew for each setting, every third clip.
    """
    if WHOLE in os.environ:
        return itertools.product(SEEDS, CLIPS, NOISES)
    clips = CLIPS if dtype == "float32" else CLIPS[::3]
    return zip(itertools.cycle(SEEDS), clips, itertools.cycle(NOISES), strict=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_devices_answer_alike_at_every_clip(
    server: Server, devices: dict[int, Trainer], dtype: str
) -> None:
    """An update of both, or one refusal that was given before the ledger was charged."""
    wild = {n: 100 * t if n.endswith("lora_A") else t for n, t in server.start.items()}
    asked, answered = list(asked_for(dtype)), 0
    for number, (seed, clip, noise) in enumerate(asked, start=1):
        numbers = {"seed": seed, "clip": clip, "noise_multiplier": noise, "dtype": dtype}
        task = server.task(number, wild, alpha=1e6, rounds=len(asked), **numbers)
        fewer, more = (shown(answer(devices[n], task)) for n in (FEWER, MORE))
        assert fewer == more, (clip, seed, noise)
        spent = [len(lines(devices[n])) for n in (FEWER, MORE)]
        answered += fewer[0] == ""
        assert spent == [answered] * 2, (clip, seed, noise)
        assert (fewer[0] == "") == (ranges.RANGES["clip"].holds(clip)), fewer[0]
    held = [clip for _, clip, _ in asked if 1e-10 <= clip <= 1e10]
    assert answered == len(held) > 0


def lines(trainer: Trainer) -> list[str]:
    ledger = trainer.own.state / "ledger.jsonl"
    return ledger.read_text().splitlines() if ledger.exists() else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_sum_overflows_or_vanishes(dtype: torch.dtype) -> None:
    """All seeds, clips and noises on the arithmetic alone, with gradients as large as there are."""
    for seed, clip, noise in itertools.product(SEEDS, CLIPS, NOISES):
        draw = torch.Generator().manual_seed(seed)
        row = (1e37 * torch.randn(1, 40, generator=draw)).to(dtype)
        sums = []
        for count in (FEWER, MORE):
            total = {"w": torch.zeros(40, dtype=torch.float64)}
            dpsgd._add_clipped(total, {"w": row.expand(count, 40)}, clip)
            sums.append(total["w"])
        assert float((sums[1] - sums[0]).norm()) <= 1 + 1e-9
        if ranges.RANGES["clip"].holds(clip):
            level = ExampleLevel(MORE, 1024, clip, noise, 1e-5, 1)
            for summed in sums:
                assert bool(level.noised({"w": summed})["w"].isfinite().all())


def test_a_clip_out_of_range_is_no_setting() -> None:
    for clip in (9e-11, 1.1e10, 1e38):
        with pytest.raises(ConfigError, match="clip: expected a number from 1e-10 to 1e"):
            RunConfig(dp="example", noise_multiplier=1.0, clip=clip)
