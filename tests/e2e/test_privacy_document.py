"""The commands of docs/privacy.md, run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "privacy.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
ENV = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}

BASH = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", range(len(BASH)))
def test_shell_examples(block: int, tmp_path: Path) -> None:
    commands = [line for line in BASH[block].splitlines() if line.strip()]
    assert commands
    for command in commands:
        assert command.startswith("corolla ")
        done = subprocess.run(
            command.split(),
            cwd=tmp_path,
            env=ENV,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        assert done.returncode == 0, command + done.stdout + done.stderr


def test_there_are_commands_and_the_links_lead_somewhere() -> None:
    assert BASH
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", TEXT)
    assert targets
    assert [target for target in targets if not (DOCUMENT.parent / target).exists()] == []
