"""What is expected of whom: sums or single updates, by class, bounded by examples."""

from dataclasses import replace
from typing import Any

import pytest

from corolla.aggregation.sums import summable, summed_like
from corolla.server.rounds import expectations
from corolla.server.rounds.federation import merges
from corolla.server.rounds.gate import judge
from corolla.types import LoraSpec
from corolla.wire import codec
from corolla.wire.messages import Kind, Reply, Task, pack_reply
from tests.server.rounds.members import CLASSES, federation, fresh


def test_a_gateway_is_expected_to_send_sums_where_sums_are_enough() -> None:
    found = expectations.expected(federation(), "gate", Kind.TRAIN, 1, 5)
    like = {"adapter": fresh(LoraSpec(2, 16.0))}
    assert found.most_clients == 5
    assert found.sums is not None
    assert found.sums.keys() == summed_like(like).keys()
    assert found.most_examples == 6
    client = expectations.expected(federation(), "ann", Kind.TRAIN, 1)
    assert (client.most_clients, client.sums, client.most_examples) == (0, None, 5)
    assert expectations.expected(federation(), "ann", Kind.EVALUATE, 1).like is None


@pytest.mark.parametrize("changes", [{"strategy": "flora"}, {"robust": "median"}])
def test_a_gateway_is_expected_to_send_all_updates_where_they_are_needed(
    changes: dict[str, Any],
) -> None:
    found = federation(**changes)
    assert expectations.expected(found, "gate", Kind.TRAIN, 1, 5).sums is None
    assert merges(found.config, found.strategy) is None


def test_each_phone_has_a_seed_of_its_own() -> None:
    found = expectations.expected(federation(strategy="seed_pool"), "gate", Kind.TRAIN, 3, 8)
    assert found.member is not None
    likes = [found.member(f"gate/p{i}")[0].like for i in range(8)]
    assert len({int(like["scalars"]["seed"]) for like in likes if like}) == 8
    flat = expectations.expected(
        federation({}, {"gate/p0": 9}, strategy="seed_pool"), "gate/p0", Kind.TRAIN, 3
    )
    assert flat.like is not None
    assert likes[0] is not None
    assert int(flat.like["scalars"]["seed"]) == int(likes[0]["scalars"]["seed"])


def test_a_gateway_of_a_mixed_federation_may_send_what_either_class_sends() -> None:
    """ann is strong, bob weak, the gateway weaker: 50 steps of 2 examples."""
    found = federation(strategy="mixed", classes=CLASSES)
    expected = expectations.expected(found, "gate", Kind.TRAIN, 1, 5)
    assert expected.like is not None
    assert expected.like.keys() == {"adapter", "scalars"}
    assert len(expected.like["scalars"]["scalars"]) == 50
    assert expected.sums is not None
    assert expected.sums.keys() == {"adapter", "scalars", "counts"}
    assert expected.parts == {
        frozenset({"scalars", "counts"}): 100,
        frozenset({"adapter", "counts"}): 6,
    }
    assert expected.most_examples == expectations.most_examples(found, "gate") == 100
    assert expected.member is not None
    weaker, strong = expected.member("gate/p1")
    assert (weaker.most_examples, strong.most_examples) == (100, 6)
    for client, groups in (("ann", {"adapter"}), ("bob", {"scalars"})):
        single = expectations.expected(found, client, Kind.TRAIN, 1)
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
    expected = expectations.expected(found, "gate", Kind.TRAIN, 1, 5)
    sent = summable(found.strategy.aggregator())
    assert sent is not None
    for examples in first:
        sent.add({"adapter": fresh(found.lora("gate"))}, examples)
    for number, examples in enumerate(zeroth):
        like = expectations.like(found, "gate", 1, "weaker", f"gate/p{number}")
        sent.add(like, examples)
    task = Task(found.run_id, 1, "v1", Kind.TRAIN, "{}", seats=5)
    payload = codec.encode(sent.sums())
    reply = Reply(found.run_id, 1, "v1", Kind.TRAIN, "gate", sum(first + zeroth), {}, payload)
    packet = pack_reply(replace(reply, clients=clients))
    return judge(packet, "gate", task, expected).verdict.code


def test_a_gateway_of_one_trainer_may_send_its_own_form_alone() -> None:
    classes = {"a": {"local_steps": 1}, "b": {"local_steps": 9}}
    found = federation(classes=classes)
    expected = expectations.expected(found, "gate", Kind.TRAIN, 1, 5)
    assert expected.most_examples == 2  # the gateway is the third in turn: of class a
    assert expected.parts == {frozenset({"adapter"}): 2}
