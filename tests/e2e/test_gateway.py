"""`corolla gateway` and `corolla phone` as users start them: a round trip, and what is refused."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.embedded.assets import asset
from corolla.host import certificates
from tests.e2e.federation import running_server
from tests.e2e.forked import Commands
from tests.e2e.gateways import running_gateway, running_phones, wait_for
from tests.server.gateway import gateways

PHONES = ("p1", "p2")
RUN = (
    "--strategy fedavg --rounds 2 --cohort 2 --local-steps 2 --batch-size 4 --set max-length=64 "
    "--set threads=1 --set eval-examples=8 --set eval-clients=0 --set quorum=1"
)


@pytest.mark.deployment
def test_a_gateway_is_a_member_whose_phones_train_as_clients_of_their_names(
    commands: Commands,
    tmp_path: Path,
) -> None:
    lines = asset("data.jsonl").read_text(encoding="utf-8").splitlines()[:32]
    rows = [json.loads(line) for line in lines]
    files = {phone: tmp_path / f"{phone}.jsonl" for phone in PHONES}
    with (tmp_path / "all.jsonl").open("w") as everything:
        for number, phone in enumerate(PHONES):
            own = [{**row, "client_id": f"gate/{phone}"} for row in rows[number::2]]
            text = "".join(json.dumps(row) + "\n" for row in own)
            files[phone].write_text(text)
            everything.write(text)
    options = f"{RUN} --data {tmp_path / 'all.jsonl'}"
    simulated = tmp_path / "simulated"
    command = ["simulate", *options.split(), "--out", str(simulated)]
    assert run(command).exit_code == 0
    more = "--min-clients 1 --set deadline=120 --set wait=300"
    with (
        running_server(tmp_path, f"{options} {more}", commands=commands) as server,
        running_gateway(tmp_path, server, "gate", seats=2) as gate,
        running_phones(tmp_path, gate, files) as logs,
    ):
        assert server.finish(300) == 0, server.said() + gate.log.read_text()
        said = logs["p1"]
        wait_for(lambda: "round 2 as gate/p1: accepted" in said.read_text(), 30, said)
    expected, found = (
        json.loads((folder / "run.json").read_text()) for folder in (simulated, server.out)
    )
    assert found["state_sha256"] == expected["state_sha256"]


# --- one line for what a user can mend ------------------------------------------------------------


def run(arguments: list[str]) -> Result:
    """In this process: importing torch for each line would take a minute in all."""
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gateways.World]:
    folder = tmp_path_factory.mktemp("world")
    with gateways.serving(folder) as found:
        (folder / "token").write_text(gateways.TOKEN)
        (folder / "wrong").write_text("a-token-of-nobody-at-all")
        (folder / "rows.jsonl").write_text('{"text": "a b c"}\n' * 9)
        certificates.make(folder / "others", [])
        yield found


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"--token-file": "wrong"}, 2, "this gateway does not know the token"),
        ({"--root-certificates": "others/ca.pem"}, 2, "not signed by --root-certificates"),
        ({"--token-file": "none"}, 2, "No such file"),
        ({"--token-file": "rows.jsonl"}, 2, "holds no token"),
        ({"--data": "none.jsonl"}, 2, "none.jsonl"),
        ({"--name": "a/b"}, 2, "--name: a device's name has 1 to 64 characters"),
        ({"--gateway": "https://localhost"}, 2, "--gateway: expected HOST:PORT"),
        ({}, 0, "waiting: no round"),
    ],
)
def test_a_phone_says_in_one_line_what_its_owner_can_mend(
    changes: dict[str, str], code: int, words: str, world: gateways.World, tmp_path: Path
) -> None:
    options = {
        "--gateway": world.address,
        "--root-certificates": "certs/ca.pem",
        "--token-file": "token",
        "--data": "rows.jsonl",
        "--name": "p1",
        "--model": "embedded",
        "--state": str(tmp_path / "state"),
        **changes,
    }
    files = ("--root-certificates", "--token-file", "--data")
    told = [w for k, v in options.items() for w in (k, str(world.folder / v) if k in files else v)]
    done = run(["phone", *told, "--charging", "--unmetered", "--idle", "--once"])
    assert done.exit_code == code, done.stderr
    if code:
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    else:
        assert words in done.stdout


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"--listen": "taken"}, 2, "cannot serve at 127.0.0.1:"),
        ({"--tokens": "none"}, 2, "cannot read the tokens"),
        ({"--tokens": "rows.jsonl"}, 2, "rows.jsonl, line 1"),
        ({"--certificate": "none"}, 2, "No such file"),
        ({"--key": "others/server.key"}, 2, "others/server.key is not the key of"),
        ({"--certificate": "rows.jsonl"}, 2, "rows.jsonl is no certificate"),
        ({"--share-model": "others"}, 2, "is no model: it has no config.json"),
        ({"--policy": "charging,warm"}, 2, "--policy 'warm' is not known"),
        ({"--name": "a b"}, 2, "--name 'a b'"),
        ({"--listen": "9443"}, 2, "--listen: expected HOST:PORT"),
    ],
)
def test_a_gateway_says_in_one_line_what_its_owner_can_mend(
    changes: dict[str, str], code: int, words: str, world: gateways.World, tmp_path: Path
) -> None:
    options = {
        "--server": "localhost:1",
        "--listen": "127.0.0.1:0",
        "--certificate": "certs/gateway.pem",
        "--key": "certs/gateway.key",
        "--tokens": "token",
        "--name": "gate",
        "--state": str(tmp_path / "state"),
        **changes,
    }
    files = ("--certificate", "--key", "--tokens", "--share-model")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        if options["--listen"] == "taken":
            options["--listen"] = f"127.0.0.1:{other.getsockname()[1]}"
        pairs = [(k, str(world.folder / v) if k in files else v) for k, v in options.items()]
        done = run(["gateway", *(word for pair in pairs for word in pair)])
    assert done.exit_code == code, done.stdout + done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
