"""The status of runs whose journals and metrics are written here by hand."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.errors import ArtefactError
from corolla.server.runs.journal import Journal
from corolla.server.runs.status import Member, print_status, status

RUNNER = CliRunner()
VERDICTS = {"ada": "accepted", "ben": "accepted", "cyd": "not_finite"}


def line(round: int, **changes: Any) -> dict[str, Any]:
    usual = {"train_loss": 3.0 - round, "eval_loss": 4.0 - round, "seconds": 1.5 * round}
    counts = {"bytes_up": 1000, "bytes_down": 2000, "clients": 2, "dropped": 1}
    return {"round": round, **usual, **counts, **changes}


def write(folder: Path, *lines: dict[str, Any]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))


def committed(journal: Journal, round: int, attempt: int = 0) -> None:
    cohort = dict.fromkeys(VERDICTS, 1)
    journal.append("planned", round=round, attempt=attempt, cohort=cohort, online=3)
    journal.append(
        "verdicts", round=round, attempt=attempt, verdicts=VERDICTS, why={"cyd": "NaN in x"}
    )
    journal.append("committed", round=round, state=f"{round:064}")


def begun(folder: Path) -> Journal:
    """A journal of a run in its second round of nine; the caller closes it."""
    journal = Journal(folder)
    roster = {"ada": 4, "ben": 5, "cyd": 6, "dot": 7}
    journal.append("started", run="the run", rounds=9, round=0, state="", roster=roster, seats={})
    committed(journal, 1)
    write(folder, line(1))
    return journal


def test_a_run_under_way(tmp_path: Path) -> None:
    with begun(tmp_path):
        found = status(tmp_path)
    assert (found.state, found.why, found.killed) == ("running", "", False)
    assert (found.run, found.round, found.rounds) == ("the run", 1, 9)
    assert (found.clients, found.online) == (4, 3)
    assert (found.bytes_up, found.bytes_down) == (1000, 2000)
    assert (found.train_loss, found.eval_loss, found.epsilon) == (2.0, 3.0, None)
    assert found.verdicts == {"accepted": 2, "not_finite": 1}
    assert found.members["cyd"] == Member(1, 0, "not_finite", "round 1: NaN in x")
    assert found.last_round_seconds == 1.5


def test_a_run_whose_process_was_killed_is_not_running(tmp_path: Path) -> None:
    begun(tmp_path).__exit__(None, None, None)
    found = status(tmp_path)
    assert (found.state, found.killed) == ("stopped", True)
    assert "--resume goes on" in found.why


def test_a_pause_lasts_until_something_happens(tmp_path: Path) -> None:
    with begun(tmp_path) as journal:
        journal.append("paused", round=2, online=1, needed=2)
        found = status(tmp_path)
        assert (found.state, found.online) == ("paused", 1)
        assert found.why == "1 clients online, 2 are needed"
        journal.append("planned", round=2, attempt=0, cohort={"ada": 1}, online=2)
        assert status(tmp_path).state == "running"
        journal.append("paused", round=2, online=0, needed=2)
    assert status(tmp_path).state == "stopped", "nobody waits any more"


@pytest.mark.parametrize("event", ["stopped", "failed", "done"])
def test_the_last_word_is_the_state(tmp_path: Path, event: Any) -> None:
    with begun(tmp_path) as journal:
        journal.append(event, why="because")
    found = status(tmp_path)
    assert (found.state, found.why, found.killed) == (event, "because", False)


def test_attempts_and_resumptions_are_counted(tmp_path: Path) -> None:
    with begun(tmp_path) as journal:
        for attempt in (0, 1):
            journal.append("planned", round=2, attempt=attempt, cohort={"ada": 1}, online=3)
            silent = {"ada": "no_answer"}
            journal.append("verdicts", round=2, attempt=attempt, verdicts=silent, why={"ada": "-"})
            journal.append("abandoned", round=2, attempt=attempt, why="nobody")
    with Journal(tmp_path) as journal:
        journal.append("resumed", run="the run", rounds=9, round=1, state="x", roster={"eve": 1})
        found = status(tmp_path)
        assert (found.abandoned, found.attempt, found.resumed, found.clients) == (2, 2, 1, 5)
        assert found.verdicts == {"accepted": 2, "no_answer": 2, "not_finite": 1}
        assert found.members["ada"] == Member(3, 1, "no_answer", "round 2: -")


def test_metrics_of_a_round_that_was_not_committed_do_not_count(tmp_path: Path) -> None:
    with begun(tmp_path):
        write(tmp_path, line(1), line(2))
        found = status(tmp_path)
    assert (found.bytes_up, len(found.lines)) == (1000, 1)


def test_what_is_spent_counts_before_its_round_is_committed(tmp_path: Path) -> None:
    with begun(tmp_path) as journal:
        write(tmp_path, line(1, epsilon=0.5))
        assert status(tmp_path).epsilon == 0.5
        journal.append("privacy", round=2, epsilon=0.75)
        assert status(tmp_path).epsilon == 0.75


def test_a_round_without_an_evaluation_keeps_the_last_loss(tmp_path: Path) -> None:
    with begun(tmp_path) as journal:
        committed(journal, 2)
        write(tmp_path, line(1), line(2, eval_loss=None))
        assert status(tmp_path).eval_loss == 3.0


def test_no_metrics_yet_is_no_mistake(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append("started", run="r", rounds=3, round=0, state="", roster={"ada": 1})
        found = status(tmp_path)
    assert (found.round, found.bytes_up, found.eval_loss, found.lines) == (0, 0, None, [])


@pytest.mark.parametrize("content", ["{", "[]\n", '{"round": 1}\n', "\xff"])
def test_damaged_metrics_are_said(tmp_path: Path, content: str) -> None:
    with begun(tmp_path):
        (tmp_path / "metrics.jsonl").write_bytes(content.encode("latin-1"))
        with pytest.raises(ArtefactError, match=r"metrics\.jsonl is damaged"):
            status(tmp_path)


def test_a_folder_without_a_run_is_said_in_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        result = RUNNER.invoke(app, ["status", str(folder)])
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 1
        assert "no run has begun in" in result.stderr


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    with begun(tmp_path) as journal:
        journal.append("privacy", round=1, epsilon=1.25)
        result = RUNNER.invoke(app, ["status", str(tmp_path)], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    shown = result.stdout
    for part in ("running", "1 of 9", "2 accepted, 1 not_finite", "1.0 KB", "1.25", "NaN in x"):
        assert part in shown, part


def test_names_and_reasons_cannot_draw_on_the_terminal(tmp_path: Path) -> None:
    with begun(tmp_path) as journal:
        hostile = "[red]x[/]\x1b[2J"
        journal.append(
            "verdicts", round=2, attempt=0, verdicts={hostile: "form"}, why={hostile: hostile}
        )
        console = Console(record=True, width=200, force_terminal=False)
        print_status(console, status(tmp_path))
    shown = console.export_text()
    assert "[red]x[/]" in shown
    assert "\x1b" not in shown


def test_the_json_is_complete(tmp_path: Path) -> None:
    with begun(tmp_path):
        result = RUNNER.invoke(app, ["status", str(tmp_path), "--json"])
    found = json.loads(result.stdout)
    assert found["state"] == "running"
    assert found["verdicts"] == {"accepted": 2, "not_finite": 1}
    assert found["lines"] == [line(1)]
    assert found["members"]["cyd"]["why"] == "round 1: NaN in x"


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_of_protected_clients_no_reasons_are_told(tmp_path: Path, sampling: str) -> None:
    promised = {"unit": "client", "sampling": sampling, "delta": 1e-6, "budget": 8.0}
    with Journal(tmp_path) as journal:
        facts = {"roster": dict.fromkeys(VERDICTS, 4), "seats": {}, "privacy": promised}
        journal.append("started", run="r", rounds=9, round=0, state="", **facts)
        committed(journal, 1)
        own = line(1)
        if sampling == "poisson":
            del own["dropped"]
        write(tmp_path, own)
        found = status(tmp_path)
    console = Console(width=200, record=True, file=io.StringIO())
    print_status(console, found)
    shown = console.export_text()
    assert "NaN" not in shown and "not_finite" not in shown
    if sampling == "poisson":
        assert (found.verdicts, found.members) == ({}, {})
        assert "not told" in shown
        assert "cyd" not in shown
    else:
        assert found.verdicts == {"accepted": 2, "refused": 1}
        assert found.members["cyd"].last == "refused"


def test_what_is_spent_of_a_privacy_budget(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        promised: dict[str, object] = {"unit": "client", "delta": 1e-6, "budget": 8.0}
        promised["neighbours"] = "add or remove one client's updates"
        journal.append(
            "started", run="r", rounds=9, round=0, state="", roster={"ada": 4}, privacy=promised
        )
        found = status(tmp_path)
        assert (found.unit, found.delta, found.budget, found.epsilon) == ("client", 1e-6, 8.0, None)
        journal.append("privacy", round=1, attempt=0, unit="client", epsilon=3.25, clients=["ada"])
    found = status(tmp_path)
    assert found.epsilon == 3.25, "also of a round that was not committed"
    console = Console(width=200, record=True, file=io.StringIO())
    print_status(console, found)
    assert (
        "3.25 of 8, to add or remove one client's updates, at delta 1e-06" in console.export_text()
    )
