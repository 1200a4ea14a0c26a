"""`corolla simulate` as a user runs it; its artefacts checked with peft, torch and json."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.embedded.assets import asset

TINY = "--clients 5 --cohort 3 --rounds 2 --local-steps 2 --batch-size 4".split()
QUICK = "--set threads=1 --set eval-examples=12 --set eval-client-examples=2".split()
RUNNER = CliRunner()


def simulate(folder: Path, *options: str) -> Path:
    """Run, expect success, return the folder."""
    result = RUNNER.invoke(app, ["simulate", *TINY, *QUICK, "--out", str(folder), *options])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module", params=["fedavg", "ffa_lora", "flora"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    strategy = str(request.param)
    extra = ["--keep-updates", "--strategy", strategy]
    if strategy == "flora":
        extra += ["--set", "ranks=[4,8,16]", "--set", "alphas=[8,4,64]"]
    return simulate(tmp_path_factory.mktemp(strategy) / "run", *extra)


def info(folder: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((folder / "run.json").read_text())
    return loaded


def base_model(folder: Path) -> torch.nn.Module:
    told = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "embedded"
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        asset("model"), dtype=torch.float32
    )
    return model


def effective(folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Dense effective updates of an adapter folder, by peft alone, in fp64."""
    model = PeftModel.from_pretrained(base_model(folder), str(adapter))
    return {
        name: module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def test_loss_falls_and_the_folder_holds_what_is_promised(run: Path) -> None:
    facts = info(run)
    assert facts["status"] == "done"
    assert facts["final"]["loss"] < facts["base"]["loss"]  # type: ignore[index]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    wanted = {"round", "train_loss", "eval_loss", "bytes_up", "bytes_down", "seconds", "clients"}
    assert all(wanted | {"dropped", "peak_rss"} <= line.keys() for line in lines)
    assert {"config", "versions", "model_sha256", "data_sha256", "adapter_sha256"} <= facts.keys()
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert list((run / "checkpoint").glob("round-000002.*"))


def test_plain_peft_loads_the_adapter_and_it_differs_from_the_base(run: Path) -> None:
    tuned = PeftModel.from_pretrained(base_model(run), str(run / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(str(run / "adapter"))
    ids = tokenizer("json.loads(s)\n", return_tensors="pt")
    with torch.no_grad():
        base = base_model(run).eval()(**ids).logits
        difference = float((tuned.eval()(**ids).logits - base).abs().max())
    assert difference > 1e-2
    # Factors are multiplied in another order by plain peft: a few roundings of logits of ten to 30.
    assert float(info(run)["reload_max_logit_difference"]) <= 1e-4  # type: ignore[arg-type]


def test_anyone_can_check_the_aggregation_with_peft_alone(run: Path) -> None:
    """global/round-002 is the weighted mean of the clients' effective updates, for exact ones."""
    strategy = str(info(run)["config"]["strategy"])  # type: ignore[index]
    folders = sorted((run / "updates" / "round-002").iterdir())
    assert len(folders) == 3
    weights = [json.loads((f / "update.json").read_text())["weight"] for f in folders]
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)
    deltas = [effective(run, f) for f in folders]
    after = effective(run, run / "global" / "round-002")
    off = total = 0.0
    for name, got in after.items():
        ideal = sum(w * d[name] for w, d in zip(weights, deltas, strict=True))
        off += float((got - ideal).square().sum())
        total += float(torch.as_tensor(ideal).square().sum())
    error = (off / total) ** 0.5
    if strategy == "fedavg":
        assert 1e-4 < error < 1  # averaging the factors is not averaging the products
    else:
        assert error < 1e-6
    final = effective(run, run / "adapter")
    assert all(torch.equal(final[name], after[name]) for name in after)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(
    run: Path, tmp_path: Path
) -> None:
    config = info(run)["config"]
    again = ["--strategy", str(config["strategy"])]  # type: ignore[index]
    if config["ranks"]:  # type: ignore[index]
        again += ["--set", "ranks=[4,8,16]", "--set", "alphas=[8,4,64]"]
    same = info(simulate(tmp_path / "same", *again))
    assert same["adapter_sha256"] == info(run)["adapter_sha256"]
    other = info(simulate(tmp_path / "other", *again, "--seed", "1"))
    assert other["adapter_sha256"] != info(run)["adapter_sha256"]


def test_the_report_works_without_a_network(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 4
    outside = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#]+)""", page)
    assert outside == []
    assert "<script" not in page


def test_evaluate_scores_base_and_adapter(run: Path) -> None:
    result = RUNNER.invoke(app, ["evaluate", str(run / "adapter"), "--json"])
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    assert scores["adapter"]["loss"] < scores["base"]["loss"]


def test_merged_export_is_a_plain_model_with_the_same_logits(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    result = RUNNER.invoke(
        app, ["export", str(run / "adapter"), "--to", "merged", "--out", str(target)]
    )
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(str(target), dtype=torch.float32).eval()
    tuned = PeftModel.from_pretrained(base_model(run), str(run / "adapter"))
    ids = torch.arange(40, 72)[None]
    with torch.no_grad():
        difference = (merged(input_ids=ids).logits - tuned.eval()(input_ids=ids).logits).abs()
    assert float(difference.max()) < 1e-4
    again = RUNNER.invoke(app, ["export", str(run / "adapter"), "--out", str(target)])
    assert again.exit_code == 2
    assert "not empty" in again.stderr


def test_a_classifier_is_trained_with_its_head(tmp_path: Path) -> None:
    rows = [
        {"text": f"{word} {n}", "label": label, "client_id": f"c{n % 3}"}
        for n in range(30)
        for word, label in (("open the file", "io"), ("add two numbers", "maths"))
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", str(data), "--clients", "3", "--local-steps", "8", "--lr", "5e-3"]
    folder = simulate(tmp_path / "run", *options)
    facts = info(folder)
    assert facts["final"]["accuracy"] > 0.9  # type: ignore[index]
    result = RUNNER.invoke(app, ["evaluate", str(folder / "adapter"), "--json"])
    assert json.loads(result.stdout)["adapter"]["accuracy"] > 0.9
    alone = tmp_path / "alone"  # without its run and its data, the head says how many labels
    shutil.copytree(folder / "adapter", alone)
    data.unlink()
    for adapter in (folder / "adapter", alone):
        target = tmp_path / f"merged-{adapter.name}"
        exported = RUNNER.invoke(app, ["export", str(adapter), "--out", str(target)])
        assert exported.exit_code == 0, exported.output
        merged = AutoModelForSequenceClassification.from_pretrained(str(target))
        head = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
        assert torch.equal(merged.score.weight, head)


def test_evaluate_repeats_the_run_and_follows_its_options(run: Path) -> None:
    command = ["evaluate", str(run / "adapter"), "--json"]
    scores = json.loads(RUNNER.invoke(app, command).stdout)
    assert scores["adapter"] == pytest.approx(info(run)["final"], rel=1e-5)
    short = json.loads(RUNNER.invoke(app, [*command, "--set", "max-length=48"]).stdout)
    assert short["base"]["targets"] < scores["base"]["targets"]


def test_a_strategy_in_the_current_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_here.py").write_text(
        "from corolla.strategies.fedavg import FedAvg\nclass Mine(FedAvg):\n    pass\n"
    )
    (tmp_path / "broken_here.py").write_text("class Mine(\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    simulate(tmp_path / "run", "--strategy", "mine_here:Mine", "--rounds", "1")
    broken = RUNNER.invoke(app, ["simulate", "--strategy", "broken_here:Mine"])
    assert broken.exit_code == 2
    assert "cannot import" in broken.stderr


def test_warnings_change_the_exit_code_where_that_is_asked_for(
    tiny_model: Path, federation_file: Path, tmp_path: Path
) -> None:
    """Of a setting that is not read; the run is the same."""
    small = ["--model", str(tiny_model), "--data", str(federation_file), "--rounds", "1"]
    small += ["--local-steps", "1", "--cohort", "2", *QUICK, "--set", "max-length=48"]
    for name, more, code in (
        ("told", ["--set", "eps=0.1"], 0),
        ("strict", ["--set", "eps=0.1", "--fail-on-warning"], 1),
        ("silent", ["--fail-on-warning"], 0),
    ):
        result = RUNNER.invoke(app, ["simulate", *small, *more, "--out", str(tmp_path / name)])
        assert result.exit_code == code, result.output
        said = "warning: eps=0.1 has no effect (it is for zeroth-order clients"
        assert result.output.count(said) == (name != "silent")
        assert (tmp_path / name / "adapter").is_dir()
    found = [info(tmp_path / name)["adapter_sha256"] for name in ("told", "strict", "silent")]
    assert len(set(found)) == 1
    (warning,) = json.loads((tmp_path / "told" / "run.json").read_text())["warnings"]
    assert warning.keys() == {"id", "text", "numbers"}
    assert warning["id"] == "no_effect"
