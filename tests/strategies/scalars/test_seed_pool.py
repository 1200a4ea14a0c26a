import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from corolla import seeds
from corolla.config.build import build_strategy
from corolla.directions import moving, pools, seedlog, signs
from corolla.errors import ConfigError, RoundError
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.round import run_round
from corolla.server.rounds.tasks import Traffic, make_tasks
from corolla.strategies.scalars.seed_pool import SeedPool
from corolla.tensors import tree
from corolla.types import Broadcast, Cost, Params, Payload, Size, row_name
from corolla.wire import codec, messages, scalar_groups
from corolla.wire.messages import Kind
from tests.strategies import devices, tiny

SPACES = ["lora", "full"]
START: Params = {
    "m.lora_A": torch.tensor([[0.5, -1.0, 2.0]]),
    "m.lora_B": torch.tensor([[3.0], [0.25]]),
}


def z(key: signs.Key, k: int, count: int) -> Tensor:
    """From the definition: signs of the key times row k of the Hadamard matrix, in fp64."""
    row = [(-1) ** (k & i).bit_count() for i in range(count)]
    return torch.from_numpy(signs.signs(key, 0, count)).double() * torch.tensor(row)


def flat(params: Params) -> Tensor:
    return torch.cat([params[n].detach().double().reshape(-1) for n in sorted(params)])


def client(n: int, seed: int, *scalars: float, step: float = -0.25) -> tiny.Scripted:
    return tiny.Scripted({}, n, seed=seed, kind="zeroth_order", scalars=scalars, step=step)


def current(strategy: SeedPool, state: Payload) -> Tensor:
    whole = strategy.adapter(state)
    return flat(moving.settle(whole.trained, whole.moves))


# By hand


@pytest.mark.parametrize("scalars", ["fp16", "fp32"])
def test_two_rounds_by_hand(scalars: Literal["fp16", "fp32"]) -> None:
    """Weights by examples, directions from the clients' seeds, signs that are new in each round."""
    strategy = SeedPool(size=8, scalars=scalars)
    first = strategy.init(START, 5)
    state, wanted = first, flat(START)
    for round in (1, 2):
        members = [
            client(1, 11, 1.0, -2.0, 0.5),
            client(3, 2**32 - 1, 4.0, 0.25, step=-0.5),
        ]
        state = tiny.play(strategy, state, members, first)
        key = (seeds.derive(5, "directions"), round)
        for member, p in zip(members, (0.25, 0.75), strict=True):
            chosen = [int(w) % 8 for w in signs.words((member.seed, 0), 0, 3, stream=1)]
            for k, g in zip(chosen, member.scalars, strict=False):
                wanted = wanted + p * member.step * g * z(key, k, 5)
    assert current(strategy, state) == pytest.approx(wanted, abs=1e-6)
    assert sorted(state) == ["key", "log-000001", "log-000002", "start"]
    kind = {"fp16": torch.float16, "fp32": torch.float32}[scalars]
    assert {row["scalars"].dtype for row in seedlog.rows(state).values()} == {kind}


def test_clients_start_where_the_rows_lead_on_the_signs_of_their_round() -> None:
    strategy = SeedPool(size=8)
    first = strategy.init(START, 5)
    state = first
    for round in (1, 2, 3):
        member = client(1, 11, 1.0, -2.0, 0.5)
        state = tiny.play(strategy, state, [member], first)
        (asked,) = member.asked
        assert len(asked["moves"]) == round - 1
        assert asked["pool"] == pools.SignPool(8, (seeds.derive(5, "directions"), round))
        assert asked["directions"] == signs.choices(11, 3, 8).tolist()
        assert asked["start"] is START


@pytest.mark.parametrize(
    "options", [{"size": 500}, {"size": 0}, {"size": 1 << 17}, {"scalars": "fp8"}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        SeedPool(**options)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e5])
