"""Rounds with a gateway: what its phones send reaches the model as if they were members."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla import seeds
from corolla.aggregation.sums import summable
from corolla.client.training.worker import Worker
from corolla.config.build import build_strategy
from corolla.config.load import validate
from corolla.data.federated import FederatedData
from corolla.data.partition import Split
from corolla.directions import seedlog
from corolla.errors import RoundError
from corolla.privacy.client_level import ClientLevel
from corolla.server.gateway import merging
from corolla.server.rounds import expectations
from corolla.server.rounds.call import Plan, RoundCall, RoundEvents
from corolla.server.rounds.federation import Federation, Held
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import RoundResult, evaluate_clients, run_round
from corolla.server.rounds.spending import Spending
from corolla.server.rounds.tasks import Traffic, make_tasks
from corolla.server.rounds.verdicts import Code
from corolla.starts import table as starts
from corolla.storage.memory import Memory
from corolla.tensors import tree
from corolla.types import Payload
from corolla.wire import codec, messages
from corolla.wire.messages import (
    Kind,
    Reply,
    Task,
    pack_reply,
    pack_task,
    unpack_reply,
    unpack_task,
)
from corolla.wire.packet import Packet
from corolla.wire.task_settings import TaskSettings
from tests.strategies import tiny

PHONES = [f"gate/p{i}" for i in range(1, 9)]
FLAT = dict.fromkeys(["ann", *PHONES, "zoe"], 6)
NESTED = {"ann": 6, "gate": 0, "zoe": 6}
Change = Callable[[Packet], Packet | None]


def same(packet: Packet) -> Packet:
    return packet


@dataclass
class Gated(Network):
    """Clients in this process, and a gateway whose phones are in this process too.

    Its way to merge is written out here: it is not that of the product's gateway.
    """

    worker: Worker
    flat: Federation
    phone: Mapping[str, Change] = field(default_factory=dict)
    gateway: Change = same
    there: frozenset[str] = frozenset(NESTED)
    asked: list[dict[str, int]] = field(default_factory=list)

    def clients(self) -> Mapping[str, int]:
        return NESTED

    def online(self) -> frozenset[str]:
        return self.there

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        self.asked.append({member: unpack_task(p).seats for member, p in packets.items()})
        for member, packet in sorted(packets.items(), reverse=True):
            if member == "gate":
                yield member, self.gateway(self._merge(unpack_task(packet)))
            else:
                yield member, self.worker(member, packet)

    def _merge(self, task: Task) -> Packet:
        own = pack_task(replace(task, seats=0))
        packets = []
        for phone in PHONES[: task.seats]:
            found = self.phone.get(phone, same)(self.worker(phone, own))
            packets += [found] if found else []
        blank = Reply(task.run_id, task.round, task.base_version, task.kind, "gate")
        strategy, config = self.worker.strategy, self.worker.config
        partial = summable(strategy.aggregator())
        if partial is None or config.robust != "none" or config.dp == "client":
            data = messages.pack_bundle(packets)
            return pack_reply(replace(blank, clients=len(packets), bundle=True, payload=data))
        replies = [unpack_reply(packet, 1 << 30) for packet in packets]
        told = replace(self.flat, chosen=TaskSettings.from_json(task.config).chosen)
        for reply in replies:
            like = expectations.expected(told, reply.client, task.kind, task.round).like
            assert like is not None
            partial.add(
                config.uplink.unpack(messages.content(reply), like), float(reply.num_examples)
            )
        total = sum(reply.num_examples for reply in replies)
        names = {name for reply in replies for name in reply.metrics}
        mean = {
            n: sum(r.metrics[n] * r.num_examples for r in replies) / total
            for n in names - {"target_tokens", "local_steps", "skipped", "scalars", "zero_scalars"}
        }
        sums = {n: sum(r.metrics[n] for r in replies) for n in names - mean.keys()}
        return pack_reply(
            replace(
                blank,
                clients=len(replies),
                num_examples=total,
                metrics={**mean, **sums},
                payload=codec.encode(partial.sums()),
            )
        )


@dataclass
class Run:
    """A federation with the same clients, with a gateway before eight of them or without."""

    worker: Worker
    nested: Federation
    flat: Federation
    first: Payload

    def rounds(
        self, federation: Federation, network: Network, number: int = 3
    ) -> list[RoundResult]:
        state, held, found = self.first, dict[str, frozenset[str]](), list[RoundResult]()
        known: Held = held
        for round in range(1, number + 1):
            found.append(run_round(RoundCall(federation, state, known, round), network))
            state, known = found[-1].state, found[-1].held
        return found

    def step(
        self,
        network: Network,
        spending: Spending | None = None,
        events: RoundEvents | None = None,
        **how: Any,
    ) -> RoundResult:
        return run_round(
            RoundCall(self.nested, self.first, {}, 1, **how), network, spending, events
        )


@dataclass
class Flat(Network):
    worker: Worker

    def clients(self) -> Mapping[str, int]:
        return FLAT

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for client, packet in packets.items():
            yield client, self.worker(client, packet)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Run]:
    def make(strategy: str, **changes: Any) -> Run:
        config = tiny.config(strategy, **{"cohort": 10, "eps": 0.01, **changes})
        model = tiny.lora_model("llama")
        rows = [row for own in tiny.data("llama").clients.values() for row in own.train]
        splits = {c: Split(rows[i : i + 6], rows[i : i + 2]) for i, c in enumerate(FLAT)}
        data = FederatedData("llama", splits, [], [], "")
        worker = Worker(config, model, data, Memory(tmp_path / "memory"))
        built = build_strategy(config)
        begun = starts.begin(
            model, model.init(config.lora, seeds.derive(config.seed, "init")), config
        )
        first = begun.state(built, config.seed)
        fresh = cache(lambda spec: model.init(spec, 0))
        origin = seedlog.origin(model.base.fingerprint, first)
        flat = Federation("0" * 32, config, built, FLAT, fresh, origin)
        nested = replace(flat, clients=NESTED, seats={"gate": 8})
        return Run(worker, nested, flat, first)

    return make


CASES: Mapping[str, dict[str, Any]] = {
    "fedavg": {"strategy": "fedavg"},
    "fedavg, int8": {"strategy": "fedavg", "codec": ["int8"]},
    "fedadam, from a part": {"strategy": "fedadam", "codec_down": ["top_k:0.25"]},
    "fisher": {"strategy": "fisher", "codec": ["bf16"]},
    "flora": {"strategy": "flora"},
    "flora, half": {"strategy": "flora", "codec": ["fp16", "zstd"]},
    "fedex_lora": {"strategy": "fedex_lora"},
    "flora of a rank": {"strategy": "flora", "max_rank": 6, "codec": ["int8"]},
    "fedex_lora of a rank": {"strategy": "fedex_lora", "max_rank": 6},
    "fedavg beside a block": {"strategy": "fedavg", "start": "olora"},
    "fedex_lora beside a block": {"strategy": "fedex_lora", "start": "olora"},
    "seed_pool": {"strategy": "seed_pool"},
    "fedkseed": {"strategy": "fedkseed", "options": {"size": 64}},
    "fedkseed_pro": {"strategy": "fedkseed_pro", "options": {"size": 64}},
    "ferret": {"strategy": "ferret", "options": {"size": 64}},
    "lisa": {"strategy": "lisa", "options": {"choose": "change", "layers": 1}},
    "lisa, int8": {"strategy": "lisa", "options": {"choose": "half"}, "codec": ["int8"]},
    "median of lisa": {"strategy": "lisa", "options": {"layers": 1}, "robust": "median"},
    "median": {"strategy": "fedavg", "robust": "median"},
    "krum": {"strategy": "flora", "robust": "multi_krum"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_gateway_gives_the_bits_of_its_phones_as_members(
    start: Callable[..., Run], case: str
) -> None:
    run = start(**CASES[case])
    nested = run.rounds(run.nested, Gated(run.worker, run.flat))
    flat = run.rounds(run.flat, Flat(run.worker))
    for found, wanted in zip(nested, flat, strict=True):
        assert found.dropped == wanted.dropped == {}
        assert tree.digest_all(found.state) == tree.digest_all(wanted.state)
        assert found.asked == wanted.asked == 10
        assert found.updates == wanted.updates == 10
        assert sum(found.num_examples.values()) == sum(wanted.num_examples.values())
        assert found.metrics.keys() == wanted.metrics.keys()
        assert found.sampling_probability == wanted.sampling_probability == 1.0
        for name, value in wanted.metrics.items():
            assert found.metrics[name] == pytest.approx(value, rel=1e-9), name


def test_a_gateway_is_told_what_its_phones_train(start: Callable[..., Run]) -> None:
    """By the settings of its task, from which it judges their updates."""
    run = start("lisa", options={"choose": "half", "always": []})
    call = RoundCall(run.nested, run.first, {}, 1)
    tasks = make_tasks(call.federation, run.first, {}, 1, Kind.TRAIN, {"gate": 8}, Traffic())
    found = merging.prepare(tasks["gate"])
    like = found.expected("gate/p1", 6).like
    chosen = {n for unit in call.federation.chosen for n in run.first[unit]}
    assert like and like["adapter"].keys() == chosen
    assert 0 < len(chosen) < sum(map(len, run.first.values()))


def account(federation: Federation) -> Spending:
    """Of dp=client, without noise."""

    def silent(shape: Sequence[int]) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=torch.float64)

    return Spending(federation.config, ClientLevel(federation.config, 10, 10, normal=silent))


def test_each_device_of_a_gateway_is_clipped_for_itself(start: Callable[..., Run]) -> None:
    run = start("fedavg", dp="client", noise_multiplier=1.0, clip=0.01)
    nested, flat, events = account(run.nested), account(run.flat), list[Mapping[str, Any]]()
    network = Gated(run.worker, run.flat)
    found = run.step(network, nested, RoundEvents(note=events.append))
    wanted = run_round(RoundCall(run.flat, run.first, {}, 1), Flat(run.worker), spending=flat)
    assert tree.digest_all(found.state) == tree.digest_all(wanted.state)
    assert found.num_examples == {}
    assert events[0]["clients"] == sorted(FLAT)


def test_a_partial_aggregate_costs_one_update_of_float64(start: Callable[..., Run]) -> None:
    """Up: two clients' float32 and the sums in float64; down: three broadcasts for ten clients."""
    run = start("fedavg")
    found = run.step(Gated(run.worker, run.flat))
    one = sum(4 * tensor.numel() for tensor in run.first["adapter"].values())
    assert found.traffic.up == found.cost.up == 2 * one + 2 * one
    assert found.traffic.down == found.cost.down == 3 * one


