"""Members and seats: who is drawn, of which class they are, what is refused."""

from collections import Counter
from typing import Any

import pytest

from corolla.config.run import RunConfig
from corolla.config.sections.groups import ClientClass
from corolla.errors import ConfigError
from corolla.server.rounds import cohort
from corolla.server.rounds.federation import classes_behind
from tests.server.rounds.members import CLASSES, CLIENTS, federation


def test_a_gateway_counts_as_many_clients_as_it_has_seats() -> None:
    found = federation(cohort=20)
    assert found.population == 10
    assert found.cohort_size == 10
    assert federation(cohort=4).cohort_size == 4
    assert federation(seats={}, cohort=20).cohort_size == 3
    assert federation(cohort=7, quorum=0.5).needed == 4


def test_every_seat_is_drawn_as_often() -> None:
    found = federation()
    drawn: Counter[str] = Counter()
    for round in range(2000):
        cohort_of_three = found.sample(list(CLIENTS), 3, round)
        assert sum(cohort_of_three.values()) == 3
        drawn.update(cohort_of_three)
    # Each of 10 seats in 3 of 10 rounds: 600 of 2000, standard deviation 20.
    assert abs(drawn["ann"] - 600) < 100
    assert abs(drawn["bob"] - 600) < 100
    assert abs(drawn["gate"] - 4800) < 140


def test_without_gateways_a_cohort_is_that_of_its_clients() -> None:
    names = [f"c{i}" for i in range(20)]
    found = federation(seats={}, clients=dict.fromkeys(names, 4))
    for round in range(20):
        wanted = cohort.sample(names, 6, 0, round)
        assert list(found.sample(names, 6, round)) == wanted
        assert set(found.sample(names, 6, round).values()) == {1}


def test_members_are_in_the_order_of_the_names_of_their_phones() -> None:
    """As if each phone, called gate/…, were a member itself: "-" comes before "/"."""
    clients = {"gate-1": 5, "gate": 0, "gates": 5, "ann": 5}
    found = federation(clients=clients)
    flat = sorted(["ann", "gate-1", "gates", *(f"gate/p{i}" for i in range(8))])
    order = list(dict.fromkeys(name.partition("/")[0] for name in flat))
    assert list(found.sample(list(clients), 11, 1)) == order


def test_a_client_must_not_have_the_name_of_a_phone() -> None:
    with pytest.raises(ConfigError, match="'gate/x' has a name that belongs to a device"):
        federation(clients={**CLIENTS, "gate/x": 3})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"strategy": "scaffold", "optimizer": "sgd"}, "keep a state of their own"),
        ({"strategy": "hetlora"}, "keep a state of their own"),
        ({"strategy": "feddpa"}, "keep a state of their own"),
        ({"codec": ["top_k:0.1"]}, "top_k leaves out"),
        ({"strategy": "fedavg", "buffer": 2}, "one by one"),
        ({"selection": "weighted"}, "examples of each client"),
        ({"local_epochs": 1}, "bounds the weight"),
    ],
)
def test_what_gateways_cannot_do_is_refused_in_one_line(changes: dict[str, Any], why: str) -> None:
    federation(seats={}, **changes)
    with pytest.raises(ConfigError, match=why) as caught:
        federation(**changes)
    assert "\n" not in str(caught.value)


def test_classes_follow_from_the_order_in_which_members_came() -> None:
    """Who comes later does not change the rank of those that are there."""
    ranks = {"ranks": [2, 4], "strategy": "flora"}
    before = federation({}, {"bob": 4, "cyd": 4}, roster=("bob", "cyd"), **ranks)
    after = federation({}, {"ann": 4, "bob": 4, "cyd": 4}, roster=("bob", "cyd", "ann"), **ranks)
    for name in ("bob", "cyd"):
        assert before.lora(name) == after.lora(name)
    assert [after.lora(name).rank for name in ("ann", "bob", "cyd")] == [2, 2, 4]


def test_only_who_is_online_can_be_asked() -> None:
    trace = cohort.Trace({"ann": [(1, 5)], "gate": [(2, 5)]}, "")
    found = federation(trace=trace)
    assert found.present(1) == ["ann"]
    assert found.present(2, {"gate", "bob", "stranger"}) == ["gate"]
    assert federation().present(1, {"bob"}) == ["bob"]


def test_gateways_are_not_evaluated() -> None:
    assert federation().evaluated == ["ann", "bob"]
    assert federation(eval_participants=True, rounds=3).evaluated == ["ann", "bob"]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("strong", {"first_order": "strong", "zeroth_order": "weak"}),
        ("weak", {"zeroth_order": "weak", "first_order": "strong"}),
        ("weaker", {"zeroth_order": "weaker", "first_order": "strong"}),
    ],
)
def test_phones_are_of_their_gateways_class_or_of_the_first_of_the_other_trainer(
    own: str, expected: dict[str, str]
) -> None:
    config = RunConfig(strategy="mixed", classes=CLASSES)
    found = classes_behind(config, own)
    assert found == expected
    assert next(iter(found.values())) == own


def test_phones_of_another_rank_than_their_gateways_do_not_come() -> None:
    classes = {"a": {"rank": 4}, "b": {"rank": 2, "trainer": "zeroth_order"}}
    assert classes_behind(RunConfig(), "") == {"first_order": ""}
    own = RunConfig().model_copy(
        update={"classes": {k: ClientClass(**v) for k, v in classes.items()}}  # type: ignore[arg-type]
    )
    assert classes_behind(own, "a") == {"first_order": "a"}
    assert classes_behind(own, "b") == {"zeroth_order": "b"}
