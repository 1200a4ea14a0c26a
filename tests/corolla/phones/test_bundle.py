"""Manifests: what is signed is what is read, and every way to be wrong is one line."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from corolla.errors import ArtefactError, ConfigError
from corolla.phones import bundle

SHA = "ab" * 32


def manifest(**changes: Any) -> bundle.Manifest:
    fields: dict[str, Any] = {
        "model": "tiny",
        "model_sha256": SHA,
        "executorch": "1.5.1",
        "executorch_min": "1.5.0",
        "rank": 2,
        "targets": ["q"],
        "vocab": 258,
        "length": 32,
        "tokenizer": {"files": ["tokenizer.json"], "eos": 0, "pad": 1, "bos": None},
        "adapter": [{"name": "q.lora_A", "shape": [2, 8]}, {"name": "q.lora_B", "shape": [6, 2]}],
        "programs": [
            {
                "name": "fp32",
                "base": "fp32",
                "files": ["fp32.pte"],
                "eps": [1e-4, 1e-2],
                "methods": {"loss": {"file": "fp32.pte", "planned": {"16": 100, "32": 200}}},
            }
        ],
        "files": {
            "fp32.pte": {"sha256": SHA, "bytes": 3},
            "tokenizer.json": {"sha256": SHA, "bytes": 3},
        },
    }
    return bundle.Manifest.model_validate({**fields, **changes})


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    """(a bundle, its publisher's public key)."""
    folder, key = tmp_path / "bundle", tmp_path / "keys" / "publisher.key"
    folder.mkdir()
    for name in ("fp32.pte", "tokenizer.json"):
        (folder / name).write_text(name)
    files = {name: bundle.describe(folder / name) for name in ("fp32.pte", "tokenizer.json")}
    bundle.write(folder, manifest(files=files), bundle.signing_key(key))
    return folder, key.with_suffix(".pub")


def refused(folder: Path, publisher: Path | None = None) -> str:
    with pytest.raises(ArtefactError) as caught:
        bundle.read(folder, publisher)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / bundle.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_what_is_written_is_read(signed: tuple[Path, Path]) -> None:
    folder, publisher = signed
    found = bundle.read(folder, publisher)
    assert found == bundle.read(folder)
    assert found.values == 2 * 8 + 6 * 2
    assert found.program("fp32").methods["loss"].planned == {16: 100, 32: 200}
    assert len((folder / bundle.SIGNATURE).read_bytes()) == 64
    bundle.verify(folder, found)


def test_the_file_has_the_fields_that_other_languages_read(signed: tuple[Path, Path]) -> None:
    fields = json.loads((signed[0] / bundle.MANIFEST).read_text())
    assert fields.keys() == {
        *(
            "version",
            "serial",
            "model",
            "model_sha256",
            "signs",
            "executorch",
            "executorch_min",
            "rank",
        ),
        *("targets", "vocab", "length", "tokenizer", "adapter", "programs", "files"),
    }
    assert fields["adapter"][0] == {"name": "q.lora_A", "shape": [2, 8]}
    assert fields["programs"][0]["methods"]["loss"]["planned"]["32"] == 200
    assert fields["programs"][0]["eps"] == [1e-4, 1e-2]


def test_every_byte_is_signed(signed: tuple[Path, Path]) -> None:
    folder, publisher = signed
    path = folder / bundle.MANIFEST
    path.write_bytes(path.read_bytes() + b" ")
    assert "is not what the owner of" in refused(folder, publisher)
    assert bundle.read(folder).rank == 2  # without a key nothing is claimed


def test_another_publisher(signed: tuple[Path, Path], tmp_path: Path) -> None:
    bundle.signing_key(tmp_path / "other.key")
    assert "is not what the owner of" in refused(signed[0], tmp_path / "other.pub")


def signed_again(folder: Path, publisher: Path, serial: int) -> None:
    key = bundle.signing_key(publisher.with_suffix(".key"))
    found = bundle.read(folder).model_copy(update={"serial": serial})
    bundle.write(folder, found, key)


def test_an_older_bundle_of_a_publisher_is_refused_once_a_newer_was_seen(
    signed: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, publisher = signed
    seen = tmp_path / "serials.json"
    assert bundle.read(folder, publisher, seen).serial == 0  # of a manifest that says none
    for serial in (5, 5, 9):
        signed_again(folder, publisher, serial)
        assert bundle.read(folder, publisher, seen).serial == serial
    for serial in (8, 0):
        signed_again(folder, publisher, serial)
        with pytest.raises(ArtefactError, match=f"its serial is {serial}, 9 was seen here"):
            bundle.read(folder, publisher, seen)
        assert bundle.read(folder, publisher).serial == serial  # by who has seen none
    raw = bundle.signing_key(publisher.with_suffix(".key")).public_key().public_bytes_raw()
    assert json.loads(seen.read_text()) == {hashlib.sha256(raw).hexdigest(): 9}
    assert seen.stat().st_mode & 0o777 == 0o600


def test_serials_are_a_publishers_own_and_an_unsigned_one_counts_for_nothing(
    signed: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, publisher = signed
    seen = tmp_path / "serials.json"
    signed_again(folder, publisher, 9)
    bundle.read(folder, publisher, seen)
    other = tmp_path / "other.pub"
    bundle.signing_key(other.with_suffix(".key"))
    signed_again(folder, other, 3)
    assert bundle.read(folder, other, seen).serial == 3
    edited(folder, serial=bundle.LAST_SERIAL)
    with pytest.raises(ArtefactError, match="is not what the owner of"):
        bundle.read(folder, publisher, seen)
    assert sorted(json.loads(seen.read_text()).values()) == [3, 9]


@pytest.mark.parametrize("text", ["", "[]", '{"ab": "x"}', "3"])
def test_a_damaged_note_of_serials_lets_no_bundle_in(
    signed: tuple[Path, Path], tmp_path: Path, text: str
) -> None:
    folder, publisher = signed
    (tmp_path / "serials.json").write_text(text)
    with pytest.raises(ArtefactError, match="which bundles are old: delete it"):
        bundle.read(folder, publisher, tmp_path / "serials.json")


@pytest.mark.parametrize("serial", [-1, bundle.LAST_SERIAL + 1, 1.5, "new"])
def test_a_serial_that_is_none_is_refused(signed: tuple[Path, Path], serial: object) -> None:
    assert "serial" in refused(edited(signed[0], serial=serial))


def test_a_signature_that_is_not_there(signed: tuple[Path, Path]) -> None:
    folder, publisher = signed
    (folder / bundle.SIGNATURE).unlink()
    assert "is not signed: manifest.sig: No such file" in refused(folder, publisher)


def test_a_key_that_is_none(signed: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "no.pub").write_text("hello")
    assert "is no public key" in refused(signed[0], tmp_path / "no.pub")
    assert "is no public key" in refused(signed[0], tmp_path / "missing.pub")
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    (tmp_path / "ec.pub").write_bytes(
        other.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    assert "is not an Ed25519 key" in refused(signed[0], tmp_path / "ec.pub")


def test_no_manifest(tmp_path: Path) -> None:
    assert "is no bundle: manifest.json: No such file" in refused(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000])
def test_no_json(signed: tuple[Path, Path], raw: bytes) -> None:
    (signed[0] / bundle.MANIFEST).write_bytes(raw)
    assert "is not JSON" in refused(signed[0])


@pytest.mark.parametrize("field", ["version", "signs"])
@pytest.mark.parametrize("value", [0, 2, "1", None])
def test_another_version(signed: tuple[Path, Path], field: str, value: object) -> None:
    said = refused(edited(signed[0], **{field: value}))
    assert f"has {field} {value!r}, this Corolla knows 1" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": "many"}, "rank"),
        ({"length": 1}, "length"),
        ({"model_sha256": "ab"}, "model_sha256"),
        ({"files": {"../fp32.pte": {"sha256": SHA, "bytes": 3}}}, "files"),
        ({"files": {".hidden": {"sha256": SHA, "bytes": 3}}}, "files"),
        ({"files": {"a/b": {"sha256": SHA, "bytes": 3}}}, "files"),
        ({"files": {}}, "fp32.pte is used but not among its files"),
        ({"adapter": []}, "not sorted by name"),
        ({"adapter": [{"name": "a", "shape": [1, 1]}] * 2}, "not sorted by name"),
        (
            {"adapter": [{"name": "b", "shape": [1, 1]}, {"name": "a", "shape": [1, 1]}]},
            "not sorted by name",
        ),
        ({"adapter": [{"name": "a", "shape": [0, 1]}]}, "adapter.0.shape.0"),
        ({"programs": []}, "it has no programs"),
        ({"length": 33}, "planned says nothing of 33 tokens"),
    ],
)
def test_fields_that_are_wrong(
    signed: tuple[Path, Path], changes: dict[str, Any], said: str
) -> None:
    assert said in refused(edited(signed[0], **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eps": [1e-2, 1e-4]}, "its eps is no range"),
        ({"eps": [0.0, 1e-4]}, "eps"),
        ({"methods": {}}, "has no methods"),
        ({"methods": {"infer": {"file": "fp32.pte", "planned": {"32": 1}}}}, "methods"),
        ({"methods": {"loss": {"file": "tokenizer.json", "planned": {"32": 1}}}}, "has no file"),
    ],
)
def test_programs_that_are_wrong(
    signed: tuple[Path, Path], changes: dict[str, Any], said: str
) -> None:
    program = json.loads((signed[0] / bundle.MANIFEST).read_text())["programs"][0]
    assert said in refused(edited(signed[0], programs=[{**program, **changes}]))


def test_files_that_are_not_those(signed: tuple[Path, Path]) -> None:
    folder, _ = signed
    found = bundle.read(folder)
    (folder / "tokenizer.json").write_text("tokenizer.jsom")
    bundle.verify(folder, found, ["fp32.pte"])
    with pytest.raises(ArtefactError, match=r"tokenizer.json has sha256 [0-9a-f]{16}…, its"):
        bundle.verify(folder, found)
    (folder / "tokenizer.json").write_text("short")
    with pytest.raises(ArtefactError, match="has 5 bytes, its manifest says 14"):
        bundle.verify(folder, found)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtefactError, match=r"tokenizer.json cannot be read: No such file"):
        bundle.verify(folder, found, ["tokenizer.json"])