def test_a_bundle_costs_what_its_updates_cost(start: Callable[..., Run]) -> None:
    run = start("flora")
    found = run.step(Gated(run.worker, run.flat))
    assert found.traffic.up == found.cost.up
    flat = run_round(RoundCall(run.flat, run.first, {}, 1), Flat(run.worker))
    assert found.traffic.up == flat.traffic.up
    assert found.traffic.down < flat.traffic.down / 3 + 1


def test_every_reply_has_a_verdict(start: Callable[..., Run]) -> None:
    run = start("flora")

    def foreign(packet: Packet) -> Packet:
        return pack_reply(replace(unpack_reply(packet, 1 << 30), run_id="f" * 32))

    network = Gated(run.worker, run.flat, {"gate/p2": foreign, "gate/p3": lambda packet: None})
    found = run.step(network)
    codes = {name: verdict.code for name, verdict in found.verdicts.items()}
    accepted = {"ann", "zoe", "gate", *PHONES} - {"gate/p2", "gate/p3"}  # p3 sent nothing
    assert codes == {**dict.fromkeys(accepted, Code.ACCEPTED), "gate/p2": Code.FOREIGN}
    assert found.dropped.keys() == {"gate/p2"}
    assert (found.asked, found.updates) == (10, 8)
    assert "gate" in found.held


