import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from corolla import seeds
from corolla.commands.compare.cells import Point, aggregation_errors, read_cell
from corolla.commands.compare.results import unequal
from corolla.errors import ArtefactError
from corolla.server.runs.journal import Journal

FEDAVG = {"label": "fedavg", "personal": False, "trainers": ["first_order"]}
PERSONAL = {"label": "own", "personal": True, "trainers": ["first_order"]}


def folder(path: Path, **changes: Any) -> Path:
    """A finished run of two rounds, as the files of a run folder."""
    info: dict[str, Any] = {
        "config": {
            **{"lr": 0.01, "seed": 3, "local_steps": 2, "local_epochs": None, "pooled": False},
            **{"batch_size": 4, "queries": 1, "classes": {}},
        },
        "num_clients": 4,
        "base": {"loss": 5.0},
        "final": {"loss": 3.0, "accuracy": 0.25},
        "clients": {
            "ada": {
                "base": {"loss": 6.0, "examples": 2, "loss_reported": 7.0, "loss_choosing": 5.0},
                "final": {"loss": 2.0, "loss_reported": 2.5, "loss_choosing": 1.5},
            },
            "ben": {
                "base": {"loss": 4.0, "examples": 3, "loss_reported": 5.0, "loss_choosing": 3.0},
                "final": {"loss": 4.0, "loss_reported": 4.5, "loss_choosing": 3.5},
            },
            "cyd": {"base": {"loss": 9.0, "examples": 1}, "final": {"loss_choosing": 1.0}},
        },
        "bytes_up": 800,
        "bytes_down": 1600,
        "peak_rss": 123,
        "warnings": [],
        "model_sha256": "m",
        "data_sha256": "d",
    }
    lines = [
        {
            **{"round": r, "eval_loss": 5.0 - r, "bytes_up": 400},
            **{"personal_loss": 9.0, "personal_loss_reported": 5.0 - 2 * r},
            **{"bytes_down": 800, "seconds": 2.0, "clients": 2, "dropped": 1, "target_tokens": 9.0},
            **{"client_loss": {"ada": 1.0, "ben": 1.0}, "dropped_why": {"cyd": "asleep"}},
        }
        for r in (1, 2)
    ]
    for line in lines:
        line.update(changes)
    path.mkdir()
    (path / "run.json").write_text(json.dumps(info))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_run_folder_as_a_cell(tmp_path: Path) -> None:
    found = read_cell(folder(tmp_path / "run"), FEDAVG, {"cpu_seconds": 1.5})
    assert found.points == [Point(0, 0, 0, 5.0), Point(1, 300, 2, 4.0), Point(2, 600, 4, 3.0)]
    assert (found.loss, found.own_loss, found.lr, found.seed) == (3.0, 3.5, 0.01, 3)
    assert found.choosing_loss == 2.0  # of other rows than are reported
    assert (found.bytes_up, found.bytes_down, found.dropped) == (200, 400, 2)
    assert (found.cpu_seconds, found.simulated, found.tokens) == (1.5, False, [9.0, 9.0])


def test_a_personal_run_is_read_by_its_clients_losses(tmp_path: Path) -> None:
    found = read_cell(folder(tmp_path / "run"), PERSONAL, {})
    assert [point.loss for point in found.points] == [6.0, 3.0, 1.0]  # 6 = mean of 7 and 5


def test_simulated_seconds_stand_for_measured_ones(tmp_path: Path) -> None:
    found = read_cell(folder(tmp_path / "run", sim_seconds=50.0), FEDAVG, {})
    assert found.simulated
    assert [point.seconds for point in found.points] == [0, 50, 100]


def test_rounds_without_evaluation_are_no_points_but_cost(tmp_path: Path) -> None:
    path = folder(tmp_path / "run")
    first, second = (path / "metrics.jsonl").read_text().splitlines()
    skipped = json.dumps({**json.loads(first), "eval_loss": None})
    (path / "metrics.jsonl").write_text(f"{skipped}\n{second}\n")
    assert read_cell(path, FEDAVG, {}).points == [Point(0, 0, 0, 5.0), Point(2, 600, 4, 3.0)]


