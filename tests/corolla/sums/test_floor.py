"""The floor under what a lying server learns: reached, and never undercut."""

import math
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from corolla.errors import SecureSumError
from corolla.sums import ring, thresholds, transcript
from tests.corolla.sums.members import Group
from tests.corolla.sums.server import Liar

SMALL = [
    (members, corrupt, missing)
    for members in range(2, 8)
    for corrupt in range(members)
    for missing in range(members)
    if 2 * missing < members - corrupt
]


def outcomes(honest: int, missing: int) -> set[tuple[int, ...]]:
    """How many votes can leave out each honest member, in every way to vote, up to their names.

    Each of `honest` votes leaves out at most `missing` of them: a member that is never listed is
    one that all leave out.
    """
    found = {(0,) * honest}
    for _ in range(honest):
        found = {
            tuple(sorted(n + (i in out) for i, n in enumerate(counts)))
            for counts in found
            for size in range(missing + 1)
            for out in combinations(range(honest), size)
        }
    return found


@pytest.mark.parametrize(("members", "corrupt", "missing"), SMALL)
def test_no_way_to_vote_goes_below_the_floor(members: int, corrupt: int, missing: int) -> None:
    honest, needed = members - corrupt, members - missing - corrupt
    learned = []
    for left_out in outcomes(honest, missing):
        own = [n for n in left_out if honest - n >= needed]  # their self masks are known
        gone = [n for n in left_out if n >= needed]  # their attempts' keys are known
        assert len(own) + len(gone) <= honest, "both secrets of one member"
        if len(own) + len(gone) == honest:  # else one hides all others: nothing is learned
            learned.append(len(own))
    assert min(learned) == thresholds.floor(members, corrupt, missing)


@pytest.mark.parametrize("members", [3, 10, 47, 250])
def test_the_floor_is_reached_by_turns(members: int) -> None:
    """A server that leaves out ⌊h e / g⌋ members, each in g votes, one vote after another."""
    corrupt = thresholds.default_corrupt(members)
    missing = thresholds.most_missing(members, corrupt, 1)
    honest, needed = members - corrupt, members - missing - corrupt
    gone, votes = honest * missing // needed, [0] * honest
    for place in range(gone * needed):
        votes[place % honest] += 1
    assert max(votes) <= missing
    assert honest - gone == thresholds.floor(members, corrupt, missing)


def test_a_server_that_splits_the_votes_learns_a_sum_of_five_of_ten() -> None:
    """With one corrupt member and three that may be missing: as many as the floor, and no fewer."""
    group, corrupt = Group(10, missing=3, corrupt=1), 9
    inputs, server = group.inputs(), Liar.of(group)
    listing = server.listing(server.deposits)
    keys: dict[int, X25519PrivateKey] = {}
    for number in server.deposits:
        if number == corrupt:
            own = group.devices[number].accepted
            assert own is not None and own.secret is not None
            keys[number] = own.secret
        server.train(number, inputs[number], listing)
    honest, needed = range(9), 6
    left_out = [set[int]() for _ in honest]
    for place in range(9 * 3 // needed * needed):
        left_out[place % 9].add(place // needed)
    for number in honest:
        server.ask(number, listing, server.deposits.keys() - left_out[number])
    server.look(corrupt, listing)
    known = [number for number in honest if server.secret(number, b"m")]
    for number in honest:
        key = server.attempt_key(number)
        assert not (key and number in known)
        if key:
            keys[number] = key
    ctx, total = server.context(listing), np.zeros_like(inputs[0])
    members = [(member.number, member.key) for member in listing.members]
    for number in known:
        total += server.unmasked(number, ctx, server.secret(number, b"m"), keys, members)
    assert len(known) == thresholds.floor(10, 1, 3) == 5
    assert np.array_equal(total, inputs[known].sum(0, dtype=np.uint32))
    for some in (known[:-1], known[1:]):
        part = np.zeros_like(total)
        for number in some:
            part += server.unmasked(number, ctx, server.secret(number, b"m"), keys, members)
        assert not np.array_equal(part, inputs[some].sum(0, dtype=np.uint32))


def test_floors_of_the_text() -> None:
    """Table of docs/secure-sums.md, worked out by hand for a few rows."""
    assert [thresholds.floor(*row) for row in ((5, 1, 1), (10, 1, 3), (20, 2, 6))] == [3, 5, 9]
    assert thresholds.floor(100, 10, 33) == 90 - 90 * 33 // 57 == 38
    assert thresholds.floor(200, 20, 66) == 76
    assert thresholds.floor(5, 3, 1) == 0, "2 e < L - c does not hold"


@pytest.mark.parametrize(
    ("members", "corrupt", "missing", "smallest", "why"),
    [
        (251, 26, 1, 5, "at most 250"),
        (10, 4, 3, 1, "fewer than 6"),
        (10, 1, 3, 6, "fewer than smallest-sum=6"),
        (20, 20, 0, 1, "fewer than 0"),
    ],
)
def test_thresholds_are_refused(
    members: int, corrupt: int, missing: int, smallest: int, why: str
) -> None:
    with pytest.raises(SecureSumError, match=why):
        thresholds.check(members, corrupt, missing, smallest)


def test_the_largest_number_of_missing_members() -> None:
    assert thresholds.most_missing(10, 1, 5) == 3
    assert thresholds.most_missing(45, 20, 5) == 11
    with pytest.raises(SecureSumError, match="ask more members"):
        thresholds.most_missing(20, 20, 5)


def test_losses_are_binomial() -> None:
    assert thresholds.lost(3, 0, 0.1) == pytest.approx(1 - 0.9**3)
    assert thresholds.lost(10, 3, 0.1) == pytest.approx(
        1 - sum(math.comb(10, k) * 0.1**k * 0.9 ** (10 - k) for k in range(4))
    )


def test_masks_cancel_in_any_order() -> None:
    """Σ of streams that are added and subtracted by two is nothing, whatever their order."""
    keys = [transcript.digest("test", bytes([n])) for n in range(4)]
    one, two = np.zeros(9, np.uint32), np.zeros(9, np.uint32)
    ring.add_masks(one, [(key, 1) for key in keys])
    ring.add_masks(two, [(key, -1) for key in reversed(keys)])
    assert one.any() and not (one + two).any()
