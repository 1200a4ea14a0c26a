"""Rows on disk are the rows in memory, whatever their form, and are found again while they hold."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from corolla.config.run import RunConfig
from corolla.data import federated, kept, rows
from corolla.data.files import sources
from corolla.data.files.sources import Source
from corolla.data.rows import Example
from corolla.errors import DataError

_CALL = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}], "content": ""}
_MESSAGES = [
    *({"role": "system", "content": "é日"}, {"role": "user", "content": "q"}, _CALL),
    *({"role": "tool", "content": "1"}, {"role": "assistant", "content": "a"}),
]
FORMS: list[list[dict[str, Any]]] = [
    [{"text": f'é日\u2028 "{i}\n', "system": "s"} for i in range(3)],
    [{"text": "", "label": "good", "user_id": "u"}, {"text": "b", "label": "bad", "user_id": 7}],
    [{"prompt": "", "response": "a", "split": "test"}, {"prompt": "p", "response": ""}],
    [{"prompt": "p", "choices": ["a", "b"], "answer": 1, "client_id": "c"}],
    [{"messages": _MESSAGES, "tools": [{"name": "f"}], "client_id": i} for i in range(3)],
]


@pytest.fixture(autouse=True)
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COROLLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "HELD", 0)
    return tmp_path / "cache"


def written(path: Path, own: Sequence[object]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in own), encoding="utf-8")
    return Source(str(path))


def everything(found: rows.Rows) -> list[Any]:
    names = [own.name for own in dataclasses.fields(Example)]
    told = [[getattr(row, name) for name in names] for row in found.examples]
    return [told, found.fingerprint, found.reading, found.unused]


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_rows_on_disk_are_those_in_memory(
    form: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "x.jsonl", FORMS[form])
    wanted = everything(rows.read(source))
    found = kept.read(source)
    assert all(isinstance(row, kept.Shelved) for row in found.examples)
    assert everything(found) == wanted
    monkeypatch.setattr(sources, "rows", lambda *_: pytest.fail("it is read a second time"))
    again = kept.read(source)
    assert everything(again) == wanted
    assert again.examples == found.examples
    assert dataclasses.replace(again.examples[0], label="x").text == wanted[0][0][0]


def test_few_rows_stay_in_memory(
    tmp_path: Path, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "HELD", 1 << 20)
    found = kept.read(written(tmp_path / "x.jsonl", FORMS[0]))
    assert type(found.examples[0]) is Example
    assert not on_disk.exists()


def test_a_federation_is_the_same_and_its_cache_is_the_owners(
    tmp_path: Path, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [{"prompt": f"p{i}", "response": "a", "client_id": i % 3} for i in range(30)]
    config = RunConfig(data=written(tmp_path / "x.jsonl", own).name)
    found = federated.load(config)
    monkeypatch.setattr(kept, "HELD", 1 << 20)
    shutil.rmtree(on_disk)
    wanted = federated.load(config)
    assert [row.content() for row in found.heldout] == [row.content() for row in wanted.heldout]
    for client, split in wanted.clients.items():
        assert [r.content() for r in found.clients[client].train] == [
            r.content() for r in split.train
        ]
    assert found.fingerprint == wanted.fingerprint


def test_what_has_changed_or_is_damaged_is_read_anew(
    tmp_path: Path, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "x.jsonl", FORMS[0])
    kept.read(source)
    [folder] = on_disk.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    written(tmp_path / "x.jsonl", [{"text": "new"}])
    assert [row.text for row in kept.read(source).examples] == ["new"]
    for name in ("rows", "numbers.npz", "facts.json"):
        (folder / name).write_bytes(b"{")
        assert [row.text for row in kept.read(source).examples] == ["new"]
    before = (folder / "rows").stat().st_mtime_ns
    monkeypatch.setattr(kept, "_code", lambda: "of another version")
    assert [row.text for row in kept.read(source).examples] == ["new"]
    assert (folder / "rows").stat().st_mtime_ns > before
    assert list(on_disk.iterdir()) == [folder]


def test_content_that_is_damaged_later_is_said(tmp_path: Path, on_disk: Path) -> None:
    found = kept.read(written(tmp_path / "x.jsonl", [{"text": "abc"}]))
    [folder] = on_disk.iterdir()
    with (folder / "rows").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(DataError, match="are damaged: delete it"):
        _ = found.examples[0].text


def test_a_folder_is_known_by_all_its_files(tmp_path: Path, on_disk: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("b", "a"):
        written(folder / f"{name}.jsonl", [{"text": name}])
    source = Source(str(folder))
    assert kept.read(source).fingerprint == sources.fingerprint(source)
    assert [row.client for row in kept.read(source).examples] == ["a", "b"]
    written(folder / "a.jsonl", [{"text": "new"}])
    assert kept.read(source).examples[0].text == "new"


def test_of_the_hub_nothing_stays(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda name: {"train": [{"text": "é"}] * 2})
    source = Source("some/set")
    found = kept.read(source)
    assert [row.text for row in found.examples] == ["é", "é"]
    assert found.fingerprint == rows.read(source).fingerprint
    assert not list(on_disk.iterdir())


def test_a_cache_that_cannot_be_written_is_said_in_one_line(tmp_path: Path, on_disk: Path) -> None:
    on_disk.write_text("a file")
    with pytest.raises(DataError, match="room for as much again as the data in COROLLA_CACHE"):
        kept.read(written(tmp_path / "x.jsonl", FORMS[0]))


def test_rows_that_cannot_be_read_leave_nothing(tmp_path: Path, on_disk: Path) -> None:
    with pytest.raises(DataError, match="line 3: needs text"):
        kept.read(written(tmp_path / "x.jsonl", [{"text": "a"}, {"body": "b"}]))
    assert not list(on_disk.iterdir())
