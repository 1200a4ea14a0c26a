"""`corolla audit`: try to refute a claim of differential privacy on the code that makes it.

A composition root, as simulate: it brings server and clients together on this machine. What is
found is a lower bound on epsilon, or how well an attack does; neither is a measurement of epsilon.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

import torch

from corolla.commands.audit import bound, canaries
from corolla.commands.audit.done import DoneRun, load, refuse_devices
from corolla.commands.audit.membership import Attack, attack
from corolla.commands.audit.watched import ONE_RUN, Watched, run_here, run_with
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, Encoder, collate
from corolla.data.partition import Split
from corolla.data.rows import Example, unit_of
from corolla.errors import ConfigError
from corolla.evaluation.scoring import log_likelihoods, loss_sum
from corolla.host.files import scratch_folder
from corolla.interfaces import Choosing, Strategy
from corolla.models.trainable import Differentiable, Trainable
from corolla.privacy.guarantee import Guarantee
from corolla.server.rounds.federation import Federation
from corolla.server.runs.setup import Setup
from corolla.types import Payload

Unit = Literal["example", "client"]

CONFIDENCE = 0.95
"""Joint confidence of all bounds of one audit."""

LOUDNESS = 10.0
"""Norm of a canary's update, as a multiple of the clip: what clips it is audited too."""

_FEW = 8
"""Number of held-out examples where nobody looks at the losses of a run."""


@dataclass(frozen=True)
class Proof:
    """The proof by one way to score canaries: a lower bound."""

    score: str
    right: int
    """Number of guesses that were right."""
    lower_bound: float


@dataclass(frozen=True)
class Audit:
    """The outcome of an audit in one run. Its lower bound holds with `confidence`."""

    unit: Unit
    claimed: Guarantee | None
    """None: nothing is claimed (epsilon ∞)."""
    canaries: int
    included: int
    guesses: int
    delta: float
    rounds: int
    proofs: Sequence[Proof]
    ceiling: float
    """The largest lower bound that so many guesses can prove, all of them right."""
    confidence: float = CONFIDENCE
    of: DoneRun | None = None
    """The run whose settings were audited; None: settings that were given."""

    @property
    def lower_bound(self) -> float:
        """The best of what was proven."""
        return max(proof.lower_bound for proof in self.proofs)

    @property
    def refuted(self) -> bool:
        """True where more leaks than is claimed."""
        return self.claimed is not None and self.lower_bound > self.claimed.epsilon

    def to_json(self) -> dict[str, Any]:
        claimed = self.claimed.to_json() if self.claimed else None
        return {
            **asdict(replace(self, claimed=None, of=None)),
            "of": self.of and self.of.to_json(),
            "claimed": claimed,
            "lower_bound": self.lower_bound,
            "refuted": self.refuted,
        }


@dataclass(frozen=True)
class Membership:
    """An attack on a model trained as asked, and on one trained without differential privacy."""

    claimed: Guarantee | None
    attacks: Mapping[str, Attack]
    """By how the model was trained: `dp=example` or `dp=client`, and `dp=none`."""
    losses: Mapping[str, float]
    """The held-out loss of the same models, and that of the `base` model."""
    of: DoneRun | None = None
    """The run whose settings were audited; None: settings that were given."""

    def to_json(self) -> dict[str, Any]:
        return {
            "of": self.of and self.of.to_json(),
            "claimed": self.claimed.to_json() if self.claimed else None,
            "attacks": {name: asdict(found) for name, found in self.attacks.items()},
            "losses": dict(self.losses),
        }


