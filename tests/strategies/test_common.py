"""One battery for every strategy of STRATEGIES: a new one is tested as soon as it is listed."""

import dataclasses
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla import codec, factors, tree
from corolla.conformance import Result, conform
from corolla.errors import ConfigError
from corolla.strategies import STRATEGIES, create
from corolla.types import LoraSpec, Params, Payload, Strategy
from tests.strategies import tiny
from tests.strategies.tiny import Run

DECLARED = {"weights": "mean of effective weights", "factors": "mean of factors"}
SPEC = LoraSpec(4, 8.0)
LIMITS = {
    **dict.fromkeys([*DECLARED.values(), "one client", "grouping", "order"], 1e-6),
    **dict.fromkeys(["no leak between clients", "bytes up = formula", "bytes down = formula"], 0.0),
    "saved and reloaded": 1e-5,
    "aggregate is finite": 0.0,
    "one client (no claim)": 0.0,
}

pytestmark = pytest.mark.parametrize("name", STRATEGIES, scope="module")


def mixed(name: str) -> dict[str, Any]:
    """Ranks and alphas that differ from client to client, where that is allowed."""
    if not STRATEGIES[name].mixed_ranks:
        return {}
    return {"ranks": [4, 8, 16], "alphas": [8.0, 4.0, 64.0]}


@pytest.fixture(scope="module")
def result(name: str) -> Result:
    (result,) = conform([name])
    return result


