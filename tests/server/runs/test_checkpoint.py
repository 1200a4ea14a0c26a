import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from corolla.errors import ArtefactError
from corolla.host.files import write_atomic
from corolla.server.runs.checkpoint import Checkpoint, load, save


def at(round: int) -> Checkpoint:
    state = {
        "adapter": {"x": torch.arange(6.0) + round, "y": torch.tensor(1.5, dtype=torch.bfloat16)},
        "head": {},
    }
    held = {"ada": frozenset({"ab" * 16, "cd" * 16}), "日本/..": frozenset[str]()}
    return Checkpoint("ef" * 16, round, state, held)


def same(found: Checkpoint | None, wanted: Checkpoint) -> bool:
    if found is None:
        return False
    tensors = [
        torch.equal(found.state[group][name], tensor)
        and found.state[group][name].dtype == tensor.dtype
        for group, params in wanted.state.items()
        for name, tensor in params.items()
    ]
    names = {g: set(p) for g, p in found.state.items()} == {
        g: set(p) for g, p in wanted.state.items()
    }
    rest = (found.run_id, found.round, found.held) == (wanted.run_id, wanted.round, wanted.held)
    return all(tensors) and names and rest


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "deep" / "checkpoint", at(1))
    assert same(load(tmp_path / "deep" / "checkpoint"), at(1))


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    assert load(tmp_path / "nowhere") is None


def test_the_newest_of_two_generations_counts(tmp_path: Path) -> None:
    for round in (8, 9, 10, 11):
        save(tmp_path, at(round))
        assert same(load(tmp_path), at(round))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("round-000010.json", "round-000010.safetensors"),
        *("round-000011.json", "round-000011.safetensors"),
    ]


def test_a_generation_that_the_journal_does_not_know_does_not_count(tmp_path: Path) -> None:
    """Its process died before it could say that the round was committed."""
    first = save(tmp_path, at(1))
    second = save(tmp_path, at(2))
    assert same(load(tmp_path, {1: first, 2: second}), at(2))
    assert same(load(tmp_path, {1: first}), at(1))
    assert same(load(tmp_path, {1: first, 2: first}), at(1))
    assert load(tmp_path, {}) is None
    for unknown in ({1: second}, {3: second}, {0: first}):
        with pytest.raises(ArtefactError, match=r"round \d was committed, but none of 2"):
            load(tmp_path, unknown)


def test_a_committed_round_without_any_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="round 2 was committed, but none of 0 checkpoints"):
        load(tmp_path, {1: "a", 2: "b"})


def test_a_damaged_generation_falls_back_to_a_committed_one(tmp_path: Path) -> None:
    committed = {round: save(tmp_path, at(round)) for round in (1, 2)}
    flip(tmp_path / "round-000002.safetensors", 300)
    assert same(load(tmp_path, committed), at(1))


def test_the_checksum_is_that_of_the_file_of_tensors(tmp_path: Path) -> None:
    sha256 = save(tmp_path, at(1))
    content = (tmp_path / "round-000001.safetensors").read_bytes()
    assert sha256 == hashlib.sha256(content).hexdigest()
    found = load(tmp_path)
    assert found is not None
    assert found.sha256 == sha256


def test_memory_comes_back_beside_the_state(tmp_path: Path) -> None:
    """Also where both have a group of one name."""
    memory = {
        "adapter": {"x": torch.tensor([7.0])},
        "weights": {"α": torch.tensor([1, 2], dtype=torch.int64)},
        "none": {},
    }
    save(tmp_path, replace(at(1), memory=memory))
    found = load(tmp_path)
    assert found is not None
    assert same(found, at(1))
    assert same(replace(found, state=found.memory), replace(at(1), state=memory))
    assert found.memory.keys() == memory.keys()
    save(tmp_path, at(2))
    later = load(tmp_path)
    assert later is not None
    assert (later.round, later.memory) == (2, {})


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_truncated_file_falls_back(tmp_path: Path, suffix: str) -> None:
    save(tmp_path, at(1))
    save(tmp_path, at(2))
    path = tmp_path / f"round-000002{suffix}"
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert same(load(tmp_path), at(1)), length


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_any_flipped_bit_falls_back(tmp_path: Path, suffix: str) -> None:
    """Of the tensors as well as of the note: a wrong round would skip or repeat training."""
    save(tmp_path, at(1))
    save(tmp_path, at(2))
    path = tmp_path / f"round-000002{suffix}"
    whole = path.read_bytes()
    wrong = []
    for bit in range(0, 8 * len(whole), 13):
        flip(path, bit)
        if not same(load(tmp_path), at(1)):
            wrong.append(bit)
        path.write_bytes(whole)
    assert len(wrong) == 0, f"{len(wrong)} bits, first {wrong[0]}"


