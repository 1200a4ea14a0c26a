import hashlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla import seeds

PURPOSE = st.lists(st.integers() | st.text(max_size=8), max_size=4)


def test_a_seed_is_four_bytes_of_a_hash_of_its_purpose() -> None:
    hashed = hashlib.blake2b(b'[7,"order",3,"ada"]', digest_size=4).digest()
    assert seeds.derive(7, "order", 3, "ada") == int.from_bytes(hashed, "little")


@settings(max_examples=50)
@given(st.integers(0, 2**63 - 1), PURPOSE)
def test_seeds_have_32_bits_and_repeat(seed: int, purpose: list[str | int]) -> None:
    assert 0 <= seeds.derive(seed, *purpose) < 2**32
    assert seeds.derive(seed, *purpose) == seeds.derive(seed, *purpose)


def test_purposes_do_not_run_into_each_other() -> None:
    purposes: list[tuple[str | int, ...]] = [
        (),
        ("a",),
        ("a", ""),
        ("a", 1, 12),
        ("a", 11, 2),
        ("a", "1", 12),
        ("a,1", 12),
        ('a",1', 12),
        (1, "a", 12),
    ]
    assert len({seeds.derive(0, *purpose) for purpose in purposes}) == len(purposes)


def test_high_bits_of_the_run_seed_count() -> None:
    assert seeds.derive(0, "init") != seeds.derive(2**32, "init")


def test_clients_and_rounds_do_not_share_seeds() -> None:
    drawn = {seeds.derive(0, "client", f"c{c}", r) for c in range(50) for r in range(50)}
    assert len(drawn) == 2500


def test_a_generator_draws_the_stream_of_its_seed_and_not_the_global_one() -> None:
    before = torch.get_rng_state()
    drawn = torch.rand(20, generator=seeds.generator(3, "order"))
    own = torch.Generator().manual_seed(seeds.derive(3, "order"))
    assert torch.equal(drawn, torch.rand(20, generator=own))
    assert torch.equal(torch.get_rng_state(), before)
