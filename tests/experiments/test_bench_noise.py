"""The bench of noise by aggregation: ratios follow the laws that its document states."""

import json
from pathlib import Path

import pytest

from experiments.bench import noise

SMALL = noise.Options(size=48, rank=4, draws=4)


def test_linear_aggregates_gain_with_n_and_lose_with_z() -> None:
    few, many, loud = (noise.ratios(SMALL, n, z) for n, z in ((10, 1.0), (40, 1.0), (10, 4.0)))
    for name in ("FFA-LoRA", "seed_pool, K = 16", "seed_pool, K = 512"):
        assert many[name] / few[name] == pytest.approx(4, rel=0.35)
        assert few[name] / loud[name] == pytest.approx(4, rel=0.01)
    stacked = "FLoRA stack, noise on every factor"
    assert many[stacked] / few[stacked] == pytest.approx(2, rel=0.35)  # only √n
    assert few["FFA-LoRA"] > few["FedAvg on (A, B)"] > few[stacked]
    square = "  its quadratic term alone"
    assert few[square] / loud[square] == pytest.approx(16, rel=1e-6)


def test_seed_pools_and_fed_sb_as_in_closed_form() -> None:
    """A mean of norm √((1 + 1/n) / 2) over noise z √K / n in K dimensions."""
    found = noise.ratios(SMALL, 20, 2.0)
    wanted = ((1 + 1 / 20) / 2) ** 0.5 * 20 / (2.0 * 512**0.5)
    assert found["seed_pool, K = 512"] == pytest.approx(wanted, rel=0.1)
    assert found["Fed-SB"] == pytest.approx(wanted * (512 / 16) ** 0.5, rel=0.4)


def test_the_command_writes_a_table_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "noise.json"
    words = "--size 16 --rank 2 --draws 1 --clients 4 --noise 1 --json".split()
    assert noise.main([*words, str(file)]) == 0
    assert "| FFA-LoRA |" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["ratios"][0]["clients"] == 4
    assert found["ratios"][0]["FFA-LoRA"] > 0