def test_half_precision_rows_lose_the_last_of_eleven_bits(scale: float) -> None:
    """Whatever the size of the scalars: no zeros, no infinities."""
    found = {}
    for kind in ("fp16", "fp32"):
        strategy = SeedPool(size=64, scalars=kind)
        aggregator = strategy.aggregator()
        generator = torch.Generator().manual_seed(1)
        group = {
            "scalars": scale * torch.randn(200, generator=generator),
            "step": torch.tensor(-1e-3),
            "seed": torch.tensor(4),
        }
        aggregator.add({"scalars": group}, 3)
        state = strategy.init({"w": torch.zeros(300)}, 0)
        after, _ = strategy.apply(state, aggregator.finalise())
        found[kind] = current(strategy, after)
    assert float((found["fp16"] - found["fp32"]).norm() / found["fp32"].norm()) < 2.0**-11


def test_the_cost_is_the_formula() -> None:
    (cost,) = SeedPool().cost([Size(1, 2, 3, 200, "zeroth_order")])
    assert cost == Cost(2 * 200 + 8, 2 * 512 + 4, at_most=True)
    (cost,) = SeedPool(size=64, scalars="fp32").cost([Size(1, 2, 3, 10, "zeroth_order")])
    assert cost == Cost(4 * 10 + 8, 4 * 64 + 4, at_most=True)


def test_more_scalars_than_a_message_takes_are_refused_before_training() -> None:
    build_strategy(tiny.config("seed_pool", local_steps=256, queries=256))
    with pytest.raises(ConfigError, match="local-steps 257 times queries 256 is more than"):
        build_strategy(tiny.config("seed_pool", local_steps=257, queries=256))
    classes = {"pc": {}, "phone": {"trainer": "zeroth_order", "queries": 7000}}
    with pytest.raises(ConfigError, match="queries 7000 is more than"):
        build_strategy(tiny.config("mixed", local_steps=10, classes=classes))
    # Of first-order clients they are no scalars.
    build_strategy(tiny.config("fedavg", local_steps=70_000))


def test_epochs_are_refused_for_clients_that_send_scalars() -> None:
    with pytest.raises(ConfigError, match="use local-steps"):
        build_strategy(tiny.config("seed_pool", local_epochs=1))
    classes = {"pc": {}, "phone": {"trainer": "zeroth_order"}}
    with pytest.raises(ConfigError, match="use local-steps"):
        build_strategy(tiny.config("mixed", local_epochs=1, classes=classes))


# Real rounds, every client a device of its own


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_all_devices_end_with_the_servers_bits(kind: str, space: str, tmp_path: Path) -> None:
    """Who followed every round, missed some, or joined late: equal hashes of all weights."""
    run = devices.start(
        kind, tmp_path, strategy="seed_pool", parameters=space, options={"size": 64}, lr=1e-3
    )
    before = run.server()
    for members in ("ab", "ac", "ab", "a", "abc"):
        run.step(*members)
    assert len(seedlog.rows(run.state)) == 5
    found = run.hashes()  # d joins here
    assert found == dict.fromkeys("abcd", run.server())
    assert run.server() != before
    logs = {c: task.log for c, task in run.network.tasks.items()}
    missed = {c: len(log.rows) for c, log in logs.items() if log}
    assert missed == {"a": 1, "b": 1, "c": 1, "d": 5}


def test_a_device_receives_the_rows_it_missed_and_no_others(tmp_path: Path) -> None:
    run = devices.start("llama", tmp_path, strategy="seed_pool", options={"size": 64}, lr=1e-3)
    received: list[dict[str, int]] = []
    for members in ("ab", "a", "a", "ab", "abc"):
        run.step(*members)
        logs = {c: task.log for c, task in run.network.tasks.items()}
        received.append({c: len(log.rows) for c, log in logs.items() if log})
    assert received == [
        {"a": 0, "b": 0},
        {"a": 1},
        {"a": 1},
        {"a": 1, "b": 3},
        {"a": 1, "b": 1, "c": 4},
    ]


