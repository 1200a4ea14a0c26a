"""The example of docs/after.md as it stands there, as forks of a warm process in small runs."""

import json
import re
from pathlib import Path

from tests.e2e.forked import Commands, run_line

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "after.md"
(BLOCK,) = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_runs(commands: Commands, tmp_path: Path) -> None:
    for line in BLOCK.splitlines():
        assert line.startswith("corolla ")
        run_line(line, tmp_path, commands.environment(small=True))
    runs = tmp_path / "runs"
    assert json.loads((runs / "a" / "run.json").read_text())["drift"].keys() == {"texts"}
    assert json.loads((runs / "both" / "edit.json").read_text())["error"] > 0
    found = json.loads((runs / "ported" / "port.json").read_text())
    assert found["scores"]["new"]["adapter"]["loss"] <= found["scores"]["new"]["base"]["loss"]
    wanted = (runs / "b" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (runs / "ported" / "adapter_model.safetensors").read_bytes() == wanted