def test_an_unknown_program() -> None:
    with pytest.raises(ArtefactError, match=r"no program 'q4': it has fp32"):
        manifest().program("q4")


@pytest.mark.parametrize(("length", "planned"), [(2, 100), (16, 100), (17, 200), (32, 200)])
def test_memory_of_a_length_is_that_of_the_next_one(length: int, planned: int) -> None:
    assert manifest().programs[0].methods["loss"].bytes_at(length) == planned


def test_memory_of_too_many_tokens() -> None:
    with pytest.raises(ValueError, match="33 tokens are more than the 32"):
        manifest().programs[0].methods["loss"].bytes_at(33)


def test_what_cannot_be_read_is_not_signed(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="it has no programs"):
        bundle.write(tmp_path, manifest(programs=[]), bundle.signing_key(tmp_path / "k.key"))
    assert not (tmp_path / bundle.SIGNATURE).exists()


def test_a_key_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "publisher.key"
    first, second = bundle.signing_key(path), bundle.signing_key(path)
    assert first.private_bytes_raw() == second.private_bytes_raw()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_public_half_is_made_of_its_key_and_never_replaced(tmp_path: Path) -> None:
    path, public = tmp_path / "publisher.key", tmp_path / "publisher.pub"
    bundle.signing_key(path)
    made = public.read_bytes()
    public.unlink()
    bundle.signing_key(path)
    assert public.read_bytes() == made
    path.unlink()
    with pytest.raises(ConfigError, match=r"does not exist, though .*publisher.pub does"):
        bundle.signing_key(path)
    assert public.read_bytes() == made
    assert not path.exists()


def test_a_key_is_not_called_as_its_public_half(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is what its public half would be called"):
        bundle.signing_key(tmp_path / "publisher.pub")
    assert not list(tmp_path.iterdir())


def test_a_key_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "publisher.key"
    path.write_text("hello")
    with pytest.raises(ConfigError, match="cannot be read"):
        bundle.signing_key(path)
    other = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(
        other.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with pytest.raises(ConfigError, match="is not an Ed25519 key"):
        bundle.signing_key(path)


def test_a_gateway_reads_bundles_without_torch() -> None:
    code = "import sys, corolla.phones.bundle; print({'torch', 'executorch'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