def audit(
    config: RunConfig,
    count: int = 1000,
    guesses: int | None = None,
    unit: Unit | None = None,
    of: DoneRun | None = None,
) -> Audit:
    """Toss a coin for each canary, run the federation, guess the coins from what it released.

    `unit` is what canaries are (default: what config.dp protects, else clients); `guesses` of how
    many (default: a fifth of them). `of`: a run that had this config. Raises ConfigError.
    """
    guesses = count // 5 if guesses is None else guesses
    unit = unit or ("example" if config.dp == "example" else "client")
    if not 1 <= guesses <= count:
        raise ConfigError(f"{guesses} guesses on {count} canaries: expected 1 to {count}")
    if config.dp not in ("none", unit):
        raise ConfigError(f"dp={config.dp} protects each {config.dp}: canaries cannot be {unit}s")
    included = canaries.coins(count, config.seed)
    run = _audited_clients if unit == "client" else _audited_examples
    scores, ran = run(config, included, of)
    share = 1 - (1 - CONFIDENCE) / len(scores)  # all of them hold together (Bonferroni)
    proofs = []
    for name, values in scores.items():
        right = bound.right_guesses(values, included, guesses)
        proven = bound.lower_bound(count, guesses, right, config.delta, share)
        proofs.append(Proof(name, right, proven))
    most = bound.ceiling(count, guesses, config.delta, share)
    return Audit(
        unit=unit,
        claimed=ran.claim,
        canaries=count,
        included=sum(included),
        guesses=guesses,
        delta=config.delta,
        rounds=len(ran.steps),
        proofs=proofs,
        ceiling=most,
        of=of,
    )


def membership(config: RunConfig, of: DoneRun | None = None) -> Membership:
    """Train as asked and, with differential privacy, once more without: who can be recognised?

    Members are the training examples of the clients that took part, the others are held-out
    examples of the same clients; an example is scored by how much lower its loss has become.
    """
    refuse_devices(of)
    attacks: dict[str, Attack] = {}
    losses: dict[str, float] = {}
    claimed: Guarantee | None = None
    for dp in dict.fromkeys((config.dp, "none")):
        asked = config if dp == config.dp else _without_dp(config)
        loaded = load(asked, of)
        run = run_here(asked, loaded)
        attacks[f"dp={dp}"] = _attacked(asked, loaded, run)
        losses |= {"base": run.base, f"dp={dp}": run.final}
        if dp != "none":
            claimed = run.claim
    return Membership(claimed, attacks, losses, of)


def _audited_clients(
    config: RunConfig, included: Sequence[bool], of: DoneRun | None
) -> tuple[dict[str, list[float]], Watched]:
    """Scores of canary clients."""
    clients = canaries.names(len(included))
    config = config.model_copy(update={"eval_examples": _FEW, **ONE_RUN})
    loaded = load(config, of)
    population = of.clients if of else len(loaded.data.clients)
    cohort = _cohort(config, population, len(clients))
    config = config.model_copy(update={"clients": None, "cohort": cohort})
    strategy = build_strategy(config)
    if isinstance(strategy, Choosing):
        raise ConfigError(
            f"strategy {config.strategy} trains other tensors in each round, which canary clients "
            f"do not follow: audit examples (--unit example), or another strategy"
        )
    fresh = cache(lambda spec: loaded.model.init(spec, 0))
    each = 2 * config.local_steps * config.batch_size  # more than can be used in a round
    federation = Federation("0" * 32, config, strategy, dict.fromkeys(clients, each), fresh)
    coins = dict(zip(clients, included, strict=True))
    loud = min(LOUDNESS * config.clip, config.max_norm or math.inf)
    network = canaries.CanaryClients(federation, coins, loud, config.seed)
    with scratch_folder("audit") as scratch:
        run = run_with(config, strategy, network, loaded, scratch / "run")
    scores = dict.fromkeys(clients, 0.0)
    for round, before, after in run.steps:
        for client in run.cohorts.get(round, ()):
            update = network.update(client, round)
            scores[client] += canaries.traced(strategy, before, after, update)
    return {"update · canary": list(scores.values())}, run


