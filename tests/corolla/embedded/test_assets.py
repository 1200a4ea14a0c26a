import importlib.metadata
import json
from pathlib import Path

import pytest

from corolla.embedded import assets
from corolla.embedded.assets import asset
from corolla.errors import ArtefactError

EMBEDDED = ("data.jsonl", "model", "report.html.j2", "DATA_CARD.md", "LICENSE-PSF.txt")


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_embedded_file_is_found(name: str) -> None:
    assert asset(name).exists()
    assert asset(name).name == name


def test_the_embedded_model_is_complete() -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (asset("model") / name).stat().st_size > 0
    assert not list(asset("model").glob("*.bin"))  # no pickles


def test_a_file_that_is_nowhere_says_what_to_do() -> None:
    with pytest.raises(ArtefactError, match="pip install"):
        asset("none.txt")


def test_a_named_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded" / "data.jsonl").write_text("{}")
    monkeypatch.setenv("COROLLA_ASSETS", str(tmp_path))
    assert asset("data.jsonl") == tmp_path / "embedded" / "data.jsonl"
    assert asset("model").is_dir()  # what it lacks is found elsewhere


class Installed:
    """A distribution: an editable one, or a wheel in site-packages."""

    def __init__(self, root: Path, editable: bool) -> None:
        self.root, self.editable = root, editable

    def read_text(self, name: str) -> str | None:
        info = {"url": self.root.as_uri(), "dir_info": {"editable": True}}
        return json.dumps(info) if self.editable else None

    def locate_file(self, name: str) -> Path:
        return self.root / name


@pytest.mark.parametrize("editable", [True, False])
def test_code_without_files_finds_the_installed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, editable: bool
) -> None:
    """In an app bundle of Flower the code lies where the files do not."""
    installed = tmp_path / "with space"
    (installed / "corolla" / "embedded").mkdir(parents=True)
    (installed / "corolla" / "embedded" / "data.jsonl").write_text("{}")
    monkeypatch.delenv("COROLLA_ASSETS", raising=False)
    monkeypatch.setattr(
        assets, "__file__", str(tmp_path / "bundle" / "corolla" / "embedded" / "assets.py")
    )
    monkeypatch.setattr(
        importlib.metadata, "distributions", lambda name: [Installed(installed, editable)]
    )
    assert asset("data.jsonl") == installed / "corolla" / "embedded" / "data.jsonl"
    with pytest.raises(ArtefactError):
        asset("model")
