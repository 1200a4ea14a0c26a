"""Certificates: what strict TLS takes, and one line for each file that is not what it should be."""

import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from corolla.errors import ConfigError
from corolla.host import certificates


def handshake(folder: Path, stem: str, name: str, ca: Path) -> str:
    """The TLS version that a strict client agrees on with a server that shows `stem`."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(folder / f"{stem}.pem", folder / f"{stem}.key")
    client = ssl.create_default_context(cafile=str(ca))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    theirs.settimeout(10)

    def serve() -> None:
        try:
            server.wrap_socket(ours, server_side=True).close()
        except OSError:
            ours.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(theirs, server_hostname=name) as secured:
            return str(secured.version())
    finally:
        theirs.close()
        thread.join()


def test_a_strict_client_takes_them_under_every_name(tmp_path: Path) -> None:
    certificates.make(tmp_path, ["fl.example.org", "10.1.2.3"], ["gate.example.org"])
    ca = tmp_path / "ca.pem"
    for name in ("fl.example.org", "10.1.2.3", "127.0.0.1", "localhost"):
        assert handshake(tmp_path, "server", name, ca) == "TLSv1.3"
    assert handshake(tmp_path, "gateway", "gate.example.org", ca) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, "server", "gate.example.org", ca)
    certificates.check(tmp_path)
    certificates.check(tmp_path, "gateway")


def test_another_ca_is_not_taken(tmp_path: Path) -> None:
    certificates.make(tmp_path / "a", ["fl.example.org"])
    certificates.make(tmp_path / "b", ["fl.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "a", "server", "fl.example.org", tmp_path / "b" / "ca.pem")


def test_keys_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    certificates.make(tmp_path / "new", [], ["g"])
    keys = sorted((tmp_path / "new").glob("*.key"))
    assert [key.name for key in keys] == ["ca.key", "gateway.key", "server.key"]
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    certificates.make(tmp_path, ["a"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"ca\.pem, ca\.key, server\.pem, server\.key already"):
        certificates.make(tmp_path, ["b"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("host", ["", "two words", "https://a", "a:9092", "ü.example"])
def test_a_host_must_be_a_name_or_an_address(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="neither a name nor an address"):
        certificates.make(tmp_path / "new", [host])
    assert not (tmp_path / "new").exists()


def test_each_wrong_file_is_one_line(tmp_path: Path) -> None:
    certificates.make(tmp_path / "a", ["a"])
    certificates.make(tmp_path / "b", ["b"])
    folder = tmp_path / "a"

    def said(stem: str = "server") -> str:
        with pytest.raises(ConfigError) as caught:
            certificates.check(folder, stem)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "cannot read" in said("gateway")
    kept = (folder / "server.key").read_bytes()
    (folder / "server.key").write_bytes((tmp_path / "b" / "server.key").read_bytes())
    assert "is not the key of" in said()
    (folder / "server.key").write_bytes(b"not a key")
    assert "is no private key" in said()
    (folder / "server.key").write_bytes(kept)
    (folder / "ca.pem").write_bytes((tmp_path / "b" / "ca.pem").read_bytes())
    assert "is not signed by" in said()
    (folder / "ca.pem").unlink()
    certificates.check(folder)  # of a public CA
    (folder / "server.pem").write_text("garbage")
    assert "is no certificate" in said()


def test_a_certificate_that_has_expired_is_named_with_its_dates(tmp_path: Path) -> None:
    certificates.make(tmp_path, ["a"], days=0)
    found = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    assert found.not_valid_after_utc <= datetime.now(UTC) + timedelta(seconds=1)
    with pytest.raises(ConfigError, match=r"is valid from .* today is"):
        certificates.check(tmp_path)


@pytest.mark.parametrize("form", ["ssh", "pem"])
@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()])
def test_public_keys_of_clients_become_pem(
    tmp_path: Path, form: str, curve: ec.EllipticCurve
) -> None:
    key = ec.generate_private_key(curve).public_key()
    pem = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    ssh = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path = tmp_path / "a.pub"
    path.write_bytes(ssh + b" a@b\n" if form == "ssh" else pem)
    assert certificates.public_key(path) == pem


def test_what_is_no_public_key_of_a_nist_curve_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pub"
    path.write_text("hello")
    with pytest.raises(ConfigError, match="is no public key"):
        certificates.public_key(path)
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    path.write_bytes(
        other.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    with pytest.raises(ConfigError, match="no key of a NIST curve"):
        certificates.public_key(path)
    curve = ec.generate_private_key(ec.SECP256K1()).public_key()
    path.write_bytes(
        curve.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    with pytest.raises(ConfigError, match="no key of a NIST curve"):
        certificates.public_key(path)
