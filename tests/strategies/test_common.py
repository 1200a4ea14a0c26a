"""One battery for every strategy of STRATEGIES: a new one is tested as soon as it is listed."""

import dataclasses
import inspect
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.client.training.worker import Worker
from corolla.commands.check.findings import Result
from corolla.commands.check.proofs import conform
from corolla.config.asked import takes_magnitudes, takes_parts, takes_start
from corolla.config.build import build_strategy
from corolla.config.sums import not_summed
from corolla.directions import seedlog
from corolla.errors import ConfigError
from corolla.interfaces import Observed, Strategy, Traits
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import evaluate_clients
from corolla.server.rounds.tasks import accepted_only, priced
from corolla.storage.memory import Memory
from corolla.strategies.listing import registry
from corolla.strategies.listing.registry import STRATEGIES, create
from corolla.tensors import factors, tree
from corolla.types import Cost, LoraSpec, Params, Payload
from corolla.wire import codec, messages, scalar_groups
from corolla.wire.packet import Packet
from tests.strategies import tiny
from tests.strategies.tiny import Run

DECLARED = {"weights": "mean of effective weights", "factors": "mean of factors"}
SPEC = LoraSpec(4, 8.0)
CLAIMED = [*DECLARED.values(), "as expected", "one client", "weights = examples"]
CLAIMED += ["shares alone count", "linear as declared"]
LIMITS = {
    **dict.fromkeys([*CLAIMED, "blocks by class", "start beside the base", "sparse sets"], 1e-6),
    **dict.fromkeys(["grouping", "order", "partial sums", "starts from the model"], 1e-6),
    **dict.fromkeys(["bytes up = formula", "bytes down = formula"], 0.0),
    **{"bytes at first = formula": 0.0, "evaluates the model": 1e-6},
    **dict.fromkeys(["no leak between clients", "examples counted", "secure sum"], 0.0),
    **dict.fromkeys(["every weight counts", "server half is pure"], 0.0),
    **dict.fromkeys(["what is kept counts", "what is kept stays", "directions of one's own"], 0.0),
    **dict.fromkeys(["mirrors what clients keep", "best of max_rank", "max_rank adds up"], 1e-6),
    **{"saved and reloaded": 1e-5, "magnitudes": 5 * 1e-6},
}
EVERYWHERE = ("fedavg", "flora", "fedex_lora", "fed_sb", "lora_fair", "seed_pool")
"""Strategies that are proven on every probe model: a mean, stacks, exact residuals, scalars."""
BESIDE = ("blocks by class", "start beside the base", "sparse sets", "magnitudes")
EFFECT = "option has an effect"
ALWAYS = {"grouping", "order", "no leak between clients", "saved and reloaded"}
ALWAYS |= {"bytes up = formula", "bytes down = formula", "weights = examples", "examples counted"}
ALWAYS |= {"starts from the model", "server half is pure", "bytes at first = formula"}

pytestmark = pytest.mark.parametrize("name", STRATEGIES, scope="module")


def varied(name: str) -> dict[str, Any]:
    """Clients as different as the strategy allows: in rank and alpha, in how they train."""
    if not STRATEGIES[name].mixed_ranks:
        return tiny.classes(name)
    return {"ranks": [4, 8, 16], "alphas": [8.0, 4.0, 64.0], **tiny.classes(name)}


def traits(name: str) -> Traits:
    return registry.traits(STRATEGIES[name])


def rounding(name: str) -> float:
    """By how much an aggregate may be off, relative to a step, because it travels in half."""
    return float(getattr(create(name), "rounding", 0.0))


def probed(name: str) -> list[str]:
    """The probe models of `corolla check` that a strategy is proven on here.

    The classifier, where options and what stands beside an adapter are tried, and one language
    model: grouped attention, or Conv1D under rank stabilisation, by turns. What aggregates alike
    does not meet each of them again, which would be minutes; EVERYWHERE has one of each kind.
    """
    language = ("llama", "gpt2")
    if name in EVERYWHERE:
        return [*language, "bert"]
    return [language[sorted(STRATEGIES).index(name) % 2], "bert"]


@pytest.fixture(scope="module")
def result(name: str) -> Result:
    (result,) = conform([name], models=probed(name))
    return result


