"""A phone that says, with one token, that it is two hundred phones.

The token is good, the names are its choice, its replies are valid and come at once. Where seats go
by names, it has all of them before an honest phone, with another token, has trained.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.server.gateway.access import Token
from corolla.server.gateway.leases import OfferRound, Phase
from tests.server.gateway import gateways
from tests.server.gateway.callers import ABLE, CONFIG, asked
from tests.server.gateway.gateways import Clock, World

EVIL, HONEST = Token("evil", "", ""), Token("honest", "", "")
TASK = gateways.a_task(CONFIG, seats=20)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with gateways.serving(tmp_path, Clock(), seats=20) as found:
        yield found


def check_in(world: World, device: str, token: Token) -> pb.CheckInResponse:
    request = pb.CheckInRequest(
        protocol=1, device=device, capabilities=ABLE, num_examples=5, own_model=True
    )
    return world.gateway.check_ins.answer(request, token)


def deliver(world: World, lease: pb.Lease, token: Token) -> str:
    """Why the gateway does not take a valid reply in; "" when it does."""
    packet, deliveries = gateways.update_of(TASK, lease.client), world.gateway.deliveries
    chunk = protocol.chunk(packet.payload, 0, len(packet.payload), lease.id)
    if problem := deliveries.upload(chunk, token).problem:
        return str(problem)
    return str(deliveries.report(pb.ReportRequest(lease=lease.id, reply=packet.header), token).why)


def attack(world: World) -> tuple[OfferRound, str]:
    """The round once both have sent what they could, and why the honest reply does not count."""
    with asked(world, TASK):
        job = world.gateway.rounds.job
        assert job
        leases = [check_in(world, f"evil-{number}", EVIL).lease for number in range(200)]
        honest = check_in(world, "honest", HONEST)
        for lease in leases:
            if lease.id:
                deliver(world, lease, EVIL)
        why = deliver(world, honest.lease, HONEST) if honest.lease.id else honest.refusal.text
        return job.round, why


def valid(round: OfferRound, owner: str) -> int:
    own = [lease for lease in round.leases.values() if lease.owner == owner]
    return sum(lease.phase == Phase.VALID for lease in own)


def test_one_token_with_many_names_leaves_a_seat_to_another(world: World) -> None:
    round, why = attack(world)
    assert why == ""
    assert (valid(round, "evil"), valid(round, "honest")) == (19, 1)


def test_where_names_have_seats_one_token_has_all_of_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody: Any = lambda self, owner: None  # noqa: E731
    monkeypatch.setattr(OfferRound, "_place_for", nobody)
    monkeypatch.setattr(OfferRound, "_has_its_share", nobody)
    round, why = attack(world)
    assert why == "enough devices have been chosen"
    assert (valid(round, "evil"), valid(round, "honest")) == (20, 0)
