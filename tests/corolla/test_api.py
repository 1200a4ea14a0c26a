"""The functions of `import corolla` do what the commands do, and say what they say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import corolla
from corolla.config.run import RunConfig
from corolla.errors import ConfigError, CorollaError
from corolla.server.runs import evaluate

Settings = Callable[..., RunConfig]


@pytest.fixture
def done(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder, as a text, of a run of one round."""
    monkeypatch.setattr(evaluate, "_ANSWER_TOKENS", 2)
    folder = str(tmp_path / "run")
    assert corolla.simulate(settings(rounds=1), folder).folder == Path(folder)
    return folder


def test_a_run_is_scored_exported_and_gone_on_with(done: str, settings: Settings) -> None:
    info = json.loads(Path(done, "run.json").read_text())
    scores = corolla.evaluate(done)
    assert scores["adapter"]["loss"] == pytest.approx(info["final"]["loss"], abs=1e-5)
    assert scores["base"]["loss"] == pytest.approx(info["base"]["loss"], abs=1e-5)
    (line,) = corolla.export(done, out=f"{done}-merged")
    assert Path(f"{done}-merged", "config.json").is_file()
    assert f"{done}-merged" in line
    again = corolla.simulate(settings(rounds=1), done, resume=True)
    assert again.adapter_hash == info["adapter_sha256"]


def test_data_is_looked_at(settings: Settings) -> None:
    config = settings()
    told = {"model": config.model, "max_length": config.max_length}
    found = corolla.look(config.data, settings=told)
    assert found["clients"].keys() == {"ada", "ben", "cyd", "dot"}
    assert found["lengths"]["of"] == found["lengths"]["rows"] > 2
    assert corolla.look(config.data, sample=2, settings=told)["lengths"]["rows"] == 2


def test_a_comparison_is_asked_for_as_on_the_command_line(tmp_path: Path) -> None:
    for strategies, says in ([], "name strategies"), (["fedavg"] * 2, "named twice"):
        with pytest.raises(ConfigError, match=says):
            corolla.compare(strategies, tmp_path / "c")
    with pytest.raises(ConfigError, match="--seeds 0"):
        corolla.compare(["fedavg"], tmp_path / "c", seeds=0)
    with pytest.raises(ConfigError, match="rounds"):
        corolla.compare(["fedavg"], tmp_path / "c", settings={"round": 2})


@pytest.mark.parametrize("call", [corolla.evaluate, corolla.export])
def test_a_folder_that_is_none_is_one_line(call: Callable[..., object], tmp_path: Path) -> None:
    with pytest.raises(CorollaError) as caught:
        call(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
