"""A saved model is loaded by another process; damage of each kind is found there or before."""

import html
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from corolla.commands.simulate.in_process import simulate
from corolla.config.run import RunConfig
from corolla.config.sections.kinds import KINDS
from corolla.data.rows import Example
from corolla.directions.pools import SignPool
from corolla.errors import ArtefactError
from corolla.evaluation import other_process, reader
from corolla.evaluation.other_process import OtherProcess
from corolla.models import pretrained, trainable
from corolla.models.files import missing
from corolla.models.trainable import Trainable
from corolla.server.runs.evaluate import Evaluator
from corolla.server.runs.proof import Proof, prove
from corolla.types import Adapter, LoraSpec, Move, Params
from tests.corolla.models import checkpoints

Settings = Callable[..., RunConfig]
HELD = [Example(f"answer {i}", prompt=f"question {i} {'of' * i}") for i in range(5)]
LABELS = ["no", "perhaps", "yes"]
TOLD = [Example(f"text {i} {'of' * i}", label=LABELS[i % 3]) for i in range(5)]


def evaluator(config: RunConfig) -> Evaluator:
    labels = LABELS if config.task == "classify" else []
    model = trainable.build(config, pretrained.load(config, labels))
    return Evaluator(config, model, TOLD if labels else HELD, labels)


def moved(model: Trainable, spec: LoraSpec, seed: int = 0) -> Params:
    noise = torch.Generator().manual_seed(seed)
    fresh = model.init(spec, 0)
    return {n: t + 0.1 * torch.randn(t.shape, generator=noise) for n, t in fresh.items()}


def proven(judge: Evaluator, adapter: Adapter, folder: Path) -> Proof:
    with OtherProcess() as other:
        return prove(judge, adapter, folder, other)


def saved(judge: Evaluator, folder: Path) -> tuple[Adapter, Path]:
    tuned = Adapter(moved(judge.model, judge.config.lora))
    place = folder / judge.model.artefact
    judge.save(tuned, place)
    return tuned, place


@pytest.mark.parametrize("task", ["causal", "classify"])
@pytest.mark.parametrize(
    ("parameters", "dtype"),
    [
        (name, dtype)
        for name in KINDS
        for dtype in ("float32", "bfloat16")
        if (name, dtype) != ("sparse", "bfloat16")  # refused: small changes would round away
    ],
)
def test_every_kind_is_proven(
    settings: Settings, tmp_path: Path, parameters: str, task: str, dtype: str
) -> None:
    if KINDS[parameters].virtual_tokens and task == "classify":
        pytest.skip("a prompt is for models that generate")
    model = checkpoints.bert(tmp_path) if task == "classify" else checkpoints.gpt2(tmp_path)
    if parameters == "head" and task == "causal":
        model = checkpoints.llama(tmp_path, tied=False)
    config = settings(
        parameters=parameters, task=task, dtype=dtype, model=str(model), virtual_tokens=3
    )
    judge = evaluator(config)
    found = proven(judge, *saved(judge, tmp_path))
    assert found.difference <= (1e-5 if dtype == "float32" else 0.1)
    assert found.dtype == dtype
    assert found.rows == 4
    assert found.reader == ("PEFT" if judge.model.artefact == "adapter" else "transformers")
    assert f"dtype={dtype}" in found.line
    assert f"{found.tolerance:.1e} allowed" in found.line


