"""Open calls of phones: how many there may be, and which is ended for one more."""

import pytest

from corolla.server.gateway import open_calls
from corolla.server.gateway.open_calls import OpenCall, OpenCalls


class Calls:
    """Open calls, by number, and the numbers of those that were ended."""

    def __init__(self) -> None:
        self.open = OpenCalls()
        self.all: list[OpenCall] = []
        self.ended: list[int] = []

    def enter(self, connection: str, owner: str = "o") -> bool:
        number = len(self.all)
        self.all.append(OpenCall(connection, owner, lambda: self.ended.append(number)))
        return self.open.enter(self.all[-1])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(open_calls, "MOST", {"connection": 2, "token": 3, "gateway": 4})
    return Calls()


def test_the_call_that_has_waited_for_longest_ends_for_one_too_many_of_a_connection(
    calls: Calls,
) -> None:
    assert all(calls.enter("one") for _ in range(4))
    assert calls.ended == [0, 1]
    assert calls.enter("other")
    assert calls.ended == [0, 1]


@pytest.mark.parametrize(("owners", "ended"), [("aaaa", [0]), ("aaab", []), ("aabbc", [0])])
def test_a_token_and_all_of_them_have_bounds_too(
    calls: Calls, owners: str, ended: list[int]
) -> None:
    for number, owner in enumerate(owners):
        assert calls.enter(f"connection {number}", owner)
    assert calls.ended == ended


def test_a_call_at_work_is_never_ended_and_one_more_is_refused(calls: Calls) -> None:
    for _ in range(2):
        calls.enter("one")
        calls.open.heard(calls.all[-1])
    assert not calls.enter("one")
    assert calls.ended == []
    calls.open.leave(calls.all[0])
    assert calls.enter("one")
    assert calls.enter("one")
    assert calls.ended == [3]


def test_who_leaves_twice_is_counted_once_and_nothing_is_kept(calls: Calls) -> None:
    for _ in range(3):
        calls.enter("one")
    for call in calls.all * 2:
        calls.open.heard(call)
        calls.open.leave(call)
    assert calls.open._open == {}
