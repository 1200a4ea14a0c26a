import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from corolla.client.training.worker import Worker
from corolla.commands.simulate import in_process
from corolla.config.load import resumed
from corolla.config.run import RunConfig
from corolla.errors import ArtefactError, ConfigError, CorollaError, DataError
from corolla.host import files
from corolla.server.runs import checkpoint, report, run
from corolla.server.runs.folder import prepare_folder, stored_run
from corolla.server.runs.setup import set_up
from corolla.server.runs.summary import Summary
from corolla.storage.memory import Memory
from corolla.types import Metrics
from corolla.wire import codec
from corolla.wire.messages import pack_reply, unpack_reply
from corolla.wire.packet import Packet

Settings = Callable[..., RunConfig]


class StopError(Exception):
    """As if the process had been killed."""


@dataclass
class Watch:
    """An observer that remembers, and stops a run at a point of its third round."""

    stop_at: tuple[str, object] | None = None
    events: list[tuple[str, object]] = field(default_factory=list)

    def _saw(self, event: str, value: object) -> None:
        self.events.append((event, value))
        if self.stop_at == (event, value) and ("ended", 2) in self.events:
            raise StopError

    def started(self, facts: Mapping[str, Any], first_round: int) -> None:
        self._saw("started", first_round)

    def warned(self, text: str) -> None:
        self._saw("warned", text)

    def round_started(self, round: int, cohort: int) -> None:
        self._saw("round", round)

    def replied(self, client: str) -> None:
        self._saw("replied", client)

    def round_ended(self, line: Mapping[str, Any]) -> None:
        self._saw("ended", line["round"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No charts: most of the time of a tiny run."""
    monkeypatch.setattr(run, "write_report", lambda path, info, lines: None)


@pytest.fixture
def with_report(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "write_report", report.write_report)


def simulate(config: RunConfig, folder: Path, **options: Any) -> Summary:
    return in_process.simulate(config, folder, options.pop("observer", Watch()), **options)


def strict(text: str) -> Any:
    """JSON as other languages read it: without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_artefacts(settings: Settings, tmp_path: Path, with_report: None) -> None:
    watch = Watch()
    summary = simulate(settings(), tmp_path / "out", observer=watch)
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("adapter", "checkpoint", "journal.jsonl", "metrics.jsonl", "report.html", "run.json")
    ]
    found = lines(folder)
    assert [line["round"] for line in found] == [1, 2, 3]
    contract = {
        *("round", "train_loss", "eval_loss", "bytes_up", "bytes_down", "seconds", "clients"),
        *("dropped", "peak_rss"),
    }
    assert all(contract <= line.keys() for line in found)
    assert all((line["clients"], line["dropped"]) == (4, 0) for line in found)
    info = strict((folder / "run.json").read_text())
    assert info["status"] == "done"
    assert info["config"] == settings().model_dump(mode="json")
    assert info["final"]["loss"] == found[-1]["eval_loss"] == summary.final["loss"]
    assert info["bytes_up"] == sum(line["bytes_up"] for line in found)
    assert info["adapter_sha256"] == summary.adapter_hash
    assert summary.final["loss"] < summary.base["loss"]
    replies = [("replied", c) for c in ("ada", "ben", "cyd", "dot")]
    assert watch.events == [
        ("started", 1),
        *[e for r in (1, 2, 3) for e in (("round", r), *replies, ("ended", r))],
    ]


def test_a_run_is_decided_by_its_seed(settings: Settings, tmp_path: Path) -> None:
    hashes = []
    for i, (seed, noise) in enumerate([(0, 1), (0, 2), (1, 1)]):
        torch.manual_seed(noise)
        summary = simulate(settings(seed=seed, dropout=0.2), tmp_path / str(i))
        hashes.append(summary.adapter_hash)
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "fedavg"},
        {"strategy": "ffa_lora"},
        {"strategy": "ffa_lora", "eval_clients": 0},
        {"strategy": "flora"},
        {"strategy": "fedex_lora", "cohort": 2, "max_rank": 3},
        {"strategy": "fedavg", "schedule": "cosine", "warmup_rounds": 0.5, "dropout": 0.2},
    ],
    ids=lambda changes: " ".join(str(value) for value in changes.values()),
)
def test_a_resumed_run_ends_in_the_same_adapter(
    settings: Settings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Killed while the third round was under way."""
    config = settings(**changes)
    whole = simulate(config, tmp_path / "whole")
    amid: tuple[str, object] = ("replied", "ben") if config.cohort == 4 else ("round", 3)
    with pytest.raises(StopError):
        simulate(config, tmp_path / "parts", observer=Watch(amid))
    watch = Watch()
    resumed = simulate(config, tmp_path / "parts", observer=watch, resume=True)
    assert resumed.adapter_hash == whole.adapter_hash
    assert watch.events[0] == ("started", 3)
    losses = [[line["eval_loss"] for line in lines(tmp_path / f)] for f in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_a_damaged_checkpoint_costs_one_round(settings: Settings, tmp_path: Path) -> None:
    config = settings()
    whole = simulate(config, tmp_path / "whole")
    with pytest.raises(StopError):
        simulate(config, tmp_path / "parts", observer=Watch(("round", 3)))
    newest = tmp_path / "parts" / "checkpoint" / "round-000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    watch = Watch()
    resumed = simulate(config, tmp_path / "parts", observer=watch, resume=True)
    assert watch.events[0] == ("started", 2)
    assert resumed.adapter_hash == whole.adapter_hash
    assert [line["round"] for line in lines(tmp_path / "parts")] == [1, 2, 3]


def test_metrics_of_a_round_that_was_not_committed_are_dropped(
    settings: Settings, tmp_path: Path
) -> None:
    """A crash between metrics and checkpoint."""
    with pytest.raises(StopError):
        simulate(settings(), tmp_path / "out", observer=Watch(("round", 3)))
    for path in (tmp_path / "out" / "checkpoint").glob("round-000002*"):
        path.unlink()
    simulate(settings(), tmp_path / "out", resume=True)
    assert [line["round"] for line in lines(tmp_path / "out")] == [1, 2, 3]


def test_a_finished_run_can_be_resumed(settings: Settings, tmp_path: Path) -> None:
    first = simulate(settings(), tmp_path / "out")
    watch = Watch()
    again = simulate(settings(), tmp_path / "out", observer=watch, resume=True)
    assert again.adapter_hash == first.adapter_hash
    assert watch.events == [("started", 4)]
    assert len(lines(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "fedavg"},
        {"strategy": "ffa_lora"},
        {"strategy": "flora", "cohort": 2},
        {"strategy": "scaffold", "cohort": 2, "optimizer": "sgd"},
        {"strategy": "fedadam", "cohort": 2},
        {"strategy": "fedsa_lora", "cohort": 2},
        {"strategy": "feddpa", "cohort": 2},
        {"strategy": "rolora"},
        {"strategy": "seed_pool", "cohort": 2},
        {"strategy": "fedkseed_pro", "cohort": 2},
        {"strategy": "fedavg", "warmup_rounds": 1.5, "eval_every": 2},
        {"strategy": "fedavg", "eval_every": 2, "patience": 1, "lr": 1e-30},
    ],
    ids=lambda changes: " ".join(str(value) for value in changes.values()),
)
def test_an_extended_run_is_one_that_was_as_long_at_first(
    settings: Settings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = {"schedule": "constant", **changes}
    whole = simulate(settings(rounds=5, **changes), tmp_path / "whole")
    simulate(settings(rounds=3, **changes), tmp_path / "parts")
    longer = resumed(tmp_path / "parts", None, {"rounds": 5})
    extended = simulate(longer, tmp_path / "parts", resume=True)
    assert extended.adapter_hash == whole.adapter_hash
    assert extended.state_hash == whole.state_hash
    assert len(extended.lines) == len(whole.lines)
    assert extended.warnings == whole.warnings
    assert strict((tmp_path / "parts" / "run.json").read_text())["config"]["rounds"] == 5


def test_an_extended_run_whose_rate_has_fallen_says_so_however_often_it_is_resumed(
    settings: Settings, tmp_path: Path
) -> None:
    simulate(settings(rounds=1, schedule="cosine"), tmp_path)
    for _ in range(2):
        done = simulate(resumed(tmp_path, None, {"rounds": 2}), tmp_path, resume=True)
        (warning,) = [found for found in done.warnings if found["id"] == "extended"]
        assert warning["numbers"] == {"from": 1, "to": 2}


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.write_atomic

    def full(path: Path, data: bytes) -> None:
        if path.name.startswith("round-000002"):
            raise OSError(28, "No space left on device")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomic", full)
        with pytest.raises((CorollaError, OSError), match="No space") as caught:
            simulate(settings(), tmp_path / "out")
    found = checkpoint.load(tmp_path / "out" / "checkpoint")
    assert found is not None
    assert found.round == 1
    whole = simulate(settings(), tmp_path / "whole")
    resumed = simulate(settings(), tmp_path / "out", resume=True)
    assert resumed.adapter_hash == whole.adapter_hash
    assert isinstance(caught.value, CorollaError), "a user is told in one line, not in a traceback"


@pytest.fixture
def reporting(monkeypatch: pytest.MonkeyPatch) -> Callable[[Metrics], None]:
    """Lets the client `cyd` report metrics of its own choice."""
    real = in_process.InProcess.ask

    def install(metrics: Metrics) -> None:
        def ask(
            self: in_process.InProcess, packets: Mapping[str, Packet]
        ) -> Iterator[tuple[str, Packet | None]]:
            for client, packet in real(self, packets):
                if client == "cyd" and packet and packet.payload:
                    reply = unpack_reply(packet, 1 << 30)
                    packet = pack_reply(replace(reply, metrics={**reply.metrics, **metrics}))
                yield client, packet

        monkeypatch.setattr(in_process.InProcess, "ask", ask)

    return install


def test_a_client_cannot_rewrite_what_the_server_measures(
    settings: Settings, tmp_path: Path, reporting: Callable[[Metrics], None]
) -> None:
    config = settings(rounds=1)
    simulate(config, tmp_path / "honest")
    (honest,) = lines(tmp_path / "honest")
    measured = [name for name in honest if name not in ("train_loss", "client_loss")]
    names = [n for n in measured if n not in ("seconds", "peak_rss", "local_steps", "skipped")]
    reporting(dict.fromkeys(honest, 12345.0))
    simulate(config, tmp_path / "hostile")
    (found,) = lines(tmp_path / "hostile")
    kept = [n for n in names if n not in ("target_tokens", "framing_up")]
    assert {n: found[n] for n in kept} == {n: honest[n] for n in kept}


def test_a_client_cannot_make_metrics_unreadable(
    settings: Settings, tmp_path: Path, reporting: Callable[[Metrics], None]
) -> None:
    reporting({"train_loss": 1.7e308, "skipped": 1.7e308})
    simulate(settings(rounds=2), tmp_path / "out")
    assert len(lines(tmp_path / "out")) == 2


def test_clients_without_a_target_are_left_out_and_named(
    settings: Settings, tmp_path: Path
) -> None:
    """One whose only rows are longer than max_length has nothing to learn from."""
    path = tmp_path / "data.jsonl"
    rows = [
        {"client_id": c, "prompt": f"{c}{i}" * (40 if c == "long" else 1), "response": "yes"}
        for c in ("long", "ada", "ben")
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    simulate(settings(data=str(path), cohort=2, rounds=1), tmp_path / "out")
    (line,) = lines(tmp_path / "out")
    assert (line["clients"], line["dropped"]) == (2, 0)
    facts = strict((tmp_path / "out" / "run.json").read_text())
    assert facts["clients_without_target"] == ["long"]
    with pytest.raises(ConfigError, match="cohort 3 is larger than the 2 clients"):
        simulate(settings(data=str(path), cohort=3, rounds=1), tmp_path / "again")


def test_kept_updates_let_anybody_check_the_mean(settings: Settings, tmp_path: Path) -> None:
    simulate(settings(local_epochs=1, rounds=2), tmp_path / "out", keep_updates=True)
    folder = tmp_path / "out"

    def read(path: Path) -> dict[str, torch.Tensor]:
        return dict(codec.read(str(path / "adapter_model.safetensors"))[0])

    assert sorted(p.name for p in (folder / "global").iterdir()) == [
        *("round-000", "round-001", "round-002")
    ]
    for round in ("round-001", "round-002"):
        clients = sorted((folder / "updates" / round).iterdir())
        assert [path.name for path in clients] == ["ada", "ben", "cyd", "dot"]
        facts = [json.loads((path / "update.json").read_text()) for path in clients]
        assert [fact["num_examples"] for fact in facts] == [4, 7, 10, 5]
        assert [fact["weight"] for fact in facts] == [4 / 26, 7 / 26, 10 / 26, 5 / 26]
        after = read(folder / "global" / round)
        own = [read(path) for path in clients]
        for name, tensor in after.items():
            mean = sum(f["weight"] * p[name].double() for f, p in zip(facts, own, strict=True))
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-7)
    final = read(folder / "adapter")
    assert all(torch.equal(final[n], t) for n, t in read(folder / "global" / "round-002").items())
    for place, what in (("global/round-002", "round 2 of 2"), ("updates/round-001/ada", "client")):
        card = (folder / place / "README.md").read_text()
        assert what in card
        assert "base_model: " in card
        assert "PeftModel.from_pretrained(base" in card
        assert str(tmp_path) not in card


@pytest.mark.parametrize(
    "hostile", ["../x", "a/b", "..", "日本", "<script>alert(1)</script>", " x "]
)
def test_names_of_clients_stay_inside_the_folder(
    settings: Settings, tmp_path: Path, with_report: None, hostile: str
) -> None:
    path = tmp_path / "data.jsonl"
    rows = [
        {"client_id": c, "prompt": f"{i}?", "response": f"{c} {i}"}
        for c in (hostile, "ada")
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "deep" / "out"
    simulate(settings(data=str(path), cohort=2, rounds=1), out, keep_updates=True)
    assert {p.name for p in tmp_path.iterdir()} == {"data.jsonl", "deep"}
    assert {p.name for p in out.parent.iterdir()} == {"out"}
    assert {p.name for p in (out / "updates").iterdir()} == {"round-001"}
    notes = list((out / "updates" / "round-001").glob("*/update.json"))
    facts = [json.loads(note.read_text()) for note in notes]
    assert {fact["client"] for fact in facts} == {hostile, "ada"}
    assert sum(fact["weight"] for fact in facts) == pytest.approx(1.0)
    assert "<script>" not in (out / "report.html").read_text()


def test_a_run_that_cannot_begin_leaves_nothing(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        simulate(settings(data=str(tmp_path / "none.jsonl")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cohort_needs_its_clients(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cohort 9 is larger than the 4 clients"):
        simulate(settings(cohort=9), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rank_that_no_module_has_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(CorollaError, match="rank 9 is larger than module"):
        simulate(settings(rank=9), tmp_path / "out")


def test_a_run_knows_its_config_and_id(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        simulate(settings(), tmp_path / "out", observer=Watch(("round", 3)))
    found, run_id, _ = stored_run(tmp_path / "out")
    assert found == settings()
    assert len(run_id) == 32
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ArtefactError):
        stored_run(tmp_path / "out")


def test_of_devices_only_the_global_adapters_are_kept(settings: Settings, tmp_path: Path) -> None:
    """Their updates are in no folder of the server."""
    config = settings(rounds=2)
    loaded = set_up(config, None)
    worker = Worker(config, loaded.model, loaded.data, Memory(tmp_path / "memory"))
    network, folder = in_process.InProcess(worker), tmp_path / "out"
    prepare_folder(folder, resume=False)
    run.Run(
        *(config, loaded.strategy, network, loaded.evaluator, folder, loaded.facts, Watch()),
        keep_updates=True,
        own_devices=True,
    ).execute()
    kept = sorted(path.name for path in (folder / "global").iterdir())
    assert kept == ["round-000", "round-001", "round-002"]
    assert not (folder / "updates").exists()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("codec_up", [["int4"], ["top_k:0.2", "int8"]], ids=str)
def test_what_the_server_decodes_is_kept_beside_what_was_trained(
    settings: Settings, tmp_path: Path, codec_up: list[str]
) -> None:
    """The mean of what was decoded is the global adapter; that of what was trained is not."""
    config = settings(rounds=2, codec=codec_up)
    folder = simulate(config, tmp_path / "out", keep_updates=True).folder
    for round in ("round-001", "round-002"):
        after = tensors(folder / "global" / round)
        for part, exact in (("decoded", True), (".", False)):
            mean = {name: torch.zeros_like(t) for name, t in after.items()}
            for note in (folder / "updates" / round).glob("*/update.json"):
                weight = json.loads(note.read_text())["weight"]
                for name, tensor in tensors(note.parent / part).items():
                    mean[name] += weight * tensor
            gap = max(float((mean[name] - after[name]).abs().max()) for name in after)
            assert (gap < 1e-6) is exact


@pytest.mark.parametrize("strategy", ["flora", "flexlora", "hetlora", "fed_sb"])
def test_decoded_factors_are_kept_where_they_are_those_of_the_model(
    settings: Settings, tmp_path: Path, strategy: str
) -> None:
    config = settings(strategy=strategy, rounds=1, cohort=1, codec=["fp16"])
    folder = simulate(config, tmp_path / "out", keep_updates=True).folder
    (kept,) = (folder / "updates" / "round-001").iterdir()
    assert (kept / "decoded.safetensors").is_file()
    assert (kept / "decoded").is_dir() == (strategy != "fed_sb")  # R is none of the model's tensors
    if strategy != "fed_sb":
        trained, decoded = tensors(kept), tensors(kept / "decoded")
        for name, tensor in trained.items():
            assert torch.allclose(decoded[name], tensor, rtol=1e-3, atol=1e-7)
        assert any(not torch.equal(decoded[name], tensor) for name, tensor in trained.items())


def test_a_lossless_codec_has_nothing_else_to_keep(settings: Settings, tmp_path: Path) -> None:
    config = settings(rounds=1, cohort=1, codec=["zstd"])
    folder = simulate(config, tmp_path / "out", keep_updates=True).folder
    assert not list((folder / "updates").rglob("decoded*"))


@pytest.mark.parametrize("strategy", ["flora", "fedex_lora"])
def test_bytes_after_a_compaction_are_those_of_the_formula(
    settings: Settings, tmp_path: Path, strategy: str
) -> None:
    config = settings(strategy=strategy, rounds=3, options={"compact_at": 1.0}, max_rank=5)
    folder = simulate(config, tmp_path / "out").folder
    found = lines(folder)
    for line in found[1:]:  # before the first round there is no block to send
        assert line["bytes_down"] == line["formula_down"]
    assert all(line["rank_error"] > 0 for line in found)
    told = json.loads((folder / "run.json").read_text())
    assert told["rank_errors"] == [line["rank_error"] for line in found]
    assert told["served"]["exact"]["rank"] == 5


@pytest.mark.parametrize("strategy", ["fedsa_lora", "feddpa"])
def test_every_client_that_trained_has_its_personal_adapter(
    settings: Settings, tmp_path: Path, strategy: str
) -> None:
    """Whoever is measured."""
    folder = simulate(
        settings(strategy=strategy, eval_clients=1, rounds=2), tmp_path / "out"
    ).folder
    saved = {path.parent.name for path in (folder / "clients").glob("*/adapter")}
    assert saved == {"ada", "ben", "cyd", "dot"}
    assert "of one client" in (folder / "clients" / "ada" / "adapter" / "README.md").read_text()
    info = strict((folder / "run.json").read_text())
    assert len(info["clients"]) == 1