def large(tmp_path: Path, **changes: Any) -> devices.Run:
    """Rows of 16 KiB: the weights of a tiny adapter are fewer bytes than one."""
    options = {"size": 4096, "scalars": "fp32"}
    return devices.start("llama", tmp_path, strategy="seed_pool", options=options, **changes)


def fill(run: devices.Run) -> None:
    """A round in which all directions were used."""
    sums = torch.randn(4096, generator=torch.Generator().manual_seed(run.round)) * 1e-4
    run.state, _ = run.federation.strategy.apply(run.state, {"scalars": {"scalars": sums.double()}})


def test_a_snapshot_is_sent_where_it_is_fewer_bytes(tmp_path: Path) -> None:
    run = large(tmp_path)
    for _ in range(3):
        fill(run)
    found = run.hashes()
    assert found == dict.fromkeys("abcd", run.server())
    whole = run.federation.strategy.adapter(run.state)
    for task in run.network.tasks.values():
        assert task.log is not None
        assert (list(task.log.rows), task.log.number) == ([], 3)
        start = messages.content(task)["start"]
        assert codec.content_bytes({"start": start}) < 3 * 4 * 4096
        assert tiny.same(start, moving.settle(whole.trained, whole.moves))


def hold(run: devices.Run, row: int) -> None:
    """Let the server believe that all devices are at the version after that row."""
    rows = list(seedlog.rows(run.state).values())
    version = seedlog.versions(run.federation.origin, rows)[row]
    run.held = {client: frozenset({version}) for client in tiny.CLIENTS}


def test_devices_go_on_from_a_snapshot_with_rows(tmp_path: Path) -> None:
    run = large(tmp_path)
    fill(run)
    assert set(run.hashes().values()) == {run.server()}
    sparse = torch.zeros(4096, dtype=torch.float64)
    sparse[:3] = 1e-3
    for _ in range(3):
        run.state, _ = run.federation.strategy.apply(run.state, {"scalars": {"scalars": sparse}})
    hold(run, 1)
    assert set(run.hashes().values()) == {run.server()}
    assert {len(t.log.rows) for t in run.network.tasks.values() if t.log} == {3}
    for client in tiny.CLIENTS:
        run.network.restart(client)
    hold(run, 4)
    assert set(run.hashes().values()) == {run.server()}  # from their disks
    assert {len(t.log.rows) for t in run.network.tasks.values() if t.log} == {0}


def test_training_on_a_snapshot_is_training_on_the_rows(tmp_path: Path) -> None:
    """The same scalars, whether a device got the rows or the weights they lead to."""
    one, other = large(tmp_path / "one"), large(tmp_path / "other")
    for run in (one, other):
        fill(run)
        fill(run)

    class Rows(SeedPool):
        def broadcast(self, state: Payload) -> Broadcast:
            return replace(super().broadcast(state), snapshot=None)

    own = Rows(**other.federation.config.options)
    other.federation = replace(other.federation, strategy=own)
    one.step("a")
    other.step("a")
    assert one.network.tasks["a"].log is not None
    assert len(one.network.tasks["a"].log.rows) == 0
    assert other.network.tasks["a"].log is not None
    assert len(other.network.tasks["a"].log.rows) == 2
    found = [run.network.replies["a"].scalars["scalars"]["scalars"] for run in (one, other)]
    assert torch.equal(*found)


@pytest.mark.parametrize("space", SPACES)
def test_a_device_that_lost_its_memory_gets_everything_again(space: str, tmp_path: Path) -> None:
    run = devices.start(
        "llama", tmp_path, strategy="seed_pool", parameters=space, options={"size": 64}, lr=1e-3
    )
    for _ in range(3):
        run.step("a", "b")
    run.network.restart("a")
    shutil.rmtree(tmp_path / "a")
    run.network.restart("b")
    rows = sorted((tmp_path / "b" / "log").glob("row-*"))
    rows[0].write_bytes(rows[0].read_bytes()[:-1] + b"\x7f")
    run.step("a", "b")
    assert run.hashes() == dict.fromkeys("abcd", run.server())


