"""The README's examples, run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
ENV = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}

BASH = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TOML = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
NAME = re.compile(r"# (\w+\.(?:py|toml))\n")
FILES = {found[1]: block for block in [*BLOCKS, *TOML] if (found := NAME.match(block))}
PYTHON = [block for block in BLOCKS if block not in FILES.values()]


def run(command: list[str], folder: Path) -> str:
    """Run and expect success; the output."""
    done = subprocess.run(
        command, cwd=folder, env=ENV, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("block", range(len(BASH)))
def test_shell_examples(block: int, tmp_path: Path) -> None:
    commands = [line for line in BASH[block].splitlines() if line.strip()]
    assert commands
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    for command in commands:
        assert command.startswith("corolla ")
        run(["bash", "-c", command], tmp_path)


@pytest.mark.parametrize("block", range(len(PYTHON)))
def test_python_examples(block: int, tmp_path: Path) -> None:
    assert " -> " in run([sys.executable, "-c", PYTHON[block]], tmp_path)


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
    from corolla.strategies.registry import STRATEGIES

    for name in STRATEGIES:
        assert f"| `{name}` |" in README
