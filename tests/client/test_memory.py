from pathlib import Path

import pytest
import torch

from corolla import codec
from corolla.client.memory import Memory
from corolla.errors import WireError
from corolla.types import Params

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
