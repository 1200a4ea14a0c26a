"""The phones between rounds: who counts, who keeps a name, how often they may come."""

import pytest

from corolla.server.gateway import roster
from corolla.server.gateway.access import Token
from corolla.server.gateway.roster import Roster, Seen


def a_roster(retry: float = 10.0, known: frozenset[str] = frozenset("ab")) -> Roster:
    return Roster(retry, known.__contains__)


def test_those_are_present_who_were_eligible_not_long_ago() -> None:
    phones = a_roster()
    phones.note("r", Seen("o", 9, at=10, eligible=True))
    phones.note("p", Seen("o", 5, at=90, eligible=True))
    phones.note("q", Seen("o", 7, at=90, eligible=False))
    assert phones.present(100) == 1
    assert phones.present(120) == 1
    assert phones.present(121) == 0


def test_a_name_stays_with_its_owner_for_a_day_or_until_its_token_is_gone() -> None:
    phones = a_roster()
    phones.note("p", Seen("a", 5, at=0, eligible=True))
    other, named = Token("b", "", ""), Token("b", "p", "")
    assert phones.refuses("p", other, 86_399)
    assert not phones.refuses("p", other, 86_400)
    assert not phones.refuses("p", named, 1)
    assert not phones.refuses("p", Token("a", "", ""), 1)
    assert not phones.refuses("q", other, 1)
    phones.note("p", Seen("gone", 5, at=0, eligible=True))
    assert not phones.refuses("p", other, 1)


def test_phones_that_do_not_come_are_forgotten_and_those_above_the_most_as_well() -> None:
    phones = a_roster()
    for at, name in enumerate("pqp"):
        phones.note(name, Seen("a", 1, at, eligible=True))
    phones.note("r", Seen("a", 1, 86_402, eligible=True))  # q came at 1
    assert list(phones.seen) == ["p", "r"]


def test_with_many_phones_each_stays_away_for_longer() -> None:
    phones = a_roster(retry=2.0)
    assert (phones.retry("a").min_seconds, phones.retry("a").max_seconds) == (1.0, 3.0)
    assert phones.retry("a", 10.0).max_seconds == 30.0
    for n in range(5 * roster._CHECK_INS):
        phones.note(str(n), Seen("a", 1, 0, eligible=True))
    assert phones.pause() == phones.pause("a") == 5.0


def test_phones_of_one_token_keep_those_of_others_neither_away_nor_from_their_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roster, "_MOST_PHONES", 1000)
    phones = a_roster(retry=2.0)
    phones.note("honest", Seen("b", 1, 0, eligible=True))
    for n in range(2000):
        phones.note(f"sybil-{n}", Seen("a", 1, 1, eligible=True))
    assert len(phones.seen) == 1000
    assert phones.refuses("honest", Token("a", "", ""), 2)
    assert (phones.pause("a"), phones.pause("b")) == (5.0, 2.0)


def test_the_name_of_a_device_with_a_token_of_its_own_is_never_that_of_another() -> None:
    phones = Roster(1.0, lambda owner: True, {"p"}.__contains__)
    assert phones.refuses("p", Token("a", "", ""), 1)
    assert not phones.refuses("p", Token("b", "p", ""), 1)
    assert not phones.refuses("q", Token("a", "", ""), 1)