def test_a_device_with_another_base_model_is_told_so(tmp_path: Path) -> None:
    run = devices.start("llama", tmp_path, strategy="seed_pool", options={"size": 64})
    model = run.network.model
    model.base = replace(model.base, fingerprint="cd" * 32)
    with pytest.raises(RoundError, match="another base model"):
        run.step("a")


@pytest.mark.parametrize("damage", ["gap", "foreign", "order"])
def test_rows_that_do_not_lead_to_the_version_are_refused(damage: str, tmp_path: Path) -> None:
    run = devices.start("llama", tmp_path, strategy="seed_pool", options={"size": 64}, lr=1e-3)
    for _ in range(3):
        run.step("b")
    task = make_tasks(run.federation, run.state, {}, 4, Kind.TRAIN, {"a": 1}, Traffic())["a"]
    assert task.log is not None
    rows = list(task.log.rows)
    rows = {
        "gap": [rows[0], rows[2]],
        "foreign": [rows[0], {**rows[1], "step": rows[1]["step"] * 2}, rows[2]],
        "order": [rows[1], rows[0], rows[2]],
    }[damage]
    bad = replace(task, log=replace(task.log, rows=rows))
    answer = run.network.worker("a")("a", messages.pack_task(bad))
    reply = messages.unpack_reply(answer, 1 << 20)
    assert "gap or a foreign row" in reply.error
    good = run.network.worker("a")("a", messages.pack_task(task))
    assert messages.unpack_reply(good, 1 << 20).error == ""


@pytest.mark.parametrize("space", SPACES)
def test_the_order_of_clients_changes_no_bit(space: str, tmp_path: Path) -> None:
    found = []
    for reverse in (False, True):
        run = devices.start(
            "llama",
            tmp_path / str(reverse),
            reverse=reverse,
            strategy="seed_pool",
            parameters=space,
            options={"size": 64, "scalars": "fp32"},
            lr=1e-3,
        )
        for _ in range(3):
            run.step()
        found.append((tree.digest_all(run.state), run.server()))
    assert found[0] == found[1]


@pytest.mark.parametrize("space", SPACES)
def test_the_global_model_is_the_mean_of_what_devices_hold(space: str, tmp_path: Path) -> None:
    """By examples, over the weights in the clients' own models after training."""
    run = devices.start(
        "llama",
        tmp_path,
        strategy="seed_pool",
        parameters=space,
        options={"size": 64, "scalars": "fp32"},
        lr=1e-3,
        local_steps=8,
    )
    for _ in range(2):
        before = flat(devices.weights(run.shown()))
        result = run.step()
        own = {c: flat(held) for c, held in run.network.weights.items()}
        total = sum(result.num_examples.values())
        mean = torch.stack([n / total * own[c] for c, n in result.num_examples.items()]).sum(0)
        off = (flat(devices.weights(run.shown())) - mean).norm()
        assert float(off / mean.norm()) < 1e-6
        assert float(off / (mean - before).norm()) < 1e-3


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("cohort", ["ab", "abcd"])
def test_bytes_are_the_formula_whatever_the_cohort(space: str, cohort: str, tmp_path: Path) -> None:
    run = devices.start(
        "llama", tmp_path, strategy="seed_pool", parameters=space, local_steps=12, lr=1e-4
    )
    for round in (1, 2):
        result = run.step(*cohort)
        assert result.metrics["zero_scalars"] == 0
        assert result.traffic.up == len(cohort) * (2 * 12 + 8)
        assert result.traffic.down <= len(cohort) * (2 * 512 + 4)
        assert (result.traffic.down > 0) == (round > 1)
        assert (result.cost.up, result.cost.down) == (result.traffic.up, len(cohort) * 1028)


