import hashlib
import struct

import pytest
import torch

from corolla.tensors import tree

A = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([[3.0]])}
B = {"y": torch.tensor([[10.0]]), "x": torch.tensor([0.5, -2.0])}


def test_adds_subtracts_and_scales_by_name() -> None:
    assert {n: t.tolist() for n, t in tree.add(A, B).items()} == {"x": [1.5, 0.0], "y": [[13.0]]}
    assert {n: t.tolist() for n, t in tree.sub(A, B).items()} == {"x": [0.5, 4.0], "y": [[-7.0]]}
    assert {n: t.tolist() for n, t in tree.scale(A, -2.0).items()} == {
        "x": [-2.0, -4.0],
        "y": [[-6.0]],
    }


def test_inputs_stay_as_they_were() -> None:
    before = {n: t.clone() for n, t in A.items()}
    for result in (tree.add(A, B), tree.sub(A, B), tree.scale(A, 1.0), tree.clone(A)):
        for tensor in result.values():
            tensor.add_(100.0)  # a result that is a view would show here
    assert all(torch.equal(A[n], before[n]) for n in A)


@pytest.mark.parametrize("operation", [tree.add, tree.sub])
def test_refuses_trees_with_different_names(operation: object) -> None:
    with pytest.raises(ValueError, match="differ in 1 names, first 'y'"):
        operation(A, {"x": A["x"]})  # type: ignore[operator]


def test_norm_is_joint_and_in_double_precision() -> None:
    assert tree.norm({"x": torch.tensor([3.0]), "y": torch.tensor([[4.0, 12.0]])}) == 13.0
    assert tree.norm({"x": torch.full((2,), 1e25)}) == pytest.approx(2**0.5 * 1e25)
    assert tree.norm({}) == 0.0


def test_count_counts_values() -> None:
    assert (tree.count(A), tree.count({})) == (3, 0)


def test_finite_finds_one_bad_value() -> None:
    assert tree.finite(A)
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not tree.finite({**A, "z": torch.tensor([0.0, bad])})


def test_digest_of_one_tensor_by_hand() -> None:
    data = b"x|torch.float32|(2,)|" + struct.pack("<2f", 1.0, 2.0)
    assert tree.digest({"x": torch.tensor([1.0, 2.0])}) == hashlib.sha256(data).hexdigest()


def test_digest_depends_on_content_alone() -> None:
    reordered = {"y": A["y"], "x": torch.tensor([1.0, 9.0, 2.0])[::2]}  # not contiguous
    assert tree.digest(reordered) == tree.digest(A)


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.tensor([1.0, 2.5]), "y": A["y"]},
        {"x": A["x"], "z": A["y"]},
        {"x": A["x"].double(), "y": A["y"]},
        {"x": A["x"].reshape(2, 1), "y": A["y"]},
        {"x": A["x"]},
    ],
)
def test_digest_sees_values_names_types_and_shapes(other: dict[str, torch.Tensor]) -> None:
    assert tree.digest(other) != tree.digest(A)


def test_digest_tells_zero_from_minus_zero() -> None:
    assert tree.digest({"x": torch.tensor([0.0])}) != tree.digest({"x": torch.tensor([-0.0])})


def test_digest_of_a_payload_sees_groups_and_not_their_order() -> None:
    payload = {"g": A, "empty": {}}
    assert tree.digest_all(payload) == tree.digest_all({"empty": {}, "g": A})
    assert tree.digest_all(payload) != tree.digest_all({"g": A})
    assert tree.digest_all(payload) != tree.digest_all({"h": A, "empty": {}})
