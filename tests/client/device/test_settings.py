import errno
import hashlib
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from corolla.client.device import settings
from corolla.errors import ConfigError, CorollaError
from corolla.host.certificates import public_key
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": None}, "--server is missing"),
        ({"data": None}, "--data is missing"),
        ({"server": "https://host:1"}, "--server: expected HOST:PORT, without https://"),
        ({"server": "host"}, "--server: expected HOST:PORT"),
        ({"server": "host:0"}, "--server: expected HOST:PORT"),
        ({"server": "host:70000"}, "--server: expected HOST:PORT"),
        ({"data": "/none.jsonl"}, "--data: there is no such file; found '/none.jsonl'"),
        ({"name": "a/b"}, "--name: a name has 1 to 64 characters"),
        ({"memory": "much"}, "--memory: expected a size such as 2GB"),
        ({"threads": -1}, "--threads: "),
        ({"quantization": "2bit"}, "--quantization: "),
        ({"epsilon": 0.0}, "--epsilon: Input should be greater than 0; found 0.0"),
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


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    first, made = settings.identity(tmp_path / "state")
    content = first.private.read_bytes()
    second, again = settings.identity(tmp_path / "state")
    assert (made, again) == (True, False)
    assert first == second
    assert first.private.read_bytes() == content
    assert stat.S_IMODE(first.private.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert not list((tmp_path / "state").glob("*.part"))


def test_flower_and_the_server_read_the_key(tmp_path: Path) -> None:
    """flower-supernode takes OpenSSH keys of NIST curves; its public half goes to the server."""
    found, _ = settings.identity(tmp_path)
    key = serialization.load_ssh_private_key(found.private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP384R1)
    pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert public_key(found.public) == pem
    assert found.fingerprint == hashlib.sha256(pem.strip()).hexdigest()[:16]
    assert found.name == f"client-{found.fingerprint}"
    assert found.public.read_text().split()[0] == "ecdsa-sha2-nistp384"


def test_names_of_keys_differ(tmp_path: Path) -> None:
    assert settings.identity(tmp_path / "a")[0].name != settings.identity(tmp_path / "b")[0].name


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAA"])
def test_a_damaged_key_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    """A new one would be another client: its owner decides."""
    (tmp_path / "client.key").write_bytes(content)
    with pytest.raises(ConfigError, match="is no private key"):
        settings.identity(tmp_path)
    assert (tmp_path / "client.key").read_bytes() == content


def test_a_key_can_be_made_before_there_is_anything_else(tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text(f'state = "{tmp_path / "here"}"\n')
    assert settings.make_key(file, {}).private == tmp_path / "here" / "client.key"
    assert (
        settings.make_key(file, {"state": tmp_path / "there"}).private.parent == tmp_path / "there"
    )


def test_state_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CorollaError, match="cannot use"):
        settings.identity(tmp_path / "file" / "state")


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "corolla", "client", *words],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_makes_a_key_and_says_where_it_is(tmp_path: Path) -> None:
    done = command("--make-key", "--state", str(tmp_path / "state"))
    path, fingerprint = done.stdout.split()
    assert (done.returncode, Path(path).name) == (0, "client.pub")
    assert settings.identity(tmp_path / "state") == (
        settings.Identity(tmp_path / "state" / "client.key", Path(path), fingerprint),
        False,
    )


def test_the_command_says_what_is_missing_before_it_loads_anything() -> None:
    done = command("--server", "host:1")
    assert (done.returncode, done.stderr) == (2, "error: --data is missing\n")


def test_a_key_that_is_there_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk a client still starts; what cannot be made is no error of the settings."""

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    first, _ = settings.identity(tmp_path / "state")
    monkeypatch.setattr(settings, "write_atomic", full)
    assert settings.identity(tmp_path / "state") == (first, False)
    with pytest.raises(CorollaError, match="No space left") as caught:
        settings.identity(tmp_path / "new")
    assert caught.value.exit_code == 1
    first.public.write_text("another")
    monkeypatch.undo()
    settings.identity(tmp_path / "state")
    assert first.name in first.public.read_text()
