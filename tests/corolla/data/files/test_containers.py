"""Every form of row in every container and encoding; hostile files; folders, splits and columns."""

import csv
import gzip
import io
import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from corolla.data.files import streams
from corolla.data.files.sources import Source
from corolla.data.forms import Turn
from corolla.data.rows import Example, read
from corolla.errors import DataError

ODD = 'é日本\u2028 "quoted", with; a\ttab\nand a line'
"""A text that each container has to quote in its own way."""

_ANSWER = Turn("assistant", "a", learnt=True)

FORMS: dict[str, tuple[dict[str, Any], Example]] = {
    "text": ({"text": ODD}, Example(ODD)),
    "text, label": ({"text": ODD, "label": "good"}, Example(ODD, label="good")),
    "prompt, response": ({"prompt": ODD, "response": "a"}, Example("a", prompt=ODD)),
    "question, context, answer": (
        {"question": "q", "context": ODD, "answer": "a"},
        Example("a", prompt=f"{ODD}\nq"),
    ),
    "prompt, choices, answer": (
        {"prompt": ODD, "choices": ["a", ODD], "answer": 1},
        Example(ODD, prompt=ODD, choices=("a", ODD)),
    ),
    "prompt, completion": ({"prompt": ODD, "completion": "a"}, Example("a", prompt=ODD)),
    "instruction, input, output": (
        {"instruction": "i", "input": ODD, "output": "a"},
        Example("a", prompt=f"i\n{ODD}"),
    ),
    "messages": (
        {
            "messages": [
                {"role": "system", "content": ODD},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ]
        },
        Example("", turns=(Turn("system", ODD), Turn("user", "q"), _ANSWER)),
    ),
    "conversations": (
        {
            "conversations": [
                {"from": "system", "value": ODD},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        Example("", turns=(Turn("system", ODD), Turn("user", "q"), _ANSWER)),
    ),
}
"""Form → a row of it, and what it is read as."""

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16")

Rows = list[dict[str, Any]]


def _lines(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _array(rows: Rows) -> str:
    return json.dumps(rows, ensure_ascii=False, indent=1)


def _table(rows: Rows, delimiter: str = ",") -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        cells = {n: json.dumps(v) if isinstance(v, list) else v for n, v in row.items()}
        writer.writerow(cells)
    return text.getvalue()


def _parquet(rows: Rows) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def _zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def _whole(name: str, make: Callable[[Rows, str], bytes]) -> Callable[[Path, Rows, str], Path]:
    def write(folder: Path, rows: Rows, encoding: str) -> Path:
        path = folder / name
        path.write_bytes(make(rows, encoding))
        return path

    return write


def _files(folder: Path, rows: Rows, encoding: str) -> Path:
    for number, row in enumerate(rows):
        (folder / f"c{number}.jsonl").write_bytes(_lines([row]).encode(encoding))
    return folder


CONTAINERS: dict[str, Callable[[Path, Rows, str], Path]] = {
    "JSON lines": _whole("x.jsonl", lambda rows, code: _lines(rows).encode(code)),
    "JSON array": _whole("x.json", lambda rows, code: _array(rows).encode(code)),
    "CSV": _whole("x.csv", lambda rows, code: _table(rows).encode(code)),
    "TSV": _whole("x.tsv", lambda rows, code: _table(rows, "\t").encode(code)),
    "parquet": _whole("x.parquet", lambda rows, code: _parquet(rows)),
    "gzip": _whole("x.jsonl.gz", lambda rows, code: gzip.compress(_lines(rows).encode(code))),
    "zstd": _whole("x.json.zst", lambda rows, code: _zstd(_array(rows).encode(code))),
    "folder": _files,
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_from_every_container(
    form: str, container: str, encoding: str, tmp_path: Path
) -> None:
    row, wanted = FORMS[form]
    path = CONTAINERS[container](tmp_path, [row, row], encoding)
    found = read(Source(str(path)))
    clients = [None, None] if container != "folder" else ["c0", "c1"]
    assert [row.client for row in found.examples] == clients
    assert [{**row.content(), "client": None} for row in found.examples] == [wanted.content()] * 2
    assert not found.unused


FINE = b'{"text": "a"}\n'
_TABLE = pa.table({"text": [1, 2]})


def _bytes_of(table: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(table, file)
    return file.getvalue()


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.jsonl", FINE)
    return file.getvalue()


def _bomb() -> bytes:
    """A hundred rows of a megabyte, each of which is packed in a thousandth of it."""
    return gzip.compress(b'{"text": "' + b"a" * (1 << 20) + b'"}\n') * 100


HOSTILE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "nothing": ("x.jsonl", lambda: b"", "has no rows"),
    "only blank lines": ("x.jsonl", lambda: b"\n \r\n\n", "has no rows"),
    "only a mark": ("x.jsonl", lambda: b"\xef\xbb\xbf", "has no rows"),
    "an empty array": ("x.json", lambda: b"[]", "has no rows"),
    "a header alone": ("x.csv", lambda: b"text,label\n", "has no rows"),
    "an empty gzip": ("x.jsonl.gz", lambda: gzip.compress(b""), "has no rows"),
    "NUL bytes": ("x.jsonl", lambda: bytes(4096), "nothing but NUL bytes"),
    "a NUL within a row": ("x.jsonl", lambda: FINE + b'{"text": "\x00"}\n', "line 2: not JSON"),
    "a cut off line": ("x.jsonl", lambda: FINE + b'{"text": "b', "line 2: not JSON"),
    "an object over lines": ("x.jsonl", lambda: b'{\n "text": "a"\n}\n', "each object on one line"),
    "mixed columns": (
        "x.jsonl",
        lambda: FINE + b'{"body": "b"}\n',
        "line 2: needs text, or prompt and response",
    ),
    "another name": ("x.jsonl", lambda: b'{"body": "b"}\n', "--set columns.text=body"),
    "other names": (
        "x.jsonl",
        lambda: b'{"body": "b", "reply": "c"}\n',
        "--set columns.prompt=NAME",
    ),
    "nested lists": ("x.json", lambda: b"[[[[1]]]]", "row 1: expected an object, found list"),
    "deep nesting": ("x.jsonl", lambda: b"[" * 100_000, "not JSON"),
    "a deep row": ("x.jsonl", lambda: b'{"text":' * 100_000, "not JSON: "),
    "an array cut off": ("x.json", lambda: b'[{"text": "a"},', "cut off after 1 rows"),
    "an array cut within a row": ("x.json", lambda: b'[{"text": "a"}, {"te', "row 2: not JSON"),
    "text after an array": ("x.json", lambda: b'[{"text": "a"}] x', "after the end of the JSON"),
    "an array without commas": ("x.json", lambda: b"[{} {}]", "needs text"),
    "Latin-1": ("x.jsonl", lambda: '{"text": "é"}\n'.encode("latin-1"), "perhaps the text is in"),
    "Latin-1 in an array": ("x.json", lambda: '[{"text": "é"}]'.encode("latin-1"), "0xe9 is not"),
    "Latin-1 in CSV": ("x.csv", lambda: "text\né\n".encode("latin-1"), "line 2: byte 0xe9 is not"),
    "half of UTF-16": ("x.jsonl", lambda: FINE.decode().encode("utf-16")[:-1], "not: "),
    "a zip file": ("x.jsonl", _zip, "is a zip file"),
    "a page": ("x.jsonl", lambda: b"\n<!DOCTYPE html><html>404", "an HTML or XML page"),
    "a pointer": ("x.parquet", lambda: b"version https://git-lfs.github.com/spec/v1", "git lfs"),
    "a pickle": ("x.json", lambda: b"\x80\x04\x95\x00\x00", "a pickle, which is never loaded"),
    "an Arrow file": ("x.parquet", lambda: b"ARROW1\x00\x00", "an Arrow file"),
    "a picture": ("x.csv", lambda: b"\x89PNG\r\n\x1a\n", "a picture"),
    "something binary": ("x.jsonl", lambda: b"\x01\x00\xff\xd9" * 40, "no text"),
    "plain text": ("x.txt", lambda: b"Once upon a time\n", "neither JSON nor CSV"),
    "gzip cut off": ("x.jsonl", lambda: gzip.compress(FINE * 999)[:-9], "gzip file is cut off"),
    "gzip damaged": ("x.gz", lambda: b"\x1f\x8b" + bytes(range(99)), "gzip file is damaged"),
    "zstd cut off": ("x.jsonl.zst", lambda: _zstd(os.urandom(9999))[:-9], "zstd file is cut off"),
    "zstd damaged": ("x.zst", lambda: b"\x28\xb5\x2f\xfd" + b"\xff" * 99, "zstd file is damaged"),
    "packed too often": ("x.gz", lambda: _packed(4), "packed more than 3 times"),
    "a bomb": ("x.jsonl.gz", _bomb, "unpacks to more than 200 times its size"),
    "a bomb of one line": (
        "x.jsonl.gz",
        lambda: gzip.compress(b"[" + b" " * (90 << 20)),
        "unpacks to more than 200 times",
    ),
    "parquet of numbers": ("x.parquet", lambda: _bytes_of(_TABLE), "row 1: needs text"),
    "parquet of bytes": (
        "x.parquet",
        lambda: _bytes_of(pa.table({"text": [b"\xff"]})),
        "row 1: needs text",
    ),
    "parquet cut off": ("x.parquet", lambda: _bytes_of(_TABLE)[:-9], "damaged parquet"),
    "more cells": ("x.csv", lambda: b"text,label\na,b,c\n", "3 cells below a header of 2"),
    "an open quote": ("x.csv", lambda: b'text\n"a\nb\n', "line 2: not CSV"),
    "a column twice": ("x.csv", lambda: b"text,text\na,b\n", "column 'text' is there twice"),
    "a list that is none": ("x.csv", lambda: b"messages\n[x]\n", "messages is not JSON"),
    "a list as label": ("x.jsonl", lambda: b'{"text": "a", "label": ["x"]}', "found a list"),
    "a label of numbers": (
        "x.jsonl",
        lambda: b'{"text": "a", "label": 0.5}',
        "found 0.5, a number",
    ),
    "an object as client": ("x.jsonl", lambda: b'{"text": "a", "client_id": {}}', "an object"),
    "a truth as user": ("x.jsonl", lambda: b'{"text": "a", "user_id": true}', "true or false"),
    "label -1": ("x.jsonl", lambda: b'{"text": "a", "label": -1}', "label -1 stands for no label"),
}
"""What a file is → its name, how it is made, and what is said of it."""


def _packed(times: int) -> bytes:
    data = FINE
    for _ in range(times):
        data = gzip.compress(data)
    return data


def refused(path: Path, **chosen: Any) -> str:
    """The one line with which a source is refused."""
    with pytest.raises(DataError) as caught:
        read(Source(str(path), **chosen))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_named_in_one_line(what: str, tmp_path: Path) -> None:
    name, make, says = HOSTILE[what]
    path = tmp_path / name
    path.write_bytes(make())
    line = refused(path)
    assert says in line
    assert str(path) in line


def test_there_are_enough_hostile_files() -> None:
    assert len(HOSTILE) >= 30
    assert len(FORMS) * len(CONTAINERS) * len(ENCODINGS) == 9 * 8 * 3


@pytest.mark.parametrize("begin", [b'{"text": "', b'[{"text": "'])
def test_a_line_of_a_gigabyte_is_refused_without_being_read(begin: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.write(begin + b"a" * 99)
        file.truncate(1 << 30)  # sparse: it takes no room
    tracemalloc.start()
    line = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "64 MB" in line or "not JSON: Invalid control character" in line
    assert peak < 8 * streams.LONGEST


def test_a_bomb_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LONGEST", 1 << 20)
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(_zstd(b"\n" * (64 << 20)))
    tracemalloc.start()
    assert "200 times its size" in refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_what_is_gzip_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(gzip.compress(FINE) + gzip.compress(FINE))
    found = read(Source(str(path)))
    assert [row.text for row in found.examples] == ["a", "a"]
    assert found.reading.told() == "JSON lines, gzip, UTF-8"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.json", FINE, "JSON lines, UTF-8"),
        ("x.jsonl", b'[{"text": "a"}]', "a JSON array, UTF-8"),
        ("x.csv", FINE, "JSON lines, UTF-8"),
        ("x.jsonl", b"text\na\n", "CSV, UTF-8"),
        ("x.txt", b'"label";"text"\r\n"x";"a"\r\n', "CSV, UTF-8"),
        ("x", b"\xef\xbb\xbf" + FINE, "JSON lines, UTF-8 with a mark"),
        ("x.jsonl", FINE.decode().encode("utf-16-le"), "JSON lines, UTF-16-LE"),
        ("x.jsonl", FINE.decode().encode("utf-32"), "JSON lines, UTF-32"),
    ],
)
def test_a_container_follows_from_content(
    name: str, content: bytes, told: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = read(Source(str(path)))
    assert [row.text for row in found.examples] == ["a"]
    assert found.reading.told() == told


def test_rows_of_a_long_array_are_those_of_its_lines(tmp_path: Path) -> None:
    """Elements that lie across the pieces in which a file is read, longer ones than a piece too."""
    rows = [{"text": f"é{i} " + "x" * (i * 37 % 5000)} for i in range(200)]
    rows += [{"text": "日" * 300_000}, {"text": "end"}]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [row.text for row in read(Source(str(path))).examples] == [r["text"] for r in rows]


def test_columns_have_other_names(tmp_path: Path) -> None:
    """A column that is named is read for that; what was called so before is not."""
    path = tmp_path / "x.csv"
    path.write_text("response,prompt,who\nq,a,ann\n")
    swapped = {"prompt": "response", "response": "prompt", "client_id": "who"}
    assert read(Source(str(path), swapped)).examples == [Example("a", prompt="q", client="ann")]
    assert "no column 'body', which the key columns asks for; found response" in refused(
        path, columns={"text": "body"}
    )


def test_splits_have_other_names_and_others_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    names = ("train_sft", "test_sft", "unsupervised", "train_sft")
    path.write_text(_lines([{"text": str(i), "split": name} for i, name in enumerate(names)]))
    found = read(Source(str(path), splits={"train": "train_sft", "test": "test_sft"}))
    assert [(row.text, row.split) for row in found.examples] == [
        *(("0", "train"), ("1", "test"), ("3", "train"))
    ]
    assert found.reading.unread == {"unsupervised": 1}
    assert "--set splits.train=train_sft" in refused(path)
    assert "has no rows of the splits that are asked for: it has" in refused(
        path, splits={"train": "none"}
    )


def _tree(folder: Path, files: dict[str, Rows]) -> Path:
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_lines(rows))
    return folder


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (("b.jsonl", "a.jsonl"), [("a", None), ("b", None)]),
        (("x/a.jsonl", "y/a.jsonl"), [("x/a", None), ("y/a", None)]),
        (("train/a.jsonl", "test/a.jsonl"), [("a", "test"), ("a", "train")]),
        (("train.jsonl", "valid.jsonl"), [(None, "train"), (None, "validation")]),
        (
            ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"),
            [(None, "train"), (None, "train")],
        ),
        (("part-00000-of-00001.jsonl",), [(None, None)]),
        (("only.jsonl",), [(None, None)]),
    ],
)
def test_a_folder_is_clients_or_parts(
    files: tuple[str, ...], wanted: list[tuple[str | None, str | None]], tmp_path: Path
) -> None:
    folder = _tree(tmp_path / "set", {name: [{"text": "a"}] for name in files})
    (folder / "README.md").write_text("no data")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.jsonl").write_text("nothing")
    found = read(Source(str(folder)))
    assert [(row.client, row.split) for row in found.examples] == wanted
    assert found.reading.ignored == 1


def test_files_whose_rows_name_clients_are_parts(tmp_path: Path) -> None:
    named: dict[str, Rows] = {
        "a.jsonl": [{"text": "1", "client_id": "x"}],
        "b.jsonl": [{"text": "2", "client_id": "x"}],
    }
    folder = _tree(tmp_path / "set", named)
    assert [row.client for row in read(Source(str(folder))).examples] == ["x", "x"]
    _tree(folder, {"c.jsonl": [{"text": "3"}]})
    assert "in all files of a folder, or in none" in refused(folder)
    _tree(folder, {"a.jsonl": [{"text": "1"}], "b.jsonl": [{"text": "1"}, *named["b.jsonl"]]})
    assert "has client_id, and the first row of its file has none" in refused(folder)


def test_a_folder_without_data_is_said(tmp_path: Path) -> None:
    assert "no file in it ends in" in refused(tmp_path)


def test_the_fingerprint_is_of_every_byte(tmp_path: Path) -> None:
    folder = _tree(tmp_path, {"a.jsonl": [{"text": "a"}], "b.jsonl": [{"text": "b"}]})
    first = read(Source(str(folder))).fingerprint
    with (folder / "b.jsonl").open("a") as file:
        file.write(" \n")
    assert read(Source(str(folder))).fingerprint != first


def test_of_a_hub_configuration_and_splits_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*names: str) -> dict[str, Rows]:
        asked.append(names)
        return {"train_sft": [{"body": "a"}], "train_gen": [{"body": "b"}]}

    monkeypatch.setattr("datasets.load_dataset", load)
    found = read(Source("some/set", {"text": "body"}, {"train": "train_sft"}, "main"))
    assert asked == [("some/set", "main")]
    assert [(row.text, row.split) for row in found.examples] == [("a", "train")]
    assert found.reading.unread == {"train_gen": 1}
    with pytest.raises(DataError, match="has no split 'x': it has train_sft, train_gen"):
        read(Source("some/set", splits={"test": "x"}))
