"""The folder that `corolla export --to executorch` writes for native clients, and its manifest.

`manifest.json` says what the programs are, what they cost in memory and which bytes every file has;
`manifest.sig` is the publisher's Ed25519 signature (RFC 8032) over its exact bytes. Whoever has the
publisher's public key needs to trust nobody else: not the gateway, not the way the files came.
Neither torch nor ExecuTorch is imported, so that a gateway reads bundles for free.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from corolla.errors import ArtefactError, ConfigError
from corolla.host.files import write_atomic

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
VERSION = 1
SIGNS = 1
"""The version of proto/signs-v1.md that a client of these bundles speaks."""

SERIALS = "serials.json"
"""The name of the file, in a state folder, of the newest bundle that was seen of each publisher."""
LAST_SERIAL = 2**53 - 1
"""The highest serial number: every reader of JSON has it exactly."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# A file lies in the folder itself: a name can lead nowhere else.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")]
Count = Annotated[int, Field(ge=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class File(_Frozen):
    """A file of the bundle, with the sha256 and the bytes that it must have."""

    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


class Tensor(_Frozen):
    """One LoRA factor: `<module>.lora_A` (rank, in) or `<module>.lora_B` (out, rank), fp32."""

    name: str
    shape: tuple[Count, Count]


class Method(_Frozen):
    """A way to run a program: `loss` (forward passes alone) or `grad` (backpropagation)."""

    file: Name
    planned: dict[int, Count]
    """Tokens of a sequence → bytes of memory of the whole process that runs it."""

    def bytes_at(self, length: int) -> int:
        """Planned bytes for sequences of at most `length` tokens: those of the next length listed.

        Raises ValueError for more tokens than any.
        """
        fitting = [tokens for tokens in self.planned if tokens >= length]
        if not fitting:
            raise ValueError(
                f"{length} tokens are more than the {max(self.planned)} it is made for"
            )
        return self.planned[min(fitting)]


class Program(_Frozen):
    """The base model in one numeric format, with its methods."""

    name: str
    base: str
    files: tuple[Name, ...]
    eps: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    """Steps (smallest, largest) at which projected gradients are sound with this base."""
    methods: dict[Literal["loss", "grad"], Method]


class Tokenizer(_Frozen):
    """Files and special tokens, for the app that turns its text into token ids."""

    files: tuple[Name, ...]
    eos: int | None
    pad: int
    bos: int | None


class Manifest(_Frozen):
    """All that a native client and its gateway know of a bundle."""

    version: Literal[1] = 1
    serial: Annotated[int, Field(ge=0, le=LAST_SERIAL)] = 0
    """Which of its publisher's bundles is newer: the higher number."""
    model: str
    model_sha256: Sha256
    signs: Literal[1] = 1
    executorch: str
    executorch_min: str
    rank: Count
    targets: tuple[str, ...]
    vocab: Count
    length: Annotated[int, Field(ge=2)]
    tokenizer: Tokenizer
    adapter: tuple[Tensor, ...]
    programs: tuple[Program, ...]
    files: dict[Name, File]

    @property
    def values(self) -> int:
        """How many values the adapter has."""
        return sum(tensor.shape[0] * tensor.shape[1] for tensor in self.adapter)

    def program(self, name: str) -> Program:
        """By its name. Raises ArtefactError for one that the bundle does not have."""
        for program in self.programs:
            if program.name == name:
                return program
        names = ", ".join(program.name for program in self.programs)
        raise ArtefactError(f"the bundle of {self.model} has no program {name!r}: it has {names}")


def read(folder: Path, publisher: Path | None = None, serials: Path | None = None) -> Manifest:
    """The manifest of a bundle; with the file of a public key, only if its owner has signed it.

    `serials` is the file of the newest bundle that was seen of each publisher: an older one is
    refused, a newer one noted. Raises ArtefactError, also for a manifest of another version. Files
    are not read: see `verify`.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ArtefactError(
            f"{folder} is no bundle: {MANIFEST}: {error.strerror}; corolla export makes one"
        ) from error
    if publisher is None:
        return parse(raw, str(path))
    key = _check_signature(folder, raw, publisher)
    manifest = parse(raw, str(path))
    if serials is not None:
        note_serial(serials, key, manifest.serial)
    return manifest


def note_serial(path: Path, publisher: bytes, serial: int) -> None:
    """Note a serial number, the highest of its publisher, whose raw public key has 32 bytes.

    Raises ArtefactError for one that is lower than a noted one, and for a file that is damaged: who
    could damage it would bring old bundles back.
    """
    name = hashlib.sha256(publisher).hexdigest()
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
        seen = {str(own): int(number) for own, number in known.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"{path} cannot be read: {_first_line(error)}; it says which bundles are old: delete "
            f"it to trust the next one"
        ) from error
    newest = seen.get(name, 0)
    if serial < newest:
        raise ArtefactError(
            f"the bundle is older than one that its publisher signed: its serial is {serial}, "
            f"{newest} was seen here"
        )
    if serial > newest:
        seen[name] = serial
        write_atomic(path, (json.dumps(seen) + "\n").encode(), private=True)


def parse(raw: bytes, where: str = MANIFEST) -> Manifest:
    """A manifest from its bytes. Raises ArtefactError that names the first field that is wrong."""
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ArtefactError(f"{where} must be an object, found {type(fields).__name__}")
    for field, known in (("version", VERSION), ("signs", SIGNS)):
        if fields.get(field) != known:
            raise ArtefactError(
                f"{where} has {field} {fields.get(field)!r}, this Corolla knows {known}: "
                f"export the model again, or use a newer Corolla"
            )
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"])) or "it"
        raise ArtefactError(f"{where} cannot be used: {at}: {first['msg']}") from error
    if wrong := _inconsistent(manifest):
        raise ArtefactError(f"{where} cannot be used: {wrong}")
    return manifest


def verify(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Hash files of a bundle, all of them by default. Raises ArtefactError for the first that is
    missing or has other bytes than its manifest says.
    """
    for name in manifest.files if names is None else names:
        wanted = manifest.files[name]
        try:
            found = describe(folder / name)
        except OSError as error:
            raise ArtefactError(f"{folder}: {name} cannot be read: {error.strerror}") from error
        if found.bytes != wanted.bytes:
            raise ArtefactError(
                f"{folder}: {name} has {found.bytes} bytes, its manifest says {wanted.bytes}"
            )
        if found.sha256 != wanted.sha256:
            raise ArtefactError(
                f"{folder}: {name} has sha256 {found.sha256[:16]}…, its manifest says "
                f"{wanted.sha256[:16]}…"
            )


def describe(path: Path) -> File:
    """sha256 and size of a file, in constant memory. Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return File(sha256=digest.hexdigest(), bytes=file.tell())


def write(folder: Path, manifest: Manifest, key: Ed25519PrivateKey) -> None:
    """Write a manifest and its signature beside the files that it describes."""
    raw = (manifest.model_dump_json(indent=1) + "\n").encode()
    parse(raw)  # nothing is signed that cannot be read
    (folder / MANIFEST).write_bytes(raw)
    (folder / SIGNATURE).write_bytes(key.sign(raw))


def signing_key(path: Path) -> Ed25519PrivateKey:
    """The publisher's key: PEM (PKCS#8). Where there is none, a new one with mode 0600.

    Its public half lies beside it as `.pub` (PEM, SubjectPublicKeyInfo): what devices are given.
    Where that is missing, it is made of the key. Raises ConfigError for a file that holds anything
    else, and for a public half without its key.
    """
    public = path.with_suffix(".pub")
    if path == public:
        raise ConfigError(f"--key {path} is what its public half would be called: drop the .pub")
    if not path.exists():
        if public.exists():
            raise ConfigError(f"--key {path} does not exist, though {public} does: name a new one")
        _make_key(path)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--key {path} cannot be read: {_first_line(error)}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"--key {path} is not an Ed25519 key: name a file that does not exist")
    if not public.exists():
        _write_public(key, public)
    return key


def _make_key(path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(private)
    except OSError as error:
        raise ConfigError(f"cannot write a key to {path}: {error.strerror}") from error


def _write_public(key: Ed25519PrivateKey, path: Path) -> None:
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    try:
        path.write_bytes(public)
    except OSError as error:
        raise ConfigError(f"cannot write a key to {path}: {error.strerror}") from error


def _check_signature(folder: Path, raw: bytes, publisher: Path) -> bytes:
    """The publisher's raw public key, 32 bytes, if it has signed. Raises ArtefactError."""
    try:
        key = serialization.load_pem_public_key(publisher.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{publisher} is no public key: {_first_line(error)}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ArtefactError(
            f"{publisher} is not an Ed25519 key: corolla export writes publisher.pub"
        )
    try:
        key.verify((folder / SIGNATURE).read_bytes(), raw)
    except OSError as error:
        raise ArtefactError(f"{folder} is not signed: {SIGNATURE}: {error.strerror}") from error
    except InvalidSignature as error:
        raise ArtefactError(
            f"{folder / MANIFEST} is not what the owner of {publisher} has signed"
        ) from error
    return key.public_bytes_raw()


def _inconsistent(manifest: Manifest) -> str:
    """Returns in words what of a manifest contradicts the rest of it; empty where nothing does."""
    named = {name for program in manifest.programs for name in program.files}
    named |= set(manifest.tokenizer.files)
    if unknown := sorted(named - manifest.files.keys()):
        return f"{unknown[0]} is used but not among its files"
    names = [tensor.name for tensor in manifest.adapter]
    if not names or names != sorted(set(names)):
        return "the tensors of its adapter are not sorted by name, each once"
    for program in manifest.programs:
        for kind, method in program.methods.items():
            if method.file not in program.files:
                return f"{program.name} has no file {method.file} for its method {kind}"
            if not method.planned or max(method.planned) < manifest.length:
                return f"{program.name}, {kind}: planned says nothing of {manifest.length} tokens"
        if not program.methods or program.eps[0] > program.eps[1]:
            return f"{program.name} has no methods, or its eps is no range"
    return "" if manifest.programs else "it has no programs"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
