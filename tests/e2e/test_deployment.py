"""The whole federation on loopback, over TLS with keys: it ends in the simulation's adapter.

A server, two clients and a gateway with eight phones; the same ten clients simulated in one
process from the same rows and seed. Every hash must be the same.
"""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from corolla.embedded.assets import asset
from tests.e2e.federation import running_client, running_server
from tests.e2e.forked import Commands
from tests.e2e.gateways import running_gateway, running_phones, wait_for

pytestmark = pytest.mark.deployment

EDGES = ["edge-a", "edge-b"]
PHONES = [f"p{number}" for number in range(1, 9)]
CLIENTS = [*EDGES, *(f"gate/{phone}" for phone in PHONES)]
ROUNDS = 5


def rows_of_clients(folder: Path) -> Path:
    """The first rows of the embedded data set, dealt to ten clients; one file each, and one of all.

    Returns the file of all.
    """
    own: dict[str, list[dict[str, Any]]] = defaultdict(list)
    lines = asset("data.jsonl").read_text(encoding="utf-8").splitlines()[:160]
    for number, line in enumerate(lines):
        row = json.loads(line)
        row["client_id"] = CLIENTS[number % len(CLIENTS)]
        own[row["client_id"]].append(row)
    for client, rows in own.items():
        write(folder / f"{client.replace('/', '-')}.jsonl", rows)
    everything = folder / "all.jsonl"
    write(everything, [row for rows in own.values() for row in rows])
    return everything


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("strategy", ["flora", "seed_pool"])
def test_a_real_federation_ends_in_the_adapter_of_the_simulation(
    strategy: str, commands: Commands, tmp_path: Path
) -> None:
    everything = rows_of_clients(tmp_path)
    options = (
        f"--strategy {strategy} --data {everything} --rounds {ROUNDS} --cohort {len(CLIENTS)} "
        "--local-steps 2 --batch-size 4 --set threads=1 --set eval-examples=8 "
        "--set eval-clients=0 --set max-length=64 --set quorum=1"
    )
    simulated = tmp_path / "simulated"
    commands.run("simulate", *options.split(), "--out", str(simulated), folder=tmp_path)
    expected = json.loads((simulated / "run.json").read_text())
    more = "--min-clients 3 --set deadline=120 --set wait=300"
    with running_server(tmp_path, f"{options} {more}", commands=commands) as server:
        gateway = running_gateway(tmp_path, server, "gate", seats=len(PHONES))
        with (
            running_client(tmp_path, server, EDGES[0], tmp_path / "edge-a.jsonl"),
            running_client(tmp_path, server, EDGES[1], tmp_path / "edge-b.jsonl"),
            gateway as gate,
        ):
            files = {phone: tmp_path / f"gate-{phone}.jsonl" for phone in PHONES}
            with running_phones(tmp_path, gate, files):
                assert server.finish(600) == 0, server.said()
    found = json.loads((server.out / "run.json").read_text())
    assert found["status"] == "done"
    assert found["num_clients"] == len(EDGES) + 1
    assert found["state_sha256"] == expected["state_sha256"]
    assert found["adapter_sha256"] == expected["adapter_sha256"]
    lines = lines_of(server.out / "metrics.jsonl")
    assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
    assert all(line["dropped"] == 0 for line in lines)


def test_a_partition_costs_rounds_their_absentee_and_nothing_is_committed_twice(
    tmp_path: Path,
) -> None:
    """Fault 24: the SuperNode of one of two clients is stopped for longer than two deadlines.

    Its sockets stay open, nothing comes from it and nothing is read: a partition in both ways.
    """
    rows_of_clients(tmp_path)
    options = (
        "--strategy fedavg --rounds 6 --local-steps 1 --batch-size 4 --min-clients 2 "
        "--set threads=1 --set eval-examples=4 --set eval-clients=0 --set max-length=64 "
        "--set quorum=0.5 --set deadline=20 --set wait=120"
    )
    with (
        running_server(tmp_path, options) as server,
        running_client(tmp_path, server, EDGES[0], tmp_path / "edge-a.jsonl"),
        running_client(tmp_path, server, EDGES[1], tmp_path / "edge-b.jsonl"),
    ):
        wait_for(lambda: "round 1:" in server.said(), 240, server.log)
        note = json.loads((tmp_path / f"state-{EDGES[0]}" / "supernode.pid").read_text())
        cut_off = psutil.Process(note["pid"])
        cut_off.suspend()
        try:
            time.sleep(45)
        finally:
            cut_off.resume()
        assert server.finish(300) == 0, server.said()
    journal = lines_of(server.out / "journal.jsonl")
    committed = [line["round"] for line in journal if line["event"] == "committed"]
    assert committed == list(range(1, 7))
    missing = [line for line in journal if EDGES[0] in line.get("why", {})]
    assert missing
    lines = lines_of(server.out / "metrics.jsonl")
    assert all(line["seconds"] < 20 + 10 for line in lines)
