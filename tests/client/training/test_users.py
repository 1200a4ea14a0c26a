"""Rows that name users: with dp=example all of a user's rows are one unit, in both trainers."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from opacus.optimizers import DPOptimizer
from torch import Tensor

from corolla.client.training import dpsgd
from corolla.client.training.dpsgd import Clipper
from corolla.client.training.private import sequences as sequences_of_rows
from corolla.client.training.worker import Device, Worker, encode_all
from corolla.commands.plan.plan import plan
from corolla.commands.simulate.in_process import simulate
from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.data.encoding import Encoded, Encoder
from corolla.data.rows import Example
from corolla.errors import DataError
from corolla.models import pretrained, trainable
from corolla.models.lora import LoraModel
from corolla.privacy.accounting import Release
from corolla.privacy.ledger import Ledger, Limit
from corolla.server.runs.status import status
from corolla.storage.memory import Memory
from corolla.types import Params
from corolla.wire.messages import Kind, unpack_reply
from tests.client.training import test_dpzero as zeroth
from tests.client.training.test_dpsgd import (
    alive,
    apart,
    base,
    clipped_by_hand,
    coins,
    level,
    local,
    norm,
    own_gradient,
    sequences,
    written,
)
from tests.client.training.test_worker import ask, task

Settings = Callable[..., RunConfig]

USERS = [0, 1, 0, 2, 1, 0, 3, 3]
"""The user of each of eight records."""


def records() -> list[Encoded]:
    """Eight records of ragged lengths, the third of two windows, which share its targets."""
    data = [
        replace(s, example=i) for i, s in enumerate(sequences(lengths=(9, 4, 11, 5, 7, 3, 6, 8)))
    ]
    window = replace(sequences(lengths=(6,))[0], example=2)
    data.insert(3, window)
    return [replace(s, unit=USERS[s.example or 0]) for s in data]


def by_user(model: LoraModel, trained: Params, data: Sequence[Encoded]) -> list[dict[str, Tensor]]:
    """By autograd: Σ over the records of each user of the gradient of the record's mean loss."""
    found: list[dict[str, Tensor]] = []
    for user in range(4):
        total = {name: torch.zeros_like(p) for name, p in trained.items()}
        for record in (i for i in range(8) if USERS[i] == user):
            own = [s for s in data if s.example == record]
            for name, tensor in own_gradient(model, trained, own).items():  # type: ignore[arg-type]
                total[name] += tensor
        found.append(total)
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_the_gradient_of_a_user_is_the_sum_of_its_rows_clipped_once(size: int) -> None:
    model, data = LoraModel(base("llama")), records()
    trained = written(model, alive(model))
    alone = by_user(model, trained, data)
    clip = sorted(norm(g) for g in alone)[1]  # two users are clipped
    known = dpsgd.examples(data, 4)
    clipper = Clipper(model, trained, size)
    with clipper.attached():
        found = scaled(clipper(known, clip), clip)
        fewer = scaled(clipper([known[0], known[3]], clip), clip)
    assert apart(found, clipped_by_hand(alone, clip)) <= 2e-6 * norm(found)
    assert apart(fewer, clipped_by_hand([alone[0], alone[3]], clip)) <= 2e-6 * norm(fewer)
    rows = [own_gradient(model, trained, [s for s in data if s.example == i]) for i in range(8)]
    assert apart(found, clipped_by_hand(rows, clip)) > 0.1 * norm(found)


