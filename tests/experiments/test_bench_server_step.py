"""The benchmark runs and reports what it promises. No time of it is judged here."""

import json
import math
from pathlib import Path

import pytest
import torch

from corolla.strategies.fedex_lora import FedExLora
from corolla.strategies.flexlora import FlexLora
from experiments.bench import server_step as bench

SMALL = bench.Options(size=64, clients=5, rank=3, threads=1, repetitions=1)


def test_all_numbers_are_written(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    small = "--size 64 --clients 5 --rank 3 --threads 1 --repetitions 1".split()
    assert bench.main(["time", "--json", str(file), *small]) == 0
    found = json.loads(file.read_text())
    assert found["options"] == {
        "size": 64,
        "clients": 5,
        "rank": 3,
        "threads": 1,
        "repetitions": 1,
    }
    assert found["machine"].keys() >= {"cpu", "cores", "threads", "torch", "date"}
    section = found["sections"]["time"]
    names = {row["contender"] for row in section["rows"]}
    assert names == {*bench.FACTORED, *bench.DENSE, "peft svd"}
    bars = {row["ratio"]: row["bar"] for row in section["ratios"]}
    for name in bench.FACTORED:
        assert bars[f"dense mean, svd / {name}"] == "≥ 50"
    assert all(math.isfinite(row["median"]) and row["median"] > 0 for row in section["ratios"])


def test_all_contenders_come_to_the_same() -> None:
    runs = bench.contenders(SMALL)
    runs["peft svd"] = bench.by_peft(SMALL)
    dense = {}
    for name, run in runs.items():
        found = run()
        dense[name] = found["dense"] if "dense" in found else found["m.lora_B"] @ found["m.lora_A"]
    mean = torch.zeros(64, 64, dtype=torch.float64)
    for own, examples in bench.updates(SMALL):
        mean += examples / 15 * (own["m.lora_B"].double() @ own["m.lora_A"].double())
    u, s, vt = torch.linalg.svd(mean)
    best = u[:, :3] * s[:3] @ vt[:3]
    for name in ("fedex_lora", "dense mean"):
        assert float((dense[name] - mean).norm() / mean.norm()) < 1e-6, name
    for name in ("flexlora", "dense mean, svd", "peft svd"):
        assert float((dense[name] - best).norm() / best.norm()) < 1e-5, name


@pytest.mark.parametrize("name", bench.FACTORED)
def test_no_matrix_of_outputs_times_inputs_is_made(name: str) -> None:
    """The largest are the factors of all clients, side by side."""
    most = bench.largest(bench.contenders(SMALL)[name])
    assert SMALL.size * SMALL.rank <= most <= SMALL.size * SMALL.rank * SMALL.clients


@pytest.mark.parametrize("name", bench.DENSE)
def test_a_matrix_that_is_made_is_seen(name: str) -> None:
    assert bench.largest(bench.contenders(SMALL)[name]) == SMALL.size**2


def test_what_is_measured_is_a_round_of_the_strategy() -> None:
    """Of states that `init` makes."""
    sent = bench.updates(SMALL)
    start = {name: torch.zeros_like(t) for name, t in sent[0][0].items()}
    for strategy, group in ((FedExLora(), "adapter"), (FlexLora(), "factors")):
        state = strategy.init(start, 0)
        after = bench.server_step(strategy, state, group, sent)
        assert after.keys() >= state.keys()
        assert any(float(t.abs().max()) for params in after.values() for t in params.values())


def test_memory_of_all_contenders() -> None:
    found = bench.memory(SMALL, measure=bench.memory_of)
    assert [row["contender"] for row in found.rows] == [*bench.FACTORED, *bench.DENSE]
    met = {row["ratio"]: row["met"] for row in found.ratios}
    assert met["flexlora: largest / (out, in)"] is True
    assert met["dense mean: largest / (out, in)"] is None


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    found = bench.in_child("flexlora", SMALL)
    assert found["largest tensor"] == bench.memory_of("flexlora", SMALL)["largest tensor"]


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["speed"])
    assert "known are time, memory" in capsys.readouterr().err