def test_two_hundred_steps_travel_in_less_than_two_kilobytes() -> None:
    """408 bytes up and at most 1,028 down for a client and round."""
    strategy = SeedPool()
    scalars = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    first = strategy.init(START, 0)
    members = [client(5, 11 * m, *scalars) for m in range(40)]
    received = tiny.seen(strategy.broadcast(first), first)
    up = {messages.content_bytes(strategy.local(m, received).payload) for m in members}
    assert up == {2 * 200 + 8}
    state = tiny.play(strategy, first, members, first)
    (row,) = seedlog.rows(state).values()
    assert bool((row["scalars"] != 0).all())
    assert scalar_groups.scalar_bytes(row) == 2 * 512 + 4
    assert 2 * 200 + 8 + 2 * 512 + 4 <= 1800


def test_a_run_continues_from_its_state_alone(tmp_path: Path) -> None:
    run = devices.start("llama", tmp_path / "a", strategy="seed_pool", lr=1e-3)
    run.step("a", "b")
    again = devices.start("llama", tmp_path / "b", strategy="seed_pool", lr=1e-3)
    again.state = codec.decode(codec.encode(run.state))
    again.round = 1
    for one in (run, again):
        one.step("a", "c")
    assert tree.digest_all(run.state) == tree.digest_all(again.state)
    assert row_name(2) in run.state
    assert math.isfinite(float(run.state[row_name(2)]["step"]))


def test_a_client_that_diverges_costs_nobody_else_the_round(tmp_path: Path) -> None:
    run = devices.start("llama", tmp_path, strategy="seed_pool", lr=1e-3)
    healthy, broken = run.network.worker("a"), run.network.worker("b")
    assert healthy is not broken
    broken.config = broken.config.model_copy(update={"lr": 1e38})
    members = {c: tiny.CLIENTS[c] for c in "ab"}
    config = run.federation.config.model_copy(update={"cohort": 2})
    own = replace(run.federation, clients=members, config=config)
    result = run_round(RoundCall(own, run.state, {}, 1), run.network)
    assert list(result.dropped) == ["b"]
    assert "lower lr" in result.dropped["b"]
    assert list(result.num_examples) == ["a"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 2e-3}, "update has step"),
        ({"seed": 1}, "starts from version"),
        ({"lr": 1.000001e-3}, ""),
    ],
)
def test_the_server_knows_the_step_and_the_seed_of_a_device(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """Up to what another machine's rounding may change."""
    run = devices.start("llama", tmp_path, strategy="seed_pool", lr=1e-3, schedule="cosine")
    other = run.network.worker("b")
    other.config = other.config.model_copy(update=changes)
    config = run.federation.config.model_copy(update={"cohort": 4})
    result = run_round(
        RoundCall(replace(run.federation, config=config), run.state, {}, 1), run.network
    )
    assert list(result.dropped) == (["b"] if says else [])
    assert says in result.dropped.get("b", "")


def test_a_snapshot_that_is_not_the_one_announced_is_refused(tmp_path: Path) -> None:
    run = large(tmp_path)
    fill(run)
    fill(run)
    task = make_tasks(run.federation, run.state, {}, 3, Kind.TRAIN, {"a": 1}, Traffic())["a"]
    assert task.log is not None
    assert task.log.start == codec.content_id(messages.content(task)["start"])
    bad = replace(task, log=replace(task.log, start="cd" * 16))
    answer = run.network.worker("a")("a", messages.pack_task(bad))
    assert "does not match its content id" in messages.unpack_reply(answer, 1 << 20).error
    good = run.network.worker("a")("a", messages.pack_task(task))
    assert messages.unpack_reply(good, 1 << 20).error == ""


def test_a_log_that_ends_at_another_number_is_refused(tmp_path: Path) -> None:
    run = devices.start("llama", tmp_path, strategy="seed_pool", options={"size": 64}, lr=1e-3)
    for _ in range(3):
        run.step("b")
    task = make_tasks(run.federation, run.state, {}, 4, Kind.TRAIN, {"a": 1}, Traffic())["a"]
    assert task.log is not None
    bad = replace(task, log=replace(task.log, number=4))
    answer = run.network.worker("a")("a", messages.pack_task(bad))
    assert "log ends at row 4, here at 3" in messages.unpack_reply(answer, 1 << 20).error
