"""The commands of docs/privacy.md as they stand there, as forks of a warm process in small runs."""

import re
from pathlib import Path

import pytest

from tests.e2e.forked import Commands, run_line

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "privacy.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
BASH = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", range(len(BASH)))
def test_shell_examples(block: int, commands: Commands, tmp_path: Path) -> None:
    lines = [line for line in BASH[block].splitlines() if line.strip()]
    assert lines
    for line in lines:
        assert line.startswith("corolla ")
        run_line(line, tmp_path, commands.environment(small=True))


def test_there_are_commands_and_the_links_lead_somewhere() -> None:
    assert BASH
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", TEXT)
    assert targets
    assert [target for target in targets if not (DOCUMENT.parent / target).exists()] == []
