import subprocess
import sys

import pytest
import torch

from corolla.errors import ModelError, WireError
from corolla.models.sparse import places

SIZES = {"a": 60, "b": 200}
COUNTS = {"a": 16, "b": 5}


def test_as_many_values_are_trained_as_lora_of_the_rank_has() -> None:
    assert places.count("m", (32, 16), 3) == 3 * (32 + 16)
    with pytest.raises(ModelError, match=r"rank 11 asks for 528 values of module m, which has 512"):
        places.count("m", (32, 16), 11)


def test_the_largest_scores_are_taken_and_of_equal_ones_the_first() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [3.0, 2.0, 2.0]])
    assert places.top(scores, 2).tolist() == [1, 3]
    assert places.top(scores, 3).tolist() == [1, 2, 3]
    assert places.top(scores, 4).tolist() == [1, 2, 3, 4]
    assert places.top(torch.zeros(9), 4).tolist() == [0, 1, 2, 3]
    assert places.top(scores, 6).tolist() == list(range(6))


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ModelError, match="not finite"):
        places.top(torch.tensor([1.0, float("nan")]), 1)


def test_random_places_depend_on_seed_and_name_alone() -> None:
    one = places.random(SIZES, COUNTS, 7)
    other = places.random(dict(reversed(SIZES.items())), COUNTS, 7)
    assert {n: t.tolist() for n, t in one.items()} == {n: t.tolist() for n, t in other.items()}
    alone = places.random({"b": 200}, COUNTS, 7)
    assert torch.equal(alone["b"], one["b"])
    assert not torch.equal(places.random(SIZES, COUNTS, 8)["b"], one["b"])
    for name, at in one.items():
        assert len(set(at.tolist())) == COUNTS[name]
        assert at.tolist() == sorted(at.tolist())
        assert 0 <= int(at.min()) <= int(at.max()) < SIZES[name]


def test_random_places_are_those_of_another_process() -> None:
    code = (
        "from corolla.models.sparse import places\n"
        f"print(places.random({SIZES}, {COUNTS}, 7)['a'].tolist())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(places.random(SIZES, COUNTS, 7)["a"].tolist())


def test_random_places_are_those_of_splitmix64() -> None:
    """By whole numbers of Python, from the published definition."""

    def score(own: int, place: int) -> int:
        z = (own + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return (z ^ (z >> 31)) >> 1

    from corolla import seeds

    own = seeds.derive(7, "places", "a", 0) << 32 | seeds.derive(7, "places", "a")
    ranked = sorted(range(60), key=lambda place: -score(own, place))
    assert places.random(SIZES, COUNTS, 7)["a"].tolist() == sorted(ranked[:16])


@pytest.mark.parametrize(("size", "k", "bytes"), [(3200, 100, 400), (3200, 99, 396), (60, 16, 8)])
def test_places_travel_as_numbers_or_as_bits_whichever_is_less(
    size: int, k: int, bytes: int
) -> None:
    own = places.random({"a": size}, {"a": k}, 1)
    sent = places.packed(own, {"a": size})
    assert sent["a"].numel() * sent["a"].element_size() == bytes
    assert torch.equal(places.opened(sent, {"a": size}, {"a": k})["a"], own["a"])
    blank = places.blank({"a": size}, {"a": k})
    assert (blank["a"].dtype, blank["a"].shape) == (sent["a"].dtype, sent["a"].shape)


@pytest.mark.parametrize(
    ("bad", "size"),
    [
        (torch.tensor([0, 1, 2], dtype=torch.int32), 200),
        (torch.tensor([0, 1, 2, 200], dtype=torch.int32), 200),
        (torch.tensor([-1, 1, 2, 3], dtype=torch.int32), 200),
        (torch.tensor([0, 2, 2, 3], dtype=torch.int32), 200),
        (torch.tensor([3, 2, 1, 0], dtype=torch.int32), 200),
        (torch.tensor([0, 1, 2, 3]), 200),
        (torch.tensor([0.0, 1.0, 2.0, 3.0]), 200),
        (torch.tensor([255, 0], dtype=torch.uint8), 9),
        (torch.tensor([7, 128], dtype=torch.uint8), 9),
        (torch.tensor([15], dtype=torch.uint8), 9),
    ],
)
def test_places_that_are_none_of_the_model_are_refused(bad: torch.Tensor, size: int) -> None:
    with pytest.raises(WireError, match=r"places of a are|support is not 4 ascending indices"):
        places.opened({"a": bad}, {"a": size}, {"a": 4})
    with pytest.raises(WireError, match="differ from the model in 2 modules"):
        places.opened({"b": bad}, {"a": size}, {"a": 4})
