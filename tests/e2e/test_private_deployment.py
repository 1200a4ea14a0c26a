"""Differential privacy over real processes: who keeps the account, and who refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from corolla.privacy import accounting
from corolla.privacy.accounting import Release
from tests.e2e.federation import running_client, running_server
from tests.e2e.forked import Commands
from tests.e2e.gateways import wait_for
from tests.e2e.test_deployment import EDGES, lines_of, rows_of_clients

pytestmark = pytest.mark.deployment

OPTIONS = (
    "--strategy ffa_lora --rounds 2 --local-steps 2 --batch-size 4 --min-clients 2 "
    "--set threads=1 --set eval-examples=4 --set max-length=64 --set deadline=120 --set wait=60 "
    "--set attempts=1"
)


def releases(ledger: Path) -> list[Release]:
    """What a device has written down."""
    names = ("noise_multiplier", "sampling_probability", "count")
    return [Release(*(line[name] for name in names)) for line in lines_of(ledger)]


def test_devices_keep_the_account_of_their_examples(commands: Commands, tmp_path: Path) -> None:
    """Each on its own disk; what the server tells is the largest of them, and within the budget."""
    rows_of_clients(tmp_path)
    options = f"{OPTIONS} --set dp=example --set epsilon=8 --set delta=0.001"
    with (
        running_server(tmp_path, options, commands=commands) as server,
        running_client(tmp_path, server, EDGES[0], tmp_path / "edge-a.jsonl"),
        running_client(tmp_path, server, EDGES[1], tmp_path / "edge-b.jsonl"),
    ):
        assert server.finish(300) == 0, server.said()
    spent = []
    for edge in EDGES:
        own = releases(tmp_path / f"state-{edge}" / "ledger.jsonl")
        assert [release.count for release in own] == [2, 2]
        spent.append(accounting.epsilon(own, 1e-3))
    lines = lines_of(server.out / "metrics.jsonl")
    assert lines[-1]["epsilon"] == pytest.approx(max(spent))
    assert 7.5 < max(spent) <= 8
    assert lines[-1]["train_loss"] is None
    found: dict[str, Any] = json.loads((server.out / "run.json").read_text())
    assert found["privacy"]["unit"] == "example"
    assert found["clients"] == {}


def test_the_server_keeps_the_account_of_clients(commands: Commands, tmp_path: Path) -> None:
    rows_of_clients(tmp_path)
    options = f"{OPTIONS} --set dp=client --set noise-multiplier=4 --set clip=0.1 --set delta=0.001"
    with (
        running_server(tmp_path, options, commands=commands) as server,
        running_client(tmp_path, server, EDGES[0], tmp_path / "edge-a.jsonl"),
        running_client(tmp_path, server, EDGES[1], tmp_path / "edge-b.jsonl"),
    ):
        assert server.finish(300) == 0, server.said()
    events = [entry["event"] for entry in lines_of(server.out / "journal.jsonl")]
    assert [event for event in events if event in ("privacy", "committed")] == [
        *("privacy", "committed"),
        *("privacy", "committed"),
    ]
    lines = lines_of(server.out / "metrics.jsonl")
    assert lines[-1]["epsilon"] == pytest.approx(accounting.gaussian_epsilon(2**0.5 / 4, 1e-3))
    assert all(line["client_loss"] == {} for line in lines)
    assert not list(tmp_path.glob("state-*/ledger.jsonl"))


def test_a_device_with_a_limit_does_not_train_without_noise(
    commands: Commands, tmp_path: Path
) -> None:
    """Its owner's word stands above what a server asks for."""
    rows_of_clients(tmp_path)
    with (
        running_server(tmp_path, OPTIONS, commands=commands) as server,
        running_client(tmp_path, server, EDGES[0], tmp_path / "edge-a.jsonl", "--epsilon 4"),
        running_client(tmp_path, server, EDGES[1], tmp_path / "edge-b.jsonl", "--epsilon 4"),
    ):
        wait_for(lambda: "valid update" in server.said(), 240, server.log)
        assert server.finish(120) == 1
    assert "dp=example" in server.said()
