"""A user's mistake gets one line, exit code 1 or 2, and leaves nothing behind."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from corolla.cli.app import app

RUNNER = CliRunner()


def one_line(*options: str) -> tuple[int, str]:
    """(exit code, the error line) of a command that must fail without a traceback."""
    result = RUNNER.invoke(app, list(options))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    return result.exit_code, lines[0]


SIMULATE = [
    (["--strategy", "florra"], 2, "did you mean 'flora'"),
    (["--set", "ranc=3"], 2, "did you mean 'rank'"),
    (["--set", "rank"], 2, "expected key=value"),
    (["--set", "flora.energie=3", "--strategy", "flora"], 2, "did you mean 'energy'"),
    (["--strategy", "no.such.module:Thing"], 2, "cannot import"),
    (["--rank", "0"], 2, "rank"),
    (["--rank", "65"], 1, "rank 65 is larger than module"),
    (["--rounds", "0"], 2, "rounds"),
    (["--lr", "-1"], 2, "lr"),
    (["--engine", "spark"], 2, "engine"),
    (["--clients", "2", "--cohort", "3"], 2, "cohort 3 is larger than clients 2"),
    (["--cohort", "1000"], 2, "cohort 1000 is larger than"),
    (["--clients", "1000"], 2, "has 32"),
    (["--set", "ranks=[4,8]"], 2, "needs one rank and alpha"),
    (["--set", 'target_modules=["q_proj","nope"]'], 1, "nope match nothing"),
    (["--set", "min-examples=100000"], 1, "no clients left"),
    (["--set", "partition=dirichlet"], 2, "needs labels"),
    (["--set", "task=classify"], 2, "needs labels"),
    (["--set", "device=cuda:99"], 2, "not available"),
    (["--data", "missing.jsonl"], 1, "cannot read data file missing.jsonl"),
    (["--model", "./missing"], 1, "neither a model folder nor a .gguf file"),
    (["--model", "missing.gguf"], 1, "does not exist"),
    (["--set", "max-length=4096"], 1, "more than the 512 positions"),
    (["--config", "missing.toml"], 2, "cannot read config file"),
    (["--resume"], 2, "--resume needs --out"),
]


@pytest.mark.parametrize(("options", "code", "says"), SIMULATE, ids=lambda v: str(v)[:40])
def test_simulate(
    options: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = [] if "--resume" in options else ["--out", "run"]
    found, line = one_line("simulate", *options, *out)
    assert found == code
    assert says in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "fine"}\n{"text": \n', "line 2: not JSON"),
        ('{"text": "fine"}\n\n[1]\n', "line 3: expected an object"),
        ('{"prompt": "p"}\n', "line 1: needs both prompt and response"),
        ('{"text": 5}\n', "line 1: needs text"),
        ('{"question": "q"}\n', "found question"),
        ('{"text": "a", "split": "holdout"}\n', "unknown split 'holdout'"),
        ('{"text": "a", "label": 1}\n{"text": "b"}\n', "1 of 2 rows have a label"),
        ("", "has no rows"),
        ("\xff", "line 1: not JSON: byte 0xff is not UTF-8"),
        ("\xff\xfe{", "begins as UTF-16, but is not"),
    ],
)
def test_data_files(content: str, says: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(content.encode("latin-1"))
    code, line = one_line("simulate", "--data", str(data), "--out", str(tmp_path / "run"))
    assert code == 1
    assert says in line
    assert not (tmp_path / "run").exists()


def test_config_files(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    for content, says in (
        ("local-stepps = 3", "did you mean 'local_steps'"),
        ("[flroa]\nenergy = 3", "did you mean 'flora'"),
        ("rank = ", "is not TOML"),
        ('rank = "many"', "rank"),
    ):
        path.write_text(content)
        code, line = one_line("simulate", "--config", str(path), "--out", str(tmp_path / "run"))
        assert code == 2
        assert says in line
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    code, line = one_line("simulate", "--out", str(tmp_path))
    assert code == 2
    assert "not empty" in line
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]
    assert one_line("simulate", "--out", str(tmp_path / "precious.txt"))[0] == 2
    code, line = one_line("simulate", "--resume", "--out", str(tmp_path))
    assert code == 2
    assert "nothing to resume" in line


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ["--clients", "3", "--rounds", "1", "--local-steps", "3", "--set", "eval-examples=8"]
    small += ["--set", "threads=1", "--set", "eval-clients=0"]
    code, line = one_line("simulate", *small, "--lr", "1e6", "--out", str(run))
    assert code == 1
    assert "0 of 3 clients gave a valid update" in line
    assert "lower lr" in line
    assert not run.exists()


def test_other_commands(tmp_path: Path) -> None:
    assert one_line("evaluate", str(tmp_path)) == (
        1,
        f"error: {tmp_path} is no adapter: it has no adapter_config.json",
    )
    assert one_line("export", str(tmp_path / "no"))[0] == 1
    assert one_line("check", "fedavgg")[0] == 2
    damaged = tmp_path / "adapter"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "./no"}))
    assert one_line("evaluate", str(damaged))[0] == 1
