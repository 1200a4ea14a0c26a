"""Callers at a time: how many there may be, and which of them ends for one more."""

import pytest

from corolla.host.occupancy import Occupancy, Occupant, network


class Calls:
    """Two of a connection, three of a token, four in all; the numbers of those that were ended."""

    def __init__(self) -> None:
        self.open = Occupancy()
        self.all: list[Occupant] = []
        self.ended: list[int] = []

    def enter(self, connection: str, owner: str = "o") -> bool:
        number = len(self.all)
        bounds = {f"connection {connection}": 2, f"token {owner}": 3, "": 4}
        self.all.append(Occupant(bounds, lambda: self.ended.append(number)))
        return self.open.enter(self.all[-1])


@pytest.fixture
def calls() -> Calls:
    return Calls()


def test_the_one_that_has_waited_for_longest_ends_for_one_too_many(calls: Calls) -> None:
    assert all(calls.enter("one") for _ in range(4))
    assert calls.ended == [0, 1]
    assert calls.enter("other")
    assert calls.ended == [0, 1]


@pytest.mark.parametrize(("owners", "ended"), [("aaaa", [0]), ("aaab", []), ("aabbc", [0])])
def test_each_bound_counts(calls: Calls, owners: str, ended: list[int]) -> None:
    for number, owner in enumerate(owners):
        assert calls.enter(f"connection {number}", owner)
    assert calls.ended == ended


def test_one_that_has_settled_is_never_ended_and_one_more_is_refused(calls: Calls) -> None:
    for _ in range(2):
        calls.enter("one")
        calls.open.settle(calls.all[-1])
    assert not calls.enter("one")
    assert calls.ended == []
    calls.open.leave(calls.all[0])
    assert calls.enter("one")
    assert calls.enter("one")
    assert calls.ended == [3]


def test_one_that_waits_again_ends_after_those_that_have_waited_for_longer(calls: Calls) -> None:
    for owner in "aab":
        calls.enter(f"connection {len(calls.all)}", owner)
    calls.open.settle(calls.all[0])
    calls.open.wait(calls.all[0])
    assert all(calls.enter(f"connection {number}", "c") for number in range(3, 6))
    assert calls.ended == [1, 2]
    calls.open.leave(calls.all[0])
    calls.open.wait(calls.all[0])  # it has left
    calls.open.leave(calls.all[0])


def test_who_leaves_twice_is_counted_once_and_nothing_is_kept(calls: Calls) -> None:
    for _ in range(3):
        calls.enter("one")
    for call in calls.all * 2:
        calls.open.settle(call)
        calls.open.leave(call)
    assert calls.open._open == {}


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::9", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff:ffff:ffff:ffff", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("", ""),
        ("a socket", "a socket"),
    ],
)
def test_an_ipv6_network_counts_as_one_caller(address: str, expected: str) -> None:
    assert network(address) == expected
