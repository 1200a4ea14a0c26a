"""`corolla check`: proofs on effective model weights that a strategy does what it declares.

Every strategy runs real rounds (wire format, gate, aggregator, trainer) on tiny random models that
cover what goes wrong in practice: grouped-query attention and tied embeddings (Llama), Conv1D
(GPT-2), a trained head (BERT classifier), mixed ranks and alphas, rank stabilisation. What a
client trained is read from its model by peft's factors and scaling, never from what it sent. A
composition root: it brings server and client together.
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from corolla import seeds
from corolla.client.training.worker import Worker
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.data.federated import FederatedData
from corolla.data.partition import Split
from corolla.data.rows import Example
from corolla.directions import seedlog
from corolla.interfaces import Observed, Strategy
from corolla.models import adapter_files
from corolla.models.lora import LoraModel
from corolla.models.pretrained import Base
from corolla.server.rounds.federation import Federation, Held, Network
from corolla.server.rounds.round import RoundResult, run_round
from corolla.server.rounds.tasks import accepted_only
from corolla.storage.memory import Memory
from corolla.strategies import registry
from corolla.tensors import factors, tree
from corolla.types import Params, Payload
from corolla.wire import messages
from corolla.wire.messages import unpack_reply
from corolla.wire.packet import Packet

EXACT = 1e-6
"""Largest relative error of effective weights, in fp32."""
LOGITS = 1e-5
"""Largest difference of logits between the server's model and the reloaded adapter."""

_VOCABULARY = 96
_CLIENTS = {"ada": 5, "ben": 11, "cyd": 8, "dot": 3}
"""Client → examples: unequal, so that a forgotten weight shows."""


@dataclass(frozen=True)
class Finding:
    """One proof on one model: what was measured, and the largest value that passes."""

    check: str
    model: str
    measured: float
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.measured <= self.limit


