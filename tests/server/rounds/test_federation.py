"""Members and seats: who is drawn, what is expected of whom, what is refused."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.aggregation.sums import summable, summed_like
from corolla.config.build import build_strategy
from corolla.config.groups import ClientClass
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.server.rounds import cohort
from corolla.server.rounds.federation import Federation, classes_behind, merges
from corolla.server.rounds.gate import judge
from corolla.types import LoraSpec, Params
from corolla.wire import codec
from corolla.wire.messages import Kind, Reply, Task, pack_reply

CLIENTS = {"ann": 5, "bob": 9, "gate": 0}
SEATS = {"gate": 8}


def fresh(spec: LoraSpec) -> Params:
    return {"m.lora_A": torch.zeros(spec.rank, 3), "m.lora_B": torch.zeros(2, spec.rank)}


def federation(seats: Any = SEATS, clients: Any = CLIENTS, **changes: Any) -> Federation:
    own = {key: changes.pop(key) for key in ("roster", "trace") if key in changes}
    config = RunConfig(**{"rank": 2, "local_steps": 3, "batch_size": 2, **changes})
    strategy = build_strategy(config)
    return Federation("ab" * 16, config, strategy, clients, fresh, seats=seats, **own)


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


def test_a_gateway_is_expected_to_send_sums_where_sums_are_enough() -> None:
    found = federation().expected("gate", Kind.TRAIN, 1, 5)
    like = {"adapter": fresh(LoraSpec(2, 16.0))}
    assert found.most_clients == 5
    assert found.sums is not None
    assert found.sums.keys() == summed_like(like).keys()
    assert found.most_examples == 6
    client = federation().expected("ann", Kind.TRAIN, 1)
    assert (client.most_clients, client.sums, client.most_examples) == (0, None, 5)
    assert federation().expected("ann", Kind.EVALUATE, 1).like is None


@pytest.mark.parametrize("changes", [{"strategy": "flora"}, {"robust": "median"}])
def test_a_gateway_is_expected_to_send_all_updates_where_they_are_needed(
    changes: dict[str, Any],
) -> None:
    found = federation(**changes)
    assert found.expected("gate", Kind.TRAIN, 1, 5).sums is None
    assert merges(found.config, found.strategy) is None


def test_each_phone_has_a_seed_of_its_own() -> None:
    found = federation(strategy="seed_pool").expected("gate", Kind.TRAIN, 3, 8)
    assert found.member is not None
    likes = [found.member(f"gate/p{i}")[0].like for i in range(8)]
    assert len({int(like["scalars"]["seed"]) for like in likes if like}) == 8
    flat = federation({}, {"gate/p0": 9}, strategy="seed_pool").expected("gate/p0", Kind.TRAIN, 3)
    assert flat.like is not None
    assert likes[0] is not None
    assert int(flat.like["scalars"]["seed"]) == int(likes[0]["scalars"]["seed"])


def test_a_network_inherits_that_all_are_there(tmp_path: Path) -> None:
    from corolla.server.rounds.federation import Network

    class Two(Network):
        def clients(self) -> dict[str, int]:
            return {"ann": 1, "bob": 2}

        def ask(self, packets: Any) -> Any:
            return []

    assert Two().online() == {"ann", "bob"}
    assert Two().seats() == {}


CLASSES: dict[str, Any] = {
    "strong": {"trainer": "first_order", "local_steps": 3},
    "weak": {"trainer": "zeroth_order", "local_steps": 7},
    "weaker": {"trainer": "zeroth_order", "local_steps": 50},
}


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


def test_a_gateway_of_a_mixed_federation_may_send_what_either_class_sends() -> None:
    """ann is strong, bob weak, the gateway weaker: 50 steps of 2 examples."""
    found = federation(strategy="mixed", classes=CLASSES)
    expected = found.expected("gate", Kind.TRAIN, 1, 5)
    assert expected.like is not None
    assert expected.like.keys() == {"adapter", "scalars"}
    assert len(expected.like["scalars"]["scalars"]) == 50
    assert expected.sums is not None
    assert expected.sums.keys() == {"adapter", "scalars", "counts"}
    assert expected.parts == {
        frozenset({"scalars", "counts"}): 100,
        frozenset({"adapter", "counts"}): 6,
    }
    assert expected.most_examples == found.most_examples("gate") == 100
    assert expected.member is not None
    weaker, strong = expected.member("gate/p1")
    assert (weaker.most_examples, strong.most_examples) == (100, 6)
    for client, groups in (("ann", {"adapter"}), ("bob", {"scalars"})):
        single = found.expected(client, Kind.TRAIN, 1)
        assert single.like is not None
        assert single.like.keys() == groups


@pytest.mark.parametrize(
    ("first", "zeroth", "code"),
    [
        ([6], [100], "accepted"),
        ([6, 6], [], "accepted"),
        ([100], [], "weight"),  # the limit of the other class
        ([50], [50], "weight"),
    ],
)
def test_a_class_behind_a_gateway_is_bounded_by_its_own_examples(
    first: list[int], zeroth: list[int], code: str
) -> None:
    assert told_by_a_gateway(first, zeroth, len(first) + len(zeroth)) == code


def test_one_phone_cannot_claim_to_be_many() -> None:
    """Two of each class would be weighted by the spread between them."""
    assert told_by_a_gateway([6, 6], [50, 50], 4) == "accepted"
    assert told_by_a_gateway([6, 6], [50, 50], 1) == "weight"
    assert told_by_a_gateway([1, 1], [1, 1], 3) == "weight"


def told_by_a_gateway(first: list[int], zeroth: list[int], clients: int) -> str:
    """The verdict on sums of updates of so many examples, of so many clients by their word."""
    found = federation(strategy="mixed", classes=CLASSES)
    expected = found.expected("gate", Kind.TRAIN, 1, 5)
    sent = summable(found.strategy.aggregator())
    assert sent is not None
    for examples in first:
        sent.add({"adapter": fresh(found.lora("gate"))}, examples)
    for number, examples in enumerate(zeroth):
        like = found.like("gate", 1, "weaker", f"gate/p{number}")
        sent.add(like, examples)
    task = Task(found.run_id, 1, "v1", Kind.TRAIN, "{}", seats=5)
    payload = codec.encode(sent.sums())
    reply = Reply(found.run_id, 1, "v1", Kind.TRAIN, "gate", sum(first + zeroth), {}, payload)
    packet = pack_reply(replace(reply, clients=clients))
    return judge(packet, "gate", task, expected).verdict.code


def test_a_gateway_of_one_trainer_may_send_its_own_form_alone() -> None:
    classes = {"a": {"local_steps": 1}, "b": {"local_steps": 9}}
    found = federation(classes=classes)
    expected = found.expected("gate", Kind.TRAIN, 1, 5)
    assert expected.most_examples == 2  # the gateway is the third in turn: of class a
    assert expected.parts == {frozenset({"adapter"}): 2}
