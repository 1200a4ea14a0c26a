"""`corolla audit` on tiny models, through the code of a run: what it says, and what it catches."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.commands.audit import canaries, done, run, watched
from corolla.commands.audit.run import Audit, Proof
from corolla.commands.simulate.in_process import simulate
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.privacy import accounting, guarantee, randomness
from corolla.privacy.accounting import Release
from corolla.privacy.client_level import ClientLevel
from corolla.privacy.clipped_sum import ClippedSum
from corolla.privacy.example_level import ExampleLevel
from corolla.server.rounds.federation import Federation
from corolla.server.runs import account
from corolla.strategies.listing import registry
from corolla.types import LoraSpec, Payload
from tests.strategies import tiny

WORDS = tiny.VOCABULARY - 1


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder and a federation of two clients in data.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    base = tiny.base("llama")
    base.model.save_pretrained(folder / "model")
    base.tokenizer.save_pretrained(folder / "model")
    rows = [
        {"client_id": client, "text": " ".join(f"w{(7 * i + 3 * j) % WORDS}" for j in range(9))}
        for client, count in (("ada", 8), ("bob", 8))
        for i in range(count)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


Settings = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def seeded_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of dp follows from a seed: at 95 % one of twenty right audits refutes by chance."""
    generator = np.random.default_rng(5)
    monkeypatch.setattr("os.urandom", generator.bytes)


@pytest.fixture
def settings(home: Path) -> Settings:
    """A config on the tiny federation."""

    def make(**changes: Any) -> RunConfig:
        usual: dict[str, Any] = {
            "model": str(home / "model"),
            "data": str(home / "data.jsonl"),
            "rounds": 1,
            "rank": 4,
            "max_length": 24,
            "threads": 1,
        }
        return RunConfig(**{**usual, **changes})

    return make


CLIENT = {"dp": "client", "epsilon": 0.8}


# --- canary clients -------------------------------------------------------------------------------


def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(shape: Sequence[int]) -> Tensor:
        return torch.zeros(tuple(shape), dtype=torch.float64)

    monkeypatch.setattr(account, "ClientLevel", partial(ClientLevel, normal=nothing))


def no_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "clip_factors", lambda norms, clip: torch.ones_like(norms))


def weight_of_five(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ClippedSum.add

    def add(self: ClippedSum, payload: Payload, weight: float) -> None:
        for _ in range(5):
            right(self, payload, weight)

    monkeypatch.setattr(ClippedSum, "add", add)


@pytest.mark.parametrize("sabotage", [no_noise, no_clip, weight_of_five])
def test_a_mechanism_that_is_wrong_is_refuted(
    sabotage: Callable[[pytest.MonkeyPatch], None],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sabotage(monkeypatch)
    found = run.audit(settings(**CLIENT), 240, 80)
    assert found.claimed is not None
    assert found.claimed.epsilon == pytest.approx(0.8, abs=1e-3)
    assert found.lower_bound > 0.8
    assert found.refuted


@pytest.mark.parametrize("seed", range(3))
def test_the_right_mechanism_is_not_refuted(seed: int, settings: Settings) -> None:
    found = run.audit(settings(seed=seed, **CLIENT), 240, 80)
    assert found.claimed is not None
    assert not found.refuted


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("fedavg", {}),
        ("ffa_lora", {}),
        ("fedsvd", {}),
        ("fed_sb", {}),
        ("seed_pool", {"local_steps": 64}),
        ("fedkseed", {"local_steps": 64, "options": {"size": 256}}),
    ],
)
def test_canaries_are_traced_through_every_kind_of_state(
    strategy: str, changes: Mapping[str, Any], settings: Settings
) -> None:
    """Without noise they are told apart: the score reads what the strategy has made of them."""
    found = run.audit(settings(strategy=strategy, **changes), 100, 20, "client")
    assert found.claimed is None
    assert not found.refuted
    assert found.proofs[0].right >= 19


