"""Runs in which a client lies: its updates are well formed, and false."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from corolla.client.training.worker import Worker
from corolla.commands.simulate.in_process import InProcess
from corolla.config.run import RunConfig
from corolla.errors import RoundError, StoppedError
from corolla.server.rounds.network import Network
from corolla.server.runs import checkpoint
from corolla.server.runs.observer import Silent
from corolla.server.runs.run import Run
from corolla.server.runs.setup import set_up
from corolla.server.runs.summary import Summary
from corolla.storage.memory import Memory
from corolla.wire import codec
from corolla.wire.messages import pack_reply, unpack_reply
from corolla.wire.packet import Packet

Settings = Callable[..., RunConfig]
Lie = Callable[[Packet], Packet | None]

LIAR = "fay"
RUN_ID = "ab" * 16


def times(factor: float) -> Lie:
    """An update that is (of factors: whose B is) that many times as large."""

    def lie(packet: Packet) -> Packet:
        reply = unpack_reply(packet, 1 << 30)
        if not reply.payload:
            return packet
        sent = codec.decode(reply.payload)
        told = {
            group: {n: t if n.endswith(".lora_A") else t * factor for n, t in params.items()}
            for group, params in sent.items()
        }
        return pack_reply(replace(reply, payload=codec.encode(told)))

    return lie


@dataclass
class Hostile(Network):
    """Clients in this process, one of which lies; all are gone after `until` rounds."""

    honest: InProcess
    lies: Mapping[str, Lie]
    until: int = 1000
    asked: int = 0

    def clients(self) -> Mapping[str, int]:
        return self.honest.clients()

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        self.asked += len(packets) > 1
        if self.asked > self.until:
            raise StoppedError("gone")
        for client, packet in self.honest.ask(packets):
            lie = self.lies.get(client)
            yield client, lie(packet) if lie and packet else packet


def silence(packet: Packet) -> None:
    return None


@dataclass
class Federation:
    """A folder to run in, and six clients that learn the same."""

    settings: Settings
    folder: Path

    def run(
        self, lies: Mapping[str, Lie], *, name: str = "run", until: int = 1000, **changes: Any
    ) -> tuple[Summary, list[dict[str, Any]]]:
        """A run of four rounds, or what is left of it, and its lines of metrics."""
        config = self.settings(
            data=str(self.folder / "six.jsonl"), cohort=6, eval_clients=0, rounds=4, **changes
        )
        out = self.folder / name
        resume = out.exists()
        out.mkdir(exist_ok=True)
        loaded = set_up(config, RUN_ID)
        worker = Worker(config, loaded.model, loaded.data, Memory(self.folder / "memory"))
        network = Hostile(InProcess(worker), lies, until)
        evaluator, facts = loaded.evaluator, loaded.facts
        run = Run(
            *(config, loaded.strategy, network, evaluator, out, facts, Silent()), resume=resume
        )
        summary = run.execute()
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return summary, [json.loads(line) for line in lines]


@pytest.fixture
def federation(settings: Settings, tmp_path: Path) -> Federation:
    rows = [
        {"client_id": name, "prompt": f"{name} {i}?", "response": "ab" * (1 + i % 4)}
        for name in ("ann", "bob", "cat", "dan", "eve", LIAR)
        for i in range(8)
    ]
    (tmp_path / "six.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Federation(settings, tmp_path)


LIES: Mapping[str, Lie] = {LIAR: times(-100)}


@pytest.mark.parametrize("strategy", ["fedavg", "flora"])
def test_one_liar_ruins_a_mean(federation: Federation, strategy: str) -> None:
    summary, _ = federation.run(LIES, strategy=strategy)
    assert summary.final["loss"] > summary.base["loss"] + 0.3


@pytest.mark.parametrize(
    ("strategy", "rule"),
    [("fedavg", "trimmed_mean"), ("fedavg", "norm_clip"), ("flora", "norm_clip"),
     ("flora", "multi_krum")],
)  # fmt: skip
def test_one_liar_does_not_ruin_a_defended_round(
    federation: Federation, strategy: str, rule: str
) -> None:
    summary, lines = federation.run(LIES, strategy=strategy, robust=rule)
    assert summary.final["loss"] < summary.base["loss"] - 0.3
    told = json.loads((federation.folder / "run" / "run.json").read_text())
    assert told["aggregates"] == "other"  # no longer the mean
    for line in lines:
        if rule == "norm_clip":
            assert 0 < line["robust_norm"] < 1  # the liar's is a hundred times as long
            assert 1 <= line["robust_clipped"] <= 5
        elif rule == "multi_krum":
            assert line["robust_selected"] == 5


def test_norms_of_earlier_rounds_survive_a_restart(federation: Federation) -> None:
    changes: dict[str, Any] = {"strategy": "flora", "robust": "norm_clip"}
    whole, lines = federation.run(LIES, name="whole", **changes)
    with pytest.raises(StoppedError):
        federation.run(LIES, until=2, **changes)
    kept = checkpoint.load(federation.folder / "run" / "checkpoint")
    assert kept is not None
    norms = [line["robust_norm"] for line in lines]
    (medians,) = kept.memory["norms"].values()
    assert medians.tolist() == pytest.approx(norms[:2])
    resumed, again = federation.run(LIES, **changes)
    assert [line["robust_norm"] for line in again] == norms
    assert resumed.adapter_hash == whole.adapter_hash


def test_a_round_with_too_few_updates_says_so(federation: Federation) -> None:
    with pytest.raises(RoundError) as caught:
        federation.run({"ann": silence, "bob": silence}, robust="krum")
    wanted = "round 1: 4 of 6 clients gave a valid update, 5 are needed; ann: no answer"
    assert str(caught.value).startswith(wanted)
    assert checkpoint.load(federation.folder / "run" / "checkpoint") is None
