"""A phone that keeps to what is asked of it: by its gateway's policy, and by its owner's limits."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from corolla.client.phone import policies, trainer
from corolla.client.phone.lease import Work
from corolla.client.phone.policies import Entry, Limits
from corolla.errors import ConfigError
from corolla.proto import device_pb2 as pb
from corolla.server.gateway.settings import Policy
from corolla.wire.parsing import parse
from tests.client.phone.standing import Standing
from tests.client.phone.test_session import CONFIG, LONG, Scripted, a_phone, ask
from tests.server.gateway import gateways
from tests.server.gateway.gateways import World

GOOD: Mapping[str, Any] = {"charging": True, "idle": True, "battery_percent": 90}


@pytest.fixture
def world(tmp_path: Path, clock: Standing) -> Iterator[World]:
    policy = Policy(battery_percent=20, thermal=2, separation=2, daily_seconds=1000.0)
    with gateways.serving(tmp_path, clock.now, seats=1, lease=5.0, policy=policy) as found:
        yield found


def noted(world: World, device: str = "p1") -> list[Entry]:
    return policies.read(world.folder / "phones" / device / "history.jsonl", time.time())


def test_the_policy_of_the_last_answer_is_kept_and_holds_before_the_next_call(
    world: World,
) -> None:
    now, said = dict(GOOD), list[str]()
    first = a_phone(world, Scripted(gateways.a_task(CONFIG)), conditions=lambda: now)
    first.say = said.append
    with first.channel:
        first.visit()
        now.update(idle=False, thermal=3)
        gateway = world.gateway
        world.gateway.roster.seen.clear()
        assert 0 < first.visit() < 1.0  # the window that the gateway gave
        first.visit()
    assert said == ["waiting: no round", "waiting: not idle, too warm"]
    assert not gateway.roster.seen  # it was not even asked
    assert first.kept.policy().thermal == 2
    again = a_phone(world, Scripted(gateways.a_task(CONFIG)), conditions=lambda: now)
    with again.channel:
        assert again.kept.policy() == first.kept.policy()  # of another process
        assert 15 <= again.visit() <= 30


def test_a_contribution_is_noted_and_the_next_one_comes_not_too_soon(
    world: World, clock: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(wanted: Callable[[], bool]) -> None:
        clock.at += 3.0

    one, two, three = (gateways.a_task(LONG, seats=1, round=round) for round in (1, 2, 3))
    phone = a_phone(world, Scripted(one, during=train), conditions=lambda: GOOD, clock=clock)
    with phone.channel:
        asked = ask(world, one)
        phone.run(rounds=1)
        assert asked.result().clients == 1
        (entry,) = noted(world)
        assert (entry.run, entry.round, entry.accepted) == (one.run_id, 1, True)
        assert entry.seconds == 3.0
        assert 500 < entry.bytes < 50_000
        phone.trainer = Scripted(two)
        asked = ask(world, two)
        with monkeypatch.context() as patch:
            patch.setattr(Work, "assembled", lambda *_: pytest.fail("its model was fetched"))
            phone.run(once=True)
        job = world.gateway.rounds.job
        assert job
        (lease,) = job.round.leases.values()
        assert (lease.phase, lease.why) == ("given_up", "policy: it contributed a few rounds ago")
        assert phone.trainer.models == []
        clock.at += LONG.deadline
        asked.result()
        phone.trainer = Scripted(three)
        asked = ask(world, three)
        phone.run(rounds=2)
        assert asked.result().clients == 1
    assert [(own.round, own.accepted) for own in noted(world)] == [(1, True), (2, False), (3, True)]


def test_charge_that_is_spent_is_noted_and_a_low_battery_ends_the_work(
    world: World, clock: Standing
) -> None:
    task, now = gateways.a_task(LONG, seats=1), {**GOOD, "charging": True}

    def drain(wanted: Callable[[], bool]) -> None:
        assert wanted()
        now.update(charging=False, battery_percent=10)
        clock.at += 1.0
        assert not wanted()

    world.gateway.check_ins.policy.charging = False  # or that would be what it says
    asked = ask(world, task)
    phone = a_phone(world, Scripted(task, during=drain), conditions=lambda: now, clock=clock)
    with phone.channel:
        phone.run(once=True)
    job = world.gateway.rounds.job
    assert job
    assert [own.why for own in job.round.leases.values()] == ["given up: the battery is low"]
    (entry,) = noted(world)
    assert (entry.battery, entry.accepted) == (80.0, False)
    clock.at += LONG.deadline
    asked.result()


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(daily_bytes=5000), "today's bytes are used up"),
        (Limits(daily_seconds=1e-6), "today's time is used up"),
    ],
)
def test_an_owners_limit_ends_the_work_of_a_day(limits: Limits, words: str, world: World) -> None:
    path, said = world.folder / "phones" / "p1" / "history.jsonl", list[str]()
    phone = a_phone(
        world, Scripted(gateways.a_task(CONFIG)), conditions=lambda: GOOD, limits=limits
    )
    phone.say = said.append
    policies.add(path, Entry(time.time() - 90_000, "ab" * 16, 1, 1.0, 9000.0))
    with phone.channel:
        phone.visit()  # a day ago
        policies.add(path, Entry(time.time() - 3600, "ab" * 16, 2, 1.0, 9000.0))
        phone.visit()
    assert said == ["waiting: no round", f"waiting: {words}"]


def test_options_are_limits() -> None:
    assert trainer.limits(None, 0.0) == Limits()
    assert trainer.limits("50MB", 1800.0) == Limits(50_000_000, 1800.0)
    with pytest.raises(ConfigError, match=r"--daily-data: expected a size .* found 'much'"):
        trainer.limits("much", 0.0)


def test_a_history_that_cannot_be_read_stops_nobody(world: World) -> None:
    folder = world.folder / "phones" / "p1"
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_bytes(b"\xff\x00 nonsense\n" * 10)
    (folder / "policy").write_bytes(b"\xff" * 50)
    said: list[str] = []
    phone = a_phone(world, Scripted(gateways.a_task(CONFIG)), conditions=lambda: GOOD)
    phone.say = said.append
    with phone.channel:
        phone.visit()
    assert said == ["waiting: no round"]
    kept = parse(pb.Policy(), (folder / "policy").read_bytes(), 1000)
    assert kept == world.gateway.check_ins.policy
