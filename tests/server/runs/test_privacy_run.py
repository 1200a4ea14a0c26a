"""Whole runs with differential privacy in this process, on a tiny federation."""

import html
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from corolla.commands.simulate import in_process
from corolla.config.run import RunConfig
from corolla.errors import ConfigError, RoundError
from corolla.privacy.accounting import gaussian_epsilon
from corolla.privacy.client_level import ClientLevel
from corolla.server.rounds import round as rounds
from corolla.server.runs import account, attempts, checkpoint, report, run
from corolla.server.runs.journal import read
from corolla.server.runs.observer import Silent
from corolla.server.runs.status import status
from corolla.server.runs.summary import Summary
from corolla.wire import codec
from corolla.wire.messages import pack_reply, unpack_reply
from corolla.wire.packet import Packet

Settings = Callable[..., RunConfig]
CLIENT = {"dp": "client", "noise_multiplier": 4.0, "clip": 0.01, "rounds": 2, "cohort": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No charts: most of the time of a tiny run."""
    monkeypatch.setattr(run, "write_report", lambda path, info, lines: None)


def simulate(config: RunConfig, folder: Path, **options: Any) -> Summary:
    return in_process.simulate(config, folder, Silent(), **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def info(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def events(folder: Path, name: str) -> list[Mapping[str, Any]]:
    return [entry for entry in read(folder) if entry["event"] == name]


def spent(folder: Path, noise_multiplier: float) -> float:
    """The closed form for the client that was in most releases."""
    cohorts = [event["clients"] for event in events(folder, "privacy")]
    most = max(sum(name in own for own in cohorts) for name in {n for own in cohorts for n in own})
    return gaussian_epsilon(most**0.5 / noise_multiplier, 1e-5)


def killed_at(monkeypatch: pytest.MonkeyPatch, wanted: str, number: int) -> None:
    """The process dies at a fail point, once: as an error that nobody catches."""
    died: list[int] = []

    def point(name: str, round: int) -> None:
        if (name, round) == (wanted, number) and not died:
            died.append(round)
            raise KeyError("as if the process had been killed")

    monkeypatch.setattr(attempts, "fail_point", point)


FORMS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("fedavg", "ffa_lora", "rolora", "fed_sb", "fedsvd")},
    "fedkseed": {"options": {"size": 64}, "local_steps": 2},
    "seed_pool": {"options": {"size": 64}, "local_steps": 2},
}


@pytest.mark.parametrize("strategy", FORMS)
def test_a_strategy_runs_with_noise_on_its_sum(
    settings: Settings, tmp_path: Path, strategy: str
) -> None:
    config = settings(strategy=strategy, **{**CLIENT, **FORMS[strategy]})
    summary = simulate(config, tmp_path / "out")
    found = lines(tmp_path / "out")
    names = [entry["event"] for entry in read(tmp_path / "out")]
    assert names == ["started", *["planned", "privacy", "verdicts", "committed"] * 2, "done"]
    wanted = spent(tmp_path / "out", 4.0)
    privacy = info(tmp_path / "out")["privacy"]
    assert found[-1]["epsilon"] == privacy["epsilon"] == pytest.approx(wanted)
    assert (privacy["unit"], privacy["noise_multiplier"], privacy["clip"]) == ("client", 4.0, 0.01)
    assert summary.privacy == privacy["line"]
    assert summary.proof.difference <= 1e-4
    base = AutoModelForCausalLM.from_pretrained(config.model)
    PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"))
    for line in found:
        assert (line["train_loss"], line["client_loss"], line["clients"]) == (None, {}, 2)
        assert "numbers of examples" in line["withheld"]
        assert not line.keys() & {"dropped_why", "target_tokens", "local_steps", "skipped"}
    assert (info(tmp_path / "out")["clients"], info(tmp_path / "out")["fairness"]) == ({}, {})
    assert status(tmp_path / "out").epsilon == pytest.approx(wanted)


def test_a_budget_lasts_for_all_rounds(settings: Settings, tmp_path: Path) -> None:
    config = settings(**{**CLIENT, "noise_multiplier": None, "epsilon": 8.0, "cohort": 4})
    simulate(config, tmp_path / "out")
    facts = info(tmp_path / "out")
    assert facts["ended"] == "all 2 rounds"
    assert facts["privacy"]["epsilon"] == pytest.approx(8.0, rel=1e-3)
    assert facts["privacy"]["epsilon"] <= facts["privacy"]["budget"] == 8.0


def test_a_kill_at_the_release_counts_twice_and_the_run_ends_before_its_budget(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event was on disk, and what it announces may have been seen."""
    config = settings(
        **{**CLIENT, "noise_multiplier": None, "epsilon": 8.0, "cohort": 4, "rounds": 3}
    )
    killed_at(monkeypatch, "privacy", 2)
    with pytest.raises(KeyError):
        simulate(config, tmp_path / "out")
    assert [event["round"] for event in events(tmp_path / "out", "privacy")] == [1, 2]
    simulate(config, tmp_path / "out", resume=True)
    noted = events(tmp_path / "out", "privacy")
    assert [event["round"] for event in noted] == [1, 2, 2]
    assert [event["epsilon"] for event in noted] == sorted({event["epsilon"] for event in noted})
    assert [event["round"] for event in events(tmp_path / "out", "committed")] == [1, 2]
    facts = info(tmp_path / "out")
    assert facts["ended"].startswith("privacy budget: with round 3, epsilon would be 9.")
    z = facts["privacy"]["noise_multiplier"]
    assert facts["privacy"]["epsilon"] == pytest.approx(gaussian_epsilon(3**0.5 / z, 1e-5))
    assert (tmp_path / "out" / "adapter").is_dir()
    assert lines(tmp_path / "out")[-1]["epsilon"] == facts["privacy"]["epsilon"]


def test_a_first_round_beyond_the_budget_is_refused(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(
        **{**CLIENT, "noise_multiplier": None, "epsilon": 8.0, "rounds": 1, "cohort": 4}
    )
    killed_at(monkeypatch, "privacy", 1)
    monkeypatch.setattr(in_process, "_undo", lambda folder, made: None)
    with pytest.raises(KeyError):
        simulate(config, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"privacy budget: with round 1.* no round can be run"):
        simulate(config, tmp_path / "out", resume=True)


def test_a_run_ends_when_too_few_may_still_take_part(settings: Settings, tmp_path: Path) -> None:
    config = settings(**{**CLIENT, "participations": 1, "rounds": 4})
    simulate(config, tmp_path / "out")
    cohorts = [set(plan["cohort"]) for plan in events(tmp_path / "out", "planned")]
    assert len(cohorts) == 2
    assert cohorts[0] | cohorts[1] == {"ada", "ben", "cyd", "dot"}
    facts = info(tmp_path / "out")
    assert facts["ended"].startswith("participations: 0 clients may still take part in round 3")
    assert facts["privacy"]["epsilon"] == pytest.approx(gaussian_epsilon(1 / 4.0, 1e-5))


def test_a_kill_may_cost_clients_their_only_turn(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was about to be released counts: another cohort does the round again."""
    config = settings(**{**CLIENT, "participations": 1, "rounds": 4})
    killed_at(monkeypatch, "privacy", 1)
    monkeypatch.setattr(in_process, "_undo", lambda folder, made: None)
    with pytest.raises(KeyError):
        simulate(config, tmp_path / "out")
    simulate(config, tmp_path / "out", resume=True)
    (abandoned,) = events(tmp_path / "out", "abandoned")
    assert abandoned["why"] == "round 1: nobody of its cohort may take part once more"
    first, second = (set(event["clients"]) for event in events(tmp_path / "out", "privacy"))
    assert first | second == {"ada", "ben", "cyd", "dot"}
    facts = info(tmp_path / "out")
    assert facts["ended"].startswith("participations: 0 clients may still take part in round 2")
    assert facts["privacy"]["epsilon"] == pytest.approx(gaussian_epsilon(1 / 4.0, 1e-5))


@pytest.mark.parametrize(
    ("given", "memory"),
    [
        ({"clip_quantile": 0.5}, "privacy-clip"),
        ({"dp_mechanism": "banded", "separation": 2}, "privacy-noise"),
    ],
)
def test_what_a_mechanism_remembers_is_in_the_checkpoint(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    memory: str,
) -> None:
    """Until the run is done: who has the noise takes it off."""
    config = settings(**{**CLIENT, **given})
    killed_at(monkeypatch, "planned", 2)
    with pytest.raises(KeyError):
        simulate(config, tmp_path / "out")
    kept = checkpoint.load(tmp_path / "out" / "checkpoint")
    assert kept is not None and any(group.startswith(memory) for group in kept.memory)
    simulate(config, tmp_path / "out", resume=True)
    assert len(list((tmp_path / "out" / "checkpoint").iterdir())) == 2, "tensors and their note"
    (tensors,) = (tmp_path / "out" / "checkpoint").glob("*.safetensors")
    assert b"privacy-noise" not in tensors.read_bytes()
    simulate(config, tmp_path / "out", resume=True)  # what is left is a committed state
    assert info(tmp_path / "out")["ended"] == "all 2 rounds"


def test_one_draw_is_that_of_all_attempts_and_processes(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: list[list[str]] = []
    real_draw, real_ask = ClientLevel.draw, in_process.InProcess.ask

    def draw(self: ClientLevel, clients: Any) -> list[str]:
        draws.append(["ben", "dot"] if len(draws) % 2 == 0 else [])
        assert set(real_draw(self, clients)) <= set(clients)
        return draws[-1]

    def ask(self: Any, packets: Any) -> Any:
        if len(events(tmp_path / "out", "planned")) == 1:
            raise RoundError("nobody can train at the moment")
        return real_ask(self, packets)

    monkeypatch.setattr(ClientLevel, "draw", draw)
    monkeypatch.setattr(in_process.InProcess, "ask", ask)
    killed_at(monkeypatch, "privacy", 1)
    monkeypatch.setattr(in_process, "_undo", lambda folder, made: None)
    config = settings(**{**CLIENT, "dp_sampling": "poisson"})
    with pytest.raises(KeyError):
        simulate(config, tmp_path / "out")
    simulate(config, tmp_path / "out", resume=True)
    plans = [(p["round"], p["attempt"], p["cohort"]) for p in events(tmp_path / "out", "planned")]
    both = {"ben": 1, "dot": 1}
    assert plans == [(1, 0, both), (1, 1, both), (2, 0, {})]
    assert len(draws) == 2
    noted = [event["clients"] for event in events(tmp_path / "out", "privacy")]
    assert noted == [["ben", "dot"], ["ben", "dot"], []]
    assert [line["clients"] for line in lines(tmp_path / "out")] == [2, 2], "the planned number"
    per_client = info(tmp_path / "out")["bytes_per_client"]
    assert [own for own, _ in per_client] == [formula for _, formula in per_client] != [0, 0]


def test_who_was_away_when_it_was_drawn_is_not_waited_for(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("everybody is there that was asked")

    monkeypatch.setattr(ClientLevel, "draw", lambda self, clients: list(clients))
    network = in_process.InProcess
    monkeypatch.setattr(network, "online", lambda self: {"ada", "ben", "cyd"})
    monkeypatch.setattr(in_process, "_undo", lambda folder, made: None)
    monkeypatch.setattr("time.sleep", sleep)
    killed_at(monkeypatch, "waiting", 1)
    config = settings(**{**CLIENT, "dp_sampling": "poisson", "rounds": 1})
    with pytest.raises(KeyError):
        simulate(config, tmp_path / "out")
    simulate(config, tmp_path / "out", resume=True)
    (plan,) = events(tmp_path / "out", "planned")
    assert (len(plan["cohort"]), plan["away"]) == (4, ["dot"])
    assert events(tmp_path / "out", "privacy")[0]["clients"] == ["ada", "ben", "cyd"]


@pytest.mark.parametrize("fault", ["fails", "not finite"])
def test_a_secret_cohort_that_always_fails_does_not_block_a_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """It would be asked again for ever: in the last attempt it counts as absent."""
    real = in_process.InProcess.ask

    def ask(self: Any, packets: Any) -> Any:
        for client, packet in real(self, packets):
            yield client, packet and OF_BEN[fault](packet)

    monkeypatch.setattr(in_process.InProcess, "ask", ask)
    monkeypatch.setattr(ClientLevel, "draw", lambda self, clients: ["ada", "ben"])
    config = settings(**{**CLIENT, "dp_sampling": "poisson", "rounds": 1, "attempts": 2})
    simulate(config, tmp_path / "out")
    (abandoned,) = events(tmp_path / "out", "abandoned")
    assert abandoned["why"] == "round 1: too few clients gave a valid update"
    assert events(tmp_path / "out", "privacy")[0]["clients"] == []
    assert info(tmp_path / "out")["ended"] == "all 1 rounds"


def test_examples_are_protected_by_their_clients(settings: Settings, tmp_path: Path) -> None:
    """Whose ledgers say what it cost: here dp-accounting says it for the smallest client."""
    config = settings(dp="example", noise_multiplier=1.5, clip=0.1, rounds=2, cohort=4)
    simulate(config, tmp_path / "out")
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    sampled = dp_event.PoissonSampledDpEvent(3 / 4, dp_event.GaussianDpEvent(1.5))
    accountant.compose(sampled, 2 * 2)  # ada has 4 examples; batches of 3, 2 steps, 2 rounds
    wanted = accountant.get_epsilon(1e-5)
    noted = events(tmp_path / "out", "privacy")
    assert [(e["unit"], e["clients"]) for e in noted] == [
        ("example", ["ada", "ben", "cyd", "dot"])
    ] * 2
    found = lines(tmp_path / "out")
    assert found[-1]["epsilon"] == noted[-1]["epsilon"] == pytest.approx(wanted, abs=2e-3)
    assert found[0]["epsilon"] < found[1]["epsilon"]
    facts = info(tmp_path / "out")
    assert facts["privacy"]["unit"] == "example"
    assert (facts["clients"], found[0]["train_loss"], found[0]["client_loss"]) == ({}, None, {})


def test_updates_that_are_hidden_are_not_kept(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--keep-updates keeps what dp=client hides"):
        simulate(settings(**CLIENT), tmp_path / "out", keep_updates=True)
    assert not (tmp_path / "out").exists()


def test_the_report_says_what_is_promised(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "write_report", report.write_report)
    summary = simulate(settings(**CLIENT), tmp_path / "out")
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    assert summary.privacy in page
    assert "Not told for the sake of this promise: what clients measure" in page
    assert "Privacy spent" in page
    assert "epsilon spent, of one client" in page
    assert "Before and after" not in page
    assert (summary.before, summary.after) == ([], [])
    assert "samples" not in info(tmp_path / "out")


class Terminal(Silent):
    """What somebody in front of it sees of clients."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def warned(self, text: str) -> None:
        self.seen.append(text)

    def round_started(self, round: int, cohort: int) -> None:
        self.seen.append((round, cohort))

    def replied(self, client: str) -> None:
        self.seen.append(client)


def scaled(packet: Packet, factor: float) -> Packet:
    """The reply of a client whose update is so many times as large."""
    reply = unpack_reply(packet, 1 << 30)
    groups = codec.decode(reply.payload)
    larger = {g: {n: factor * t for n, t in own.items()} for g, own in groups.items()}
    return pack_reply(replace(reply, payload=codec.encode(larger)))


OF_BEN: dict[str, Callable[[Packet], Packet]] = {
    "honest": lambda packet: packet,
    "huge": lambda packet: scaled(packet, 1e6),
    "not finite": lambda packet: scaled(packet, math.nan),
    "fails": lambda packet: pack_reply(
        replace(unpack_reply(packet, 1 << 30), error="rows of ben", payload=b"")
    ),
    "not drawn": lambda packet: packet,
}
TOLD = {
    *("run_id", "seconds", "peak_rss", "adapter_sha256", "state_sha256", "final"),
    *("eval_loss", "eval_accuracy", "reload_max_logit_difference", "reload", "served"),
}
"""What may differ: chance, time, memory, and what follows from the model, which has noise on it."""


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_what_ben_sends_is_not_told(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: str
) -> None:
    """Nor, where who is asked is a secret, whether he is asked at all."""
    real, found = in_process.InProcess.ask, {}
    given = {"noise_multiplier": 4.0, "dp_sampling": sampling, "quorum": 0.25}
    config = settings(**{**CLIENT, **given, "cohort": 4 if sampling == "fixed" else 2})
    for name, fault in OF_BEN.items():
        if name == "not drawn" and sampling == "fixed":
            continue

        def ask(self: Any, packets: Any, fault: Any = fault) -> Any:
            for client, packet in real(self, packets):
                yield client, fault(packet) if client == "ben" else packet

        def uniform(n: int, own: float = 0.9 * (name == "not drawn")) -> Tensor:
            return torch.tensor([0.0, own, 0.0, 0.9], dtype=torch.float64)

        def zeros(shape: Any) -> Tensor:
            return torch.zeros(tuple(shape), dtype=torch.float64)

        monkeypatch.setattr(in_process.InProcess, "ask", ask)
        level = partial(ClientLevel, normal=zeros, uniform=uniform)
        monkeypatch.setattr(account, "ClientLevel", level)
        folder, terminal = tmp_path / name / "out", Terminal()
        in_process.simulate(config, folder, terminal)
        told = [*lines(folder), info(folder)]
        found[name] = [
            *({key: own[key] for key in own.keys() - TOLD} for own in told),
            *terminal.seen,
        ]
        verdicts = [event["verdicts"].get("ben") for event in events(folder, "verdicts")]
        wanted = {"not finite": "not_finite", "fails": "client_error", "not drawn": None}
        assert verdicts == [wanted.get(name, "accepted")] * 2, "the journal knows"
    for name, own in found.items():
        assert own == found["honest"], name


def test_a_run_that_can_spend_no_more_between_attempts_is_done(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its attempts have announced is spent, though they came to nothing."""
    config = settings(**{**CLIENT, "noise_multiplier": None, "epsilon": 8.0, "cohort": 4})
    real = ClientLevel.release

    def release(self: ClientLevel, *given: Any, round: int) -> Any:
        found = real(self, *given, round=round)
        if round == 2:
            raise ValueError("as if nothing of it were finite")
        return found

    monkeypatch.setattr(ClientLevel, "release", release)
    simulate(config, tmp_path / "out")
    facts = info(tmp_path / "out")
    assert facts["ended"].startswith("privacy budget: with round 2")
    assert facts["status"] == "done"
    assert [event["round"] for event in events(tmp_path / "out", "privacy")] == [1, 2]


def test_without_privacy_nobody_is_promised_an_epsilon(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever one client says that it has measured; nor is anything told of noise."""
    said = {"epsilon": 0.1, "noise_norm": 9.0, "update_norm": 1.0}
    monkeypatch.setattr(rounds, "mean_metrics", lambda metrics, examples: said)
    simulate(settings(rounds=1), tmp_path / "out")
    assert not said.keys() & lines(tmp_path / "out")[0].keys()
    assert "noise" not in [warning["id"] for warning in info(tmp_path / "out")["warnings"]]
    assert "privacy" not in info(tmp_path / "out")
    assert status(tmp_path / "out").epsilon is None
