"""Certificates for a federation of one's own: a small CA, and what servers show to clients.

`make` writes `ca.pem` (what clients are given), `server.pem` and, with `gateway`, `gateway.pem`,
each with its `.key`. `check` says in one line what is wrong with files, before anything starts.
"""

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from corolla.errors import ConfigError

Key = ec.EllipticCurvePrivateKey
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_SKEW = timedelta(days=1)
"""Devices whose clock is behind must not find a new certificate to be of the future."""


def make(folder: Path, hosts: Sequence[str], gateway: Sequence[str] = (), days: int = 825) -> None:
    """Write a CA and certificates for `hosts` (names, addresses; loopback is added).

    Keys are EC P-256 with mode 0600. Raises ConfigError for a host that is none, and when one of
    the files is there already: a new CA would lock out all clients of the old one.
    """
    names = {"server": _names(hosts)} | ({"gateway": _names(gateway)} if gateway else {})
    files = [folder / f"{stem}.{kind}" for stem in ("ca", *names) for kind in ("pem", "key")]
    if there := [path.name for path in files if path.exists()]:
        raise ConfigError(f"{folder} has {', '.join(there)} already: name another folder")
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = _name("Corolla federation CA")
    ca = _builder(ca_name, ca_name, ca_key, days)
    ca = ca.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    ca = ca.add_extension(_usage(signs=True), critical=True)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(folder / "ca", ca.sign(ca_key, hashes.SHA256()), ca_key)
        for stem, alternatives in names.items():
            key = ec.generate_private_key(ec.SECP256R1())
            leaf = _builder(_name(f"Corolla {stem}"), ca_name, key, days, ca_key)
            leaf = leaf.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            leaf = leaf.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
            )
            leaf = leaf.add_extension(_usage(signs=False), critical=True)
            leaf = leaf.add_extension(x509.BasicConstraints(False, None), critical=True)
            _write(folder / stem, leaf.sign(ca_key, hashes.SHA256()), key)
    except OSError as error:
        raise ConfigError(f"cannot write certificates to {folder}: {error.strerror}") from error


def check(folder: Path, stem: str = "server") -> None:
    """Checks that `folder` has a certificate that can be shown to clients. Raises ConfigError."""
    where = folder / f"{stem}.pem"
    chain = check_pair(where, folder / f"{stem}.key")
    if not (folder / "ca.pem").exists():
        return  # of a public CA, which clients know
    ca = _certificates(folder / "ca.pem")[0]
    try:
        chain[-1].verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise ConfigError(f"{where} is not signed by {folder / 'ca.pem'}") from error


def check_pair(where: Path, key_file: Path) -> list[x509.Certificate]:
    """The chain in a certificate's file, if it is valid now and this is its key.

    Raises ConfigError.
    """
    chain = _certificates(where)
    found, key = chain[0], _key(key_file)
    now = datetime.now(UTC)
    if not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
        raise ConfigError(
            f"{where} is valid from {found.not_valid_before_utc:%Y-%m-%d} to "
            f"{found.not_valid_after_utc:%Y-%m-%d}, today is {now:%Y-%m-%d}: make new ones with "
            f"corolla certs, or set the clock"
        )
    if _public(found.public_key()) != _public(key.public_key()):
        raise ConfigError(f"{key_file} is not the key of {where}")
    return chain


def public_key(path: Path) -> bytes:
    """A client's public key file (OpenSSH or PEM, of a NIST curve) as PEM. Raises ConfigError."""
    data = _read(path)
    try:
        ssh = data.startswith((b"ecdsa-", b"ssh-"))
        load = serialization.load_ssh_public_key if ssh else serialization.load_pem_public_key
        key = load(data)
    except Exception as error:
        raise ConfigError(f"{path} is no public key: {_first_line(error)}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise ConfigError(f"{path} is no key of a NIST curve: make one with corolla client")
    return _public(key)


def _names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    found: dict[str, x509.GeneralName] = {}
    for host in (*hosts, *LOOPBACK):
        try:
            found[host] = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            try:
                found[host] = x509.DNSName(host)
            except ValueError as error:
                raise ConfigError(f"--host {host!r} is neither a name nor an address") from error
            if not host or any(c in host for c in " /:@"):
                raise ConfigError(f"--host {host!r} is neither a name nor an address") from None
    return list(found.values())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Key, days: int, ca_key: Key | None = None
) -> x509.CertificateBuilder:
    """With the two identifiers that strict verifiers ask for."""
    signer = (ca_key or key).public_key()
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _write(stem: Path, certificate: x509.Certificate, key: Key) -> None:
    """The key first, readable by its owner alone from the moment it exists."""
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    descriptor = os.open(stem.with_suffix(".key"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(private)
    stem.with_suffix(".pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise ConfigError(f"{path} is no certificate: {_first_line(error)}") from error


def _key(path: Path) -> Key:
    try:
        key = serialization.load_pem_private_key(_read(path), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no private key: {_first_line(error)}") from error
    return key  # type: ignore[return-value]  # of any kind: only its public half is compared


def _public(key: object) -> bytes:
    return key.public_bytes(  # type: ignore[attr-defined,no-any-return]
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; corolla certs makes certificates"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