def lying(**changes: Any) -> Change:
    return lambda packet: pack_reply(replace(unpack_reply(packet, 1 << 30), **changes))


def poisoned(packet: Packet) -> Packet:
    reply = unpack_reply(packet, 1 << 30)
    payload = {
        g: {n: t * torch.nan for n, t in p.items()} for g, p in messages.content(reply).items()
    }
    return pack_reply(replace(reply, payload=codec.encode(payload)))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda packet: None, Code.NO_ANSWER),
        (lying(clients=9), Code.WEIGHT),
        (lying(clients=0), Code.FORM),
        (lying(bundle=True), Code.FORM),
        (lying(num_examples=10**6), Code.WEIGHT),
        (lying(client="ann"), Code.FOREIGN),
        (lying(payload=b""), Code.FORM),
        (poisoned, Code.NOT_FINITE),
    ],
)
def test_a_hostile_gateway_loses_its_updates_and_nobody_elses(
    start: Callable[..., Run], change: Change, code: Code
) -> None:
    run = start("fedavg", quorum=0.1)
    found = run.step(Gated(run.worker, run.flat, gateway=change))
    assert found.verdicts["gate"].code == code
    assert found.num_examples.keys() == {"ann", "zoe"}
    assert (found.asked, found.updates) == (10, 2)
    assert "gate" not in found.held
    two = {"ann": 1, "zoe": 1}
    wanted = run_round(
        RoundCall(run.nested, run.first, {}, 1, cohort=two), Gated(run.worker, run.flat)
    )
    assert tree.digest_all(found.state) == tree.digest_all(wanted.state)


