"""Checkpoints: the state after each committed round, two generations, checked before use."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from corolla.errors import ArtefactError, WireError
from corolla.host.files import sync_folder, write_atomic
from corolla.types import Payload
from corolla.wire import codec

_KEPT = 2
_MEMORY = "memory:"


@dataclass(frozen=True)
class Checkpoint:
    """The values that a run needs to go on after `round` as if it had never stopped."""

    run_id: str
    round: int
    state: Payload
    held: Mapping[str, frozenset[str]]
    memory: Payload = field(default_factory=dict)
    """Groups that the server remembers beside the strategy's state."""
    sha256: str = ""
    """Of the file of tensors that it was read from or written to."""


def save(folder: Path, checkpoint: Checkpoint) -> str:
    """Write a generation: tensors first, then the note that makes them valid; drop old ones.

    Returns the sha256 of the tensors. A crash at any moment leaves the previous generation as it
    was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"round-{checkpoint.round:06d}"
    remembered = {_MEMORY + group: params for group, params in checkpoint.memory.items()}
    data = codec.encode({**checkpoint.state, **remembered})
    note = {
        "run_id": checkpoint.run_id,
        "round": checkpoint.round,
        "sha256": hashlib.sha256(data).hexdigest(),
        "held": {client: sorted(ids) for client, ids in sorted(checkpoint.held.items())},
    }
    write_atomic(folder / f"{stem}.safetensors", data)
    text = json.dumps(note)
    signed = {"note": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_atomic(folder / f"{stem}.json", json.dumps(signed).encode())
    sync_folder(folder)
    prune(folder)
    return str(note["sha256"])


def prune(folder: Path, kept: int = _KEPT) -> None:
    """Drop all generations but the newest ones."""
    for old in sorted(folder.glob("round-*.json"))[:-kept]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def load(folder: Path, committed: Mapping[int, str] | None = None) -> Checkpoint | None:
    """The newest generation whose tensors match their note; None when there is none at all.

    With `committed` (round → sha256, of the journal) it must be one of these: what a process wrote
    that died before it could say so does not count. Raises ArtefactError when generations should
    exist and there is not one to go on from.
    """
    notes = sorted(folder.glob("round-*.json"), reverse=True)
    for path in notes:
        try:
            signed = json.loads(path.read_bytes())
            if hashlib.sha256(signed["note"].encode()).hexdigest() != signed["sha256"]:
                continue
            note = json.loads(signed["note"])
            data = path.with_suffix(".safetensors").read_bytes()
            round, sha256 = int(note["round"]), str(note["sha256"])
            if hashlib.sha256(data).hexdigest() != sha256:
                continue
            if committed is not None and committed.get(round) != sha256:
                continue
            # Content ids repeat from client to client: one object for equal sets.
            shared: dict[frozenset[str], frozenset[str]] = {}
            held = {c: frozenset(ids) for c, ids in note["held"].items()}
            held = {c: shared.setdefault(ids, ids) for c, ids in held.items()}
            groups = codec.decode(data)
            state = {g: params for g, params in groups.items() if not g.startswith(_MEMORY)}
            memory = {g.removeprefix(_MEMORY): groups[g] for g in groups if g not in state}
            return Checkpoint(note["run_id"], round, state, held, memory, sha256)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, WireError):
            continue
    if committed:
        raise ArtefactError(
            f"round {max(committed)} was committed, but none of {len(notes)} checkpoints in "
            f"{folder} is whole and of a committed round: restore one, or start a new run"
        )
    if notes and committed is None:
        raise ArtefactError(f"{folder} has {len(notes)} checkpoints and all are damaged")
    return None
