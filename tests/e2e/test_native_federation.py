"""Native phones in a real federation on loopback: two backpropagate, two run forward passes.

A server, a gateway with four `corolla-phone` processes, of which two have a base of 4 bits, and a
`corolla client`. What the phones sent is then taken by a simulation of the same five clients.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.client.training.worker import Worker
from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.embedded.assets import asset
from corolla.models.files.adapter_files import read_adapter
from corolla.server.runs.observer import Silent
from corolla.server.runs.run import Run
from corolla.server.runs.setup import set_up
from corolla.storage.memory import Memory
from corolla.wire import codec
from corolla.wire.messages import unpack_reply
from corolla.wire.packet import Packet
from tests.bundles import small_bundle
from tests.client.native.conftest import built
from tests.e2e import native
from tests.e2e.federation import running_client, running_server
from tests.e2e.forked import Commands
from tests.e2e.gateways import running_gateway
from tests.e2e.native import Recorded
from tests.e2e.test_deployment import lines_of, write

pytestmark = pytest.mark.deployment


@pytest.fixture(scope="module")
def native_build() -> Path:
    """Where corolla-phone is."""
    return built()


FULL, LIGHT = ("p1", "p2"), ("p3", "p4")
CLIENTS = ["edge-a", *(f"gate/{phone}" for phone in (*FULL, *LIGHT))]
ROUNDS = 5


def rows(folder: Path) -> Path:
    """Rows of the embedded data set, dealt to five clients; the edge's own file beside them."""
    lines = asset("data.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    own = [{**json.loads(line), "client_id": CLIENTS[i % 5]} for i, line in enumerate(lines)]
    write(folder / "all.jsonl", own)
    write(folder / "edge-a.jsonl", [row for row in own if row["client_id"] == "edge-a"])
    return folder / "all.jsonl"


def options(model: str, data: Path, rank: int) -> str:
    classes = (
        "--set classes.full.trainer=first_order --set classes.full.share=3 "
        "--set classes.light.trainer=zeroth_order --set classes.light.share=2 "
        "--set classes.light.local-steps=4"
    )
    return (
        f"--strategy mixed {classes} --model {model} --data {data} --rounds {ROUNDS} --cohort 5 "
        f"--rank {rank} --local-steps 2 --batch-size 4 --set threads=1 --set eval-examples=8 "
        "--set eval-clients=0 --set max-length=48 --set quorum=1"
    )


def configured(text: str) -> RunConfig:
    """The config of a command line."""
    words, settings, values = text.split(), list[str](), dict[str, Any]()
    for key, value in zip(words[::2], words[1::2], strict=True):
        if key == "--set":
            settings.append(value)
        else:
            values[key[2:].replace("-", "_")] = value
    return load(None, values, settings)


def simulated(config: RunConfig, folder: Path, sent: Mapping[tuple[str, int], Packet]) -> str:
    """The hash of the final state of a simulation in which some clients answer `sent`."""
    folder.mkdir()
    loaded = set_up(config, None)
    worker = Worker(config, loaded.model, loaded.data, Memory(folder / "memory"))
    network = Recorded(worker, sent)
    run = Run(
        *(config, loaded.strategy, network, loaded.evaluator),
        *(folder, loaded.facts, Silent()),
    )
    run.execute()
    return str(json.loads((folder / "run.json").read_text())["state_sha256"])


def test_native_phones_of_both_kinds_and_a_python_client_end_in_one_adapter(
    commands: Commands, tmp_path: Path, native_build: Path
) -> None:
    model, bundle, publisher = small_bundle()
    rank = json.loads((bundle / "manifest.json").read_text())["rank"]
    text = options(model, rows(tmp_path), rank)
    config = configured(text)
    files = {f"gate/{phone}": tmp_path / f"{phone}.tokens" for phone in (*FULL, *LIGHT)}
    native.write_tokens(config, files)
    served = f"{text} --min-clients 2 --set deadline=120 --set wait=300"
    share = f"--share-bundle {bundle}"
    with (
        running_server(tmp_path, served, commands=commands) as server,
        running_client(tmp_path, server, "edge-a", tmp_path / "edge-a.jsonl", f"--model {model}"),
        running_gateway(tmp_path, server, "gate", seats=4, options=share) as gate,
    ):
        natives = {
            phone: [
                *native.command(
                    native_build, tmp_path, gate, publisher, phone, files[f"gate/{phone}"]
                ),
                *("--methods", "grad" if phone in FULL else "loss"),
            ]
            for phone in (*FULL, *LIGHT)
        }
        with native.running_natives(tmp_path, natives) as phones:
            assert server.finish(600) == 0, server.said() + gate.log.read_text()
            noted = {device: phone.rounds() for device, phone in phones.items()}
            kept = {
                (f"gate/{device}", round): phone.kept(round)
                for device, phone in phones.items()
                for round in range(1, ROUNDS + 1)
            }
    found = json.loads((server.out / "run.json").read_text())
    assert all(line["dropped"] == 0 for line in lines_of(server.out / "metrics.jsonl"))
    programs = {device: lines[0]["program"] for device, lines in noted.items()}
    assert programs == {"p1": "fp32", "p2": "fp32", "p3": "q4", "p4": "q4"}
    for round in range(ROUNDS):  # the same adapter at the start of each round
        hashes = {lines[round]["adapter_sha256"] for lines in noted.values()}
        assert len(hashes) == 1

    # The server's state from what was sent, bit for bit.
    assert simulated(config, tmp_path / "same", kept) == found["state_sha256"]
    # With Python's backpropagation in place of the phones', nearly so.
    scalars = {key: packet for key, packet in kept.items() if key[0].endswith(LIGHT)}
    assert all(unpack_reply(packet, 0).scalars for packet in scalars.values())
    simulated(config, tmp_path / "python", scalars)
    real, python = (
        read_adapter(folder / "adapter")[0] for folder in (server.out, tmp_path / "python")
    )
    assert real.keys() == python.keys()
    for name, tensor in real.items():
        torch.testing.assert_close(tensor, python[name], rtol=0, atol=1e-4)
    assert codec.content_id(real)