@pytest.fixture(scope="module")
def run(name: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """After two rounds on a classifier. Tests look at it and leave it as it is."""
    run = tiny.start(tiny.config(name, **varied(name)), "bert", tmp_path_factory.mktemp(name))
    run.step()
    run.step()
    return run


def updates(run: Run) -> list[tuple[Payload, float]]:
    """What the last cohort sent, with weights."""
    return [(run.network.update(c), float(run.network.examples[c])) for c in run.network.sent]


def aggregate(strategy: Strategy, parts: Sequence[tuple[Payload, float]]) -> Payload:
    aggregator = strategy.aggregator()
    for payload, weight in parts:
        aggregator.add(payload, weight)
    return aggregator.finalise()


def weights(run: Run, state: Payload) -> Params:
    """The effective weights of a state, by peft; where clients keep a factor, the other one."""
    strategy = run.federation.strategy
    if registry.traits(strategy).personal and strategy.aggregates == "other":
        return {n: tensor.double() for n, tensor in strategy.adapter(state).trained.items()}
    run.model.show(strategy.adapter(state), run.federation.config.lora)
    return tiny.effective(run.model)


def applied(run: Run, parts: Sequence[tuple[Payload, float]]) -> Params:
    strategy = run.federation.strategy
    return weights(run, strategy.apply(run.state, aggregate(strategy, parts))[0])


# What it says of itself


def test_names_its_paper_and_keeps_no_state(name: str) -> None:
    cls: Any = STRATEGIES[name]
    module = inspect.getmodule(cls)
    assert cls.name == name
    assert re.search(r"arXiv \d{4}\.\d{5}", (module and module.__doc__) or "")
    assert cls.aggregates in {"weights", "factors", "other"}
    assert 1 <= len(set(cls.trainers)) == len(cls.trainers)
    assert set(cls.trainers) <= {"first_order", "zeroth_order"}
    assert not (cls.full and "first_order" in cls.trainers)  # there is no such trainer
    assert isinstance(create(name), Strategy)
    made: Any = create(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.state = {}


def test_mixed_ranks_are_accepted_exactly_when_declared(name: str) -> None:
    settings = tiny.config(name, ranks=[2, 4], **tiny.classes(name))
    if STRATEGIES[name].mixed_ranks:
        build_strategy(settings)
        return
    with pytest.raises(ConfigError, match="needs one rank and alpha for all clients"):
        build_strategy(settings)
    assert build_strategy(tiny.config(name, ranks=[2, 2], **tiny.classes(name))) is not None


@pytest.mark.parametrize("role", ["bias", "full"])
def test_other_tensors_are_trained_exactly_when_declared(name: str, role: str) -> None:
    settings = tiny.config(name, parameters=role)
    if STRATEGIES[name].full or getattr(STRATEGIES[name], "dense", False):
        build_strategy(settings)
        return
    with pytest.raises(ConfigError, match="trains LoRA factors"):
        build_strategy(settings)


@pytest.mark.parametrize("trainer", ["first_order", "zeroth_order"])
def test_clients_train_as_declared_and_in_no_other_way(name: str, trainer: str) -> None:
    known = tiny.classes(name).get("classes", {})
    settings = tiny.config(name, classes={"phone": {"trainer": trainer}, **known})
    assert settings.trainer_of("") == STRATEGIES[name].trainers[0]
    if trainer in STRATEGIES[name].trainers:
        build_strategy(settings)
        assert settings.trainer_of("phone") == trainer
        return
    with pytest.raises(ConfigError, match=f"class phone has trainer {trainer}, but"):
        build_strategy(settings)


def test_more_than_one_way_to_train_needs_all_of_them(name: str) -> None:
    if len(STRATEGIES[name].trainers) == 1:
        build_strategy(tiny.config(name))
        return
    for trainer in STRATEGIES[name].trainers:
        with pytest.raises(ConfigError, match=f"found {trainer}: set classes.NAME.trainer"):
            build_strategy(tiny.config(name, classes={"all": {"trainer": trainer}}))


# Proofs on effective weights


def goes_beside(name: str) -> bool:
    """Whether a part of the base may be out of it, and the adapter in its place."""
    strategy = create(name)
    alone = set(strategy.trainers) == {"first_order"}
    return takes_start(strategy) and alone and not traits(name).personal


def proofs(name: str, model: str) -> set[str]:
    """All that a strategy must be held against on a model, by what it says of itself."""
    strategy, said = create(name), traits(name)
    claim = DECLARED.get(strategy.aggregates)
    found = ALWAYS | ({claim, "one client"} if claim else {"as expected"})
    if getattr(strategy, "weighted", True):
        found |= {"shares alone count", "every weight counts"}
    if strategy.aggregator().linear:
        found |= {"partial sums", "linear as declared"}
    if name in ("fedkseed", "fedkseed_pro"):
        found |= {"directions of one's own"}
    if name in ("flora", "fedex_lora"):
        found |= {"best of max_rank", "max_rank adds up"}
    if takes_parts(strategy) and model == "bert":
        found |= {"blocks by class"}
    if (strategy.full or said.dense) and not said.personal and model == "bert":
        found |= {"sparse sets"}
    if takes_magnitudes(strategy) and model == "bert":
        found |= {"magnitudes"}
    if not not_summed(strategy) and model == "bert":
        found |= {"secure sum"}
    if goes_beside(name) and model == "bert":
        found |= {"start beside the base"}
    if said.mirrors:
        found |= {"mirrors what clients keep"}
    if said.mirrors or said.personal:
        found |= {"what is kept counts"}
    return found | ({"what is kept stays"} if said.personal else {"evaluates the model"})


def test_conforms(name: str, result: Result) -> None:
    """Every expected proof is there, with the expected limit, and holds."""
    assert rounding(name) <= 2**-11
    assert result.claims
    for model in probed(name):
        found = {f.check: f for f in result.findings if f.model == model and not f.options}
        assert found.keys() == proofs(name, model)
        claimed = {*CLAIMED, *BESIDE}
        off = {check: rounding(name) if check in claimed else 0.0 for check in found}
        assert {c: f.limit for c, f in found.items()} == {c: LIMITS[c] + off[c] for c in found}
        assert [finding for finding in found.values() if not finding.passed] == []


def test_conforms_with_every_option_away_from_its_default(name: str, result: Result) -> None:
    """One at a time, each with an effect, and held against as much as with the defaults."""
    cls: Any = STRATEGIES[name]
    own = {f.name for f in dataclasses.fields(cls) if f.metadata["example"] != f.default}
    tried = [f for f in result.findings if f.options]
    assert own == {option for f in tried for option in f.options if f.check == EFFECT}
    assert [finding for finding in tried if not finding.passed] == []
    assert {f.check for f in tried} >= (
        {EFFECT} | ALWAYS - {"no leak between clients"} if own else set()
    )
    assert result.passed


@pytest.mark.parametrize("model", tiny.KINDS)
def test_saved_model_is_the_weighted_mean_of_what_clients_trained(
    name: str, model: str, tmp_path: Path
) -> None:
    """Five rounds in fp32, against dense sums in fp64 of peft's own weights."""
    if STRATEGIES[name].aggregates != "weights":
        pytest.skip("does not claim to be exact")
    run = tiny.start(tiny.config(name, **varied(name)), model, tmp_path / "memory")
    trained: set[str] = set()
    for _ in range(5):
        run.step()
        trained |= run.network.examples.keys()
        wanted, found = run.network.mean(), tiny.saved(run, tmp_path / "adapter")
        assert found.keys() == wanted.keys()
        assert tiny.relative(found, wanted) <= 1e-6
        heads = {n for n in wanted if n.startswith("classifier")}
        assert len(heads) == (2 if model == "bert" else 0)
        assert not heads or tiny.relative(found, {n: wanted[n] for n in heads}) <= 1e-6
    assert trained == set(tiny.CLIENTS)


@pytest.mark.parametrize("model", tiny.KINDS)
def test_saved_factors_are_the_weighted_means_of_what_clients_trained(
    name: str, model: str, tmp_path: Path
) -> None:
    """Three rounds: A, B and the head apart, each client's read from its model."""
    if STRATEGIES[name].aggregates != "factors":
        pytest.skip("does not claim means of factors")
    run = tiny.start(tiny.config(name, **varied(name)), model, tmp_path / "memory")
    for _ in range(3):
        run.step()
        total = sum(run.network.examples.values())
        p = {client: n / total for client, n in run.network.examples.items()}
        wanted = dict(run.network.mean())
        means = {
            n: torch.stack([p[c] * own[n].double() for c, own in run.network.trained.items()]).sum(
                0
            )
            for n in run.model.init(SPEC, 0)
        }
        for module in [n.removesuffix(".lora_A") for n in means if n.endswith(".lora_A")]:
            product = SPEC.scaling * means[module + ".lora_B"] @ means[module + ".lora_A"]
            wanted[module] = product.T if model == "gpt2" else product  # Conv1D is (in, out)
        found = tiny.saved(run, tmp_path / "adapter")
        assert found.keys() == wanted.keys()
        assert tiny.relative(found, wanted) <= 1e-6 + rounding(name)


@pytest.mark.parametrize("model", tiny.KINDS)
def test_saved_model_is_what_the_strategy_says_to_expect(
    name: str, model: str, tmp_path: Path
) -> None:
    """Three rounds: its second opinion, in fp64, against the saved weights by peft alone."""
    expected = getattr(create(name), "expected", None)
    if expected is None:
        pytest.skip("declares a mean instead")
    run = tiny.start(tiny.config(name, **varied(name)), model, tmp_path / "memory")
    spec, base = run.federation.config.lora, run.model.init(SPEC, 0)
    observed: list[Observed] = []
    for _ in range(3):
        before = run.state
        run.step()
        observed.append(tiny.observed(run, before))
        said = expected(observed)
        if traits(name).personal:
            found, wanted = run.federation.strategy.adapter(run.state).trained, dict(said)
            assert wanted.keys() <= found.keys()
            assert tiny.relative(found, wanted) <= 1e-6
            continue
        wanted = {n: t - base[n] for n, t in factors.select(said, factors.is_head).items()}
        for module in factors.modules(said):
            product = spec.scaling * tiny.dense(said, module)
            wanted[module] = product.T if model == "gpt2" else product  # Conv1D is (in, out)
        found = tiny.saved(run, tmp_path / "adapter")
        assert found.keys() == wanted.keys()
        assert tiny.relative(found, wanted) <= 1e-6


def test_equal_updates_count_as_one(name: str, run: Run) -> None:
    ((payload, _), *_) = updates(run)
    wanted = applied(run, [(payload, 5.0)])
    found = applied(run, [(payload, 2.0), (payload, 3.0), (payload, 0.5)])
    assert tiny.relative(found, wanted) < 1e-6


def test_only_ratios_of_weights_count(name: str, run: Run) -> None:
    scaled = [(payload, 1000 * weight) for payload, weight in updates(run)]
    assert tiny.relative(applied(run, scaled), applied(run, updates(run))) < 1e-6


def test_order_and_grouping_do_not_change_the_model(name: str, run: Run) -> None:
    wanted = applied(run, updates(run))
    assert tiny.relative(applied(run, updates(run)[::-1]), wanted) < 1e-6
    strategy = run.federation.strategy
    root = strategy.aggregator()
    for payload, weight in updates(run):
        leaf, between = strategy.aggregator(), strategy.aggregator()
        leaf.add(payload, weight)
        between.merge(leaf)
        between.merge(strategy.aggregator())
        root.merge(between)
    merged = weights(run, strategy.apply(run.state, root.finalise())[0])
    assert tiny.relative(merged, wanted) < 1e-6


def test_a_linear_aggregator_needs_only_sums(name: str, run: Run) -> None:
    """Where it says `linear`, one update with the summed weight and the mean does as well.

    The mean of scalars along seeded directions: all of them, each times its client's share and
    step. Clients that send different groups (other trainers) are summed up apart.
    """
    strategy = run.federation.strategy
    assert strategy.aggregator().linear != traits(name).individual
    if traits(name).individual:
        pytest.skip("needs individual updates, and says so")
    parts = updates(run)
    kinds = {tuple(payload): [p for p in parts if tuple(p[0]) == tuple(payload)]
             for payload, _ in parts}  # fmt: skip
    means = [(mean(own, strategy), sum(weight for _, weight in own)) for own in kinds.values()]
    limit = 1e-6 + rounding(name)
    assert tiny.relative(applied(run, means), applied(run, parts)) < limit


def mean(parts: Sequence[tuple[Payload, float]], strategy: Strategy) -> Payload:
    total = sum(weight for _, weight in parts)
    shares = [weight / total for _, weight in parts]
    found: dict[str, Params] = {}
    for group, params in parts[0][0].items():
        own = [payload[group] for payload, _ in parts]
        if "step" in params:
            size: int = vars(strategy)["size"]
            scales = [p * float(one["step"]) for p, one in zip(shares, own, strict=True)]
            scalars = [s * one["scalars"].double() for s, one in zip(scales, own, strict=True)]
            found[group] = {
                "scalars": torch.cat(scalars).float(),
                "step": torch.tensor(1.0),
                "directions": torch.cat([seedlog.directions(one, size) for one in own]).int(),
            }
            continue
        found[group] = {
            n: torch.stack([p * one[n].double() for p, one in zip(shares, own, strict=True)])
            .sum(0)
            .float()
            for n in params
        }
    return found


def test_a_fresh_state_is_the_base_model(name: str, run: Run) -> None:
    strategy, spec = run.federation.strategy, run.federation.config.lora
    run.model.show(strategy.adapter(strategy.init(run.model.init(spec, 3), 0)), spec)
    assert torch.equal(tiny.logits(run.model.model), tiny.logits(tiny.base("bert").model))


def test_training_moves_the_model(name: str, run: Run) -> None:
    """Or every equality here would hold for nothing."""
    before, after = weights(run, run.first), weights(run, run.state)
    assert all(float((after[n] - before[n]).abs().max()) > 0 for n in after)


def test_clients_evaluate_the_servers_model(name: str, run: Run, tmp_path: Path) -> None:
    """Whoever knows nothing, and whoever has followed: over the wire, to the same bits.

    Of another rank, what is made for it; who keeps a part of its model, with that part.
    """
    strategy, spec = run.federation.strategy, run.federation.config.lora
    broadcast = strategy.broadcast(run.state)
    assert not broadcast.payload.keys() & broadcast.cached.keys()
    run.model.show(strategy.adapter(run.state), spec)
    wanted = tiny.effective(run.model)
    for held in ({}, run.held):
        network = _Evaluated(run, tmp_path / f"holds {len(held)}")
        scores = evaluate_clients(RoundCall(run.federation, run.state, held, 3), network)
        assert scores.keys() == network.found.keys() == set(tiny.CLIENTS)
        for client, found in network.found.items():
            lora, own = run.federation.lora(client), kept(run, client) if held else {}
            received = tiny.seen(broadcast, run.first, lora)
            run.model.show(strategy.adapter({**received, **own}), lora)
            assert tiny.same(found, tiny.effective(run.model))
            if own:
                run.model.show(strategy.adapter(received), lora)
                assert tiny.relative(tiny.effective(run.model), found) > 1e-3
            elif broadcast.fitted is None:
                assert tiny.same(found, wanted)
            elif lora == spec:
                assert tiny.relative(found, wanted) < 1e-6


def kept(run: Run, client: str) -> Payload:
    """What a device has kept for its own model since its update was accepted last."""
    rounds = [n for n, done in enumerate(run.done, 1) if client in done.num_examples]
    if not (rounds and traits(run.federation.strategy.name).personal):
        return {}
    return run.network.worker.memory.kept(client, rounds[-1])


class _Evaluated(Network):
    """The same clients with a copy of their memory: what each one's model was when it was asked."""

    def __init__(self, run: Run, folder: Path) -> None:
        shutil.copytree(run.network.worker.memory.folder, folder)
        config = run.federation.config
        self.worker = Worker(config, run.model, tiny.data("bert"), Memory(folder))
        self.model, self.found = run.model, dict[str, Params]()

    def clients(self) -> Mapping[str, int]:
        return tiny.CLIENTS

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for client, packet in packets.items():
            answer = self.worker(client, packet)
            self.found[client] = tiny.effective(self.model)
            yield client, answer


# What travels


def test_updates_are_what_the_server_expects(name: str, run: Run) -> None:
    strategy = run.federation.strategy
    assert run.network.sent.keys() == run.network.examples.keys()
    for client in run.network.sent:
        fresh = run.model.init(run.federation.lora(client), 9)
        update = run.network.update(client)
        like = strategy.update_like(fresh, run.federation.size(client, len(run.done)))
        assert tiny.names(update) == tiny.names(like)
        assert any(tensor.any() for params in update.values() for tensor in params.values())
        for group, params in update.items():
            for n, tensor in params.items():
                if tensor.dim() == 0:
                    assert tensor == like[group][n]  # the seed and the step it was given
                assert tensor.is_floating_point() or bool((tensor <= like[group][n]).all())


def test_what_a_device_keeps_for_itself_never_leaves_it(name: str, run: Run) -> None:
    """Not one kept tensor among the bytes of an update."""
    own = {client: kept(run, client) for client in run.network.sent}
    assert all(bool(groups) == traits(name).personal for groups in own.values())
    for client, groups in own.items():
        sent = run.network.sent[client]
        for tensor in (t for params in groups.values() for t in params.values() if t.any()):
            assert tensor.numpy().tobytes() not in sent.payload + sent.header


def test_an_update_without_change_leaves_the_model(name: str, run: Run) -> None:
    """Where updates are differences: a client that did nothing pulls at nothing."""
    if traits(name).updates != "differences":
        pytest.skip("sends factors, values or scalars")
    still = {group: run.first[group] for group in ("momentum", "variance") if group in run.first}
    like = run.federation.strategy.update_like(run.model.init(SPEC, 0), run.federation.size("a"))
    zero = {group: tree.scale(params, 0.0) for group, params in like.items()}
    aggregated = aggregate(run.federation.strategy, [(zero, 3.0), (zero, 5.0)])
    after, _ = run.federation.strategy.apply({**run.state, **still}, aggregated)
    assert tiny.relative(weights(run, after), weights(run, run.state)) < 1e-6


def size_of(payload: Payload) -> int:
    """Bytes by hand: each value as it is, a seed in 4; what is sparse is sent in fewer."""
    total = 0
    for params in payload.values():
        plain = sum(t.numel() * (4 if n == "seed" else t.element_size()) for n, t in params.items())
        if "scalars" in params and "directions" not in params and not params["scalars"].all():
            assert scalar_groups.scalar_bytes(params) <= plain
            plain = scalar_groups.scalar_bytes(params)
        total += plain
    return total


def test_bytes_are_those_of_the_tensors(name: str, run: Run) -> None:
    result = run.done[-1]
    assert result.traffic.up == sum(size_of(run.network.update(c)) for c in run.network.sent)
    assert result.traffic.down == sum(size_of(r) for r in run.network.received.values())


def costs_of(run: Run, clients: Sequence[str]) -> Sequence[Cost]:
    """By the strategy's formula, for the second round."""
    state = run.done[0].state
    sizes = [run.federation.at(state).size(c, 2) for c in clients]
    return priced(run.federation.strategy, state, sizes)


def test_upload_is_the_formula_for_each_client(name: str, run: Run) -> None:
    clients = list(run.network.sent)
    costs = costs_of(run, clients)
    assert len(costs) == len(clients)
    for client, cost in zip(clients, costs, strict=True):
        assert messages.content_bytes(run.network.update(client)) == cost.up
        assert min(cost.up, cost.down, cost.once) >= 0
    result = run.done[-1]
    assert (result.cost.up, result.cost.down) == (
        sum(cost.up for cost in costs),
        sum(cost.down for cost in costs),
    )
    assert result.cost.up == result.traffic.up


def test_download_is_the_formula_for_who_missed_nothing(name: str, run: Run) -> None:
    """In the second round, of those that were there in the first; a limit where it says so."""
    clients = [c for c in run.network.received if c in run.done[0].num_examples]
    assert clients
    costs = costs_of(run, [*run.network.received])
    by_client = dict(zip(run.network.received, costs, strict=True))
    for client in clients:
        found, cost = messages.content_bytes(run.network.received[client]), by_client[client]
        assert found <= cost.down if cost.at_most else found == cost.down
        assert found > 0


def test_a_state_survives_the_codec_and_the_next_round_is_the_same(
    name: str, tmp_path: Path
) -> None:
    run = tiny.start(tiny.config(name, **varied(name)), "bert", tmp_path)
    run.step()
    restored, held = codec.decode(codec.encode(run.state)), run.held
    assert tree.digest_all(restored) == tree.digest_all(run.state)
    straight = run.step().state
    again = tiny.start(tiny.config(name, **varied(name)), "bert", tmp_path)
    again.state, again.done = restored, [run.done[0]]
    # All is sent once more; the server still knows whose update it accepted, and when.
    again.held = {client: accepted_only(held, client) for client in held}
    assert tree.digest_all(again.step().state) == tree.digest_all(straight)


def test_a_state_is_a_payload_of_single_precision(name: str, run: Run) -> None:
    """Rows of a log may be in half, as they travel; seeds are whole numbers."""
    for group, params in run.state.items():
        for n, tensor in params.items():
            wanted = torch.float32
            if n in ("seed", "key"):
                wanted = torch.int64
            elif group in ("phase", "subset"):
                wanted = torch.uint8
            elif n == "scalars" and group.startswith("log-") and rounding(name):
                wanted = torch.float16
            assert tensor.dtype == wanted, (group, n)
            assert bool(torch.isfinite(tensor).all())


# Purity and determinism


def test_nothing_given_is_changed(name: str, run: Run) -> None:
    strategy = run.federation.strategy
    start = run.model.init(run.federation.config.lora, 3)
    combined = aggregate(strategy, updates(run))
    before = [tree.digest(start), tree.digest_all(run.state), tree.digest_all(combined)]
    strategy.init(start, 0)
    strategy.update_like(start, run.federation.size("a"))
    strategy.broadcast(run.state)
    strategy.apply(run.state, combined)
    strategy.adapter(run.state)
    assert before == [tree.digest(start), tree.digest_all(run.state), tree.digest_all(combined)]


def test_a_client_does_not_change_what_it_received(name: str, run: Run) -> None:
    """A cached group, and a row of a log, is shared by all simulated clients."""
    received = tiny.seen(run.federation.strategy.broadcast(run.state), run.first, SPEC)
    before = tree.digest_all(received), tree.digest_all(run.state)
    fresh, ends = tiny.adapter(run.model, SPEC, 1), tiny.adapter(run.model, SPEC, 2)
    for kind in STRATEGIES[name].trainers:
        client = tiny.Scripted(ends, 3, SPEC, fresh=fresh, kind=kind)
        update = run.federation.strategy.local(client, received)
        assert bool(update.keep) == traits(name).keeps
        for params in [*update.payload.values(), *update.keep.values()]:
            for tensor in params.values():
                tensor.add_(1)  # a view of what was received would show
        assert client.asked
        assert update.num_examples == 3
        assert (tree.digest_all(received), tree.digest_all(run.state)) == before


def test_the_same_seed_gives_the_same_bits(name: str, run: Run, tmp_path: Path) -> None:
    torch.random.manual_seed(99)
    before = torch.get_rng_state()
    again = tiny.start(tiny.config(name, **varied(name)), "bert", tmp_path / "again")
    again.step()
    again.step()
    assert tree.digest_all(again.state) == tree.digest_all(run.state)
    assert torch.equal(torch.get_rng_state(), before)
    other = tiny.start(tiny.config(name, seed=1, **varied(name)), "bert", tmp_path / "other")
    other.step()
    other.step()
    assert tree.digest_all(other.state) != tree.digest_all(run.state)


@pytest.mark.parametrize("model", tiny.KINDS)
def test_with_dropout_no_update_depends_on_the_client_before(
    name: str, model: str, tmp_path: Path
) -> None:
    settings = tiny.config(name, dropout=0.3, **varied(name))
    runs = [
        tiny.start(settings, model, tmp_path / str(reverse), reverse=reverse)
        for reverse in (False, True)
    ]
    for _ in range(2):
        forwards, backwards = (run.step() for run in runs)
        assert runs[0].network.visits == runs[1].network.visits[::-1]
        assert runs[0].network.sent == runs[1].network.sent
        assert tree.digest_all(forwards.state) == tree.digest_all(backwards.state)


@pytest.mark.parametrize("model", tiny.KINDS)
def test_dropout_changes_what_backpropagation_sends_and_nothing_else(
    name: str, model: str, tmp_path: Path
) -> None:
    """A difference of two losses means something only where both see the same network."""
    sent = []
    for dropout in (0.0, 0.3):
        run = tiny.start(
            tiny.config(name, dropout=dropout, **varied(name)), model, tmp_path / str(dropout)
        )
        run.step()
        sent.append(run.network.sent)
    federation = run.federation
    assert sent[0].keys() == sent[1].keys()
    for client in sent[0]:
        kind = federation.config.trainer_of(federation.class_of(client))
        assert (sent[0][client] == sent[1][client]) == (kind == "zeroth_order")


def test_the_base_model_is_never_touched(name: str, run: Run) -> None:
    wanted = dict(tiny.base("bert").model.named_parameters())
    base = {
        n.replace(".base_layer", "").replace(".original_module", ""): tensor
        for n, tensor in run.model.model.base_model.model.state_dict().items()
        if ".lora_" not in n and ".modules_to_save" not in n
    }
    assert wanted.keys() <= base.keys()
    assert all(torch.equal(base[n], wanted[n]) for n in wanted)
