"""lm-evaluation-harness on a task of our own, without a network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.config.run import RunConfig
from corolla.errors import ConfigError, DataError
from corolla.evaluation import harness
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.types import Adapter

Settings = Callable[..., RunConfig]
ROWS = [
    {"prompt": f"pick {i}", "choices": [f"the {i}", f"a longer {i}", "no"], "answer": i % 3}
    for i in range(6)
]
INSTALLED = pytest.importorskip("lm_eval", reason="needs the extra corolla[evaluation]")

# what the harness imports and leaves open
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A multiple-choice task in two files."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "pick.yaml"
    files = {"data_files": {"test": str(rows)}, "cache_dir": str(tmp_path / "cache")}
    path.write_text(
        f"task: pick\ndataset_path: json\ndataset_kwargs: {json.dumps(files)}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{prompt}}"\n'
        'doc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: "\\n"\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    return path


@pytest.fixture
def adapter(settings: Settings, tmp_path: Path) -> Path:
    """An adapter that changes much."""
    model = LoraModel(pretrained.load(settings()))
    noise = torch.Generator().manual_seed(0)
    start = model.init(settings().lora, 0)
    tuned = {name: torch.randn(t.shape, generator=noise) for name, t in start.items()}
    folder = tmp_path / "adapter"
    model.save(folder, Adapter(tuned), settings().lora)
    model.base.tokenizer.save_pretrained(str(folder))
    return folder


def accuracy(model: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[bool, bool]:
    """(right, right by the norm) of one row, by transformers alone."""
    sums = []
    for choice in row["choices"]:
        before, after = (list(tokenizer(t)["input_ids"]) for t in (row["prompt"], "\n" + choice))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([before + after])).logits[0]
        spoken = torch.log_softmax(logits.double(), -1)[len(before) - 1 : -1]
        sums.append(float(spoken[range(len(after)), after].sum()))
    norms = [s / len(c) for s, c in zip(sums, row["choices"], strict=True)]
    return sums.index(max(sums)) == row["answer"], norms.index(max(norms)) == row["answer"]


def test_a_task_of_ones_own_is_scored(task: Path, settings: Settings) -> None:
    base = pretrained.load(settings())
    before = torch.get_rng_state()
    found = harness.run(base.model, base, harness.load([str(task)]))
    right = [accuracy(base.model, base.tokenizer, row) for row in ROWS]
    assert found["pick/acc"] == pytest.approx(sum(a for a, _ in right) / 6)
    assert found["pick/acc_norm"] == pytest.approx(sum(b for _, b in right) / 6)
    assert found.keys() == {f"pick/{m}{e}" for m in ("acc", "acc_norm") for e in ("", "_stderr")}
    assert torch.equal(torch.get_rng_state(), before)


def test_base_and_adapter_side_by_side(task: Path, adapter: Path, settings: Settings) -> None:
    command = ["evaluate", str(adapter), "--tasks", str(task), "--json", "--limit", "4"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    base = pretrained.load(settings())
    plain = [accuracy(base.model, base.tokenizer, row)[0] for row in ROWS[:4]]
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(base.model, str(adapter)).eval()
    changed = [accuracy(tuned, base.tokenizer, row)[0] for row in ROWS[:4]]
    assert scores["base"]["pick/acc"] == pytest.approx(sum(plain) / 4)
    assert scores["adapter"]["pick/acc"] == pytest.approx(sum(changed) / 4)


def test_tasks_that_cannot_be_loaded(task: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task file no\.yaml does not exist"):
        harness.load(["no.yaml"])
    broken = tmp_path / "broken.yaml"
    broken.write_text(task.read_text().replace("rows.jsonl", "gone.jsonl"))
    with pytest.raises(DataError, match="cannot load tasks"):
        harness.load([str(broken)])
    broken.write_text("just: text\n")
    with pytest.raises(DataError, match="cannot load tasks"):
        harness.load([str(broken)])


def test_an_unknown_task_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of all tasks takes half a minute to read: here it is empty."""
    import lm_eval.tasks

    class Empty:
        all_tasks: tuple[str, ...] = ()

        def __init__(self, include_defaults: bool) -> None:
            assert include_defaults

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Empty)
    with pytest.raises(ConfigError, match="unknown task 'hellasvag'"):
        harness.load(["hellasvag"])


def test_a_harness_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'corolla\[evaluation\]'"):
        harness.load(["hellaswag"])
