"""A registered client that answers every round with another kind of poison, among honest ones."""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from safetensors.torch import load_file

from corolla.commands.simulate import in_process
from corolla.commands.simulate.in_process import InProcess, simulate
from corolla.config.run import RunConfig
from corolla.host import text
from corolla.server.rounds import gate_checks
from corolla.server.runs.journal import read
from corolla.types import Payload
from corolla.wire import codec, messages
from corolla.wire.messages import Kind, Reply, pack_reply, unpack_reply, unpack_task
from corolla.wire.packet import Packet

Settings = Callable[..., RunConfig]
EVIL = (
    '<script>alert(1)</script>[link=http://evil]x[/link]\x1b[31m\x1b]0;pwn\x07\u202e{{7*7}} "},{\n'
)
EVE = "ben"


def filled(honest: Reply, value: float) -> Payload:
    """An update of the right form with one value everywhere."""
    update = messages.content(honest)
    return {
        group: {name: torch.full_like(tensor, value) for name, tensor in params.items()}
        for group, params in update.items()
    }


def answers(echo: tuple[Any, ...], honest: Reply) -> Iterator[Packet]:
    """One answer a round."""

    def reply(payload: bytes = b"", **changes: Any) -> Packet:
        return pack_reply(Reply(*echo, **{"client": EVE, "payload": payload, **changes}))

    update = honest.payload
    yield reply(error=EVIL)
    yield reply(error="x" * 900_000)
    yield reply(num_examples=1 << 40, payload=update, metrics={f"{EVIL}{i}": 1.0 for i in range(9)})
    yield Packet(b"\xff" * (900 << 10), b"")
    yield reply(client=EVIL[:50], num_examples=2, payload=update)
    yield reply(missing=[EVIL] * 3000, error=EVIL)
    yield reply(codec.encode({EVIL: {EVIL: torch.full((64, 64), float("nan"))}}), num_examples=2)
    yield reply(codec.encode(filled(honest, float("nan"))), num_examples=2)
    yield reply(zstandard.ZstdCompressor().compress(bytes(1 << 20)), num_examples=2)
    yield reply(struct.pack("<Q", 1 << 60), num_examples=2)


MODES = 10


class Hostile(InProcess):
    """Three honest clients, and one that has an answer of its own for each round."""

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for client, packet in super().ask(packets):
            task = unpack_task(packets[client])
            if client == EVE and task.kind == Kind.TRAIN and packet:
                echo = (task.run_id, task.round, task.base_version, task.kind)
                packet = [*answers(echo, unpack_reply(packet, 1 << 30))][(task.round - 1) % MODES]
            yield client, packet


@pytest.fixture
def config(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(in_process, "InProcess", Hostile)
    return settings(rounds=MODES, local_steps=1, eval_every=MODES, eval_clients=0)


def verdicts(folder: Path) -> list[dict[str, str]]:
    """Of each round, what became of each reply."""
    return [dict(entry["verdicts"]) for entry in read(folder) if entry["event"] == "verdicts"]


def test_no_answer_of_a_hostile_client_counts_or_is_written_as_it_came(
    config: RunConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    simulate(config, folder)
    for round in verdicts(folder):
        assert round.pop(EVE) != "accepted"
        assert set(round.values()) == {"accepted"}
    assert len(verdicts(folder)) == MODES
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in adapter.values())
    told = [json.dumps(entry, ensure_ascii=False) for entry in read(folder)]
    told += [(folder / name).read_text() for name in ("run.json", "metrics.jsonl", "report.html")]
    for written in told:
        assert "\x1b" not in written
        assert "\\u001b" not in written
    assert "<script>alert" not in (folder / "report.html").read_text()
    assert max(map(len, told[:-1])) < 100_000


def test_without_the_gate_one_answer_ends_the_model(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_checks, "_check_values", lambda *_: None)
    monkeypatch.setattr(gate_checks, "_check_norm", lambda *_: None)
    monkeypatch.setattr(messages, "one_line", lambda found, *_: found)
    monkeypatch.setattr(text, "one_line", lambda found, *_: found)
    folder = tmp_path / "run"
    with pytest.raises(Exception, match=r"finite|nan|NaN"):
        simulate(config.model_copy(update={"rounds": 8}), folder)
    accepted = [round[EVE] == "accepted" for round in verdicts(folder)]
    assert accepted[7]
    assert any("\\u001b" in json.dumps(entry) for entry in read(folder))
