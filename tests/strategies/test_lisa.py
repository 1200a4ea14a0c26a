"""A subset of tensors in each round: on factors, and on all parameters of a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from corolla import seeds
from corolla.client.training.worker import Worker
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.models.dense import DenseModel
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.federation import Federation, Held
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import RoundResult, evaluate_clients, run_round
from corolla.storage.memory import Memory
from corolla.strategies.lisa import Lisa
from corolla.tensors import tree, units
from corolla.types import Cost, LoraSpec, Params, Payload, Size
from corolla.wire import messages
from corolla.wire.messages import unpack_reply
from corolla.wire.packet import Packet
from tests.strategies import tiny


def BYTES(size: Size) -> tuple[set[int], set[int]]:  # noqa: N802 - a table's name
    """At most: where all blocks are trained."""
    return {4 * (size.A + size.B)}, {4 * (size.A + size.B)}


SPEC = LoraSpec(1, 1.0)
BLOCKS = 3
OF_BLOCK = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
"""Values of a block of the tiny Llama: q, o; k, v; gate, up, down; two norms."""


@dataclass
class Seen(Network):
    """Clients of a dense model in this process: what they received, sent and had trained."""

    worker: Worker
    reverse: bool = False
    received: dict[str, Payload] = field(default_factory=dict)
    sent: dict[str, Payload] = field(default_factory=dict)
    trained: dict[str, Params] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)

    def clients(self) -> Mapping[str, int]:
        return dict(tiny.CLIENTS)

    def ask(self, packets: Mapping[str, Packet]) -> Any:
        for seen in (self.received, self.sent, self.trained, self.examples):
            seen.clear()
        for client in sorted(packets, reverse=self.reverse):
            answer = self.worker(client, packets[client])
            reply = unpack_reply(answer, 1 << 30)
            assert not reply.error, reply.error
            self.received[client] = tiny.delivered(packets[client])
            self.sent[client] = messages.content(reply)
            self.trained[client] = self.worker.model.read()
            self.examples[client] = reply.num_examples
            yield client, answer


class Dense:
    """A federation that trains all parameters of a tiny model."""

    def __init__(self, config: RunConfig, folder: Path, reverse: bool = False) -> None:
        self.model = DenseModel(tiny.base("llama", BLOCKS), config.parameters)
        self.network = Seen(Worker(config, self.model, tiny.data("llama"), Memory(folder)), reverse)
        strategy = build_strategy(config)
        fresh = cache(lambda spec: self.model.init(spec, 0))
        self.federation = Federation("0" * 32, config, strategy, tiny.CLIENTS, fresh)
        self.state = strategy.init(self.model.init(SPEC, 0), config.seed)
        self.held: Held = {}
        self.number = 0

    def call(self, *members: str) -> RoundCall:
        cohort = dict.fromkeys(members, 1) or None
        return RoundCall(self.federation, self.state, self.held, self.number + 1, cohort=cohort)

    def step(self, *members: str) -> RoundResult:
        result = run_round(self.call(*members), self.network)
        self.state, self.held, self.number = result.state, result.held, self.number + 1
        return result

    @property
    def trained(self) -> Params:
        return self.federation.strategy.adapter(self.state).trained


def settings(strategy: str = "lisa", **options: Any) -> RunConfig:
    return tiny.config(strategy, parameters="full", cohort=4, options=options)


@pytest.fixture
def dense(tmp_path: Path) -> Callable[..., Dense]:
    made = iter(range(9))

    def make(config: RunConfig, **more: Any) -> Dense:
        return Dense(config, tmp_path / f"{next(made)}", **more)

    return make


def changed(one: Params, other: Params) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


# What is trained


def test_two_rounds_are_dense_means_on_the_subset_and_nothing_elsewhere(
    dense: Callable[..., Dense],
) -> None:
    """All clients train one subset; the mean is that of their models in fp64."""
    run = dense(settings(layers=1, always=["norm"]))
    seen = []
    for _ in range(2):
        before = run.trained
        chosen = {n for u in Lisa(1).chosen(run.state) for n in run.state[u]}
        run.step()
        total = sum(run.network.examples.values())
        for client, own in run.network.trained.items():
            assert changed(own, before) == chosen
            assert run.network.sent[client]["adapter"].keys() == chosen
        assert changed(run.trained, before) == chosen
        for name in chosen:
            parts = [
                n * run.network.trained[c][name].double() for c, n in run.network.examples.items()
            ]
            mean = torch.stack(parts).sum(0) / total
            torch.testing.assert_close(run.trained[name].double(), mean, rtol=1e-6, atol=1e-7)
        seen.append(chosen)
    assert all("model.norm.weight" in own for own in seen)
    assert "model.embed_tokens.weight" not in set.union(*seen)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_local_steps_are_those_of_torch_on_the_subset(
    dense: Callable[..., Dense], optimizer: str
) -> None:
    """A plain model of transformers, autograd and torch.optim, with all else frozen."""
    config = settings(layers=1, choose="suffix", always=[])
    config = config.model_copy(update={"optimizer": optimizer, "clip_norm": 0.5, "local_steps": 3})
    run = dense(config)
    run.step("a")  # who has as many examples as a batch: the order of its rows has no effect
    plain = tiny.base("llama", BLOCKS).model
    own = {n: p for n, p in plain.named_parameters() if ".layers.2." in n}
    for parameter in own.values():
        parameter.requires_grad_(True)
    kind: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    steps = kind(own.values(), lr=config.lr, weight_decay=config.weight_decay)
    rows = [sequence.input_ids for sequence in run.network.worker._tokens("a")[0]]
    ids = torch.tensor(rows)
    plain.train()
    for _ in range(3):
        logits = plain(input_ids=ids).logits[:, :-1]
        loss: Any = cross_entropy(logits.reshape(-1, tiny.VOCABULARY), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own.values(), 0.5)
        steps.step()
        steps.zero_grad()
    for name, parameter in own.items():
        found = run.network.trained["a"][name]
        torch.testing.assert_close(found, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_the_backward_pass_ends_at_the_deepest_block(dense: Callable[..., Dense]) -> None:
    run = dense(settings(layers=1, choose="suffix", always=["norm"]))
    graph: dict[int, set[bool]] = {}
    for number, block in enumerate(run.model.model.model.layers):
        own = graph.setdefault(number, set())
        block.register_forward_hook(lambda _, __, out, own=own: own.add(out.requires_grad))
    run.step("a")
    assert graph == {0: {False}, 1: {False}, 2: {True}}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_all_blocks_and_all_else_are_fedavg_bit_for_bit(
    dense: Callable[..., Dense], optimizer: str
) -> None:
    change = {"optimizer": optimizer, "lr": 1e-2}
    one = dense(settings(layers=BLOCKS).model_copy(update=change))
    other = dense(settings("fedavg").model_copy(update=change))
    for _ in range(2):
        one.step()
        other.step()
        assert tiny.same(one.trained, other.trained)


def test_the_order_of_clients_changes_no_bit(dense: Callable[..., Dense]) -> None:
    config = settings(choose="half")
    one, other = dense(config), dense(config, reverse=True)
    for _ in range(2):
        one.step()
        other.step()
        assert tree.digest_all(one.state) == tree.digest_all(other.state)


# What is chosen


def chosen(rounds: int, start: Params, seed: int = 0, **options: Any) -> list[list[str]]:
    """The units of so many rounds in which a client moves all that it trains by as much as it is
    told: blocks by 1, 2, … (`moves`)."""
    moves = options.pop("moves", {})
    strategy, found = Lisa(**options), []
    state = strategy.init(start, seed)
    for _ in range(rounds):
        found.append(list(strategy.chosen(state)))
        by = {n: moves.get(n, 1.0) for n in start}
        outcome = {n: t + by[n] for n, t in strategy.adapter(state).trained.items()}
        client = tiny.Scripted(outcome, 1, fresh=start)
        state = tiny.play(strategy, state, [client])
    return found


def stack(blocks: int) -> Params:
    inside = {f"h.{i}.{m}.weight": torch.ones(2) for i in range(blocks) for m in ("attn", "mlp")}
    return {**inside, "wte.weight": torch.ones(3), "ln_f.weight": torch.ones(2)}


def test_blocks_are_drawn_by_the_runs_seed_until_each_was_trained() -> None:
    found = chosen(20, stack(6), layers=2, always=["norm"])
    assert all(len(own) == 3 and own[-1] == "norm" for own in found)
    assert {unit for own in found for unit in own} == {*(f"layer-000{i}" for i in range(6)), "norm"}
    assert found == chosen(20, stack(6), layers=2, always=["norm"])
    assert found != chosen(20, stack(6), 1, layers=2, always=["norm"])


def test_a_choice_holds_for_some_rounds() -> None:
    found = chosen(6, stack(6), layers=2, every=3, always=[])
    assert found[0] == found[1] == found[2] != found[3] == found[4] == found[5]


def test_the_last_blocks_are_the_same_in_each_round() -> None:
    assert (
        chosen(3, stack(4), choose="suffix", layers=2, always=[])
        == [["layer-0002", "layer-0003"]] * 3
    )
    assert chosen(1, stack(2), choose="suffix", layers=9, always=["embed"]) == [
        ["embed", "layer-0000", "layer-0001"]
    ]


def test_those_that_changed_most_are_trained_once_all_have_been_tried() -> None:
    """One block a round. Relative changes by hand: 0.1, 0.4 and, of a block of zeros, 3 / 1e-12;
    then the last one again, whose norm is that of its change by now: 3 / 3, 3 / 6, and 3 / 9,
    which is less than 0.4 of the second."""
    start = {f"h.{i}.w": torch.tensor([value]) for i, value in enumerate((1.0, 1.0, 0.0))}
    moves = {"h.0.w": 0.1, "h.1.w": 0.4, "h.2.w": 3.0}
    found = chosen(7, start, choose="change", layers=1, always=[], moves=moves)
    assert [int(own[-1]) for (own,) in found] == [0, 1, 2, 2, 2, 2, 1]


def test_half_of_the_modules_are_trained_in_each_block(dense: Callable[..., Dense]) -> None:
    run = dense(settings(choose="half", always=[]))
    before = run.trained
    run.step("a")
    moved = changed(run.trained, before)
    values = sum(run.trained[name].numel() for name in moved)
    assert {name.split(".")[2] for name in moved} == {"0", "1", "2"}
    assert 0.35 < values / (BLOCKS * OF_BLOCK) < 0.65
    run.step("a")
    assert run.network.sent["a"]["adapter"].keys() != moved


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"layers": 0}, "layers must be at least 1, found 0"),
        ({"every": 0}, "every must be at least 1, found 0"),
        ({"choose": "best"}, "choose must be random or half or suffix or change, found 'best'"),
        ({"always": ["tail"]}, r"always is a list of embed or norm or head, found \['tail'\]"),
        ({"always": "embed"}, "always is a list of words, found 'embed'"),
    ],
)
def test_options_that_are_none_get_one_line(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        build_strategy(tiny.config("lisa", options=options))


def test_a_model_without_blocks_and_nothing_else_to_train_gets_one_line() -> None:
    strategy = Lisa(always=[])
    state = strategy.init({"score.weight": torch.ones(2)}, 0)
    with pytest.raises(ConfigError, match="what this run trains is in none: use fedavg"):
        strategy.chosen(state)


def test_groups_that_a_server_keeps_beside_the_units_are_none() -> None:
    """What a start leaves beside the base, the places of a sparse set."""
    strategy, start = Lisa(layers=1), stack(3)
    state = {**strategy.init(start, 0), "support": {"h.0.attn.weight": torch.ones(2)}}
    assert strategy.chosen(state) == strategy.chosen(strategy.init(start, 0))
    assert tiny.same(strategy.adapter(state).trained, start)
    assert "support" not in strategy.broadcast(state).cached


# What travels


def test_a_client_receives_what_has_changed_since_it_was_here(dense: Callable[..., Dense]) -> None:
    """Nothing of the fresh model; who was away for two rounds the blocks of both."""
    run = dense(settings(layers=1, always=[]))
    drawn = []
    for members in (("a", "b"), ("b",), ("b",), ("a", "b")):
        drawn.append(Lisa(1, always=[]).chosen(run.state)[0])
        run.step(*members)
        blocks = {c: units.blocks(own) for c, own in run.network.received.items()}
        before = set(drawn[:-1][-1:])
        if len(drawn) < 4:
            assert blocks["b"] == sorted(before)
        else:
            assert blocks == {"a": sorted(set(drawn[:-1])), "b": sorted(before)}
    assert len(set(drawn[:-1])) > 1
    for client in ("a", "b"):
        own = run.network.trained[client]
        assert changed(own, run.trained).isdisjoint(
            n for n in own if f".layers.{int(drawn[-1][-4:])}." not in n
        )


def test_bytes_are_those_of_the_blocks(dense: Callable[..., Dense]) -> None:
    run = dense(settings(layers=1, always=["norm"]))
    one = OF_BLOCK + 32
    first, second = run.step("a"), run.step("a")
    marks = BLOCKS + 2 + 8  # a byte for each unit, and the run's seed
    assert (first.traffic.up, first.traffic.down) == (4 * one, marks)
    assert (second.traffic.up, second.traffic.down) == (4 * one, 4 * one + marks)
    assert (first.cost, second.cost) == (Cost(4 * one, marks), Cost(4 * one, 4 * one + marks))


def test_clients_evaluate_the_servers_model(dense: Callable[..., Dense]) -> None:
    run = dense(settings(layers=1))
    run.step("a")
    scores = evaluate_clients(run.call(), run.network)
    assert scores
    assert not changed(run.model.read(), run.trained)


def test_a_start_that_clients_cannot_make_is_sent(tmp_path: Path) -> None:
    """Factors of another origin than the run's seed, as `start` may give."""
    model = tiny.lora_model("llama", blocks=2)
    lora = LoraSpec(4, 8.0)
    for seed, sent in ((seeds.derive(7, "init"), False), (5, True)):
        state = Lisa().init(model.init(lora, seed), 7)
        cached = Lisa().broadcast(state).cached
        assert bool(cached) == sent
        assert not sent or tiny.same(
            {n: t for own in cached.values() for n, t in own.items()}, model.init(lora, seed)
        )


