"""Leases by hand: who gets a seat, who loses it, who is told what; the clock is a number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.server.gateway.budget import Assignment
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


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["check in", "heartbeat", "report", "valid", "refused", "lost"]),
            st.integers(0, 5),
            st.floats(0, 12),
        ),
        max_size=60,
    ),
    st.integers(1, 3),
)
def test_whatever_phones_do_seats_and_places_are_never_exceeded(
    events: list[tuple[str, int, float]], seats: int
) -> None:
    round, now, number = a_round(seats), 0.0, 0
    held: dict[int, str] = {}
    words = {"valid": Phase.VALID, "refused": Phase.REFUSED, "lost": Phase.LOST}
    for what, phone, later in events:
        now += later
        if what == "check in":
            number += 1
            round, got = round.check_in(f"p{phone}", "o", 1, f"id{number}", now)
            if isinstance(got, Lease):
                held[phone] = got.id
        elif phone in held and what == "heartbeat":
            round, _ = round.heartbeat(held[phone], now)
        elif phone in held and what == "report":
            round, _ = round.report(held[phone], now)
        elif phone in held:
            round = round.settle(held[phone], words[what], "")
        own = list(round.leases.values())
        working = [x for x in own if x.phase in (Phase.OPEN, Phase.REPORTED, Phase.VALID)]
        assert len(working) <= round.places
        assert len({x.device for x in working}) == len(working)
        assert round.count(Phase.VALID) <= seats
        assert all(x.ends <= round.deadline for x in own)