def scaled(sums: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """Sums as they are: a clipper's are in units of the clip."""
    return {name: clip * tensor for name, tensor in sums.items()}


@pytest.mark.parametrize("left_out", range(4))
def test_leaving_a_user_out_moves_the_sum_by_at_most_the_clip(left_out: int) -> None:
    """Also the one with most rows, all alike and far beyond the clip."""
    model, data = LoraModel(base("llama")), records()
    trained = written(model, alive(model))
    data += [replace(data[0], example=8 + i, unit=0) for i in range(20)]
    clip = 0.01
    known = dpsgd.examples(data, 4)
    clipper = Clipper(model, trained, 8)
    with clipper.attached():
        whole = scaled(clipper(known, clip), clip)
        left = [own for i, own in enumerate(known) if i != left_out]
        rest = scaled(clipper(left, clip), clip)
    assert 0.99 * clip <= apart(whole, rest) <= clip * (1 + 1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_no_user_decides_what_the_rows_of_others_are_beside(size: int) -> None:
    """A device may round a row otherwise in another place, or beside more: by a server's weights
    that can be much."""
    model, data = LoraModel(base("llama")), records()
    trained = written(model, alive(model))
    known, seen = dpsgd.examples(data, 4), list[list[tuple[int, ...]]]()
    model.model.register_forward_pre_hook(
        lambda _, args, named: seen.append([tuple(row) for row in named["input_ids"].tolist()]),
        with_kwargs=True,
    )

    def places(batch: Sequence[dpsgd.Example]) -> list[dict[tuple[int, ...], tuple[int, int]]]:
        """Of each user but the first: row → (its place, how many there are in its pass)."""
        seen.clear()
        with (clipper := Clipper(model, trained, size, length=12)).attached():
            clipper(batch, 1.0)
        found = {row: (i, len(rows)) for rows in seen for i, row in enumerate(rows)}
        return [
            {
                row: found[row]
                for row in found
                for s in own
                if row[: len(ids := tuple(s.input_ids))] == ids
            }
            for own in known[1:]
        ]

    assert all(places(known))
    assert places(known) == places([[], *known[1:]])


def test_a_step_of_users_is_that_of_opacus(settings: Settings) -> None:
    """Its clipping and its noise, on the sums of the users' gradients that autograd made."""

    def same(seed: int) -> Callable[[Sequence[int]], Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return lambda shape: torch.normal(0.0, 1.0, tuple(shape), generator=draw).double()

    model, data = LoraModel(base("llama")), records()
    start = alive(model)
    private = level(examples=4, batch=4, clip=0.5, normal=same(7), unit="user")
    found = local(model, data, private, settings, optimizer="sgd", lr=0.5).fit(start)
    trained = written(model, start)
    alone = by_user(model, trained, data)
    optimizer = DPOptimizer(
        torch.optim.SGD(trained.values(), lr=0.5),
        noise_multiplier=1.0,
        max_grad_norm=0.5,
        expected_batch_size=4,
        generator=torch.Generator().manual_seed(7),
    )
    for name, parameter in trained.items():
        parameter.grad_sample = torch.stack([own[name] for own in alone])  # type: ignore[attr-defined]
    optimizer.step()
    for name, parameter in trained.items():
        assert float((found.params[name] - parameter.detach()).abs().max()) <= 1e-6
    assert found.num_examples == 4


def silent(shape: Sequence[int]) -> Tensor:
    return torch.zeros(tuple(shape), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 3, None])
def test_with_one_row_a_user_the_bits_are_those_without_users(
    size: int | None, settings: Settings
) -> None:
    model = LoraModel(base("llama"))
    data = [replace(s, unit=None) for s in records()]
    named = [replace(s, unit=s.example) for s in data]
    results = []
    for own, unit in ((data, "example"), (named, "user")):
        private = level(8, 3, 4, normal=silent, uniform=coins(), unit=unit)
        changes = {"batch_size": 3, "optimizer": "adamw", "lr": 0.01}
        trainer = local(model, own, private, settings, micro_batch_size=size, **changes)
        results.append(trainer.fit(alive(model)).params)
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name])


# Forward passes alone


@pytest.fixture
def model(settings: Settings) -> LoraModel:
    return LoraModel(pretrained.load(settings()))


def private(settings: Settings, **changes: Any) -> RunConfig:
    given: dict[str, Any] = {"strategy": "fedmezo", "dp": "example", "noise_multiplier": 2.0}
    given |= {"eps": zeroth.EPS, "lr": 0.01, "local_steps": 1, "batch_size": 3}
    return settings(**{**given, **changes})


OWN = [[0, 2], [1], [3, 4]]
"""User → its examples in zeroth.DATA, one of which is of two windows."""


def named(data: Sequence[Encoded]) -> list[Encoded]:
    users = {example: user for user, own in enumerate(OWN) for example in own}
    return [replace(s, unit=users[s.example or 0]) for s in data]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("clip", [1e6, 1.0], ids=["loose", "tight"])
def test_the_slopes_of_a_user_are_summed_and_clipped_once(
    model: LoraModel,
    start: Params,
    plain: transformers.PreTrainedModel,
    settings: Settings,
    queries: int,
    clip: float,
) -> None:
    config = private(settings, queries=queries)
    level = zeroth.level(examples=3, clip=clip, unit="user")
    found = zeroth.walk(model, config, start, level, named(zeroth.DATA)).scalars
    directions = [zeroth.z(zeroth.SIGN, k, start) for k in range(queries)]
    wanted = [0.0] * queries
    for examples in OWN:
        own = [
            sum(zeroth.slope(plain, start, direction, example) for example in examples)
            for direction in directions
        ]
        for query, g in enumerate(zeroth.clipped(own, clip)):
            wanted[query] += g / 3
    assert found.tolist() == pytest.approx(wanted, rel=1e-3, abs=4e-4)