def test_sums_that_no_updates_have_are_refused(start: Callable[..., Run]) -> None:
    run = start("fedkseed_pro", options={"size": 64}, quorum=0.1)

    def negative(packet: Packet) -> Packet:
        reply = unpack_reply(packet, 1 << 30)
        payload = {g: dict(own) for g, own in messages.content(reply).items()}
        payload["history"]["sum.counts"] -= 1
        return pack_reply(replace(reply, payload=codec.encode(payload)))

    found = run.step(Gated(run.worker, run.flat, gateway=negative))
    assert found.verdicts["gate"].code == Code.FORM
    assert found.dropped["gate"] == "partial aggregate has a history that no updates have"
    assert found.updates == 2


def test_the_quorum_counts_updates_and_not_members(start: Callable[..., Run]) -> None:
    run = start("fedavg", quorum=0.6)
    few = {phone: (lambda packet: None) for phone in PHONES[:5]}
    with pytest.raises(RoundError, match="5 of 10 clients gave a valid update, 6 are needed") as e:
        run.step(Gated(run.worker, run.flat, few))
    assert {name: v.code for name, v in e.value.verdicts.items()} == dict.fromkeys(
        NESTED, Code.ACCEPTED
    )
    few.popitem()
    assert run.step(Gated(run.worker, run.flat, few)).updates == 6


def test_a_part_of_the_seats_is_asked_for(start: Callable[..., Run]) -> None:
    run = start("fedavg", cohort=5)
    network = Gated(run.worker, run.flat)
    found = run.step(network)
    (asked,) = network.asked
    assert asked["gate"] + len(asked) - 1 == 5
    assert found.asked == found.updates == 5
    assert found.sampling_probability == 0.5


def test_the_plan_is_known_before_anything_is_sent(start: Callable[..., Run]) -> None:
    run = start("fedavg", cohort=5)
    network, plans = Gated(run.worker, run.flat), list[Plan]()

    def planned(plan: Plan) -> None:
        assert not network.asked
        plans.append(plan)

    run.step(network, events=RoundEvents(on_plan=planned))
    (plan,) = plans
    assert (plan.round, plan.attempt, plan.seed) == (1, 0, run.nested.config.seed)
    assert plan.base_version == tree.digest_all(run.first)
    assert sum(plan.cohort.values()) == 5
    assert network.asked[0].keys() == plan.cohort.keys()

    def full(plan: Plan) -> None:
        raise OSError("no space")

    fresh = Gated(run.worker, run.flat)
    with pytest.raises(OSError, match="no space"):
        run.step(fresh, events=RoundEvents(on_plan=full))
    assert fresh.asked == []


def test_another_attempt_asks_another_cohort_and_a_plan_asks_the_same(
    start: Callable[..., Run],
) -> None:
    run = start("fedavg", cohort=3)
    plans: list[Plan] = []
    kept = RoundEvents(on_plan=plans.append)
    first = run.step(Gated(run.worker, run.flat), events=kept)
    cohorts = []
    for attempt in range(1, 6):
        run.step(Gated(run.worker, run.flat), events=kept, attempt=attempt)
        cohorts.append(plans[-1].cohort)
    assert any(cohort != plans[0].cohort for cohort in cohorts)
    # As read from a journal, with somebody gone whom a new draw would not ask.
    told = json.loads(json.dumps(plans[0].cohort))
    again = run.step(Gated(run.worker, run.flat, there=frozenset({"zoe"})), cohort=told)
    assert tree.digest_all(again.state) == tree.digest_all(first.state)
    with pytest.raises(RoundError, match="'eve' of its cohort is not in the federation"):
        run.step(Gated(run.worker, run.flat), cohort={"eve": 1})