def test_rounds_add_up(settings: Settings) -> None:
    """Each canary takes part in as many rounds as its rules allow, and all of them count."""
    config = settings(rounds=3, participations=2, dp="client", noise_multiplier=0.01)
    found = run.audit(config, 30, 10)
    assert found.rounds == 3
    assert found.claimed is not None
    assert "at most 2 rounds" in found.claimed.how
    assert found.proofs[0].right == 10


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"dp_sampling": "poisson", "cohort": 1}, "Poisson sampling of clients, q = 0.5"),
        ({"dp_mechanism": "banded", "separation": 2}, "noise correlated over 2 rounds"),
        ({"clip_quantile": 0.5}, "no amplification, each client in at most 3 rounds"),
    ],
)
def test_other_mechanisms_are_audited_as_they_run(
    changes: Mapping[str, Any], how: str, settings: Settings
) -> None:
    found = run.audit(settings(rounds=3, **CLIENT, **changes), 60, 20)
    assert found.claimed is not None
    assert how in found.claimed.how
    assert found.rounds == 3
    assert not found.refuted


def test_an_update_is_as_loud_as_asked_and_the_same_again(settings: Settings) -> None:
    for name, options in (("fedavg", {}), ("seed_pool", {"local_steps": 20, "lr": 3e-3})):
        config = settings(strategy=name, **options)
        network = _network(config)
        update = network.update("canary-1", 2)
        alone = canaries.contribution(network.federation.strategy, update)
        norm = math.sqrt(
            sum(float(t.double().square().sum()) for p in alone.values() for t in p.values())
        )
        assert norm == pytest.approx(7.0, rel=2e-3)  # scalars in half precision
        again = network.update("canary-1", 2)
        for group, params in update.items():
            assert all(torch.equal(t, again[group][n]) for n, t in params.items())


def test_what_half_precision_cannot_carry_is_as_loud_as_can_be(settings: Settings) -> None:
    config = settings(strategy="seed_pool", lr=1e-9, local_steps=20)
    scalars = _network(config).update("canary-0", 1)["scalars"]["scalars"]
    assert scalars.dtype == torch.float16
    assert bool(scalars.isfinite().all())
    assert float(scalars.abs().max()) > 3e4


def test_coins_are_fair_and_of_the_seed() -> None:
    tossed = canaries.coins(10_000, 3)
    assert tossed == canaries.coins(10_000, 3)
    assert tossed != canaries.coins(10_000, 4)
    assert abs(sum(tossed) - 5000) < 250


def _network(config: RunConfig) -> canaries.CanaryClients:
    model = tiny.lora_model("llama")
    federation = Federation(
        "0" * 32,
        config,
        registry.create(config.strategy),
        dict.fromkeys(canaries.names(3), 1000),
        lambda spec: model.init(LoraSpec(spec.rank, spec.alpha), 0),
    )
    return canaries.CanaryClients(federation, {}, 7.0, 0)


# --- canary examples ------------------------------------------------------------------------------

EXAMPLES = {"lr": 0.02, "local_steps": 20, "batch_size": 16, "rounds": 2, "schedule": "constant"}


def test_canary_examples_are_recognised_without_noise(settings: Settings) -> None:
    found = run.audit(settings(**EXAMPLES), 60, 30, "example")
    assert {proof.score for proof in found.proofs} == {"fall of the loss", "step · gradient"}
    assert found.unit == "example"
    assert found.lower_bound > 0.5


def test_private_training_of_examples_is_not_refuted(settings: Settings) -> None:
    found = run.audit(settings(dp="example", epsilon=1.0, **EXAMPLES), 60, 30)
    assert found.claimed is not None
    assert found.claimed.unit == "example"
    assert 0.9 < found.claimed.epsilon <= 1.0
    assert not found.refuted