def test_with_one_row_a_user_the_scalars_are_those_without_users(
    model: LoraModel, start: Params, settings: Settings
) -> None:
    config = private(settings, queries=2, local_steps=3)
    found = []
    for data in (zeroth.DATA, [replace(s, unit=s.example) for s in zeroth.DATA]):
        drawn = zeroth.Drawn(18)
        level = zeroth.level(steps=3, batch=3, uniform=drawn.uniform)
        found.append(zeroth.walk(model, config, start, level, data))
    assert torch.equal(found[0].scalars, found[1].scalars)
    for name, tensor in found[0].params.items():
        assert torch.equal(tensor, found[1].params[name])


@pytest.mark.parametrize("left_out", range(3))
def test_no_user_moves_the_scalars_by_more_than_clip(
    model: LoraModel, start: Params, settings: Settings, left_out: int
) -> None:
    config, data = private(settings, queries=3), named(zeroth.DATA)
    rest = [s for s in data if s.unit != left_out]
    level = zeroth.level(examples=3, clip=0.5, unit="user")
    both = [zeroth.walk(model, config, start, level, own).scalars for own in (data, rest)]
    moved = 3 * float((both[0] - both[1]).double().norm())
    assert 0.1 * 0.5 <= moved <= 0.5 * (1 + 1e-4)


# A device


SECRET = "user-7f3a91c2"
ROWS = [5, 1, 3]
"""Rows of each user of the device."""


@pytest.fixture
def make(settings: Settings, tmp_path: Path) -> Callable[..., Worker]:
    """A device of nine rows of three users, taken in turn."""

    def worker(
        folder: str = "memory", users: bool = True, labels: Sequence[str] = (), **changes: Any
    ) -> Worker:
        owners = [u for u, count in enumerate(ROWS) for _ in range(count)]
        owners = owners[::2] + owners[1::2]
        rows = [
            {"text": f"row {i} of all rows", **({"user_id": f"{SECRET}-{u}"} if users else {})}
            for i, u in enumerate(owners)
        ]
        path = tmp_path / f"{folder}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"dp": "example", "noise_multiplier": 4.0, "batch_size": 2, "local_steps": 2}
        config = settings(data=str(path), **{**given, **changes})
        own = federated.load_device(config, "ada", [])
        own = replace(own, labels=labels)
        model = trainable.build(config, pretrained.load(config, labels))
        memory = Memory(tmp_path / folder)
        return Worker(config, model, own, memory, device=Device())

    return worker


def test_units_are_numbered_as_users_come(make: Callable[..., Worker]) -> None:
    worker = make()
    rows = worker.data.clients["ada"].train
    encoder = Encoder(worker.model.base.tokenizer, [], worker.config.max_length)
    found, _ = encode_all(encoder, rows)
    order = list(dict.fromkeys(row.user for row in rows))
    assert [s.unit for s in found] == [order.index(rows[s.example or 0].user) for s in found]
    assert [s.unit for s in sequences_of_rows(encoder, rows)] == [s.unit for s in found]
    for encode in (lambda *own: encode_all(*own)[0], sequences_of_rows):
        assert {s.unit for s in encode(encoder, [Example("a b c")])} == {None}


@pytest.mark.parametrize("strategy", ["fedavg", "ffa_lora", "seed_pool", "fedkseed", "fedmezo"])
def test_steps_sampling_ledger_and_weight_are_of_users(
    make: Callable[..., Worker], strategy: str
) -> None:
    """Three users in batches of two: two steps, in each of which a user is with chance 2/3.

    First-order clients count epochs: two steps are one.
    """
    first = {"local_epochs": 1, "local_steps": 9} if strategy in ("fedavg", "ffa_lora") else {}
    worker = make(strategy=strategy, delta=1e-3, **first)
    hello = unpack_reply(worker("ada", task(worker, Kind.HELLO)), 0)
    assert hello.num_examples == 3
    reply = ask(worker, "ada", task(worker))
    assert reply.error == ""
    assert reply.metrics.keys() == {"local_steps", "epsilon", "per_user"}
    assert (reply.metrics["per_user"], reply.metrics["local_steps"]) == (1.0, 2.0)
    assert reply.num_examples == 3
    spent = Ledger(worker.memory.kept_folder("ada") / "ledger.jsonl").releases()
    assert spent == [Release(4.0, 2 / 3, 2)]
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(PoissonSampledDpEvent(2 / 3, GaussianDpEvent(4.0)), 2)
    assert reply.metrics["epsilon"] == pytest.approx(accountant.get_epsilon(1e-3), rel=2e-3)


