"""Memory depends on the model and the cohort, not on how many clients there are."""

import json
from pathlib import Path

from tests.e2e.forked import Commands


def peak_rss(commands: Commands, folder: Path, clients: int) -> int:
    """Bytes at most of a process of its own, which begins with what the imports take."""
    command = ["simulate", "--clients", str(clients)]
    command += "--cohort 20 --rounds 2 --local-steps 1 --batch-size 2 --strategy ffa_lora".split()
    command += "--set partition=iid --set threads=1 --set eval-examples=8".split()
    command += ["--set", "eval-client-examples=2", "--out", str(folder)]
    commands.run(*command, folder=folder.parent)
    facts = json.loads((folder / "run.json").read_text())
    assert facts["num_clients"] == clients
    assert facts["cohort"] == 20
    return int(facts["peak_rss"])


def test_a_thousand_clients_take_the_memory_of_a_hundred(
    commands: Commands, tmp_path: Path
) -> None:
    hundred = peak_rss(commands, tmp_path / "a", 100)
    thousand = peak_rss(commands, tmp_path / "b", 1000)
    assert thousand < 1.1 * hundred