def test_a_stack_of_blocks_is_proven(settings: Settings, tmp_path: Path) -> None:
    judge = evaluator(settings())
    spec = LoraSpec(3, 3.0)
    tuned = Adapter(moved(judge.model, settings().lora), (moved(judge.model, spec, 1),))
    judge.save(tuned, tmp_path / "adapter")
    assert proven(judge, tuned, tmp_path / "adapter").difference < 1e-5


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_large_products_beside_a_block_are_proven_and_a_wrong_factor_is_not(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """As noise of dp=client leaves them: attention is so steep that rounding shows in logits. The
    distance of the update, which refuses a wrong factor as well, is left out."""
    judge = evaluator(settings(rank=8, model=str(checkpoints.llama(tmp_path))))
    spec = judge.config.lora
    large = {n: 18 * t for n, t in moved(judge.model, spec, 3).items()}
    tuned = Adapter(large, (moved(judge.model, spec, 12),))
    wrong = {n: factor * t if n.endswith("lora_B") else t for n, t in large.items()}
    judge.save(Adapter(wrong, tuned.frozen), tmp_path / "adapter")
    monkeypatch.setattr(judge.model, "distance_to", lambda *args: 0.0)
    if factor == 1.0:
        found = proven(judge, tuned, tmp_path / "adapter")
        assert found.difference <= found.tolerance < 0.1
        return
    with pytest.raises(ArtefactError, match="differs from the server's model"):
        proven(judge, tuned, tmp_path / "adapter")


def test_a_model_that_was_moved_in_place_is_proven(settings: Settings, tmp_path: Path) -> None:
    judge = evaluator(settings(parameters="full", strategy="seed_pool", batch_size=2))
    scalars = torch.randn(16, generator=torch.Generator().manual_seed(0))
    tuned = Adapter({}, moves=(Move(SignPool(16, (0, 1)), 1e-2 * scalars),))
    judge.save(tuned, tmp_path / "model")
    found = proven(judge, tuned, tmp_path / "model")
    assert found.difference < 1e-5
    assert sum(p.numel() for p in judge.model.model.parameters()) == 0


@pytest.mark.parametrize("damage", ["one value", "not a number", "scaling", "gone", "config"])
def test_a_damaged_adapter_is_refused(settings: Settings, tmp_path: Path, damage: str) -> None:
    judge = evaluator(settings())
    tuned, folder = saved(judge, tmp_path)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "gone":
        weights.unlink()
    elif damage == "config":
        config.write_text(config.read_text().replace('"q_proj"', '"o_proj"'))
    elif damage == "scaling":
        config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    else:
        params = load_file(weights)
        params[max(params)][0, 0] += 1.0 if damage == "one value" else float("nan")
        save_file(params, weights, {"format": "pt"})
    with pytest.raises(ArtefactError) as caught:
        proven(judge, tuned, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [0.5, 0.999])
def test_a_saved_adapter_with_another_scaling_is_refused(
    settings: Settings, tmp_path: Path, dtype: str, factor: float
) -> None:
    """Logits of a half-precision base would not show it: the updates themselves are compared."""
    judge = evaluator(settings(dtype=dtype))
    tuned = moved(judge.model, settings().lora)
    wrong = {n: factor * t if n.endswith("lora_B") else t for n, t in tuned.items()}
    judge.save(Adapter(wrong), tmp_path / "adapter")
    with pytest.raises(ArtefactError, match="another update"):
        proven(judge, Adapter(tuned), tmp_path / "adapter")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_that_has_changed_on_disk_is_refused(
    settings: Settings, tmp_path: Path, dtype: str
) -> None:
    """By one value, which logits in half precision would not show: another file, or a new commit of
    a hub's model."""
    model = checkpoints.llama(tmp_path)
    judge = evaluator(settings(model=str(model), dtype=dtype))
    tuned, folder = saved(judge, tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] *= 1.02
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtefactError, match="is not the one of this run") as caught:
        proven(judge, tuned, folder)
    assert str(model) in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_in_no_file_are_named(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Were the pooler neither trained nor refused, as before, the proof would name it."""
    monkeypatch.setattr(missing, "poolers", lambda model, names: [])
    monkeypatch.setattr(missing, "refuse", lambda *facts: None)
    model = checkpoints.masked_bert(tmp_path)
    judge = evaluator(settings(model=str(model), task="classify", dtype=dtype))
    with pytest.raises(ArtefactError, match=r"lacks bert\.pooler\.dense\.bias"):
        proven(judge, *saved(judge, tmp_path))


def test_weights_that_nobody_has_noticed_are_named(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reports no weights that the class of a model wants to be silent about."""
    silent = ["lm_head.weight"]
    kind = transformers.LlamaForCausalLM
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_missing", silent, raising=False)
    model = checkpoints.llama(tmp_path, tied=False, headless=True)
    judge = evaluator(settings(model=str(model)))
    with pytest.raises(ArtefactError, match=r"lacks lm_head\.weight"):
        proven(judge, *saved(judge, tmp_path))


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import sys; sys.exit('error: no room')", "in another process: no room"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import sys; sys.stdin.readline()", "gave no answer"),
    ],
)
def test_a_process_that_fails_is_one_line(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, says: str
) -> None:
    judge = evaluator(settings())
    tuned, folder = saved(judge, tmp_path)
    monkeypatch.setattr(other_process, "command", lambda: [sys.executable, "-c", code])
    with pytest.raises(ArtefactError, match=says) as caught:
        proven(judge, tuned, folder)
    assert "\n" not in str(caught.value)


def test_a_process_that_cannot_be_started_is_one_line(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = evaluator(settings())
    tuned, folder = saved(judge, tmp_path)
    monkeypatch.setattr(other_process, "command", lambda: [str(tmp_path / "no python")])
    with pytest.raises(ArtefactError, match="no other process to load what is saved: "):
        proven(judge, tuned, folder)


def test_a_run_whose_proof_fails_says_so_and_saves_no_adapter(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys; sys.stdin.readline(); sys.exit('error: OSError: no space')"
    own = other_process.command
    monkeypatch.setattr(other_process, "command", lambda: [sys.executable, "-c", code])
    with pytest.raises(ArtefactError, match="in another process: OSError: no space"):
        simulate(settings(rounds=1), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    monkeypatch.setattr(other_process, "command", own)
    summary = simulate(settings(rounds=1), tmp_path / "run", resume=True)
    assert summary.artefact.is_dir()
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["reload"]["claim"] == summary.proof.line
    assert (info["reload"]["dtype"], info["reload"]["rows"]) == ("float32", 4)
    page = html.unescape((tmp_path / "run" / "report.html").read_text())
    assert info["reload"]["claim"] in page


def test_nothing_of_the_other_process_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = other_process.command()
    monkeypatch.setattr(other_process, "command", lambda: command)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pid = 0
    with pytest.raises(KeyboardInterrupt), OtherProcess() as other:
        pid = other._child.pid or 0
        assert pid
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_few_positions_of_a_large_vocabulary_are_compared(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = evaluator(settings())
    rows = judge.probe
    whole, loss = reader.measure(judge.model.model, rows)
    assert len(whole) == int(rows["attention_mask"].sum())
    plain = transformers.AutoModelForCausalLM.from_pretrained(judge.config.model)
    with torch.no_grad():
        wanted = plain(**rows)
    assert loss == pytest.approx(float(wanted.loss), rel=1e-5)
    mask = rows["attention_mask"].bool()
    torch.testing.assert_close(whole, wanted.logits[mask], rtol=0, atol=1e-5)
    monkeypatch.setattr(reader, "_VALUES", 258 * 4 * 3)
    few, same = reader.measure(judge.model.model, rows)
    assert same == loss
    assert len(few) == 3 * 4
    assert torch.equal(few[2], whole[int(mask[0].sum()) - 1])
