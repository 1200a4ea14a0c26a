"""The README's examples, run as they stand there.

The first of those in STARTED_COLD is started as a user starts it; `simulate` and `compare` are in
test_packaging.py and test_compare.py, and what each imports is in tests of its own. The others are
forks of a process that has imported everything, which a `corolla` in PATH asks for them. They train
few steps on short sequences, whatever the line says.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from corolla.config.run import RunConfig
from corolla.embedded.assets import asset
from corolla.models import pretrained
from corolla.models.tokens import rows
from tests.e2e.forked import Commands, run_line

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
STARTED_COLD = ("evaluate", "export")
COLD = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

BASH = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
SHELL = [[line for line in block.splitlines() if line.strip()] for block in BASH]
FIRST = {line.split()[1]: line for block in reversed(SHELL) for line in reversed(block)}
"""Command → the line in which it is for the first time."""
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TOML = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
NAME = re.compile(r"# (\w+\.(?:py|toml))\n")
FILES = {found[1]: block for block in [*BLOCKS, *TOML] if (found := NAME.match(block))}
LOADING = [block for block in BLOCKS if "PeftModel.from_pretrained" in block]
ROOM = [block for block in BLOCKS if "resize_token_embeddings" in block]
WHOLE = [block for block in BLOCKS if '/model")' in block]
PYTHON = [block for block in BLOCKS if block not in [*FILES.values(), *LOADING, *ROOM, *WHOLE]]


def run(command: list[str], folder: Path, environment: Mapping[str, str]) -> str:
    """Run and expect success; the output."""
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("block", range(len(SHELL)))
def test_shell_examples(block: int, commands: Commands, tmp_path: Path) -> None:
    assert SHELL[block]
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    for line in SHELL[block]:
        assert line.startswith("corolla ")
        name = line.split()[1]
        cold = line == FIRST[name] and name in STARTED_COLD
        run_line(line, tmp_path, COLD if cold else commands.environment(small=True))


@pytest.mark.parametrize("block", range(len(PYTHON)))
def test_python_examples(
    block: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, which has imported what they need."""
    monkeypatch.chdir(tmp_path)
    exec(PYTHON[block], {})
    assert " -> " in capsys.readouterr().out


LOGITS = """
from safetensors.torch import save_file
with torch.no_grad():
    save_file({{"logits": model(input_ids=torch.arange(40, 72)[None]).logits.float()}}, "{}")
"""


def test_the_adapter_is_loaded_as_it_was_trained(commands: Commands, tmp_path: Path) -> None:
    """With the lines that stand there; without `dtype` the base is rounded as its file is."""
    (block,) = LOADING
    short = "--clients 4 --cohort 2 --rounds 1 --local-steps 2 --set eval-examples=8"
    commands.run(
        "simulate", "--strategy", "flora", *short.split(), "--out", "runs/flora", folder=tmp_path
    )
    commands.run("export", "runs/flora/adapter", "--out", "merged", folder=tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        wanted = merged(input_ids=torch.arange(40, 72)[None]).logits
    careless = block.replace(", dtype=torch.float32", "")
    code = block + LOGITS.format("right") + careless + LOGITS.format("careless")
    run([sys.executable, "-c", code], tmp_path, COLD)
    right, off = (
        float((load_file(tmp_path / name)["logits"] - wanted).abs().max())
        for name in ("right", "careless")
    )
    claim = json.loads((tmp_path / "runs" / "flora" / "run.json").read_text())["reload"]
    assert right <= claim["tolerance"]
    assert claim["dtype"] == "float32"
    assert "dtype=torch.float32" in block
    assert off > 100 * right


def test_a_base_gets_room_for_new_tokens_and_a_whole_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has imported what they need."""
    (room,), (whole,) = ROOM, WHOLE
    monkeypatch.chdir(tmp_path)
    exec(room, {})
    config = RunConfig(model="with-room", new_tokens=["<tool>"])
    base = pretrained.load(config)
    (added,) = rows.ids(base.tokenizer, config.new_tokens, base.model)
    assert added == len(AutoTokenizer.from_pretrained(asset("model")))
    (tmp_path / "runs" / "norms").mkdir(parents=True)
    Path("with-room").rename("runs/norms/model")
    found: dict[str, Any] = {}
    exec(whole, found)
    assert len(found["tokenizer"]) == added
    assert torch.equal(found["model"].lm_head.weight, base.model.lm_head.weight)


def test_the_readme_has_examples_and_its_links_lead_somewhere() -> None:
    assert len(BASH) >= 3
    assert len(PYTHON) >= 1
    assert FILES
    assert all(len(content.splitlines()) <= 40 for content in FILES.values())
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_both_set_up_commands_are_named() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "demo-llm"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_strategy_is_in_the_table() -> None:
    from corolla.strategies.listing.registry import STRATEGIES

    for name in STRATEGIES:
        assert f"| `{name}` |" in README