def test_a_folder_that_is_no_finished_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no finished run"):
        read_cell(tmp_path, FEDAVG, {})
    path = folder(tmp_path / "run")
    (path / "run.json").write_text('{"status": "running"}')
    with pytest.raises(ArtefactError, match="no finished run"):
        read_cell(path, FEDAVG, {})


def test_evidence_tells_cohorts_partitions_and_models_apart(tmp_path: Path) -> None:
    same = read_cell(folder(tmp_path / "a"), FEDAVG, {})
    again = read_cell(folder(tmp_path / "b"), {**FEDAVG, "label": "flora"}, {})
    assert unequal([same, again]) == []
    other = read_cell(
        folder(tmp_path / "c", client_loss={"ada": 1.0, "dot": 1.0}),
        {**FEDAVG, "label": "flora"},
        {},
    )
    assert unequal([same, other]) == ["seed 3: cohorts of flora and fedavg differ"]
    silent = read_cell(folder(tmp_path / "d", client_loss={}), FEDAVG, {})
    assert "not proven" in unequal([silent])[0]
    for what in same.evidence:
        changed = replace(same, method="flora", evidence={**same.evidence, what: ["else"]})
        assert unequal([same, changed]) == [f"seed 3: {what} of flora and fedavg differ"]


def save_adapter(path: Path, b: torch.Tensor, a: torch.Tensor, alpha: float) -> None:
    path.mkdir(parents=True)
    config = {"r": a.shape[0], "lora_alpha": alpha, "use_rslora": False}
    (path / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.layer.lora_{}.weight"
    save_file({name.format("A"): a, name.format("B"): b}, path / "adapter_model.safetensors")


def test_the_error_of_aggregation_is_that_of_dense_matrices(tmp_path: Path) -> None:
    draw = seeds.generator(0, "adapters")
    shares, ranks = {"ada": 0.25, "ben": 0.75}, {"ada": 2, "ben": 3}
    mean = torch.zeros(5, 4, dtype=torch.float64)
    for client, share in shares.items():
        b = torch.randn(5, ranks[client], generator=draw)
        a = torch.randn(ranks[client], 4, generator=draw)
        path = tmp_path / "updates" / "round-001" / client
        save_adapter(path, b, a, alpha=6)
        (path / "update.json").write_text(json.dumps({"weight": share}))
        mean += share * 6 / ranks[client] * b.double() @ a.double()
    late = tmp_path / "updates" / "round-001" / "late"  # trained, but its reply was not accepted
    save_adapter(late, torch.ones(5, 1), torch.ones(1, 4), alpha=1)
    (late / "update.json").write_text("{}")
    b, a = torch.randn(5, 2, generator=draw), torch.randn(2, 4, generator=draw)
    save_adapter(tmp_path / "global" / "round-001", b, a, alpha=4)
    wanted = (2 * b.double() @ a.double() - mean).norm() / mean.norm()
    assert aggregation_errors(tmp_path) == pytest.approx([float(wanted)], rel=1e-6)
    assert aggregation_errors(tmp_path / "global") is None


def private(path: Path, sampling: str = "fixed", rounds: int = 2) -> Path:
    """A finished run of dp=client: its lines do not tell who was asked, its journal does."""
    found = folder(path, client_loss={}, dropped_why={})
    info = json.loads((found / "run.json").read_text())
    info["config"] |= {"dp": "client", "dp_sampling": sampling}
    info |= {"privacy": {"epsilon": 3.5}, "clients": {}}
    (found / "run.json").write_text(json.dumps(info))
    with Journal(found) as journal:
        for number in range(1, rounds + 1):
            cohort = {f"{path.name if sampling == 'poisson' else 'ada'}": 1}
            journal.append("planned", round=number, attempt=0, cohort=cohort, online=4)
    return found


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_with_privacy_cohorts_are_those_of_the_journal(tmp_path: Path, sampling: str) -> None:
    """Those that chance draws differ by nature."""
    one = read_cell(private(tmp_path / "a", sampling), FEDAVG, {})
    other = read_cell(private(tmp_path / "b", sampling), {**FEDAVG, "label": "ffa"}, {})
    assert unequal([one, other]) == []
    assert (one.epsilon, one.own_loss) == (3.5, None)
    lost = read_cell(private(tmp_path / "c", sampling, 1), {**FEDAVG, "label": "lost"}, {})
    assert any("is not known" in text for text in unequal([one, lost]))