@pytest.mark.parametrize("strategy", ["fedavg", "fedmezo"])
@pytest.mark.parametrize("unusable", [0, 6])
def test_a_device_trains_on_its_users_with_all_their_rows(
    make: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    strategy: str,
    unusable: int,
) -> None:
    """Also where users without a usable row leave room for as many examples as others have rows."""
    real, known = dpsgd.examples, list[list[dpsgd.Example]]()

    def examples(data: Sequence[Encoded], counted: int) -> list[dpsgd.Example]:
        known.append(real(data, counted))
        return known[-1]

    monkeypatch.setattr(dpsgd, "examples", examples)
    worker = make(strategy=strategy)
    split = worker.data.clients["ada"]
    lost = [replace(split.train[0], prompt="p" * 200, user=f"no-{i}") for i in range(unusable)]
    rows = [*lost, *split.train]
    worker.data = replace(worker.data, clients={"ada": replace(split, train=rows)})
    with caplog.at_level(logging.INFO, "corolla"):
        reply = ask(worker, "ada", task(worker))
    assert (reply.error, reply.num_examples) == ("", min(2 * 2, 3 + unusable))
    assert "trained without rows" not in caplog.text
    units = known[0]  # what comes later is synthetic
    usable = sorted(sum(s.targets > 0 for s in unit) for unit in units)
    assert usable == [0] * unusable + [1, 3, 5]
    for unit in units:
        assert len({rows[s.example or 0].user for s in unit}) <= 1


@pytest.mark.parametrize("strategy", ["fedavg", "fedmezo"])
@pytest.mark.parametrize("labels", [[], ["a", "b"]], ids=["text", "classes"])
def test_a_row_of_a_user_takes_its_time_whatever_is_left_of_it(
    make: Callable[..., Worker], strategy: str, labels: list[str]
) -> None:
    """Nothing, where a prompt fills the sequence, or the run does not know its label."""
    passes: list[list[tuple[int, ...]]] = []
    for lost in (False, True):
        worker = make(folder=f"lost-{lost}", strategy=strategy, batch_size=16, labels=labels)
        split, seen = worker.data.clients["ada"], list[tuple[int, ...]]()
        rows = [replace(row, label=labels[0] if labels else None) for row in split.train]
        if lost:
            rows[0] = replace(rows[0], **({"label": None} if labels else {"prompt": "p" * 200}))
        worker.data = replace(worker.data, clients={"ada": replace(split, train=rows)})
        worker.model.model.register_forward_pre_hook(
            lambda _, args, named, seen=seen: seen.append(tuple(named["input_ids"].shape)),
            with_kwargs=True,
        )
        assert ask(worker, "ada", task(worker)).error == ""
        passes.append(seen)
    assert passes[0] == passes[1]


@pytest.mark.parametrize("dp", ["none", "client", "example"])
def test_a_limited_device_tells_the_number_of_its_users_alone(
    make: Callable[..., Worker], dp: str
) -> None:
    """Whatever it is asked for: it does nothing but dp=example. Others tell dp=none their rows."""
    worker = make(dp=dp, noise_multiplier=None if dp == "none" else 4.0)
    rows = len(worker.data.clients["ada"].train)
    assert rows > 3
    for limit, wanted in ((Limit(4.0, 1e-5), 3), (None, 3 if dp == "example" else rows)):
        worker.device = Device(limit=limit)
        hello = unpack_reply(worker("ada", task(worker, Kind.HELLO)), 0)
        assert hello.num_examples == wanted


def test_a_delta_that_protects_no_user_is_refused(make: Callable[..., Worker]) -> None:
    """Of 1 / 9 rows it would do."""
    worker = make(delta=0.09, epsilon=8.0, noise_multiplier=None)
    assert ask(worker, "ada", task(worker)).error == ""
    worker = make(folder="other", delta=0.09)
    rows = worker.data.clients["ada"]
    many = [replace(row, user=f"{SECRET}-{i}") for i, row in enumerate([*rows.train] * 2)]
    worker.data = replace(worker.data, clients={"ada": replace(rows, train=many)})
    assert "among 18 users of a client" in ask(worker, "ada", task(worker)).error


