"""What each strategy leaves is read by others: plain peft in a process of its own, llama.cpp."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from corolla.artefacts import served
from corolla.commands.export.order import Order, export
from corolla.config.run import RunConfig
from corolla.models import pretrained
from corolla.strategies.listing.registry import STRATEGIES
from tests.corolla.artefacts import tiny_models
from tests.strategies import tiny

pytest.importorskip("gguf", reason="an extra: pip install 'corolla[gguf]'")
pytest.importorskip("xllamacpp", reason="in the dev extra, where it has a wheel")

from experiments.bench.llama_cpp import LlamaCpp, greedy, write_base

pytestmark = pytest.mark.command

READ = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base, folder, *names = sys.argv[1:]
found = {}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, f"{folder}/{name}/adapter").eval()
    with torch.no_grad():
        found[name] = model(input_ids=torch.arange(2, 26).reshape(2, 12)).logits
save_file(found, f"{folder}/logits.safetensors")
"""
RANK = 2
"""Of what is served: less than any strategy's own."""


@dataclass(frozen=True)
class Left:
    """What runs of all strategies left, each in a folder of its name."""

    base: Path
    folder: Path
    logits: Mapping[str, Tensor]
    """Of the server's own model."""


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder = tmp_path_factory.mktemp("strategies")
    base = tiny_models.make(folder / "base", "llama")
    plain = RunConfig(model=str(base), max_length=64, device="cpu")
    logits = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "base", lambda *asked: pretrained.load(plain))
        for name in STRATEGIES:
            run = tiny.start(
                tiny.config(name, **tiny.classes(name)), "llama", folder / name / "kept"
            )
            run.step()
            adapter, spec = run.federation.strategy.adapter(run.state), run.federation.config.lora
            run.model.save(folder / name / "adapter", adapter, spec)
            run.model.show(adapter, spec)
            logits[name] = tiny.logits(run.model.model)
    return Left(base, folder, logits)


def test_plain_peft_loads_the_adapter_of_each_strategy_in_another_process(left: Left) -> None:
    command = [sys.executable, "-c", READ, str(left.base), str(left.folder), *STRATEGIES]
    subprocess.run(command, check=True, timeout=300)
    found = load_file(left.folder / "logits.safetensors")
    assert found.keys() == STRATEGIES.keys()
    for name, wanted in left.logits.items():
        torch.testing.assert_close(
            found[name], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max())
        )


@pytest.fixture(scope="module")
def alone(left: Left) -> Path:
    return write_base(left.base, left.folder / "base.gguf")


@pytest.mark.parametrize("name", STRATEGIES)
def test_llama_cpp_says_what_peft_says_of_what_is_served(
    name: str, left: Left, alone: Path
) -> None:
    folder = left.folder / name
    smaller = served.prepare(folder / "adapter", RANK, 0.0, lambda adapter: {"loss": 0.0})
    served.write(smaller, folder, folder / "adapter", str(left.base))
    export(Order(folder / "served", "gguf", str(left.base), folder / "gguf", "f32"))
    prompt = list(range(20, 32))
    (told,) = greedy_of(left.base, folder / "served", prompt)
    (bare,) = greedy_of(left.base, None, prompt)
    (theirs,) = LlamaCpp(alone, folder / "gguf" / "adapter-f32.gguf").greedy(prompt, 1)
    assert max(abs(value - float(told[token])) for token, value in theirs.items()) <= 1e-4
    # One that leaves no global model has B at zero: clients have their own.
    assert float((told - bare).abs().max()) > 0.05 or name == "fedsa_lora"


def greedy_of(base: Path, adapter: Path | None, prompt: Sequence[int]) -> Sequence[Tensor]:
    """The log probabilities of one step, by transformers and peft."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    return greedy(model.eval(), prompt, 1)