def test_examples_without_noise_or_clip_refute_the_claim(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ExampleLevel.noised

    def noised(self: ExampleLevel, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return right(replace(self, noise_multiplier=0.0), sums)

    monkeypatch.setattr(ExampleLevel, "noised", noised)
    found = run.audit(settings(dp="example", epsilon=0.4, **EXAMPLES), 60, 30)
    assert found.refuted


# --- membership -----------------------------------------------------------------------------------


def test_members_stand_out_where_a_model_is_overfitted(settings: Settings) -> None:
    config = settings(dp="example", epsilon=1.0, cohort=2, **EXAMPLES)
    found = run.membership(config)
    assert list(found.attacks) == ["dp=example", "dp=none"]
    assert found.claimed is not None
    assert found.claimed.unit == "example"
    assert all(own.members == 12 and own.others == 4 for own in found.attacks.values())
    assert found.losses.keys() == {"base", "dp=example", "dp=none"}
    json.dumps(found.to_json())


def test_without_dp_a_model_is_attacked_once(settings: Settings) -> None:
    found = run.membership(settings(cohort=2, local_steps=2, batch_size=4))
    assert list(found.attacks) == ["dp=none"]
    assert found.claimed is None


# --- what is said ---------------------------------------------------------------------------------


def _found(lower_bound: float, claimed: float | None = 1.0) -> Audit:
    claim = guarantee.Guarantee("client", claimed, 1e-5, None, "once") if claimed else None
    proofs = [Proof("a", 10, lower_bound), Proof("b", 9, 0.1)]
    return Audit("client", claim, 20, 11, 10, 1e-5, 1, proofs, 1.2)


def test_refuted_is_when_the_lower_bound_exceeds_the_claim() -> None:
    assert _found(1.01).refuted
    assert not _found(0.99).refuted
    assert not _found(9.0, None).refuted
    assert _found(0.5).to_json()["lower_bound"] == 0.5
    assert _found(0.5, None).to_json()["claimed"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 10, "guesses": 11}, "11 guesses on 10 canaries"),
        ({"count": 10, "guesses": 0}, "0 guesses on 10 canaries"),
        ({"count": 10, "unit": "example"}, "dp=client protects each client"),
    ],
)
def test_what_makes_no_audit_is_refused(
    options: Mapping[str, Any], words: str, settings: Settings
) -> None:
    with pytest.raises(ConfigError, match=words):
        run.audit(settings(**CLIENT), **options)


def test_the_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["audit", "--model", str(home / "model"), "--data", str(home / "data.jsonl")]
    words += "--rounds 1 --rank 4 --set max-length=24 --set threads=1 --canaries 60".split()
    private = [*words, "--dp", "client", "--epsilon", "0.5"]
    said = CliRunner().invoke(app, private)
    assert said.exit_code == 0, said.output
    assert "claimed  epsilon 0.5" in said.output
    assert "lower bound on epsilon" in said.output
    assert "no lower bound is above" in said.output
    assert "measured" not in said.output
    no_noise(monkeypatch)
    said = CliRunner().invoke(app, [*private, "--guesses", "30", "--json"])
    assert said.exit_code == 1, said.output
    told = json.loads(said.output)
    assert told["refuted"]
    assert told["lower_bound"] > told["claimed"]["epsilon"]
    assert (told["canaries"], told["guesses"], told["unit"]) == (60, 30, "client")


