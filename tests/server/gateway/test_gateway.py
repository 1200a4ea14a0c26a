"""A gateway between a real server's rounds and real phones' calls, over TLS on loopback."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from corolla.client.training.worker import Worker
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import update_pb2
from corolla.server.gateway.gateway import margin
from corolla.server.gateway.merging import prepare
from corolla.storage.memory import Memory
from corolla.tensors import tree
from corolla.wire import limits, messages
from corolla.wire.messages import Kind, Task
from corolla.wire.packet import Packet
from corolla.wire.rpc import Waits
from tests.server.gateway import gateways
from tests.server.gateway.callers import CONFIG, Caller, asked, sums
from tests.server.gateway.gateways import Behind, Clock, Flat, Shared, World
from tests.strategies import tiny


@pytest.mark.parametrize("strategy", ["flora", "seed_pool", "fedavg", "fedkseed"])
def test_phones_behind_a_gateway_give_the_bits_of_clients_of_the_same_names(
    strategy: str, tmp_path: Path
) -> None:
    config = tiny.config(strategy, cohort=4, deadline=60.0)
    data = gateways.renamed("gate/")
    flat = gateways.course(
        config,
        Flat(Worker(config, tiny.lora_model("llama"), data, Memory(tmp_path / "flat")), data),
        {},
    )
    shared = Shared(config, data, tmp_path / "memories")
    with gateways.serving(tmp_path) as world:
        trainers = {name: shared.of(f"gate/{name}") for name in tiny.CLIENTS}
        behind = gateways.course(config, Behind(world), {"gate": 4})
        with gateways.phones(world, trainers):
            for _ in range(3):
                expected, found = flat.step(), behind.step()
                assert tree.digest_all(found.state) == tree.digest_all(expected.state)
                assert found.num_examples["gate"] if strategy != "flora" else True
    assert len(shared.asked) == 12


def test_a_partial_aggregate_is_the_weighted_sum_of_what_phones_sent(
    world: World, caller: Callable[..., Caller]
) -> None:
    task = gateways.a_task(CONFIG, seats=2)
    with asked(world, task) as reply:
        for device, value, examples in (("p2", 0.25, 3), ("p1", 2.0, 5)):
            own = caller(device)
            packet = gateways.update_of(task, f"gate/{device}", value, examples)
            assert own.report(own.lease(), packet).accepted
        found = reply.result(10)
    assert (found.clients, found.num_examples, found.error) == (2, 8, "")
    assert not found.bundle
    assert sums(found) == 3 * 0.25 + 5 * 2.0


def test_the_round_ends_with_what_there_is_at_its_deadline(
    world: World, caller: Callable[..., Caller]
) -> None:
    task = gateways.a_task(CONFIG, seats=3)
    with asked(world, task) as reply:
        own, silent = caller("p1"), caller("p2")
        assert own.report(own.lease(), gateways.update_of(task, "gate/p1")).accepted
        late = silent.lease()
        assert late.deadline_seconds == CONFIG.deadline - margin(CONFIG.deadline)
        world.later(late.deadline_seconds)
        found = reply.result(10)
        told = silent.report(late, Packet(gateways.update_of(task, "gate/p2").header, b""))
    assert found.clients == 1
    assert not told.accepted
    assert told.why


def test_a_round_without_any_update_is_an_error(world: World) -> None:
    with asked(world, gateways.a_task(CONFIG)) as reply:
        world.end_round()
        found = reply.result(10)
    assert found.error == "none of 0 phones gave a valid update in time"


def test_hello_tells_the_seats_and_needs_a_phone(tmp_path: Path) -> None:
    packet = messages.pack_task(Task("0" * 32, 0, "", Kind.HELLO, ""))
    with gateways.serving(tmp_path, Clock()) as world:
        world.later(1.5 * world.gateway.settings.retry)  # it waits no longer for the first ones
        nobody = messages.unpack_reply(world.gateway.answer(packet), 0)
        assert nobody.error == "no eligible phone has checked in yet"
        with ExitStack() as stack:
            for device in ("p1", "p2", "p3"):
                own = Caller(world, device)
                stack.enter_context(own.channel)
                idle = device != "p3"
                can = update_pb2.Capabilities(charging=True, idle=idle)
                own.check_in(capabilities=can, num_examples=limits.MAX_EXAMPLES)
        found = messages.unpack_reply(world.gateway.answer(packet), 0)
    assert (found.client, found.seats, found.num_examples, found.error) == ("gate", 2, 2, "")


def test_seats_can_be_promised_and_evaluation_is_refused(world: World) -> None:
    hello = world.gateway.answer(messages.pack_task(Task("0" * 32, 0, "", Kind.HELLO, "")))
    assert messages.unpack_reply(hello, 0).seats == 4
    task = replace(gateways.a_task(CONFIG), kind=Kind.EVALUATE)
    found = messages.unpack_reply(world.gateway.answer(messages.pack_task(task)), 0)
    assert "no examples of its own" in found.error


def test_a_strategy_from_a_file_is_refused_unless_its_owner_allowed_it(
    world: World, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    file = tmp_path / "own.py"
    file.write_text(f"open({str(marker)!r}, 'w')\n")
    task = gateways.a_task(CONFIG)
    config = json.loads(task.config)
    config["run"]["strategy"] = f"{file}:Own"
    packet = messages.pack_task(replace(task, config=json.dumps(config)))
    found = messages.unpack_reply(world.gateway.answer(packet), 0)
    assert "its owner has not allowed it" in found.error
    assert not marker.exists()


def test_a_strategy_that_its_owner_allowed_is_known_by_its_files_name(
    tmp_path: Path,
) -> None:
    """The server names the file by a path of its own machine, or without one."""
    file = tmp_path / "own.py"
    file.write_text("from corolla.strategies.fedavg import FedAvg\nclass Own(FedAvg): pass\n")
    task = gateways.a_task(CONFIG, seats=1)
    config = json.loads(task.config)
    with gateways.serving(tmp_path, seats=1, allow=[f"{file}:Own"]) as world:
        for round, told in enumerate(("own.py:Own", "/on/the/server/own.py:Own"), 1):
            config["run"]["strategy"] = told
            asked_for = replace(task, config=json.dumps(config), round=round)
            own = Caller(world)
            with own.channel, asked(world, asked_for) as reply:
                lease = own.lease()
                assert own.report(lease, gateways.update_of(asked_for, "gate/p1")).accepted
                assert reply.result(10).clients == 1
            assert lease.strategy == "own.py:Own"


@pytest.mark.parametrize(
    "config",
    ["", "{}", "[]", "[" * 100_000, '{"run": {}}', '{"run": {"strategy": "fedavg"}, "lora": {}}'],
)
def test_a_task_that_cannot_be_read_is_an_error_reply(config: str, world: World) -> None:
    task = replace(gateways.a_task(CONFIG), config=config)
    found = messages.unpack_reply(world.gateway.answer(messages.pack_task(task)), 0)
    assert "settings cannot be read" in found.error


def test_a_task_whose_adapter_nothing_could_hold_is_an_error_reply(world: World) -> None:
    told = json.loads(gateways.a_task(CONFIG).config)
    told["fresh"] = {"adapter": {"m.lora_A": ("float32", [1 << 30, 1 << 30])}}
    task = replace(gateways.a_task(CONFIG), config=json.dumps(told))
    found = messages.unpack_reply(world.gateway.answer(messages.pack_task(task)), 0)
    assert found.error == "the task's adapter takes more memory than this gateway has"


def test_a_task_asked_twice_is_done_once_and_a_new_one_takes_its_place(
    world: World, caller: Callable[..., Caller]
) -> None:
    own, task = caller(), gateways.a_task(CONFIG, seats=1)
    with asked(world, task) as first, asked(world, task) as second:
        assert own.report(own.lease(), gateways.update_of(task, "gate/p1")).accepted
        assert first.result(10) == second.result(10)
        assert messages.unpack_reply(
            world.gateway.answer(messages.pack_task(task)), 1 << 20
        ) == first.result(10)
    old, new = gateways.a_task(CONFIG, round=2), gateways.a_task(CONFIG, seats=1, round=3)
    with asked(world, old) as dropped:
        lease = own.lease()
        assert own.call("Heartbeat", pb.HeartbeatRequest(lease=lease.id)).wanted
        with asked(world, new) as reply:
            assert "another task" in dropped.result(10).error
            assert not own.call("Heartbeat", pb.HeartbeatRequest(lease=lease.id)).wanted
            stale = own.call("Upload", protocol.chunk(b"abc", 0, 3, lease.id))
            assert stale.problem == "the lease is of an earlier round"
            assert own.report(own.lease(), gateways.update_of(new, "gate/p1")).accepted
            assert reply.result(10).round == 3


def test_a_late_joiner_gets_what_it_missed_and_a_lost_gateway_starts_from_a_snapshot(
    tmp_path: Path,
) -> None:
    options = {"size": 4096, "scalars": "fp32"}
    config = tiny.config("seed_pool", cohort=2, deadline=60.0, rounds=7, options=options)
    shared = Shared(config, gateways.renamed("gate/"), tmp_path / "memories")

    def trainers(names: str) -> dict[str, Any]:
        return {name: shared.of(f"gate/{name}") for name in names}

    with gateways.serving(tmp_path) as world:
        run = gateways.course(config, Behind(world), {"gate": 2})
        with gateways.phones(world, trainers("ab")):
            for _ in range(4):
                run.step()
        with gateways.phones(world, trainers("bc")):  # c has seen nothing
            run.step()
        assert set(shared.asked[-2:]) == {"gate/b", "gate/c"}
    shutil.rmtree(tmp_path / "gate")
    with gateways.serving(tmp_path) as world:
        run.network = Behind(world)
        with gateways.phones(world, trainers("ad")):  # a is behind, d is new
            run.step()
            result = run.step()  # rows after the snapshot
        assert set(shared.asked[-2:]) == {"gate/a", "gate/d"}
    assert result.num_examples
    assert len(run.done) == 7


def test_groups_the_gateway_has_lost_are_asked_for_again(tmp_path: Path) -> None:
    config = tiny.config("flora", cohort=2, deadline=60.0)
    shared = Shared(config, gateways.renamed("gate/"), tmp_path / "memories")
    trainers = {name: shared.of(f"gate/{name}") for name in "ab"}
    with gateways.serving(tmp_path) as world:
        run = gateways.course(config, Behind(world), {"gate": 2})
        with gateways.phones(world, trainers):
            run.step()
            run.step()
    shutil.rmtree(tmp_path / "gate")
    shutil.rmtree(tmp_path / "memories")  # nor do phones have them any more
    with gateways.serving(tmp_path) as world:
        run.network = Behind(world)
        with gateways.phones(world, trainers):
            assert len(run.step().num_examples) == 2


def test_one_phones_own_metrics_do_not_spoil_the_gateways_reply(
    world: World, caller: Callable[..., Caller]
) -> None:
    task = gateways.a_task(CONFIG, seats=3)
    many = {f"own{number}": 1.0 for number in range(limits.MAX_METRICS)}
    with asked(world, task) as reply:
        for device, metrics in (("p1", many), ("p2", {"loss": 2.0}), ("p3", {"loss": 4.0})):
            own, plain = caller(device), gateways.update_of(task, f"gate/{device}", 1.0, 1)
            told = messages.unpack_reply(plain, len(plain.payload))
            assert own.report(
                own.lease(), messages.pack_reply(replace(told, metrics=metrics))
            ).accepted
        found = reply.result(10)
    assert (found.clients, found.error) == (3, "")
    assert found.metrics == {"loss": 3.0}


def test_that_one_phone_counts_users_is_not_lost_among_others() -> None:
    """Nor among many names of a phone's own."""
    task = gateways.a_task(CONFIG, seats=3)
    packets = [gateways.update_of(task, f"gate/p{i}", 1.0, 1) for i in range(3)]
    told = [messages.unpack_reply(packet, len(packet.payload)) for packet in packets]
    own = {f"own{number}": 1.0 for number in range(limits.MAX_METRICS)}
    metrics = [{"epsilon": 1.0, "per_user": 1.0}, {"epsilon": 2.0}, own]
    sent = [
        (f"gate/p{i}", 1, None, messages.pack_reply(replace(reply, metrics=said)))
        for i, (reply, said) in enumerate(zip(told, metrics, strict=True))
    ]
    packet = prepare(task).merge("gate", sent)
    found = messages.unpack_reply(packet, len(packet.payload))
    assert found.metrics == {"epsilon": 2.0, "per_user": pytest.approx(1 / 3)}


@pytest.mark.parametrize("robust", ["none", "median"])
def test_a_reply_that_was_damaged_since_it_was_judged_is_left_out(robust: str) -> None:
    """Also of a bundle, which would be refused as a whole."""
    task = gateways.a_task(CONFIG.model_copy(update={"robust": robust}), seats=2)
    good = gateways.update_of(task, "gate/p1")
    bad = gateways.update_of(task, "gate/p2")
    bad = Packet(bad.header, bad.payload[:-1] + b"x")
    packet = prepare(task).merge("gate", [("gate/p1", 5, None, good), ("gate/p2", 5, None, bad)])
    found = messages.unpack_reply(packet, len(packet.payload))
    assert (found.clients, found.num_examples) == (1, 3)


class NineSeconds(Waits):
    """A server that waits for so long still."""

    def left(self) -> float:
        return 9.0


def test_a_round_ends_before_its_server_has_stopped_waiting(world: World) -> None:
    with asked(world, gateways.a_task(CONFIG), NineSeconds()) as reply:
        world.later(9.0 - margin(9.0))
        assert "none of 0 phones" in reply.result(10).error
    assert margin(9.0) == 3.0
