"""The key of a device: made once, readable by its owner alone, never replaced."""

import errno
import hashlib
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from corolla.client.device import identity
from corolla.errors import ConfigError, CorollaError
from corolla.host.certificates import public_key


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    first, made = identity.identity(tmp_path / "state")
    content = first.private.read_bytes()
    second, again = identity.identity(tmp_path / "state")
    assert (made, again) == (True, False)
    assert first == second
    assert first.private.read_bytes() == content
    assert stat.S_IMODE(first.private.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert not list((tmp_path / "state").glob("*.part"))


def test_flower_and_the_server_read_the_key(tmp_path: Path) -> None:
    """flower-supernode takes OpenSSH keys of NIST curves; its public half goes to the server."""
    found, _ = identity.identity(tmp_path)
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
    assert identity.identity(tmp_path / "a")[0].name != identity.identity(tmp_path / "b")[0].name


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAA"])
def test_a_damaged_key_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    """A new one would be another client: its owner decides."""
    (tmp_path / "client.key").write_bytes(content)
    with pytest.raises(ConfigError, match="is no private key"):
        identity.identity(tmp_path)
    assert (tmp_path / "client.key").read_bytes() == content


def test_a_key_can_be_made_before_there_is_anything_else(tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text(f'state = "{tmp_path / "here"}"\n')
    assert identity.make_key(file, {}).private == tmp_path / "here" / "client.key"
    assert (
        identity.make_key(file, {"state": tmp_path / "there"}).private.parent == tmp_path / "there"
    )


def test_state_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CorollaError, match="cannot use"):
        identity.identity(tmp_path / "file" / "state")


def test_the_command_makes_a_key_and_says_where_it_is(tmp_path: Path) -> None:
    words = ["client", "--make-key", "--state", str(tmp_path / "state")]
    done = subprocess.run(
        [sys.executable, "-m", "corolla", *words], capture_output=True, text=True, check=False
    )
    path, fingerprint = done.stdout.split()
    assert (done.returncode, Path(path).name) == (0, "client.pub")
    assert identity.identity(tmp_path / "state") == (
        identity.Identity(tmp_path / "state" / "client.key", Path(path), fingerprint),
        False,
    )


def test_a_key_that_is_there_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk a client still starts; what cannot be made is no error of the settings."""

    def full(path: Path, data: bytes, private: bool = False) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    first, _ = identity.identity(tmp_path / "state")
    monkeypatch.setattr(identity, "write_atomic", full)
    assert identity.identity(tmp_path / "state") == (first, False)
    with pytest.raises(CorollaError, match="No space left") as caught:
        identity.identity(tmp_path / "new")
    assert caught.value.exit_code == 1
    first.public.write_text("another")
    monkeypatch.undo()
    identity.identity(tmp_path / "state")
    assert first.name in first.public.read_text()