@pytest.fixture(scope="module")
def run(name: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """After two rounds on a classifier. Tests look at it and leave it as it is."""
    run = tiny.start(tiny.config(name, **mixed(name)), "bert", tmp_path_factory.mktemp(name))
    run.step()
    run.step()
    return run


def updates(run: Run) -> list[tuple[Payload, float]]:
    """What the last cohort sent, with weights."""
    return [(codec.decode(s), float(run.network.examples[c])) for c, s in run.network.sent.items()]


def aggregate(strategy: Strategy, parts: Sequence[tuple[Payload, float]]) -> Payload:
    aggregator = strategy.aggregator()
    for payload, weight in parts:
        aggregator.add(payload, weight)
    return aggregator.finalise()


def weights(run: Run, state: Payload) -> Params:
    """The effective weights of a state, by peft."""
    run.model.show(run.federation.strategy.adapter(state), run.federation.config.lora)
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
    assert isinstance(create(name), Strategy)
    made: Any = create(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.state = {}


def test_mixed_ranks_are_accepted_exactly_when_declared(name: str) -> None:
    settings = tiny.config(name, ranks=[2, 4])
    if STRATEGIES[name].mixed_ranks:
        settings.build_strategy()
        return
    with pytest.raises(ConfigError, match="needs one rank and alpha for all clients"):
        settings.build_strategy()
    assert tiny.config(name, ranks=[2, 2]).build_strategy() is not None


# Proofs on effective weights


@pytest.mark.parametrize("model", tiny.KINDS)
def test_conforms(name: str, result: Result, model: str) -> None:
    """Every expected proof is there, with the expected limit, and holds."""
    claim = DECLARED.get(STRATEGIES[name].aggregates)
    expected = {claim, "one client"} if claim else {"aggregate is finite", "one client (no claim)"}
    expected |= {"grouping", "order", "no leak between clients", "saved and reloaded"}
    expected |= {"bytes up = formula", "bytes down = formula"}
    found = {f.check: f for f in result.findings if f.model == model}
    assert expected <= found.keys()
    assert {check: found[check].limit for check in expected} == {
        check: LIMITS[check] for check in expected
    }
    assert [finding for finding in found.values() if not finding.passed] == []
    assert result.passed


@pytest.mark.parametrize("model", tiny.KINDS)
def test_saved_model_is_the_weighted_mean_of_what_clients_trained(
    name: str, model: str, tmp_path: Path
) -> None:
    """Five rounds in fp32, against dense sums in fp64 of peft's own weights."""
    if STRATEGIES[name].aggregates != "weights":
        pytest.skip("does not claim to be exact")
    run = tiny.start(tiny.config(name, **mixed(name)), model, tmp_path / "memory")
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


def test_equal_updates_count_as_one(name: str, run: Run) -> None:
    if STRATEGIES[name].aggregates == "other":
        pytest.skip("makes no claim")
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
    """Where it says `linear`, one update with the summed weight and the mean does as well."""
    strategy = run.federation.strategy
    if not strategy.aggregator().linear:
        pytest.skip("needs individual updates, and says so")
    parts = updates(run)
    total = sum(weight for _, weight in parts)
    mean = {
        group: {
            n: sum((p[group][n].double() * w / total for p, w in parts), torch.zeros(())).float()
            for n in params
        }
        for group, params in parts[0][0].items()
    }
    assert tiny.relative(applied(run, [(mean, total)]), applied(run, parts)) < 1e-6


def test_a_fresh_state_is_the_base_model(name: str, run: Run) -> None:
    strategy, spec = run.federation.strategy, run.federation.config.lora
    run.model.show(strategy.adapter(strategy.init(run.model.init(spec, 3), 0)), spec)
    assert torch.equal(tiny.logits(run.model.model), tiny.logits(tiny.base("bert").model))


def test_training_moves_the_model(name: str, run: Run) -> None:
    """Or every equality here would hold for nothing."""
    moved = weights(run, run.state)
    assert all(float(tensor.abs().max()) > 0 for tensor in moved.values())


def test_clients_evaluate_the_servers_model(name: str, run: Run) -> None:
    broadcast = run.federation.strategy.broadcast(run.state)
    assert not broadcast.payload.keys() & broadcast.cached.keys()
    received = codec.decode(codec.encode({**broadcast.cached, **broadcast.payload}))
    assert tiny.same(weights(run, received), weights(run, run.state))


# What travels


def test_updates_are_what_the_server_expects(name: str, run: Run) -> None:
    strategy = run.federation.strategy
    assert run.network.sent.keys() == run.network.examples.keys()
    for client, sent in run.network.sent.items():
        fresh = run.model.init(run.federation.lora(client), 9)
        update = codec.decode(sent)
        assert tiny.names(update) == tiny.names(strategy.update_like(fresh))
        assert any(tensor.any() for params in update.values() for tensor in params.values())


def test_bytes_are_those_of_the_tensors(name: str, run: Run) -> None:
    result = run.done[-1]
    assert result.bytes_up == sum(
        tensor.numel() * tensor.element_size()
        for sent in run.network.sent.values()
        for params in codec.decode(sent).values()
        for tensor in params.values()
    )
    assert result.bytes_down == sum(
        tensor.numel() * tensor.element_size()
        for received in run.network.received.values()
        for params in received.values()
        for tensor in params.values()
    )


def test_upload_is_the_formula_for_each_client(name: str, run: Run) -> None:
    clients = list(run.network.sent)
    sizes = [factors.size(run.model.init(run.federation.lora(c), 0)) for c in clients]
    costs = run.federation.strategy.cost(sizes)
    assert len(costs) == len(clients)
    for client, cost in zip(clients, costs, strict=True):
        assert codec.content_bytes(codec.decode(run.network.sent[client])) == 4 * cost.up
        assert min(cost.up, cost.down, cost.once) >= 0


def test_a_state_survives_the_codec_and_the_next_round_is_the_same(
    name: str, tmp_path: Path
) -> None:
    run = tiny.start(tiny.config(name, **mixed(name)), "bert", tmp_path)
    run.step()
    restored = codec.decode(codec.encode(run.state))
    assert tree.digest_all(restored) == tree.digest_all(run.state)
    straight = run.step().state
    again = tiny.start(tiny.config(name, **mixed(name)), "bert", tmp_path)
    again.state, again.done = restored, [run.done[0]]  # without `held`: all is sent once more
    assert tree.digest_all(again.step().state) == tree.digest_all(straight)


def test_a_state_is_a_payload_of_single_precision(name: str, run: Run) -> None:
    types = {tensor.dtype for params in run.state.values() for tensor in params.values()}
    assert types == {torch.float32}


# Purity and determinism


def test_nothing_given_is_changed(name: str, run: Run) -> None:
    strategy = run.federation.strategy
    start = run.model.init(run.federation.config.lora, 3)
    combined = aggregate(strategy, updates(run))
    before = [tree.digest(start), tree.digest_all(run.state), tree.digest_all(combined)]
    strategy.init(start, 0)
    strategy.update_like(start)
    strategy.broadcast(run.state)
    strategy.apply(run.state, combined)
    strategy.adapter(run.state)
    assert before == [tree.digest(start), tree.digest_all(run.state), tree.digest_all(combined)]


def test_a_client_does_not_change_what_it_received(name: str, run: Run) -> None:
    """A cached group is shared by all simulated clients."""
    broadcast = run.federation.strategy.broadcast(run.state)
    received = {**broadcast.cached, **broadcast.payload}
    before = tree.digest_all(received)
    fresh = tiny.adapter(run.model, SPEC, 1)
    client = tiny.Scripted(tiny.adapter(run.model, SPEC, 2), 3, SPEC, fresh=fresh)
    update = run.federation.strategy.local(client, received)
    for params in update.payload.values():
        for tensor in params.values():
            tensor.add_(1.0)  # a view of what was received would show
    assert update.num_examples == 3
    assert tree.digest_all(received) == before


def test_the_same_seed_gives_the_same_bits(name: str, run: Run, tmp_path: Path) -> None:
    torch.random.manual_seed(99)
    before = torch.get_rng_state()
    again = tiny.start(tiny.config(name, **mixed(name)), "bert", tmp_path / "again")
    again.step()
    again.step()
    assert tree.digest_all(again.state) == tree.digest_all(run.state)
    assert torch.equal(torch.get_rng_state(), before)
    other = tiny.start(tiny.config(name, seed=1, **mixed(name)), "bert", tmp_path / "other")
    other.step()
    other.step()
    assert tree.digest_all(other.state) != tree.digest_all(run.state)


@pytest.mark.parametrize("model", tiny.KINDS)
def test_with_dropout_no_update_depends_on_the_client_before(
    name: str, model: str, tmp_path: Path
) -> None:
    settings = tiny.config(name, dropout=0.3, **mixed(name))
    runs = [
        tiny.start(settings, model, tmp_path / str(reverse), reverse=reverse)
        for reverse in (False, True)
    ]
    for _ in range(2):
        forwards, backwards = (run.step() for run in runs)
        assert runs[0].network.visits == runs[1].network.visits[::-1]
        assert runs[0].network.sent == runs[1].network.sent
        assert tree.digest_all(forwards.state) == tree.digest_all(backwards.state)
    without = tiny.start(tiny.config(name, **mixed(name)), model, tmp_path / "without")
    without.step()
    without.step()
    assert without.network.sent != runs[0].network.sent
    assert without.network.sent.keys() == runs[0].network.sent.keys()


def test_the_base_model_is_never_touched(name: str, run: Run) -> None:
    wanted = dict(tiny.base("bert").model.named_parameters())
    base = {
        n.replace(".base_layer", "").replace(".original_module", ""): tensor
        for n, tensor in run.model.model.base_model.model.state_dict().items()
        if ".lora_" not in n and ".modules_to_save" not in n
    }
    assert wanted.keys() <= base.keys()
    assert all(torch.equal(base[n], wanted[n]) for n in wanted)
