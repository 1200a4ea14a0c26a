"""Leases by hand: who gets a seat, who loses it, who is told what; the clock is a number."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.phones.budget import Assignment
from corolla.server.gateway.leases import Bucket, Lease, OfferRound, Phase


def a_round(seats: int = 2, over_select: float = 1.3) -> OfferRound:
    """Ends at 100; a lease lasts 30."""
    return OfferRound(seats, deadline=100.0, lease_seconds=30.0, over_select=over_select)


def given_to(round: OfferRound, device: str, now: float = 0.0) -> OfferRound:
    """The round after a device has got a lease whose id is its name and the time."""
    after, lease = round.check_in(device, f"owner of {device}", 5, f"{device}@{now:g}", now)
    assert isinstance(lease, Lease), lease
    return after


def why_not(round: OfferRound, device: str, now: float = 0.0) -> str:
    _, told = round.check_in(device, "owner", 5, "another", now)
    assert isinstance(told, str)
    return told


def test_a_seat_that_is_given_up_is_free_at_once() -> None:
    round = given_to(a_round(1, over_select=1.0), "p")
    assert why_not(round, "q", 1) == "enough devices have been chosen"
    round, why = round.report("p@0", 1)
    assert why == ""
    round = round.settle("p@0", Phase.GIVEN_UP, "policy: too soon")
    assert isinstance(round.check_in("q", "owner", 5, "q@1", 1)[1], Lease)
    assert why_not(round, "p", 1) == "asked already in this round"


def test_a_lease_keeps_what_its_phone_was_assigned() -> None:
    one, other = (Assignment("", name, "loss", 4, 64, 10, "D") for name in ("fp32", "q4"))
    round, lease = a_round().check_in("p", "owner of p", 5, "p@0", 0.0, one)
    assert isinstance(lease, Lease)
    assert lease.assigned == one
    assert round.open_to("p") == lease
    assert round.open_to("q") is None
    round, again = round.check_in("p", "owner of p", 5, "unused", 1.0, other)
    assert isinstance(again, Lease)
    assert again.assigned == one
    assert round.expire(99).open_to("p") is None


@pytest.mark.parametrize(
    ("seats", "over", "places"), [(1, 1.3, 2), (10, 1.3, 13), (8, 1.3, 11), (5, 1.0, 5)]
)
def test_more_are_chosen_than_are_needed(seats: int, over: float, places: int) -> None:
    round = a_round(seats, over)
    for number in range(places):
        round = given_to(round, f"p{number}")
    assert why_not(round, "one too many") == "enough devices have been chosen"


def test_who_checks_in_again_gets_the_same_lease_and_its_full_time() -> None:
    round = given_to(a_round(), "p", now=0)
    round, lease = round.check_in("p", "owner of p", 5, "unused", 20)
    assert isinstance(lease, Lease)
    assert (lease.id, lease.ends) == ("p@0", 50)
    assert len(round.leases) == 1


def test_a_heartbeat_renews_a_lease_until_the_deadline_and_not_beyond() -> None:
    round = given_to(a_round(), "p")
    round, seconds = round.heartbeat("p@0", 29)
    assert seconds == 30
    round, _ = round.heartbeat("p@0", 58)
    round, seconds = round.heartbeat("p@0", 85)
    assert seconds == 15
    assert round.heartbeat("p@0", 100)[1] == 0


def test_a_phone_that_vanished_leaves_its_seat_to_another_and_may_come_back() -> None:
    round = given_to(given_to(a_round(1), "p"), "q")
    assert why_not(round, "r", 29) == "enough devices have been chosen"
    round = given_to(round, "r", 30)
    assert round.leases["p@0"].phase == Phase.LOST
    round, _ = round.heartbeat("r@30", 45)
    round = given_to(round, "q", 45)  # also lost at 30
    assert why_not(round, "p", 45) == "enough devices have been chosen"
    round, why = round.report("p@0", 46)
    assert why == "the lease was over"


def test_a_lease_ends_at_its_very_time() -> None:
    round = given_to(a_round(), "p")
    assert round.expire(29.999).leases["p@0"].phase == Phase.OPEN
    assert round.expire(30).leases["p@0"].phase == Phase.LOST
    assert round.heartbeat("p@0", 30)[1] == 0


def test_a_valid_reply_fills_a_seat_and_the_last_one_ends_the_round() -> None:
    round = given_to(given_to(given_to(a_round(2), "p"), "q"), "r")
    for id in ("p@0", "q@0"):
        round, why = round.report(id, 1)
        assert why == ""
        assert not round.over(1)
        round = round.settle(id, Phase.VALID, "")
    assert round.over(1)
    round, why = round.report("r@0", 2)
    assert why == "the round is over: 2 others were faster"
    assert round.leases["r@0"].phase == Phase.LATE
    assert round.heartbeat("r@0", 2)[1] == 0
    assert why_not(round, "s", 2) == "the round is over"


def test_of_replies_examined_at_a_time_one_too_many_is_late() -> None:
    round = given_to(given_to(a_round(1), "p"), "q")
    round, _ = round.report("p@0", 1)
    round, _ = round.report("q@0", 1)
    round = round.settle("q@0", Phase.VALID, "").settle("p@0", Phase.VALID, "")
    assert round.leases["q@0"].phase == Phase.VALID
    assert round.leases["p@0"].phase == Phase.LATE
    assert round.count(Phase.VALID) == 1


@pytest.mark.parametrize("phase", [Phase.REFUSED, Phase.GIVEN_UP])
def test_who_failed_frees_its_seat_and_is_not_asked_again_in_the_round(phase: Phase) -> None:
    round = given_to(given_to(a_round(1), "p"), "q")
    round, _ = round.report("p@0", 1)
    round = round.settle("p@0", phase, "too bad")
    assert why_not(round, "p", 2) == "asked already in this round"
    round = given_to(round, "r", 2)
    assert round.report("p@0", 3)[1] == "too bad"


def test_a_reply_is_taken_in_once() -> None:
    round, why = given_to(a_round(), "p").report("p@0", 1)
    assert why == ""
    assert round.report("p@0", 1)[1] == "it is being examined"
    round = round.settle("p@0", Phase.VALID, "")
    assert round.settle("p@0", Phase.REFUSED, "no").leases["p@0"].phase == Phase.VALID
    assert round.report("p@0", 1)[1] == "reported already"


def test_nothing_more_is_taken_of_a_reply_that_is_examined() -> None:
    round, _ = given_to(a_round(), "p").report("p@0", 1)
    assert round.refuses("p@0", 2) == "it is being examined"


def test_a_name_that_went_to_another_token_gets_a_lease_of_its_own() -> None:
    round = given_to(a_round(), "p")
    round, lease = round.check_in("p", "somebody else", 5, "new", 1)
    assert isinstance(lease, Lease)
    assert (lease.id, lease.owner) == ("new", "somebody else")
    assert round.leases["p@0"].phase == Phase.LOST


def test_a_reply_that_is_examined_at_its_leases_end_is_not_lost() -> None:
    round, _ = given_to(a_round(), "p").report("p@0", 29)
    assert round.expire(31).leases["p@0"].phase == Phase.REPORTED


def test_after_the_deadline_nothing_counts() -> None:
    round = given_to(a_round(), "p", 90)
    assert round.refuses("p@90", 99.9) == ""
    round, why = round.report("p@90", 100)
    assert why != ""
    assert round.over(100)
    assert round.count(Phase.VALID) == 0


def test_an_unknown_lease_is_of_an_earlier_round() -> None:
    assert a_round().report("x", 0)[1] == "the lease is of an earlier round"
    assert a_round().heartbeat("x", 0)[1] == 0


def test_a_bucket_gives_a_burst_and_then_a_rate() -> None:
    bucket, allowed = Bucket(3, 0.0), []
    for now in (0, 0, 0, 0, 0.5, 0.5, 1.0):
        bucket, ok = bucket.take(now, rate=2.0, burst=3)
        allowed.append(ok)
    assert allowed == [True, True, True, False, True, False, True]


def shared(round: OfferRound, owner: str, number: int, now: float = 0.0) -> OfferRound:
    """The round after so many names of one token have asked."""
    for place in range(number):
        round, _ = round.check_in(f"{owner}{place}", owner, 5, f"{owner}{place}", now)
    return round


def held(round: OfferRound) -> Counter[str]:
    return Counter(lease.owner for lease in round.working.values())


def valid(round: OfferRound, id: str) -> OfferRound:
    round, why = round.report(id, 1)
    return round if why else round.settle(id, Phase.VALID, "")


def test_a_token_that_is_alone_may_have_all_places() -> None:
    round = shared(a_round(20), "a", 200)
    assert held(round) == {"a": 26}
    assert round.check_in("a again", "a", 5, "a again", 1)[1] == "enough devices have been chosen"
    for place in range(20):
        round = valid(round, f"a{place}")
    assert round.full


def test_while_all_places_are_taken_tokens_share_them_whatever_the_names() -> None:
    round = shared(a_round(20), "a", 200)
    round = shared(round, "b", 1)
    assert held(round) == {"a": 25, "b": 1}
    assert round.leases["a25"].phase == Phase.LOST  # the youngest
    assert round.report("a25", 1)[1] == "its place has gone to a phone of another token"
    round = shared(round, "b", 200)
    assert held(round) == {"a": 13, "b": 13}
    round = shared(round, "c", 200)
    assert sorted(held(round).values()) == [8, 9, 9]
    assert isinstance(round.check_in("d", "d", 5, "d", 1)[1], Lease)


def test_a_place_that_is_at_work_no_more_goes_to_nobody() -> None:
    round = shared(a_round(2, over_select=1.0), "a", 2)
    for id in ("a0", "a1"):
        round, _ = round.report(id, 1)
    assert isinstance(round.check_in("b", "b", 5, "b", 1)[1], str)


@pytest.mark.parametrize(
    ("others", "theirs"), [(1, 1), (2, 1), (3, 2), (13, 10)], ids=lambda number: str(number)
)
def test_valid_replies_of_a_token_leave_the_others_seats(others: int, theirs: int) -> None:
    round = shared(shared(a_round(20), "a", 26), "b", others)
    for place in range(26):
        round = valid(round, f"a{place}")
    assert round.count(Phase.VALID) == 20 - theirs
    late = round.leases[f"a{25 - others}"]
    assert late.why == "the other seats of the round are for phones of other tokens"
    assert isinstance(round.check_in("a again", "a", 5, "a again", 2)[1], str)
    for place in range(others):
        round = valid(round, f"b{place}")
    assert round.full


def test_seats_of_phones_that_vanish_go_back_to_the_others() -> None:
    round = shared(shared(a_round(2), "a", 3), "b", 1)
    round = valid(valid(round, "a0"), "a1")
    assert round.count(Phase.VALID) == 1
    round, lease = round.check_in("a3", "a", 5, "a3", 31)
    assert isinstance(lease, Lease)
    assert round.leases["b0"].phase == Phase.LOST
    assert valid(round, "a3").full


def test_a_round_for_one_update_takes_that_of_whoever_is_first() -> None:
    round = shared(shared(a_round(1), "a", 2), "b", 1)
    assert held(round) == {"a": 1, "b": 1}
    assert valid(round, "b0").full


def test_a_token_that_uses_up_leases_gets_no_more_of_them_in_a_round() -> None:
    round, places = a_round(2), 3
    for number in range(10 * places):
        round, lease = round.check_in(f"n{number}", "a", 5, f"n{number}", 0)
        assert isinstance(lease, Lease)
        round, _ = round.report(lease.id, 0)
        round = round.settle(lease.id, Phase.REFUSED, "no")
    _, why = round.check_in("one more", "a", 5, "one more", 0)
    assert why == "its token has been asked too often in this round"
    assert isinstance(round.check_in("other", "b", 5, "other", 0)[1], Lease)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["check in", "heartbeat", "report", "valid", "refused", "lost"]),
            st.integers(0, 8),
            st.floats(0, 12),
        ),
        max_size=60,
    ),
    st.integers(1, 4),
)
def test_whatever_phones_do_seats_and_places_are_shared_and_never_exceeded(
    events: list[tuple[str, int, float]], seats: int
) -> None:
    """Phones 0 to 5 have one token, each of the others has its own."""
    round, now, number = a_round(seats), 0.0, 0
    ids: dict[int, str] = {}
    words = {"valid": Phase.VALID, "refused": Phase.REFUSED, "lost": Phase.LOST}
    for what, phone, later in events:
        now += later
        if what == "check in":
            number += 1
            owner = str(max(5, phone))
            round, got = round.check_in(f"p{phone}", owner, 1, f"id{number}", now)
            if isinstance(got, Lease):
                ids[phone] = got.id
            elif got == "enough devices have been chosen" and round.count(Phase.VALID) == 0:
                open = Counter(x.owner for x in round.leases.values() if x.phase == Phase.OPEN)
                assert all(held(round)[x] < held(round)[owner] + 2 for x in open)
        elif phone in ids and what == "heartbeat":
            round, _ = round.heartbeat(ids[phone], now)
        elif phone in ids and what == "report":
            round, _ = round.report(ids[phone], now)
        elif phone in ids:
            round = round.settle(ids[phone], words[what], "")
        own = list(round.leases.values())
        working = {x.id: x for x in own if x.phase in (Phase.OPEN, Phase.REPORTED, Phase.VALID)}
        assert working == round.working
        assert len(working) <= round.places
        assert len({x.device for x in working.values()}) == len(working)
        for phase in Phase:
            assert round.count(phase) == sum(x.phase == phase for x in own)
        assert round.count(Phase.VALID) <= seats
        assert all(x.ends <= round.deadline for x in own)