@pytest.mark.parametrize(
    "note", ["{}", "[]", "null", "3", '{"sha256": 1}', '{"run_id": "a", "held": []}', "\xff"]
)
def test_a_note_of_another_form_falls_back(tmp_path: Path, note: str) -> None:
    save(tmp_path, at(1))
    save(tmp_path, at(2))
    (tmp_path / "round-000002.json").write_text(note)
    assert same(load(tmp_path), at(1))


def test_held_groups_of_another_form_fall_back(tmp_path: Path) -> None:
    save(tmp_path, at(1))
    save(tmp_path, at(2))
    path = tmp_path / "round-000002.json"
    odd: list[object] = [[], 3, {"ada": 3}, None]
    for held in odd:
        note = json.dumps({**json.loads(json.loads(path.read_text())["note"]), "held": held})
        sha256 = hashlib.sha256(note.encode()).hexdigest()
        path.write_text(json.dumps({"note": note, "sha256": sha256}))
        assert same(load(tmp_path), at(1))


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_missing_half_falls_back(tmp_path: Path, suffix: str) -> None:
    """A crash between the two files leaves tensors without a note."""
    save(tmp_path, at(1))
    save(tmp_path, at(2))
    (tmp_path / f"round-000002{suffix}").unlink()
    assert same(load(tmp_path), at(1))


def test_nothing_but_damage_is_said(tmp_path: Path) -> None:
    save(tmp_path, at(1))
    save(tmp_path, at(2))
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"junk")
    with pytest.raises(ArtefactError, match="2 checkpoints and all are damaged"):
        load(tmp_path)


@pytest.mark.parametrize("stage", ["write", "rename"])
@pytest.mark.parametrize("victim", [".safetensors", ".json"])
def test_a_crash_while_saving_leaves_the_generation_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str, stage: str
) -> None:
    save(tmp_path, at(1))
    save(tmp_path, at(2))
    real = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if target.name == f"round-000003{victim}":
            if stage == "write":
                self.write_bytes(self.read_bytes()[:10])
            raise OSError(28, "No space left on device")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, at(3))
    assert same(load(tmp_path), at(2))
    save(tmp_path, at(3))
    assert same(load(tmp_path), at(3))


def test_a_round_can_be_committed_again(tmp_path: Path) -> None:
    """After a fall back the damaged round is repeated."""
    save(tmp_path, at(1))
    save(tmp_path, at(2))
    flip(tmp_path / "round-000002.safetensors", 300)
    assert same(load(tmp_path), at(1))
    save(tmp_path, replace(at(1), round=2))
    assert same(load(tmp_path), replace(at(1), round=2))


def test_files_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for round in (1, 2, 3):
        save(tmp_path, at(round))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_equal_sets_of_a_thousand_clients_are_one_object(tmp_path: Path) -> None:
    ids = [f"{i:032x}" for i in range(3)]
    held = {f"{i}": frozenset(ids) for i in range(1000)}
    save(tmp_path, replace(at(1), held=held))
    found = load(tmp_path)
    assert found is not None
    assert found.held == held
    assert len({id(own) for own in found.held.values()}) == 1


def test_a_file_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch:

        def fail(descriptor: int) -> None:
            raise OSError(5, "Input/output error")

        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert path.read_bytes() == b"new"
