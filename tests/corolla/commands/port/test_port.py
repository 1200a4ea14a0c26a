"""`corolla port`: the same bits on the same base, dense weights on another, and when it refuses."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from typer.testing import CliRunner

from corolla.artefacts.adapters import read_lora
from corolla.artefacts.weights import open_tensors
from corolla.cli.app import app
from corolla.commands.edit.edit import Order, edit
from corolla.commands.port.distance import measure
from corolla.commands.port.port import _named
from corolla.config.run import RunConfig
from corolla.models.files import adapter_files
from corolla.tensors import factors
from corolla.tensors.stored import StoredTensor
from tests.strategies import tiny


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, federation_file: Path
) -> Path:
    """A folder as of a run, with an adapter that peft has trained to lower the loss."""
    folder = tmp_path_factory.mktemp("port")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    rows = [json.loads(line) for line in federation_file.read_text().splitlines()]
    texts = [tokenizer(row["prompt"] + row["response"])["input_ids"] for row in rows]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    trained = [own for own in model.parameters() if own.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for _ in range(3):
        for ids in texts[::4]:
            batch = torch.tensor([ids])
            model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    config = RunConfig(
        model=str(tiny_model), data=str(federation_file), max_length=48, eval_examples=8, threads=1
    )
    told = {"config": config.model_dump(mode="json")}
    (folder / "run.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The base after a little noise on all of its weights."""
    folder = tmp_path_factory.mktemp("moved") / "moved"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.001 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["port", *map(str, arguments)])


def test_there_and_back_gives_the_same_bits(
    finished: Path, moved: Path, tiny_model: Path, tmp_path: Path
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    done = run(finished, "--to", moved, "--out", there, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["scores"]["new"]["adapter"]["loss"] < found["scores"]["new"]["base"]["loss"]
    data = json.loads((finished / "run.json").read_text())["config"]["data"]
    done = run(there, "--to", tiny_model, "--data", data, "--set", "max-length=48", "--out", back)
    assert done.exit_code == 0, done.output
    before, after = (own / "adapter_model.safetensors" for own in (finished / "adapter", back))
    assert before.read_bytes() == after.read_bytes()
    assert adapter_files.base_of(there) == str(moved)
    assert adapter_files.base_of(back) == str(tiny_model)
    record = json.loads((there / "port.json").read_text())
    assert record["adapter_sha256"] == adapter_files.adapter_hash(finished / "adapter")


def test_the_same_base_gives_the_same_logits(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "same"
    done = run(finished, "--to", tiny_model, "--out", out)
    assert done.exit_code == 0, done.output
    assert "the same in both bases" in " ".join(done.stdout.split())
    assert torch.equal(logits(tiny_model, out), logits(tiny_model, finished / "adapter"))


def logits(model: Path, adapter: Path) -> torch.Tensor:
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    return tiny.logits(PeftModel.from_pretrained(base, str(adapter)))


def test_on_another_base_it_is_that_base_and_the_products(
    finished: Path, moved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(finished, "--to", moved, "--out", out).exit_code == 0
    dense = transformers.AutoModelForCausalLM.from_pretrained(moved, dtype=torch.float64)
    weights, saved = dict(dense.named_parameters()), read_lora(out)
    for name in factors.modules(saved.update):
        b, a = (saved.update[name + role].double() for role in (factors.B, factors.A))
        weights[f"{name}.weight"].data += saved.spec.scaling * b @ a
    assert torch.allclose(logits(moved, out).double(), tiny.logits(dense).double(), atol=1e-5)


def test_harm_is_refused_with_its_reasons(finished: Path, moved: Path, tmp_path: Path) -> None:
    edit(Order([finished], "scale:-3", tmp_path / "worse"))
    data = json.loads((finished / "run.json").read_text())["config"]["data"]
    asked = [tmp_path / "worse", "--to", moved, "--data", data, "--set", "max-length=48"]
    asked += ["--out", tmp_path / "out"]
    done = run(*asked)
    assert done.exit_code == 1
    said = " ".join(done.stderr.split())
    for text in ("makes", "worse: loss", "with it on held-out rows", "have moved", "--force"):
        assert text in said, text
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert run(*asked, "--force").exit_code == 0
    assert json.loads((tmp_path / "out" / "port.json").read_text())["forced"] is True


def test_a_mistake_is_a_line_and_leaves_nothing(
    finished: Path, tiny_model: Path, moved: Path, tmp_path: Path
) -> None:
    alone, other = tmp_path / "alone", tmp_path / "other"
    edit(Order([finished], "scale:1", alone))
    other.mkdir()
    for path in moved.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = transformers.AutoTokenizer.from_pretrained(moved)
    tokenizer.add_tokens(["corolla"])
    tokenizer.save_pretrained(other)
    cases: list[tuple[int, list[str | Path], str]] = [
        (2, [alone, "--to", moved], "has no run.json beside it"),
        (1, [finished, "--to", "embedded"], "not another version of the adapter's base: model."),
        (1, [finished, "--to", other], "the tokenizers differ: they have 258 and 259 tokens"),
        (1, [finished, "--to", tmp_path / "none"], "is neither a model folder"),
        (1, [tiny_model, "--to", moved], "is a whole model"),
    ]
    before = sorted(tmp_path.iterdir())
    for code, asked, message in cases:
        done = run(*asked, "--out", tmp_path / "out")
        assert (done.exit_code, message in done.stderr) == (code, True), done.output
        assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_each_weight_is_read_once(
    finished: Path, tiny_model: Path, moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = open_tensors(str(tiny_model)), open_tensors(str(moved))
    saved, seen = read_lora(finished / "adapter"), Counter[tuple[Path, int]]()
    read = StoredTensor.read

    def counted(self: StoredTensor, start: int, stop: int) -> torch.Tensor:
        seen.update((self.path, self.at + i) for i in range(start, stop))
        return read(self, start, stop)

    monkeypatch.setattr(StoredTensor, "read", counted)
    found = measure(old, new, _named(saved, new, ""), saved.baked, transposed=False)
    assert {*seen.values()} == {1}
    assert sum(seen.values()) == sum(own.count for part in (old, new) for own in part.values())
    monkeypatch.undo()
    total, added, cosines = 0.0, 0.0, []
    for name in factors.modules(saved.update):
        own = [tensors[f"{name}.weight"] for tensors in (old, new)]
        before, after = (t.read(0, t.count).reshape(t.shape).double() for t in own)
        d = saved.spec.scaling * factors.product(saved.update, name)
        total, added = (
            total + float((after - before).square().sum()),
            added + float(d.square().sum()),
        )
        cosines.append(float(torch.cosine_similarity((after - before).ravel(), d.ravel(), dim=0)))
    assert found.ratio == pytest.approx((total / added) ** 0.5)
    assert found.cosine == pytest.approx(sum(cosines) / len(cosines))
    assert measure(old, old, {}, {}, transposed=False).old == found.old != found.new
