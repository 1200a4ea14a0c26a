"""The adapter for servers beside the exact one: what a run writes, and what it tells."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from corolla.artefacts import card as card_module
from corolla.artefacts.adapters import read_lora
from corolla.artefacts.sizes import sentence
from corolla.commands import artefacts
from corolla.commands.export.order import Order, export
from corolla.commands.simulate.in_process import simulate
from corolla.config.run import RunConfig
from corolla.errors import ArtefactError
from corolla.host.text import human_bytes

Settings = Callable[..., RunConfig]
Facts = dict[str, Any]


def run(settings: Settings, folder: Path, **changes: Any) -> Facts:
    simulate(settings(strategy="flora", rounds=2, **changes), folder)
    facts: Facts = json.loads((folder / "run.json").read_text())
    return facts


def dense(model: str, folder: Path) -> dict[str, torch.Tensor]:
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(folder))
    return {
        name: layer.get_delta_weight("default").double()
        for name, layer in tuned.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def test_a_large_adapter_has_a_small_one_beside_it(settings: Settings, tmp_path: Path) -> None:
    config = settings()
    facts = run(settings, tmp_path / "cut", served_rank=3)
    told, exact = facts["served"], tmp_path / "cut" / "adapter"
    assert told["folder"] == "served"
    assert told["exact"]["loss"] == facts["final"]["loss"] != told["loss"]
    assert told["exact"]["rank"] == read_lora(exact).spec.rank > told["rank"] == 3
    served = tmp_path / "cut" / "served" / "adapter_model.safetensors"
    assert told["bytes"] == served.stat().st_size
    assert sentence(told).startswith(f"adapter/ is of rank {told['exact']['rank']}, ")
    assert told["exact"]["bytes"] == (exact / "adapter_model.safetensors").stat().st_size
    all_of, best = dense(config.model, exact), dense(config.model, tmp_path / "cut" / "served")
    lost = total = 0.0
    for name, update in all_of.items():
        u, s, vt = torch.linalg.svd(update)
        torch.testing.assert_close(
            best[name], (u[:, :3] * s[:3]) @ vt[:3], rtol=1e-4, atol=1e-5 * float(s[0])
        )
        lost, total = lost + float(s[3:].square().sum()), total + float(s.square().sum())
    assert told["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    scores = artefacts.evaluate_adapter(tmp_path / "cut" / "served", None, None)
    assert scores["adapter"]["loss"] == pytest.approx(told["loss"], abs=1e-6)
    page = (tmp_path / "cut" / "report.html").read_text()
    size = human_bytes(told["bytes"])
    assert f"for servers in served/: rank 3, {size}, {100 * told['error']:.3f}% off" in page
    card = (tmp_path / "cut" / "served" / "README.md").read_text()
    assert f"{told['error']:.3%} off in effective weights" in card
    assert f"{told['loss']:.4f}" in card


def test_the_run_and_its_adapter_are_the_same_bits(settings: Settings, tmp_path: Path) -> None:
    small, large = (run(settings, tmp_path / str(r), served_rank=r) for r in (1, 64))
    for key in ("adapter_sha256", "state_sha256", "final"):
        assert small[key] == large[key]
    assert not (tmp_path / "64" / "served").exists()
    assert large["served"]["folder"] == "adapter"
    assert large["served"]["error"] == 0.0
    assert sentence(large["served"]).endswith(", and is served itself")
    assert large["served"]["loss"] == large["final"]["loss"]


def test_a_card_says_what_the_run_did(settings: Settings, tmp_path: Path) -> None:
    facts = run(settings, tmp_path / "out")
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    for text in (
        f"| held out | base model | fine-tuned |\n|---|---|---|\n| loss | "
        f"{facts['base']['loss']:.4f} | {facts['final']['loss']:.4f} |",
        "| strategy | flora |",
        "| clients, of them in a round | 4, 4 |",
        "no differential privacy",
        f"--max-lora-rank {8 * -(-facts['served']['rank'] // 8)}",
        "neither was run here",
        "not named here, see the base model",
    ):
        assert text in card
    assert str(tmp_path) not in card
    assert facts["data_sha256"] in card
    private = {**facts, "privacy": {"line": "epsilon 3 of each client"}}
    card_module.write_card(tmp_path / "out" / "adapter", private, None)
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "epsilon 3 of each client" in card
    assert facts["data_sha256"] not in card
    assert "/" + str(Path(settings().model).relative_to("/")) not in card


def test_the_card_of_a_classifier_loads_it_with_its_labels(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lines of Python, run as they stand there: the class names are in the head's order."""
    names = ("yes", "no", 'per "haps')
    rows = [{"text": f"row {i}", "label": names[i % 3], "client_id": i % 2} for i in range(30)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    simulate(settings(data=str(data), cohort=2, rounds=1), tmp_path / "out")
    labels = json.loads((tmp_path / "out" / "run.json").read_text())["labels"]
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert f"| labels, in the order of the head | {', '.join(labels)} |" in card
    monkeypatch.chdir(tmp_path / "out" / "adapter")
    code = card.partition("```python\n")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(code.replace(f'"{Path(settings().model).name}"', repr(settings().model)), found)
    assert found["model"].config.id2label == dict(enumerate(labels))
    assert found["model"].config.num_labels == 3


def test_scales_have_no_rank_to_serve(settings: Settings, tmp_path: Path) -> None:
    simulate(settings(parameters="ia3", rounds=1), tmp_path / "out")
    assert "served" not in json.loads((tmp_path / "out" / "run.json").read_text())
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "Other programs take plain LoRA alone: this adapter is of type IA3." in card
    assert "tags: [ia3, federated]" in card
    with pytest.raises(ArtefactError, match="is of type IA3: only plain LoRA") as caught:
        export(Order(tmp_path / "out", "gguf", out=tmp_path / "gguf"))
    assert "rank to write" not in str(caught.value)
