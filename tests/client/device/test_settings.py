"""What a device is told by options and by a file: its data, its model, its limits."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from corolla.client.device import settings
from corolla.errors import ConfigError
from corolla.host.text import parse_bytes


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    return {"server": "host:9092", "data": str(data), "state": tmp_path / "state"}


def test_options_go_over_the_file(options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text(f'server = "a:1"\nmemory = "2GB"\nthreads = 3\ndata = "{options["data"]}"\n')
    found = settings.load(file, {"server": "b:2", "threads": 0, "name": None})
    assert (found.server, found.memory, found.threads) == ("b:2", 2_000_000_000, 3)
    file.write_text('micro-batch-size = 2\nroot-certificates = "ca.pem"\n')
    found = settings.load(file, options)
    assert found.micro_batch_size == 2
    assert found.root_certificates == Path.cwd() / "ca.pem"


def test_a_device_names_its_own_columns_and_splits(options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text('subset = "main"\n[columns]\ntext = "diary"\n[splits]\ntrain = "all"\n')
    found = settings.load(file, options)
    assert (found.columns, found.splits, found.subset) == (
        {"text": "diary"},
        {"train": "all"},
        "main",
    )
    found = settings.load(file, options | {"columns": ["prompt=q", "response=a=b"], "splits": None})
    assert (found.columns, found.splits) == ({"prompt": "q", "response": "a=b"}, {"train": "all"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": ["body"]}, "--columns: expected names as prompt=body, found"),
        ({"server": None}, "--server is missing"),
        ({"data": None}, "--data is missing"),
        ({"server": "https://host:1"}, "--server: expected HOST:PORT, without https://"),
        ({"server": "host"}, "--server: expected HOST:PORT"),
        ({"server": "host:0"}, "--server: expected HOST:PORT"),
        ({"server": "host:70000"}, "--server: expected HOST:PORT"),
        ({"data": "/none.jsonl"}, "--data: there is no such file, found '/none.jsonl'"),
        ({"name": "a/b"}, "--name: a name has 1 to 64 characters"),
        ({"memory": "much"}, "--memory: expected a size such as 2GB"),
        ({"run_disk": "lots"}, "--run-disk: expected a size such as 2GB"),
        ({"run_disk": "2GB", "disk": "1GB"}, "--disk: expected at least the bytes of --run-disk"),
        (
            {"run_disk": "9GB"},
            "--disk: expected at least the bytes of --run-disk, found 8000000000",
        ),
        ({"threads": -1}, "--threads: expected a whole number from 0, found -1"),
        ({"quantization": "2bit"}, "--quantization: expected one of none, 8bit, 4bit, found"),
        ({"allow": 3}, "--allow: expected a list, found 3"),
        ({"epsilon": 0.0}, "--epsilon: expected a number above 0, found 0.0"),
        ({"epsilon": -1.0}, "--epsilon: "),
        ({"delta": 0.0}, "--delta: "),
    ],
)
def test_a_mistake_is_one_line(options: dict[str, Any], changes: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings.load(None, options | changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_device_has_no_limit_of_privacy_unless_it_says_so(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """An epsilon of 0 is an error (above): it must not be taken for none."""
    found = settings.load(None, options | {"epsilon": None, "delta": None})
    assert (found.epsilon, found.delta) == (None, 1e-5)
    file = tmp_path / "client.toml"
    file.write_text("epsilon = 3\ndelta = 1e-6\n")
    found = settings.load(file, options)
    assert (found.epsilon, found.delta) == (3.0, 1e-6)
    found = settings.load(file, options | {"epsilon": 2.0})
    assert (found.epsilon, found.delta) == (2.0, 1e-6)


@pytest.mark.parametrize("server", ["[::1]:9092", "10.0.0.1:1", "a-b.example.org:443"])
def test_addresses(options: dict[str, Any], server: str) -> None:
    assert settings.load(None, options | {"server": server}).server == server


def test_a_mistake_in_the_file_is_one_line(options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    for text, message in (
        ('sever = "a:1"', "did you mean 'server'"),
        ("zzzzzzzzz = 1", "known are server"),
        ("server", "is not TOML"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            settings.load(file, options)
    with pytest.raises(ConfigError, match="cannot read"):
        settings.load(tmp_path / "none.toml", options)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2GB", 2 * 10**9),
        ("2 GiB", 2 * 2**30),
        ("512m", 512 * 10**6),
        ("1.5g", 1_500_000_000),
        ("100", 100),
        ("7kib", 7168),
    ],
)
def test_sizes(text: str, wanted: int) -> None:
    assert parse_bytes(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "2 XB", "2GBit"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "corolla", "client", *words],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_says_what_is_missing_before_it_loads_anything() -> None:
    done = command("--server", "host:1")
    assert (done.returncode, done.stderr) == (2, "error: --data is missing\n")
