from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corolla.directions import seedlog
from corolla.errors import WireError
from corolla.storage.memory import Memory
from corolla.types import Params, Payload
from corolla.wire import codec

A: Params = {"x.lora_A": torch.arange(6.0).reshape(2, 3)}
OTHER: Params = {"x.lora_A": torch.ones(2, 3)}
ID, OTHER_ID = codec.content_id(A), codec.content_id(OTHER)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_not_held_is_missing(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "memory")
    assert memory.missing({"A": ID, "B": OTHER_ID}) == ["A", "B"]
    memory.keep("A", A, ID)
    assert memory.missing({"A": ID, "B": OTHER_ID}) == ["B"]
    assert memory.missing({"A": OTHER_ID}) == ["A"]


def test_a_group_survives_a_restart_bit_for_bit(tmp_path: Path) -> None:
    Memory(tmp_path).keep("A", A, ID)
    again = Memory(tmp_path)
    assert again.missing({"any name": ID}) == []
    recalled = again.recall({"any name": ID})
    assert list(recalled) == ["any name"]
    assert torch.equal(recalled["any name"]["x.lora_A"], A["x.lora_A"])


def test_content_that_is_not_what_was_announced_is_refused(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    with pytest.raises(WireError, match="cached group A"):
        memory.keep("A", A, OTHER_ID)
    assert memory.missing({"A": OTHER_ID}) == ["A"]
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["../precious", "/precious", "", "A" * 32, "0/1"])
def test_an_id_that_is_a_path_is_refused(tmp_path: Path, name: str) -> None:
    kept = tmp_path / "precious.safetensors"
    kept.write_bytes(b"not of this folder")
    touches: list[Callable[[Memory, str], object]] = [
        lambda memory, name: memory.missing({"A": name}),
        lambda memory, name: memory.log(name, "0" * 32),
    ]
    for touch in touches:
        with pytest.raises(WireError, match="hexadecimal"):
            touch(
                Memory(tmp_path / "memory"),
                str(tmp_path / "precious") if name == "/precious" else name,
            )
    assert kept.exists()


def test_equal_content_of_many_clients_is_stored_once(tmp_path: Path) -> None:
    for _ in range(3):
        Memory(tmp_path).keep("A", A, ID)
    assert files(tmp_path) == [f"{ID}.safetensors"]