def test_canaries_among_users_are_users(home: Path, tmp_path: Path, settings: Settings) -> None:
    """One row each, in a client of four users: 4 and the canaries that are in."""
    rows = [json.loads(line) for line in (home / "data.jsonl").read_text().splitlines()]
    rows = [{**row, "user_id": i % 4, "split": "train"} for i, row in enumerate(rows)]
    rows += [{**rows[0], "split": split} for split in ("validation", "test")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    private = {"dp": "example", "noise_multiplier": 2.0, "delta": 1e-3, "batch_size": 2}
    config = settings(data=str(tmp_path / "data.jsonl"), local_steps=1, **private)
    found = run.audit(config, count=20, guesses=4)
    assert found.claimed is not None
    assert found.claimed.unit == "user"
    wanted = accounting.epsilon([Release(2.0, 2 / (4 + found.included), 1)], 1e-3)
    assert found.claimed.epsilon == pytest.approx(wanted, rel=1e-6)


# --- of a run that has been ----------------------------------------------------------------------


def audited(*words: str) -> tuple[int, str]:
    said = CliRunner().invoke(app, ["audit", *words])
    return said.exit_code, said.output


def ran(folder: Path, config: RunConfig) -> Mapping[str, Any]:
    """A run in `folder`: what its run.json says."""
    simulate(config, folder)
    told: Mapping[str, Any] = json.loads((folder / "run.json").read_text())
    return told


FEW = {"clip": 0.01, "eval_examples": 4, "local_steps": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "ffa_lora", "dp": "client", "epsilon": 0.5, "rounds": 2},
        {"strategy": "fed_sb", "dp": "client", "noise_multiplier": 3.0, "dp_sampling": "poisson"},
        {"dp": "example", "epsilon": 2.0, "delta": 1e-4, "batch_size": 2},
    ],
)
def test_a_run_is_audited_as_it_was(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Every setting of it that its privacy rests on; --json and the table name it."""
    config = settings(cohort=2, **FEW, **changes)
    told = ran(tmp_path / "run", config)
    seen: list[RunConfig] = []
    whole = watched.run_with

    def noted(given: RunConfig, *rest: Any) -> Any:
        seen.append(given)
        return whole(given, *rest)

    monkeypatch.setattr(run, "run_with", noted)
    monkeypatch.setattr(watched, "run_with", noted)
    code, said = audited(str(tmp_path / "run"), "--canaries", "20", "--json")
    assert code == 0, said
    found = json.loads(said)
    assert found["of"] == {"folder": str(tmp_path / "run"), "stated": told["privacy"]["line"]}
    assert (found["unit"], found["rounds"]) == (config.dp, config.rounds)
    (given,) = seen
    ours = {"cohort", "clients", *watched.ONE_RUN, "eval_examples"}
    assert given.model_dump(exclude=ours) == config.model_dump(exclude=ours)
    if config.dp == "client":
        assert found["claimed"]["epsilon"] == pytest.approx(told["privacy"]["epsilon"])
    code, said = audited(str(tmp_path / "run"), "--canaries", "20")
    assert f"says: {told['privacy']['line']}" in said


def test_membership_of_a_run(tmp_path: Path, settings: Settings) -> None:
    told = ran(tmp_path / "run", settings(**{**FEW, "clip": 1.0}))
    assert "privacy" not in told
    code, said = audited(str(tmp_path / "run"), "--membership", "--json")
    assert code == 0, said
    assert json.loads(said)["of"]["stated"] is None
    code, said = audited(str(tmp_path / "run"), "--membership")
    assert "says: no differential privacy" in said


def test_a_run_under_way_says_what_it_has_spent(tmp_path: Path, settings: Settings) -> None:
    """Its run.json is of its start, when that was nothing: the journal knows."""
    config = settings(cohort=2, **FEW, dp="client", noise_multiplier=3.0)
    told = ran(tmp_path / "run", config)
    told = {name: value for name, value in told.items() if name != "ended"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(told))
    wanted = f"not at its end, epsilon {told['privacy']['epsilon']:.4g} so far at delta 1e-05"
    assert done.read(tmp_path / "run").stated == wanted


def edited(folder: Path, **changes: Any) -> None:
    told = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**told, **changes}))


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path / "run"
    ran(folder, settings(cohort=2, **FEW, dp="example", noise_multiplier=1.0, delta=1e-4))

    def refusal(*words: str) -> tuple[int, str]:
        code, said = audited(*words)
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return code, said

    for other in (tmp_path, folder / "adapter", folder / "run.json", tmp_path / "nowhere"):
        code, said = refusal(str(other))
        assert (code, "is no run's folder, it has no run.json" in said) == (2, True)
    code, said = refusal(str(folder), "--epsilon", "3", "--set", "lr=1", "--local-steps", "2")
    assert (code, "leave out --set, --local-steps, --epsilon" in said) == (2, True)
    before = (folder / "run.json").read_text()
    edited(folder, model_sha256="0" * 64)
    assert "is not what" in refusal(str(folder))[1]
    edited(folder, **json.loads(before) | {"data_sha256": "0" * 64})
    assert "the data (" in refusal(str(folder))[1]
    edited(folder, **json.loads(before) | {"own_devices": True})
    for words in ((), ("--membership",)):
        assert "are on its clients' devices" in refusal(str(folder), *words)[1]
    for torn in (before[: len(before) // 2], "[]", '{"config": {}}'):
        (folder / "run.json").write_text(torn)
        assert "cannot be read" in refusal(str(folder))[1]


def test_of_a_server_the_number_of_its_clients_counts(tmp_path: Path, settings: Settings) -> None:
    """Its data are what it measures on: they say nothing of who was there to be drawn."""
    changes = {"dp": "client", "noise_multiplier": 3.0, "dp_sampling": "poisson", "cohort": 2}
    ran(tmp_path / "run", settings(**FEW, **changes))
    edited(tmp_path / "run", own_devices=True, num_clients=4)
    code, said = audited(str(tmp_path / "run"), "--canaries", "20", "--json")
    assert code == 0, said
    assert "q = 0.5" in json.loads(said)["claimed"]["how"]