def test_only_who_is_online_is_asked(start: Callable[..., Run]) -> None:
    run = start("fedavg", cohort=10)
    network = Gated(run.worker, run.flat, there=frozenset({"gate", "stranger"}))
    found = run.step(network)
    assert network.asked == [{"gate": 8}]
    assert found.asked == 8
    assert evaluate_clients(RoundCall(run.nested, run.first, {}, 1), network) == {}
    with pytest.raises(RoundError, match="none of 3 clients can be reached"):
        run.step(Gated(run.worker, run.flat, there=frozenset()))


def test_no_folder_of_the_server_reaches_a_device(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    run = start(
        "mixed", classes={"big": {"trainer": "first_order"}, "phone": {"trainer": "zeroth_order"}}
    )
    for name in ("model", "data.jsonl", "trace.jsonl", "public.jsonl"):
        (tmp_path / name).touch()
    config = run.nested.config.model_copy(
        update={
            "model": str(tmp_path / "model"),
            "data": str(tmp_path / "data.jsonl"),
            "availability": str(tmp_path / "trace.jsonl"),
            "public": str(tmp_path / "public.jsonl"),
            "start": "gradient",
            "threads": 7,
            "device": "cuda",
        }
    )
    told = _settings(
        run, replace(run.nested, config=config, own_devices=True, labels=("no", "yes"))
    )
    assert str(tmp_path) not in json.dumps(told)
    assert told["labels"] == ["no", "yes"]
    found = validate(told["run"])
    assert (found.model, found.threads, found.device) == ("embedded", 0, "auto")
    for name in ("big", "phone"):
        assert found.of_class(name).lr == config.of_class(name).lr
    assert found.strategy == config.strategy
    assert found.local_steps == config.local_steps
    at_home = _settings(run, replace(run.nested, config=config))
    assert at_home["run"]["model"] == str(tmp_path / "model")


def test_a_strategy_of_ones_own_goes_by_the_name_of_its_file(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from corolla.strategies.fedavg import FedAvg\n")
    run = start(f"{file}:FedAvg")
    told = _settings(run, replace(run.nested, own_devices=True))
    assert told["run"]["strategy"] == "mine.py:FedAvg"


def _settings(run: Run, federation: Federation) -> dict[str, Any]:
    """What every member of the cohort is told, and the task of the last."""
    seen: list[Packet] = []

    class Seen(Network):
        def clients(self) -> Mapping[str, int]:
            return NESTED

        def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
            seen.extend(packets.values())
            return iter(())

    with pytest.raises(RoundError):
        run_round(RoundCall(federation, run.first, {}, 1), Seen())
    found: dict[str, Any] = json.loads(unpack_task(seen[0]).config)
    return found


def test_a_gateway_is_told_what_an_adapter_looks_like(start: Callable[..., Run]) -> None:
    run = start("fedavg")
    asked: dict[str, Task] = {}

    class Seen(Gated):
        def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
            asked.update({member: unpack_task(packet) for member, packet in packets.items()})
            return super().ask(packets)

    federation = replace(run.nested, model_sha256="c" * 64)
    with pytest.raises(RoundError, match="the run is of cccccccccccc"):
        run_round(RoundCall(federation, run.first, {}, 1), Seen(run.worker, run.flat))
    assert {task.model_sha256 for task in asked.values()} == {"c" * 64}
    assert {member: task.seats for member, task in asked.items()} == {"ann": 0, "gate": 8, "zoe": 0}
    told = json.loads(asked["gate"].config)["fresh"]["adapter"]
    adapter = run.first["adapter"]
    assert {n: tuple(shape) for n, (_, shape) in told.items()} == {
        n: tuple(t.shape) for n, t in adapter.items()
    }
    assert "fresh" not in json.loads(asked["ann"].config)
    assert json.loads(asked["ann"].config)["population"] == 10