def _cohort(config: RunConfig, population: int, count: int) -> int:
    """All canaries, or as many as the rules allow; with Poisson sampling the same part as asked."""
    cohort = count // config.separation
    if config.participations:
        cohort = min(cohort, count * config.participations // config.rounds)
    if config.dp_sampling == "poisson":
        cohort = count * min(config.cohort or 8, population) // population
    return max(1, cohort)


def _audited_examples(
    config: RunConfig, included: Sequence[bool], of: DoneRun | None
) -> tuple[dict[str, list[float]], Watched]:
    """Scores of canary examples in one client's data."""
    refuse_devices(of)
    config = config.model_copy(update={"cohort": 1, "eval_examples": _FEW, **ONE_RUN})
    loaded = load(config, of)
    config = loaded.config
    name, split = next(iter(loaded.data.clients.items()))
    tokenizer, labels = loaded.model.base.tokenizer, loaded.data.labels
    made = canaries.examples(tokenizer, labels, len(included), config.max_length, config.seed)
    if unit_of(split.train) == "user":  # each canary is a user of its own, with one row
        made = [replace(example, user=f"canary {i}") for i, example in enumerate(made)]
    there = [example for example, coin in zip(made, included, strict=True) if coin]
    own = Split([*split.train, *there], split.eval)
    run = run_here(config, replace(loaded, data=replace(loaded.data, clients={name: own})))
    model = loaded.model
    sequences = _encoded(config, model, labels, made)
    before, after = (
        _losses(config, loaded, state, sequences) for state in (run.steps[0][1], run.steps[-1][2])
    )
    scores = {"fall of the loss": [b - a for b, a in zip(before, after, strict=True)]}
    turns = canaries.turns(loaded.strategy)
    if isinstance(model, Differentiable) and not turns:
        scores["step · gradient"] = _along(config, loaded.strategy, model, run, sequences)
    return scores, run


def _encoded(
    config: RunConfig, model: Trainable, labels: Sequence[str], examples: Sequence[Example]
) -> list[list[Encoded]]:
    """The sequences of each example, as a worker makes them."""
    encoder = Encoder.of(config, model.base.tokenizer, labels)
    return [encoder(example) for example in examples]


def _losses(
    config: RunConfig, loaded: Setup, state: Payload, examples: Sequence[Sequence[Encoded]]
) -> list[float]:
    """The loss of each example, in nats per target, under a released state."""
    model = loaded.model
    model.show(loaded.strategy.adapter(state), config.lora)
    flat = [sequence for own in examples for sequence in own]
    found = iter(log_likelihoods(model.model, flat, model.base.pad_id, model.device))
    sums = [(-sum(next(found) for _ in own), sum(s.targets for s in own)) for own in examples]
    return [total / max(1, targets) for total, targets in sums]


def _along(
    config: RunConfig,
    strategy: Strategy,
    model: Differentiable,
    run: Watched,
    examples: Sequence[Sequence[Encoded]],
) -> list[float]:
    """How far all steps of the run went down the gradient of each example, of norm 1."""
    scores = [0.0] * len(examples)
    for _, before, after in run.steps:
        model.show(strategy.adapter(after), config.lora)
        there = model.read()
        model.show(strategy.adapter(before), config.lora)
        here = dict(model.parameters())
        moved = [(there[name] - own.detach().cpu()).double() for name, own in here.items()]
        for parameter in here.values():
            parameter.requires_grad_(True)
        for i, own in enumerate(examples):
            batch = collate(own, model.base.pad_id, model.device)
            loss = loss_sum(model.model, batch)
            gradient = torch.autograd.grad(loss, list(here.values()), materialize_grads=True)
            down = [-g.cpu().double() for g in gradient]
            norm = math.sqrt(math.fsum(float(g.square().sum()) for g in down))
            dot = math.fsum(float((g * m).sum()) for g, m in zip(down, moved, strict=True))
            scores[i] += dot / max(1e-30, norm)
        for parameter in here.values():
            parameter.requires_grad_(False)
    return scores


def _attacked(config: RunConfig, loaded: Setup, run: Watched) -> Attack:
    """The attack on the clients that a run asked."""
    took = {client for cohort in run.cohorts.values() for client in cohort}
    splits = [loaded.data.clients[client] for client in sorted(took)]
    members = [example for split in splits for example in split.train]
    others = [example for split in splits for example in split.eval]
    others += [e for e in loaded.data.heldout if e.client in took]
    first, last = run.steps[0][1], run.steps[-1][2]

    def fallen(examples: Sequence[Example]) -> list[float]:
        encoded = _encoded(config, loaded.model, loaded.data.labels, examples)
        told = [own for own in encoded if own]
        before, after = (_losses(config, loaded, s, told) for s in (first, last))
        return [b - a for b, a in zip(before, after, strict=True)]

    return attack(fallen(members), fallen(others))


def _without_dp(config: RunConfig) -> RunConfig:
    """The same run without any noise or clip: what belongs to dp is as it is by default."""
    ours = ("dp", "epsilon", "noise_multiplier", "clip_quantile", "dp_sampling", "dp_mechanism")
    return config.model_copy(
        update={
            key: RunConfig.model_fields[key].default
            for key in (*ours, "participations", "separation")
        }
    )