def test_groups_no_broadcast_names_are_deleted(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.keep("A", A, ID)
    memory.keep("B", OTHER, OTHER_ID)
    memory.prune({"A": ID})
    assert files(tmp_path) == [f"{ID}.safetensors"]
    assert Memory(tmp_path).missing({"A": ID, "B": OTHER_ID}) == ["B"]


def test_recall_forgets_in_memory_and_keeps_on_disk(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.keep("A", A, ID)
    memory.keep("B", OTHER, OTHER_ID)
    assert list(memory.recall({"A": ID})) == ["A"]
    assert torch.equal(memory.recall({"B": OTHER_ID})["B"]["x.lora_A"], OTHER["x.lora_A"])


def test_a_group_without_tensors_is_held_too(tmp_path: Path) -> None:
    empty = codec.content_id({})
    Memory(tmp_path).keep("head", {}, empty)
    assert Memory(tmp_path).recall({"head": empty}) == {"head": {}}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_file_is_asked_for_again(tmp_path: Path, damage: str) -> None:
    """Else the client trains on wrong values, or never again."""
    Memory(tmp_path).keep("A", A, ID)
    path = tmp_path / f"{ID}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    kept = {"truncated": bytes(data[:-4]), "flipped": bytes(data), "empty": b""}
    path.write_bytes(kept[damage])
    again = Memory(tmp_path)
    assert again.missing({"A": ID}) == ["A"]
    again.keep("A", A, ID)
    fresh = Memory(tmp_path)
    assert torch.equal(fresh.recall({"A": ID})["A"]["x.lora_A"], A["x.lora_A"])


# The log of seeded steps

ORIGIN = "0" * 32
ROWS: list[Params] = [
    {"scalars": torch.tensor([float(i), -1.0]), "step": torch.tensor(0.5)} for i in range(1, 6)
]
VERSIONS = seedlog.versions(ORIGIN, ROWS)
"""VERSIONS[i] is the version after i rows."""


def rows(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "log").glob("row-*"))


def held(memory: Memory, number: int) -> tuple[Params | None, list[Params], int] | None:
    return memory.log(VERSIONS[number], ORIGIN)


def same(found: list[Params], wanted: list[Params]) -> bool:
    return len(found) == len(wanted) and all(
        one.keys() == other.keys()
        and all(torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one)
        for one, other in zip(found, wanted, strict=True)
    )


def test_before_any_row_there_is_the_first_state(tmp_path: Path) -> None:
    assert Memory(tmp_path).log(ORIGIN, ORIGIN) == (None, [], 0)
    assert Memory(tmp_path).extend(ORIGIN, []) == ORIGIN


def test_rows_lead_to_a_version_and_come_back_in_order(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    assert memory.extend(ORIGIN, ROWS[:2]) == VERSIONS[2]
    assert memory.extend(VERSIONS[2], ROWS[2:]) == VERSIONS[5]
    for number in (5, 2, 1):
        found = held(memory, number)
        assert found is not None
        assert (found[0], found[2]) == (None, 0)
        assert same(found[1], ROWS[:number])


def test_rows_survive_a_restart_bit_for_bit(tmp_path: Path) -> None:
    """Also in half precision, and a scalar that is minus zero."""
    row = {"scalars": torch.tensor([-0.0, 6e-8], dtype=torch.float16), "step": torch.tensor(2.0)}
    version = Memory(tmp_path).extend(ORIGIN, [row])
    found = Memory(tmp_path).log(version, ORIGIN)
    assert found is not None
    assert same(found[1], [row])
    assert bool(torch.signbit(found[1][0]["scalars"][0]))
    assert seedlog.after(ORIGIN, found[1][0]) == version


def test_a_log_is_continued_by_another_process(tmp_path: Path) -> None:
    for number, row in enumerate(ROWS):
        assert Memory(tmp_path).extend(VERSIONS[number], [row]) == VERSIONS[number + 1]
    found = held(Memory(tmp_path), 5)
    assert found is not None
    assert same(found[1], ROWS)


def test_rows_of_many_clients_are_stored_once(tmp_path: Path) -> None:
    for _ in range(3):
        Memory(tmp_path).extend(ORIGIN, ROWS)
    assert len(rows(tmp_path)) == 5
    assert [p.name for p in tmp_path.rglob("*") if p.suffix == ".part"] == []


def test_what_a_broadcast_does_not_name_is_not_the_log(tmp_path: Path) -> None:
    """Forgetting cached groups leaves rows and snapshots."""
    memory = Memory(tmp_path)
    memory.extend(ORIGIN, ROWS)
    memory.keep("A", A, ID)
    memory.prune({})
    assert len(rows(tmp_path)) == 5
    assert held(Memory(tmp_path), 5) is not None


def test_a_missing_row_is_noticed(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.extend(VERSIONS[2], ROWS[2:])
    assert held(memory, 5) is None
    assert held(memory, 2) is None
    memory.extend(ORIGIN, ROWS[:2])
    assert held(memory, 5) is not None


def test_a_row_of_another_run_is_not_found(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.extend("1" * 32, ROWS)
    assert held(memory, 5) is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "swapped", "gone"])
def test_a_damaged_row_is_asked_for_again(tmp_path: Path, damage: str) -> None:
    Memory(tmp_path).extend(ORIGIN, ROWS)
    path = tmp_path / "log" / f"row-{VERSIONS[3]}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    other = tmp_path / "log" / f"row-{VERSIONS[2]}.safetensors"
    kept = {
        "truncated": bytes(data[:-4]),
        "flipped": bytes(data),
        "empty": b"",
        "swapped": other.read_bytes(),
    }
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(kept[damage])
    again = Memory(tmp_path)
    assert held(again, 5) is None
    assert held(again, 2) is not None
    assert again.extend(ORIGIN, ROWS) == VERSIONS[5]
    for memory in (again, Memory(tmp_path)):  # in this process, and in the next
        found = held(memory, 5)
        assert found is not None
        assert same(found[1], ROWS)


def test_a_snapshot_stands_for_the_rows_before_it(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.keep_start(VERSIONS[3], A, 3)
    memory.extend(VERSIONS[3], ROWS[3:])
    for again in (memory, Memory(tmp_path)):
        found = held(again, 5)
        assert found is not None
        assert found[0] is not None
        assert torch.equal(found[0]["x.lora_A"], A["x.lora_A"])
        assert same(found[1], ROWS[3:])
        assert found[2] == 3  # rows that it stands for
    at = held(memory, 3)
    assert at is not None
    assert at[1:] == ([], 3)
    assert held(memory, 2) is None


def test_a_newer_snapshot_replaces_the_older(tmp_path: Path) -> None:
    """A device keeps one, whatever it misses."""
    memory = Memory(tmp_path)
    memory.keep_start(VERSIONS[1], A, 1)
    memory.keep_start(VERSIONS[3], OTHER, 3)
    assert len(list((tmp_path / "log").glob("start-*"))) == 1
    assert held(memory, 1) is None
    found = held(memory, 3)
    assert found is not None
    assert found[0] is not None
    assert torch.equal(found[0]["x.lora_A"], OTHER["x.lora_A"])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_snapshot_is_asked_for_again(tmp_path: Path, damage: str) -> None:
    Memory(tmp_path).keep_start(VERSIONS[3], A, 3)
    path = tmp_path / "log" / f"start-{VERSIONS[3]}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    kept = {"truncated": bytes(data[:-4]), "flipped": bytes(data), "empty": b""}
    path.write_bytes(kept[damage])
    again = Memory(tmp_path)
    assert held(again, 3) is None
    again.keep_start(VERSIONS[3], A, 3)
    found = held(Memory(tmp_path), 3)
    assert found is not None
    assert found[0] is not None
    assert torch.equal(found[0]["x.lora_A"], A["x.lora_A"])


# What a client keeps of its own

KEPT: Payload = {
    "control": {"x.lora_A": torch.arange(6.0).reshape(2, 3), "é/..": torch.tensor(3)},
    "empty": {},
}


def of(round: int) -> Payload:
    return {"control": {"x": torch.tensor([float(round)])}}


def kept_round(memory: Memory, accepted: int, client: str = "ada") -> int:
    return int(memory.kept(client, accepted)["control"]["x"])


def files_of(memory: Memory, client: str = "ada") -> list[str]:
    return files(memory.kept_folder(client))


def test_nothing_is_kept_before_the_first_accepted_round(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    assert memory.kept("ada", 0) == {}
    memory.stage("ada", 1, of(1))
    assert Memory(tmp_path).kept("ada", 0) == {}


def test_what_was_staged_counts_once_it_is_accepted(tmp_path: Path) -> None:
    """Groups, names, types and values, over restarts."""
    Memory(tmp_path).stage("ada", 4, KEPT)
    for _ in range(2):
        found = Memory(tmp_path).kept("ada", 4)
        assert {g: set(p) for g, p in found.items()} == {g: set(p) for g, p in KEPT.items()}
        for group, params in KEPT.items():
            for name, tensor in params.items():
                assert torch.equal(found[group][name], tensor)
                assert found[group][name].dtype == tensor.dtype


def test_what_was_rejected_is_replaced_and_what_was_accepted_stays(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.stage("ada", 1, of(1))
    assert kept_round(memory, 1) == 1
    memory.stage("ada", 2, of(2))  # the server refuses it, or never sees it
    assert kept_round(memory, 1) == 1
    memory.stage("ada", 3, of(3))
    assert kept_round(memory, 3) == 3
    with pytest.raises(WireError, match="this device kept round 3, the server accepted 1"):
        memory.kept("ada", 1)


def test_a_round_that_is_repeated_after_a_crash_finds_what_it_found(tmp_path: Path) -> None:
    """The server falls back to round 2; the device has staged round 3 of the interrupted run."""
    memory = Memory(tmp_path)
    memory.stage("ada", 2, of(2))
    assert kept_round(memory, 2) == 2
    memory.stage("ada", 3, of(30))
    again = Memory(tmp_path)
    assert kept_round(again, 2) == 2
    again.stage("ada", 3, of(3))
    assert kept_round(Memory(tmp_path), 3) == 3


def test_a_question_as_if_nothing_were_kept_deletes_nothing(tmp_path: Path) -> None:
    """The base model is evaluated again when a run is resumed."""
    memory = Memory(tmp_path)
    memory.stage("ada", 1, of(1))
    assert kept_round(memory, 1) == 1
    memory.stage("ada", 2, of(2))
    assert memory.kept("ada", 0) == {}
    assert kept_round(memory, 1) == 1


@pytest.mark.parametrize("name", ["staged", "last"])
def test_what_is_lost_is_said(tmp_path: Path, name: str) -> None:
    memory = Memory(tmp_path)
    memory.stage("ada", 1, of(1))
    if name == "last":
        assert kept_round(memory, 1) == 1
    (memory.kept_folder("ada") / f"{name}.safetensors").unlink()
    with pytest.raises(WireError, match="what this device kept of round 1 is lost"):
        memory.kept("ada", 1)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: b"", lambda data: b"x" * 99]
)
def test_damage_of_what_counts_is_an_error_and_of_what_does_not_is_none(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    memory = Memory(tmp_path)
    memory.stage("ada", 1, of(1))
    assert kept_round(memory, 1) == 1
    memory.stage("ada", 2, of(2))
    staged, last = (memory.kept_folder("ada") / f"{n}.safetensors" for n in ("staged", "last"))
    staged.write_bytes(damage(staged.read_bytes()))
    assert kept_round(memory, 1) == 1
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(WireError):
        memory.kept("ada", 1)


def test_a_crash_while_staging_leaves_what_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(tmp_path)
    memory.stage("ada", 1, of(1))

    def crash(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(OSError, match="No space"):
            memory.stage("ada", 2, of(2))
    assert kept_round(Memory(tmp_path), 1) == 1
    memory.stage("ada", 2, of(2))
    assert kept_round(memory, 2) == 2
    assert files_of(memory) == ["last.safetensors"]


def test_clients_are_kept_apart_and_beside_the_cache(tmp_path: Path) -> None:
    """Names as they come; in a simulation all share a folder of cached groups."""
    memory = Memory(tmp_path / "cache", tmp_path / "clients")
    names = ["ada", "ada/..", "../ada", "日本", "", "a" * 300]
    for round, client in enumerate(names, 1):
        memory.stage(client, round, of(round))
    memory.keep("A", A, ID)
    memory.prune({})
    assert [kept_round(memory, r, client) for r, client in enumerate(names, 1)] == [*range(1, 7)]
    assert len(files(tmp_path / "clients")) == len(names)
    assert files(tmp_path) == ["cache", "clients"]


def test_a_look_at_what_a_round_staged_leaves_the_round_before_in_place(tmp_path: Path) -> None:
    """The server evaluates a round before it writes it down, and may be killed in between."""
    memory = Memory(tmp_path)
    memory.stage("ada", 1, {"own": {"x": torch.tensor([1.0])}})
    assert memory.kept("ada", 1)["own"]["x"].tolist() == [1.0]
    memory.stage("ada", 2, {"own": {"x": torch.tensor([2.0])}})
    assert memory.kept("ada", 2, commit=False)["own"]["x"].tolist() == [2.0]
    assert memory.kept("ada", 1)["own"]["x"].tolist() == [1.0]
    assert memory.kept("ada", 2)["own"]["x"].tolist() == [2.0]
