"""Differential privacy as a user asks for it: options, refusals, a kill at a release."""

import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.privacy.accounting import gaussian_epsilon
from corolla.server.runs.journal import read
from tests.e2e.forked import Commands

OPTIONS = (
    "--clients 3 --cohort 2 --rounds 2 --local-steps 1 --batch-size 2 --strategy ffa_lora "
    "--dp client --epsilon 30 --clip 0.01 --set threads=1 --set eval-examples=8 "
    "--set max-length=64"
).split()
RUNNER = CliRunner()


def test_a_server_killed_at_a_release_never_counts_it_as_nothing(
    commands: Commands, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    killed = commands.start(
        *("simulate", *OPTIONS, "--out", str(folder)),
        folder=tmp_path,
        environment={"COROLLA_FAIL_AT": "privacy:1"},
        output=tmp_path / "killed.log",
    )
    assert killed.wait() == -signal.SIGKILL
    (first,) = (entry for entry in read(folder) if entry["event"] == "privacy")
    assert not any(entry["event"] == "committed" for entry in read(folder))
    result = RUNNER.invoke(app, ["simulate", "--resume", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    releases = [entry for entry in read(folder) if entry["event"] == "privacy"]
    assert [entry["round"] for entry in releases][:2] == [1, 1]
    assert releases[0] == first
    assert releases[1]["clients"] == first["clients"], "the cohort of the journal"
    most = max(sum(name in entry["clients"] for entry in releases) for name in first["clients"])
    facts = json.loads((folder / "run.json").read_text())
    wanted = gaussian_epsilon(most**0.5 / first["noise_multiplier"], 1e-5)
    assert facts["privacy"]["epsilon"] == pytest.approx(wanted)
    assert facts["privacy"]["epsilon"] <= 30
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    shown = " ".join(result.output.split())
    assert facts["privacy"]["line"] in shown
    assert "of each client: budget epsilon 30, delta 1e-05, clip 0.01" in shown
    status = RUNNER.invoke(app, ["status", str(folder)])
    assert "of 30, to add or remove one client's updates, at delta 1e-05" in " ".join(
        status.output.split()
    )


@pytest.mark.parametrize("command", ["simulate", "plan"])
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--dp client", "dp=client needs epsilon, the budget of the run, or noise-multiplier"),
        ("--epsilon 8", "epsilon=8.0 is for dp=example or dp=client, found dp=none"),
        ("--dp clients --epsilon 8", "dp: expected one of none, example, client, found"),
        (
            "--dp client --epsilon 0",
            "epsilon: expected a number from 1e-06",
        ),
        (
            "--dp client --epsilon nan",
            "epsilon: expected a number from 1e-06",
        ),
        ("--dp client --epsilon 8 --delta 1", "delta: expected a number above 0 below 0.1"),
        ("--dp client --epsilon 8 --delta 0.09 --clients 12", "among 12 clients: set less than"),
        ("--dp client --epsilon 8 --strategy flora", "does not fit strategy flora"),
        ("--dp example --epsilon 8 --set parameters=prompt", "use parameters=lora"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    command: str, options: str, why: str, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "run")] if command == "simulate" else []
    result = RUNNER.invoke(app, [command, *options.split(), *out])
    assert result.exit_code == 2
    assert why in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