@dataclass(frozen=True)
class Result:
    """All findings of one strategy."""

    strategy: str
    aggregates: str
    findings: Sequence[Finding] = field(default_factory=list)
    claims: bool = True
    """Whether what it aggregates was checked."""

    @property
    def passed(self) -> bool:
        """Whether there are findings and all passed."""
        return bool(self.findings) and all(finding.passed for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Everything, for --json."""
        found = [{**asdict(finding), "passed": finding.passed} for finding in self.findings]
        return {**asdict(self), "passed": self.passed, "findings": found}


def conform(
    names: Sequence[str],
    say: Callable[[str], None] = lambda text: None,
    rounds: int = 3,
    models: Sequence[str] | None = None,
) -> list[Result]:
    """Check strategies by name or module:Class, on all probe models or those named.

    Raises ConfigError for an unknown strategy. A strategy that raises fails; it does not stop
    the others.
    """
    classes = {name: registry.find(name) for name in names}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would mostly wait for each other on models as small
    try:
        return [_result(name, cls, say, rounds, models) for name, cls in classes.items()]
    finally:
        torch.set_num_threads(threads)


def _result(
    name: str,
    cls: type[Strategy],
    say: Callable[[str], None],
    rounds: int,
    models: Sequence[str] | None,
) -> Result:
    findings: list[Finding] = []
    for kind in models or _MODELS:
        say(f"{name} on {kind}")
        with torch.random.fork_rng(devices=[]):
            findings += _on_model(name, kind, cls.mixed_ranks, rounds)
    claims = cls.aggregates != "other" or hasattr(cls, "expected")
    return Result(name, cls.aggregates, findings, claims)


def print_findings(console: Console, results: Sequence[Result]) -> None:
    """A table: checks down, models across."""
    for result in results:
        columns = list(dict.fromkeys(finding.model for finding in result.findings))
        verdict = "[green]passed[/]" if result.passed else "[red]FAILED[/]"
        claim = f"mean of {result.aggregates}"
        if result.aggregates == "other":
            claim = "what it says to expect"
            if not result.claims:
                claim = "[yellow]it claims no mean, so none was checked[/]"
        title = f"{result.strategy}: {verdict} ({claim})"
        table = Table("check", *columns, "limit", title=title, title_justify="left")
        for check in dict.fromkeys(finding.check for finding in result.findings):
            row = {f.model: f for f in result.findings if f.check == check}
            cells = [_cell(row[model]) if model in row else "" for model in columns]
            table.add_row(check, *cells, f"{next(iter(row.values())).limit:.0e}")
        console.print(table)
        for finding in result.findings:
            if finding.note:
                colour = "dim" if finding.passed else "red"
                console.print(f"  {finding.check}, {finding.model}: {finding.note}", style=colour)


def _cell(finding: Finding) -> str:
    return f"[{'green' if finding.passed else 'red'}]{finding.measured:.1e}[/]"


def _on_model(name: str, kind: str, mixed: bool, rounds: int) -> Iterator[Finding]:
    try:
        yield from _Probe(name, kind, mixed).findings(rounds)
    except Exception as error:  # noqa: BLE001 - whatever a strategy raises is its failure
        yield Finding("runs", kind, 1.0, 0.0, f"{type(error).__name__}: {error}")


class _Probe:
    """One strategy on one tiny model."""

    def __init__(self, name: str, kind: str, mixed: bool) -> None:
        self.name, self.kind = name, kind
        spec: dict[str, Any] = {"rank": 4, "alpha": 8.0, "rslora": kind == "gpt2"}
        if mixed:
            spec |= {"ranks": [4, 8, 16], "alphas": [8.0, 4.0, 64.0]}
        cls = registry.find(name)
        trainers, optimizer = cls.trainers, registry.traits(cls).optimizers[0]
        if len(trainers) > 1:
            spec["classes"] = {trainer: {"trainer": trainer, "lr": 1e-2} for trainer in trainers}
        self.config = RunConfig(
            strategy=name,
            cohort=3,
            rounds=10,
            optimizer=optimizer,
            lr=0.3 if optimizer == "sgd" else 1e-2,
            local_steps=3,
            batch_size=4,
            **spec,
        )
        self.labels = ["no", "perhaps", "yes"] if kind == "bert" else []
        self.data = _data(self.labels)
        self.strategy = build_strategy(self.config)

    def findings(self, rounds: int) -> Iterator[Finding]:
        """Run rounds and compare each with what the clients' models say."""
        with tempfile.TemporaryDirectory() as scratch:
            network = self._network(Path(scratch) / "a")
            model = network.model
            federation = _federation(self.config, self.strategy, model, self.data)
            state = self._fresh(network)
            held: Held = {}
            worst, gap, miscounted = 0.0, 0.0, 0
            observed: list[Observed] = []
            for round in range(1, rounds + 1):
                before = state, held
                kept = Path(scratch) / f"kept-{round}"  # what devices keep, as it was before
                shutil.copytree(network.worker.memory.folder, kept)
                result = run_round(federation, state, held, round, network)
                observed.append(self._observed(federation, state, result, network))
                state, held = result.state, result.held
                error, inexact = self._error(model, network, result, observed)
                worst, gap = max(worst, error), max(gap, inexact)
                # Three steps of four: every client sees each of its examples at least once.
                miscounted += sum(_CLIENTS[c] != n for c, n in result.num_examples.items())
            yield self._mean(worst, gap)
            yield Finding("weights = examples", self.kind, float(miscounted), 0.0)
            again = self._network(kept, reverse=True)
            yield self._leak(federation, before, rounds, network, again)
            yield from self._grouping(federation, network)
            if self.strategy.aggregates != "other":
                yield self._single(federation, model, network)
            yield from self._bytes(federation, result, rounds, network)
            yield self._reload(model, state, Path(scratch) / "adapter")

    def _network(self, folder: Path, reverse: bool = False) -> "_Recorder":
        model = LoraModel(_base(self.kind, len(self.labels)))
        folder.mkdir(exist_ok=True)
        worker = Worker(self.config, model, self.data, Memory(folder))
        return _Recorder(worker, model, reverse)

    def _error(
        self,
        model: LoraModel,
        network: "_Recorder",
        result: RoundResult,
        observed: Sequence[Observed],
    ) -> tuple[float, float]:
        """(error against what the strategy declares, distance from the exact weighted mean)."""
        p = _weights(result.num_examples)
        ideal = _mean({c: network.deltas[c] for c in p}, p)
        model.show(self.strategy.adapter(result.state), self.config.lora)
        got = model.deltas()
        gap = _relative(got, ideal)
        if self.strategy.aggregates == "other":
            return self._from_expected(model, result, observed), gap
        if self.strategy.aggregates == "weights":
            return gap, gap
        means = _mean({c: network.trained[c] for c in p}, p)
        scaling = self.config.lora.scaling
        expected = {m: scaling * factors.product(means, m) for m in factors.modules(means)}
        expected |= {
            n: t for n, t in ideal.items() if n not in expected
        }  # the head is a mean itself
        covariance = self._covariance(p, network, means)
        off = _relative({m: got[m] + covariance[m] for m in covariance}, ideal)
        return max(_relative(got, expected), off), gap

    def _observed(
        self, federation: Federation, state: Payload, result: RoundResult, network: "_Recorder"
    ) -> Observed:
        """A round as it happened. `start` is the global adapter in one set of tensors."""
        spec, model = self.config.lora, network.model
        adapter = self.strategy.adapter(state)
        trained = {c: network.trained[c] for c in result.num_examples}
        zero = model.init(spec, 0)
        start = {**zero, **adapter.trained}
        if adapter.frozen:
            start |= factors.bake(adapter.frozen[0], 1 / spec.scaling)
        loras = {client: federation.lora(client) for client in trained}
        return Observed(spec, start, trained, _weights(result.num_examples), loras)

    def _from_expected(
        self, model: LoraModel, result: RoundResult, observed: Sequence[Observed]
    ) -> float:
        """How far the global adapter is from what the strategy says to expect; 0 if it says not."""
        expect = getattr(self.strategy, "expected", None)
        if expect is None:
            return 0.0 if all(tree.finite(own) for own in result.state.values()) else math.inf
        wanted: Params = expect(observed)
        if registry.traits(self.strategy).personal:
            own = self.strategy.adapter(result.state).trained
            return _relative({n: own[n] for n in wanted}, wanted)
        dense = {
            m: self.config.lora.scaling * factors.product(wanted, m)
            for m in factors.modules(wanted)
        }
        start = model.init(self.config.lora, 0)
        heads = factors.select(wanted, factors.is_head)
        dense |= {n: t.double() - start[n].double() for n, t in heads.items()}
        model.show(self.strategy.adapter(result.state), self.config.lora)
        got = model.deltas()
        return _relative({n: got[n] for n in dense}, dense)

    def _covariance(
        self, p: Mapping[str, float], network: "_Recorder", means: Params
    ) -> dict[str, torch.Tensor]:
        """S Σ p_m (B_m - B̄)(A_m - Ā): by which averaging factors misses the mean of products."""
        scaling = self.config.lora.scaling
        centred = {c: tree.sub(network.trained[c], means) for c in p}
        return {
            m: scaling
            * torch.stack([w * factors.product(centred[c], m) for c, w in p.items()]).sum(0)
            for m in factors.modules(means)
        }

    def _mean(self, worst: float, gap: float) -> Finding:
        limit = EXACT + getattr(self.strategy, "rounding", 0.0)
        if self.strategy.aggregates == "weights":
            return Finding("mean of effective weights", self.kind, worst, limit)
        if self.strategy.aggregates == "factors":
            note = (
                f"{gap:.1%} off the mean of effective weights = the weighted covariance of A and B"
            )
            return Finding("mean of factors", self.kind, worst, limit, note)
        note = f"{gap:.1%} off the mean of effective weights"
        if hasattr(self.strategy, "expected"):
            return Finding("as expected", self.kind, worst, limit, note)
        note += " (no claim to check)"
        return Finding("aggregate is finite", self.kind, worst, 0.0, note)

    def _leak(
        self,
        federation: Federation,
        before: tuple[Payload, Held],
        round: int,
        network: "_Recorder",
        again: "_Recorder",
    ) -> Finding:
        """The last round again, on another model, clients in reverse order: the same bytes."""
        accepted = {client: accepted_only(before[1], client) for client in before[1]}
        run_round(federation, before[0], accepted, round, again)
        differ = [c for c, sent in network.sent.items() if again.sent.get(c) != sent]
        note = (
            f"{', '.join(differ)}: update depends on which client trained before" if differ else ""
        )
        return Finding("no leak between clients", self.kind, float(len(differ)), 0.0, note)

    def _grouping(self, federation: Federation, network: "_Recorder") -> Iterator[Finding]:
        """Merging partial aggregates gives what adding one by one gives, in effective weights."""
        updates = {c: messages.content(unpack_reply(s, 1 << 40)) for c, s in network.sent.items()}
        flat = self._applied(list(updates.items()), network)
        left, right = self.strategy.aggregator(), self.strategy.aggregator()
        for index, (client, update) in enumerate(updates.items()):
            (left if index == 0 else right).add(update, network.examples[client])
        left.merge(right)
        merged, _ = self.strategy.apply(self._fresh(network), left.finalise())
        yield self._same("grouping", network, merged, flat)
        backwards = self._applied(list(reversed(updates.items())), network)
        yield self._same("order", network, backwards, flat)

    def _applied(self, updates: Sequence[tuple[str, Payload]], network: "_Recorder") -> Payload:
        aggregator = self.strategy.aggregator()
        for client, update in updates:
            aggregator.add(update, network.examples[client])
        return self.strategy.apply(self._fresh(network), aggregator.finalise())[0]

    def _fresh(self, network: "_Recorder") -> Payload:
        model = network.model
        return self.strategy.init(model.init(self.config.lora, seeds.derive(0, "init")), 0)

    def _same(self, check: str, network: "_Recorder", one: Payload, other: Payload) -> Finding:
        model = network.model
        found = []
        for state in (one, other):
            model.show(self.strategy.adapter(state), self.config.lora)
            found.append(model.deltas())
        return Finding(check, self.kind, _relative(*found), EXACT)

    def _single(self, federation: Federation, model: LoraModel, network: "_Recorder") -> Finding:
        """With a cohort of one, the global model is that client's model."""
        alone = self.config.model_copy(update={"cohort": 1})
        state = self._fresh(network)
        result = run_round(replace(federation, config=alone), state, {}, 1, network)
        (client,) = result.num_examples
        model.show(self.strategy.adapter(result.state), self.config.lora)
        error = _relative(model.deltas(), network.deltas[client])
        limit = EXACT + getattr(self.strategy, "rounding", 0.0)
        return Finding("one client", self.kind, error, limit)

    def _bytes(
        self,
        federation: Federation,
        result: RoundResult,
        round: int,
        network: "_Recorder",
    ) -> Iterator[Finding]:
        """Bytes sent equal the paper's formula; one's own update looks as declared."""
        members = list(result.num_examples)
        costs = self.strategy.cost([federation.size(client, round) for client in members])
        formula = sum(cost.up for cost in costs)
        off = abs(result.bytes_up - formula)
        if any(cost.at_most for cost in costs):
            off = max(0, result.bytes_up - formula)
        yield Finding(
            "bytes up = formula", self.kind, float(off), 0.0, f"{formula} bytes" if off else ""
        )
        everyone = self.config.model_copy(update={"cohort": len(_CLIENTS)})
        full = replace(federation, config=everyone)
        state: Payload = self._fresh(network)
        held: Held = {}
        for number in (1, 2):  # in the second round of full participation everything cached is held
            done = run_round(full, state, held, number, network)
            state, held = done.state, done.held
        costs = self.strategy.cost([full.size(client, 2) for client in done.num_examples])
        formula = sum(cost.down for cost in costs)
        off = abs(done.bytes_down - formula)
        if any(cost.at_most for cost in costs):
            off = max(0, done.bytes_down - formula)
        yield Finding(
            "bytes down = formula", self.kind, float(off), 0.0, f"{formula} bytes" if off else ""
        )

    def _reload(self, model: LoraModel, state: Payload, folder: Path) -> Finding:
        """The saved adapter, loaded by plain peft, gives the server's logits."""
        adapter = self.strategy.adapter(state)
        model.save(folder, adapter, self.config.lora)
        model.show(adapter, self.config.lora)
        ids = torch.arange(3, 3 + 24).reshape(2, 12)
        with torch.no_grad():
            ours = model.model(input_ids=ids).logits
            theirs = adapter_files.load_adapter(model.detach(), folder)(input_ids=ids).logits
        return Finding("saved and reloaded", self.kind, float((ours - theirs).abs().max()), LOGITS)


class _Recorder(Network):
    """A network of clients in this process that remembers what each model was after training."""

    def __init__(self, worker: Worker, model: LoraModel, reverse: bool = False) -> None:
        self.worker, self.model, self.reverse = worker, model, reverse
        self.deltas: dict[str, Params] = {}
        self.trained: dict[str, Params] = {}
        self.sent: dict[str, Packet] = {}
        self.examples: dict[str, int] = {}

    def clients(self) -> Mapping[str, int]:
        return dict(_CLIENTS)

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        self.sent = {}
        for client in sorted(packets, reverse=self.reverse):
            answer = self.worker(client, packets[client])
            self.deltas[client] = self.model.deltas()
            self.trained[client] = self.model.read()
            self.sent[client] = answer
            self.examples[client] = unpack_reply(answer, 1 << 40).num_examples
            yield client, answer


def _federation(
    config: RunConfig, strategy: Strategy, model: LoraModel, data: FederatedData
) -> Federation:
    clients = {client: len(split.train) for client, split in data.clients.items()}
    first = strategy.init(model.init(config.lora, seeds.derive(config.seed, "init")), config.seed)
    origin = seedlog.origin(model.base.fingerprint, first)
    fresh = cache(lambda spec: model.init(spec, 0))
    return Federation("0" * 32, config, strategy, clients, fresh, origin)


def _weights(examples: Mapping[str, int]) -> dict[str, float]:
    total = sum(examples.values())
    return {client: n / total for client, n in examples.items()}


def _mean(values: Mapping[str, Params], p: Mapping[str, float]) -> dict[str, torch.Tensor]:
    names = next(iter(values.values()))
    return {n: torch.stack([w * values[c][n].double() for c, w in p.items()]).sum(0) for n in names}


def _relative(found: Params, wanted: Params) -> float:
    """Joint Frobenius norm of the difference over that of `wanted`, over the names of `found`."""
    off = tree.norm({n: found[n].double() - wanted[n].double() for n in found})
    return off / max(tree.norm({n: wanted[n] for n in found}), 1e-30)


def _data(labels: Sequence[str]) -> FederatedData:
    """Random words, different for each client, the same on every machine."""
    generator = seeds.generator(0, "conformance")
    clients = {}
    for index, (client, number) in enumerate(_CLIENTS.items()):
        words = torch.randint(20 * index, 20 * index + 30, (number, 9), generator=generator)
        rows = [
            Example(" ".join(f"w{w}" for w in row), label=labels[row[0] % 3] if labels else None)
            for row in words.tolist()
        ]
        clients[client] = Split(rows, rows[:2])
    return FederatedData("conformance", clients, [], list(labels), "")


def _tokenizer() -> transformers.PreTrainedTokenizerBase:
    words = {"<eos>": 0, **{f"w{i}": i + 1 for i in range(_VOCABULARY - 1)}}
    raw = Tokenizer(WordLevel(words, unk_token="<eos>"))  # noqa: S106
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<eos>",  # noqa: S106
        pad_token="<eos>",  # noqa: S106
    )


def _base(kind: str, labels: int) -> Base:
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)  # transformers draws initial weights from the global state only
        model = _MODELS[kind](labels).eval()
    model.requires_grad_(False)
    return Base(model, _tokenizer(), "classify" if labels else "causal", kind, kind)


def _llama(labels: int) -> transformers.PreTrainedModel:
    """Grouped-query attention (k and v are narrower than q), tied embeddings, no biases."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def _gpt2(labels: int) -> transformers.PreTrainedModel:
    """Conv1D layers, whose weight is (in, out); dropout is on, as GPT-2 ships."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=_VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def _bert(labels: int) -> transformers.PreTrainedModel:
    """A classifier: its head is trained and aggregated as it is."""
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=_VOCABULARY,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            num_labels=labels,
            pad_token_id=0,
        )
    )


_MODELS: dict[str, Callable[[int], transformers.PreTrainedModel]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "bert": _bert,
}