@pytest.mark.parametrize("dp", ["none", "client"])
def test_without_dp_of_examples_users_have_no_effect(make: Callable[..., Worker], dp: str) -> None:
    replies = []
    for folder, users in (("with", True), ("without", False)):
        noise = None if dp == "none" else 4.0
        worker = make(folder=folder, users=users, dp=dp, noise_multiplier=noise)
        rows = worker.data.clients["ada"].train
        hello = unpack_reply(worker("ada", task(worker, Kind.HELLO)), 0)
        assert hello.num_examples == len(rows) > 3
        replies.append(worker("ada", task(worker)))
    assert replies[0] == replies[1]


@pytest.mark.parametrize("dp", ["none", "example"])
@pytest.mark.parametrize("strategy", ["fedavg", "seed_pool"])
def test_no_id_of_a_user_leaves_the_device(
    make: Callable[..., Worker], dp: str, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it is asked, also for what it refuses; nor is one in its ledger or its log."""
    worker = make(strategy=strategy, dp=dp, noise_multiplier=4.0 if dp == "example" else None)
    packets = [task(worker, kind) for kind in (Kind.HELLO, Kind.TRAIN, Kind.EVALUATE)]
    packets += [task(worker, model_sha256="0" * 64), task(worker, payload=b"x")]
    for packet in packets:
        reply = worker("ada", packet)
        for part in (reply.header, reply.payload):
            assert SECRET.encode() not in part
            assert b"7f3a91c2" not in part
    written = [path for path in worker.memory.folder.rglob("*") if path.is_file()]
    assert all(SECRET.encode() not in path.read_bytes() for path in written)
    assert SECRET not in caplog.text


def test_a_row_without_a_user_is_refused_without_a_name(tmp_path: Path, settings: Settings) -> None:
    rows = [{"text": "a", "user_id": f"{SECRET}-{i}"} for i in range(6)]
    rows[4]["user_id"] = " "
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(data=str(path), dp="example", noise_multiplier=1.0)
    for load in (federated.load, lambda c: federated.load_device(c, "ada", [])):
        with pytest.raises(
            DataError, match="1 of 6 rows have no user_id, the first is line 5"
        ) as e:
            load(config)
        assert SECRET not in str(e.value)
    federated.load_device(settings(data=str(path)), "ada", [])  # no unit is promised


# A whole run


@pytest.mark.parametrize("strategy", ["ffa_lora", "seed_pool"])
def test_a_run_names_its_unit_and_spends_what_was_planned(
    settings: Settings, tmp_path: Path, strategy: str
) -> None:
    rows = [
        {
            "text": f"{c} {i} and more",
            "client_id": c,
            "user_id": f"{SECRET}-{i % 4}",
            "split": "train",
        }
        for c, count in (("ada", 12), ("ben", 9))
        for i in range(count)
    ]
    rows += [{**rows[0], "split": split, "text": split} for split in ("validation", "test")]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(
        data=str(path),
        strategy=strategy,
        dp="example",
        noise_multiplier=2.0,
        delta=1e-2,
        rounds=2,
        cohort=2,
        batch_size=3,
        **({"local_epochs": 1} if strategy == "ffa_lora" else {"local_steps": 2}),
    )
    planned = plan(config).privacy
    assert planned is not None
    assert "to add or remove one user of a client" in planned.end.line()
    assert "Poisson sampling of users, q = 0.75" in planned.end.line()
    folder = tmp_path / "run"
    summary = simulate(config, folder)
    told = json.loads((folder / "run.json").read_text())["privacy"]
    assert (told["unit"], told["epsilon"]) == ("user", planned.end.epsilon)
    assert "to add or remove one user of a client, with all rows" in summary.privacy
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(PoissonSampledDpEvent(3 / 4, GaussianDpEvent(2.0)), 2 * 2)
    assert told["epsilon"] == pytest.approx(accountant.get_epsilon(1e-2), rel=2e-3)
    assert "of one user" in (folder / "report.html").read_text()
    found = status(folder)
    assert (found.unit, found.epsilon) == ("user", told["epsilon"])
    assert found.neighbours == "add or remove one user of a client, with all rows"
    for file in folder.rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes()
    assert math.isfinite(told["epsilon"])
