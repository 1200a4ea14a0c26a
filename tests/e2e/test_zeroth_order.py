"""Zeroth-order strategies as a user runs them; artefacts checked with transformers and peft."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.config.run import RunConfig
from corolla.directions import seedlog, signs
from corolla.server.runs import checkpoint, run
from corolla.server.runs.run import Run
from corolla.server.runs.setup import set_up
from corolla.types import Payload
from tests.e2e.forked import Commands

Settings = Callable[..., RunConfig]
RUNNER = CliRunner()
OPTIONS = "--rounds 3 --cohort 3 --local-steps 4 --batch-size 4 --rank 2"
QUICK = "--set threads=1 --set eval-examples=6 --set eval-client-examples=2 --set max-length=48"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No charts: most of the time of a tiny run."""
    monkeypatch.setattr(run, "write_report", lambda path, info, lines: None)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path, federation_file: Path) -> list[str]:
    given = ["--model", str(tiny_model), "--data", str(federation_file)]
    return [*OPTIONS.split(), *QUICK.split(), *given]


def simulate(folder: Path, *options: str) -> dict[str, Any]:
    """Run, expect success, return what run.json says."""
    result = RUNNER.invoke(app, ["simulate", *options, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    facts: dict[str, Any] = json.loads((folder / "run.json").read_text())
    assert facts["status"] == "done"
    return facts


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder: Path) -> Payload:
    found = checkpoint.load(folder / "checkpoint")
    assert found is not None
    return found.state


FULL = ["--set", "parameters=full"]
SMALL = ["--set", "seed_pool.size=64", "--strategy", "seed_pool"]
KSEED = ["--set", "fedkseed.size=8", "--strategy", "fedkseed"]
SIGNED = ["--set", "fedkseed.directions=sign"]


@pytest.mark.parametrize("strategy", [SMALL, KSEED], ids=["seed_pool", "fedkseed"])
@pytest.mark.parametrize("space", [[], FULL], ids=["lora", "full"])
def test_a_run_ends_in_a_model_that_others_load(
    strategy: list[str], space: list[str], tiny: list[str], tmp_path: Path, tiny_model: Path
) -> None:
    facts = simulate(tmp_path / "run", *tiny, *strategy, *space)
    found = lines(tmp_path / "run")
    assert [line["round"] for line in found] == [1, 2, 3]
    for line in found:
        assert line["scalars"] == 3 * 4
        assert line["skipped_scalars"] == 0
        assert line["bytes_up"] <= line["formula_up"]
        assert line["bytes_down"] <= line["formula_down"]
        assert line["dropped"] == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(40, 64)[None]
    with torch.no_grad():
        before = base.eval()(input_ids=ids).logits
        if space:
            assert not (tmp_path / "run" / "adapter").exists()
            folder = tmp_path / "run" / "model"
            tuned = AutoModelForCausalLM.from_pretrained(folder)
        else:
            assert not (tmp_path / "run" / "model").exists()
            folder = tmp_path / "run" / "adapter"
            tuned = PeftModel.from_pretrained(base, str(folder))
        assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"]
        assert not torch.equal(tuned.eval()(input_ids=ids).logits, before)
    assert facts["reload_max_logit_difference"] <= 1e-5


def dense(rows: Payload, size: int, count: int) -> Tensor:
    """Σ over rounds and directions, one at a time, from the definition."""
    total = torch.zeros(count, dtype=torch.float64)
    seed = int(rows["key"]["seed"])
    index = torch.arange(count)
    for round, row in seedlog.rows(rows).items():
        signed = torch.from_numpy(signs.signs((seed, round), 0, count)).double()
        for k in range(size):
            bits = index & k
            odd = sum((bits >> b) & 1 for b in range(16)) % 2
            total += float(row["step"]) * float(row["scalars"][k]) * signed * (1 - 2 * odd)
    return total


def test_the_saved_model_is_the_base_and_the_log(
    tiny: list[str], tmp_path: Path, tiny_model: Path
) -> None:
    """Anyone can rebuild it: base weights plus the rows of the checkpoint, densely."""
    simulate(tmp_path / "run", *tiny, *SMALL, *FULL, "--lr", "1e-4")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    start, end = (
        torch.cat([p.detach().reshape(-1).double() for _, p in sorted(m.named_parameters())])
        for m in (base, tuned)
    )
    log = state(tmp_path / "run")
    assert sorted(log) == ["key", "log-000001", "log-000002", "log-000003", "start"]
    assert log["start"] == {}
    wanted = dense(log, 64, len(start))
    assert float((end - start - wanted).norm() / wanted.norm()) < 1e-4  # of small steps in fp32
    assert float((end - start - wanted).norm() / start.norm()) < 1e-7


def test_the_same_seed_gives_the_same_model_and_another_seed_another(
    tiny: list[str], tmp_path: Path
) -> None:
    found = {
        name: simulate(tmp_path / name, *tiny, *SMALL, *FULL, "--rounds", "2", *more)
        for name, more in (("one", []), ("same", []), ("other", ["--seed", "1", "--rounds", "1"]))
    }
    assert found["one"]["adapter_sha256"] == found["same"]["adapter_sha256"]
    assert found["one"]["state_sha256"] == found["same"]["state_sha256"]
    assert found["one"]["adapter_sha256"] != found["other"]["adapter_sha256"]


def test_training_lowers_the_loss(tiny: list[str], tmp_path: Path) -> None:
    longer = ["--local-steps", "60", "--lr", "1e-3", "--rounds", "1"]
    facts = simulate(tmp_path / "run", *tiny, *SMALL, *FULL, *longer)
    assert facts["final"]["loss"] < facts["base"]["loss"] - 0.05


@pytest.mark.parametrize(
    "options",
    [
        [*SMALL, *FULL],
        SMALL,
        [*KSEED, *SIGNED, *FULL],
        ["--strategy", "ferret", "--set", "ferret.size=64"],
    ],
    ids=["seed_pool-full", "seed_pool", "fedkseed-full", "ferret"],
)
def test_an_interrupted_run_ends_in_the_same_model(
    options: list[str], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = simulate(tmp_path / "whole", *tiny, *options)
    commit = Run._commit

    def interrupted(self: Run, at: Any, *rest: Any) -> None:
        commit(self, at, *rest)
        if at.round == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_commit", interrupted)
        out = ["--out", str(tmp_path / "run")]
        result = RUNNER.invoke(app, ["simulate", *tiny, *options, *out])
    assert result.exit_code == 1
    assert "go on with --resume" in result.stderr
    facts = simulate(tmp_path / "run", "--resume")
    assert facts["adapter_sha256"] == wanted["adapter_sha256"]
    assert facts["state_sha256"] == wanted["state_sha256"]
    # Asked again from nothing: what a new process receives is the log so far.
    assert [line["round"] for line in lines(tmp_path / "run")] == [1, 2, 3]


def test_a_killed_run_ends_in_the_same_model(
    commands: Commands, tiny: list[str], tmp_path: Path
) -> None:
    options = [*tiny, *SMALL, "--local-steps", "20"]
    wanted = simulate(tmp_path / "whole", *options)
    folder, log = tmp_path / "run", tmp_path / "killed.log"
    process = commands.start(
        *("simulate", *options, "--out", str(folder)), folder=tmp_path, output=log
    )
    deadline = time.monotonic() + 300
    while not (folder / "checkpoint" / "round-000001.json").exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "adapter").exists()
    facts = simulate(folder, "--resume")
    assert facts["adapter_sha256"] == wanted["adapter_sha256"]


def test_mixed_classes_train_together(tiny: list[str], tmp_path: Path) -> None:
    options = ["--strategy", "mixed", "--set", "mixed.size=256", "--lr", "1e-2", "--cohort", "4"]
    classes = ["--set", "classes.pc.trainer=first_order", "--set", "classes.phone.queries=2"]
    classes += ["--set", "classes.phone.trainer=zeroth_order", "--set", "classes.phone.lr=1e-3"]
    facts = simulate(tmp_path / "run", *tiny, *options, *classes)
    assert facts["final"]["loss"] < facts["base"]["loss"]
    for line in lines(tmp_path / "run"):
        assert line["scalars"] == 2 * 2 * 4
        assert line["first_order_share"] + line["zeroth_order_share"] == pytest.approx(1)
        assert line["bytes_up"] == line["formula_up"]
        assert line["bytes_down"] == line["formula_down"]


@pytest.mark.deployment
def test_both_engines_give_the_same_model(
    commands: Commands, tiny: list[str], tmp_path: Path
) -> None:
    options = [*tiny, *SMALL, "--rounds", "2"]
    ours = simulate(tmp_path / "a", *options)
    more = ["--engine", "flower", "--out", str(tmp_path / "b")]
    commands.run("simulate", *options, *more, folder=tmp_path)
    flower = json.loads((tmp_path / "b" / "run.json").read_text())
    assert flower["adapter_sha256"] == ours["adapter_sha256"]
    assert flower["state_sha256"] == ours["state_sha256"]
    assert (flower["bytes_up"], flower["bytes_down"]) == (ours["bytes_up"], ours["bytes_down"])


# Perturbations that are too small


def warnings(settings: Settings, **changes: Any) -> list[str]:
    config = settings(**{"strategy": "seed_pool", "eps": 1e-3, **changes})
    told = set_up(config, None).facts["warnings"]
    found: list[str] = [warning["text"] for warning in told if warning["id"] == "eps"]
    assert not any("\n" in warning for warning in found)
    return found


@pytest.mark.parametrize("model", ["tiny", "embedded"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_perturbations_below_rounding_are_warned_of(
    settings: Settings, model: str, dtype: str
) -> None:
    changes = {"dtype": dtype, **({"model": model} if model == "embedded" else {})}
    unmoved, slopes = warnings(settings, **changes, parameters="full", eps=1e-5)
    part = re.search(r"eps=1e-05 leaves (\d+)% of the (\w+) weights as they are", unmoved)
    assert part and 50 < int(part[1]) <= 100
    assert part[2] == dtype
    numbers = re.search(
        r"at eps=1e-05 and at 2 eps differ by (\S+), and are of size (\S+), so", slopes
    )
    assert numbers and float(numbers[1]) > float(numbers[2]) / 2 > 0
    assert warnings(settings, **changes, parameters="full") == []
    (alone,) = warnings(settings, **changes, eps=1e-5)  # factors are in single precision
    assert alone.startswith("slopes measured at eps=1e-05")


@pytest.mark.parametrize("space", ["lora", "full"])
def test_single_precision_is_warned_of_only_where_it_is_lost(
    settings: Settings, space: str
) -> None:
    for eps in (1e-3, 1e-4, 9e-5):
        assert warnings(settings, parameters=space, eps=eps) == []
    for eps in (1e-8, 1e-12):
        assert any(f"eps={eps:g}" in said for said in warnings(settings, parameters=space, eps=eps))


def test_only_classes_that_perturb_are_looked_at(settings: Settings) -> None:
    classes = {"pc": {"eps": 1e-9}, "phone": {"trainer": "zeroth_order", "eps": 1e-8}}
    (said,) = warnings(settings, strategy="mixed", classes=classes)
    assert "eps=1e-08" in said
    assert warnings(settings, strategy="fedavg", eps=1e-9) == []


def test_a_user_sees_the_warning(tiny: list[str], tmp_path: Path) -> None:
    options = [*tiny, *SMALL, *FULL, "--set", "dtype=bfloat16", "--rounds", "1"]
    command = ["simulate", *options, "--set", "eps=1e-5", "--out", str(tmp_path / "run")]
    result = RUNNER.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "of the bfloat16 weights as they are" in result.output
    assert "slopes measured at eps=1e-05" in result.output
    told = json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]
    assert len([warning for warning in told if warning["id"] == "eps"]) == 2


# Mistakes


POOL = ["--strategy", "seed_pool"]
PHONES = ["--set", "classes.pc.share=1", "--set", "classes.phone.trainer=zeroth_order"]
MISTAKES = [
    ([*POOL, "--set", "seed_pool.size=500"], "power of two"),
    ([*POOL, "--set", "seed_pool.size=0"], "power of two"),
    ([*POOL, "--set", "seed_pool.size=131072"], "power of two"),
    ([*POOL, "--set", "seed_pool.scalars=fp8"], "fp16 or fp32"),
    ([*POOL, "--set", "seed_pool.scalers=fp16"], "did you mean 'scalars'"),
    (["--strategy", "fedkseed", "--set", "fedkseed.directions=uniform"], "gaussian or sign"),
    (["--strategy", "fedkseed_pro", "--set", "fedkseed_pro.size=3"], "power of two"),
    (["--strategy", "ferret", "--set", "ferret.server_lr=0"], "more than 0"),
    (["--strategy", "mixed", "--set", "mixed.weights=equal"], "examples or inverse_variance"),
    (["--strategy", "fedmezo", "--set", "fedmezo.interval=0"], "from 1"),
    ([*POOL, "--set", "eps=0"], "eps"),
    ([*POOL, "--set", "eps=-1e-3"], "eps"),
    ([*POOL, "--set", "queries=0"], "queries"),
    ([*POOL, "--set", "estimator=one_sided"], "estimator"),
    ([*POOL, "--set", "local-epochs=1"], "use local-steps"),
    ([*POOL, "--set", "queries=20000"], "more than the 65536 scalars"),
    (["--strategy", "mixed"], "needs classes of clients with trainers"),
    (["--strategy", "mixed", "--set", "classes.pc.share=2"], "found first_order"),
    (["--strategy", "mixed", *PHONES, "--set", "local-epochs=1"], "use local-steps"),
    (["--strategy", "mixed", *PHONES, "--set", "classes.phone.queries=20000"], "65536 scalars"),
    (["--set", "parameters=some"], "parameters"),
    (["--strategy", "flora", *FULL], "flora trains LoRA factors, found parameters=full"),
    (["--strategy", "ferret", *FULL], "ferret trains LoRA factors, found parameters=full"),
    (["--strategy", "mixed", *FULL], "mixed trains LoRA factors, found parameters=full"),
    ([*POOL, *FULL, "--set", "quantization=8bit"], "cannot train a base in 8bit"),
    ([*POOL, *FULL, "--set", "quantization=4bit"], "cannot train a base in 4bit"),
    ([*POOL, *FULL, "--set", "ranks=[4]"], "ranks"),
    ([*POOL, *FULL, "--keep-updates"], "parameters=full has none"),
    ([*POOL, "--set", "ranks=[4,8]"], "needs one rank"),
    ([*POOL, "--set", "classes.phone.trainer=first_order"], "train with zeroth_order"),
    (["--set", "classes.phone.trainer=zeroth_order"], "train with first_order"),
    (["--strategy", "mixed", "--set", "classes.phone.trainer=second_order"], "trainer"),
    (["--strategy", "mixed", *PHONES, "--set", "classes.phone.rank=3"], "needs one rank"),
    (["--strategy", "mixed", "--set", "classes.phone=3"], "classes.NAME.KEY=value"),
    (["--strategy", "mixed", "--set", "classes.phone.share=0"], "share"),
]


@pytest.mark.parametrize(("options", "says"), MISTAKES, ids=lambda v: str(v)[:60])
def test_a_mistake_is_one_line(
    options: list[str], says: str, tiny: list[str], tmp_path: Path
) -> None:
    result = RUNNER.invoke(app, ["simulate", *tiny, *options, "--out", str(tmp_path / "run")])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    said = [line for line in result.stderr.splitlines() if line.strip()]
    assert (result.exit_code, len(said)) == (2, 1), result.output
    assert says in said[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("space", [[], FULL], ids=["lora", "full"])
def test_a_loss_that_is_not_finite_ends_the_run(
    space: list[str], tiny: list[str], tmp_path: Path
) -> None:
    options = [*POOL, *space, "--lr", "1e6", "--set", "dtype=float16"]
    result = RUNNER.invoke(app, ["simulate", *tiny, *options, "--out", str(tmp_path / "run")])
    said = [line for line in result.stderr.splitlines() if line.strip()]
    assert (result.exit_code, len(said)) == (1, 1), result.output
    assert "lower lr" in said[0] or "beyond 1e+06" in said[0]
    assert list(tmp_path.iterdir()) == []