# Artefacts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_loaded_by_transformers_with_the_servers_logits(
    dense: Callable[..., Dense], tmp_path: Path, dtype: torch.dtype
) -> None:
    """Tensors that no round has trained have the bits of the base; training is of fp32 values."""
    config = settings(layers=1, choose="suffix", always=[])
    base = tiny.base("llama", BLOCKS)
    for parameter in base.model.parameters():  # a buffer stays in fp32, as where one is loaded
        parameter.data = parameter.data.to(dtype)
    plain = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    run = dense(config)
    run.model = DenseModel(base, "full")
    run.network = Seen(Worker(config, run.model, tiny.data("llama"), Memory(tmp_path / "m")))
    run.state = run.federation.strategy.init(run.model.init(SPEC, 0), 0)
    run.step()
    adapter = run.federation.strategy.adapter(run.state)
    assert all(tensor.dtype == torch.float32 for tensor in adapter.trained.values())
    run.model.save(tmp_path / "model", adapter, SPEC)
    wanted = tiny.logits(run.model.model)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(tiny.logits(other), wanted, rtol=0, atol=1e-6)
    found = dict(other.named_parameters())
    assert all(p.dtype == dtype for p in found.values())
    moved = {n for n, p in found.items() if not torch.equal(p, plain[n])}
    assert moved
    assert all(".layers.2." in name for name in moved)
