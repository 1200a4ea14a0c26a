import json
import math
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.stats import norm

from corolla.errors import ArtefactError, ConfigError
from corolla.host import sealed_lines
from corolla.privacy.accounting import Release
from corolla.privacy.ledger import Ledger

ONE, TWO = "ab" * 16, "cd" * 16
DELTA = 1e-5


def ledger(tmp_path: Path) -> Ledger:
    """Two runs: 3 and 1 rounds of 2 steps with noise 4, then one round of 8 steps with noise 5."""
    made = Ledger(tmp_path / "client" / "ledger.jsonl")
    for round in (1, 2, 2):
        made.spend(ONE, round, Release(4.0, 1.0, 2))
    made.spend(TWO, 1, Release(5.0, 1.0, 8))
    return made


def delta_of(epsilon: float, mu: float) -> float:
    """Of a Gaussian mechanism: equation 6 of Balle and Wang (ICML 2018), written out."""
    low = norm.cdf(-mu / 2 - epsilon / mu)
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * low)


def test_a_new_ledger_is_empty_and_makes_no_file(tmp_path: Path) -> None:
    made = Ledger(tmp_path / "ledger.jsonl")
    assert (made.releases(), made.epsilon(DELTA)) == ([], 0.0)
    assert not made.path.exists()


def test_releases_are_kept_by_run_and_over_all_runs(tmp_path: Path) -> None:
    made = ledger(tmp_path)
    assert made.releases(ONE) == [Release(4.0, 1.0, 2)] * 3  # a round done again counts again
    assert made.releases(TWO) == [Release(5.0, 1.0, 8)]
    assert made.releases() == [*made.releases(ONE), *made.releases(TWO)]
    assert made.releases("ef" * 16) == []


def test_epsilon_composes_every_release(tmp_path: Path) -> None:
    """6 sums of noise 4 and 8 of noise 5 are one Gaussian with mu = sqrt(6/16 + 8/25)."""
    made = ledger(tmp_path)
    for run, mu in (
        (ONE, math.sqrt(6 / 16)),
        (TWO, math.sqrt(8 / 25)),
        (None, math.sqrt(6 / 16 + 8 / 25)),
    ):
        assert delta_of(made.epsilon(DELTA, run), mu) == pytest.approx(DELTA, rel=1e-6)
    more = made.epsilon(DELTA, ONE, [Release(2.0), Release(2.0)])
    assert delta_of(more, math.sqrt(6 / 16 + 2 / 4)) == pytest.approx(DELTA, rel=1e-6)
    assert made.epsilon(1e-3) < made.epsilon(DELTA)


def test_sampling_is_kept_and_amplifies(tmp_path: Path) -> None:
    made = Ledger(tmp_path / "ledger.jsonl")
    release = Release(1.0, 0.05, 100)
    made.spend(ONE, 1, release)
    assert made.releases() == [release]
    assert made.epsilon(DELTA) == pytest.approx(3.51, abs=0.02)  # PRV of opacus: 3.5124


def test_another_process_finds_what_was_spent(tmp_path: Path) -> None:
    made = ledger(tmp_path)
    again = Ledger(made.path)
    assert again.epsilon(DELTA) == made.epsilon(DELTA)
    again.spend(ONE, 3, Release(4.0, 1.0, 2))
    assert len(made.releases(ONE)) == 4


def test_what_is_spent_is_on_disk_before_spend_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Ledger(tmp_path / "ledger.jsonl")
    synced: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            synced.append(len(made.path.read_bytes().splitlines()))

    monkeypatch.setattr(os, "fsync", fsync)
    for lines in (1, 2):
        made.spend(ONE, lines, Release(4.0))
        assert synced.pop() == lines
        assert synced == []


def test_a_process_killed_after_spending_has_spent(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    code = """
import os, signal, sys
from pathlib import Path
from corolla.privacy.accounting import Release
from corolla.privacy.ledger import Ledger
Ledger(Path(sys.argv[1])).spend("ab" * 16, 1, Release(4.0, 0.5, 3))
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Ledger(path).releases(ONE) == [Release(4.0, 0.5, 3)]


def test_a_torn_last_line_is_no_obstacle_and_counts_if_it_can_be_read(tmp_path: Path) -> None:
    """Cut anywhere: training had not begun, or the line was whole once and was damaged later."""
    made = ledger(tmp_path)
    whole = made.path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    readable = whole.index(b', "sha256": "', start) + len(b', "sha256": "')
    before, after = made.releases(ONE), made.releases()
    for length in range(start, len(whole)):
        made.path.write_bytes(whole[:length])
        assert made.releases() == (after if length >= readable else before), length
    for length in (readable - 1, readable):
        made.path.write_bytes(whole[:length])
        made.spend(TWO, 2, Release(6.0))
        kept = after if length >= readable else before
        assert made.releases() == [*kept, Release(6.0)]
        assert made.releases(TWO) == [r for r in kept if r.count == 8] + [Release(6.0)]
        assert sealed_lines.read(made.path, "").torn == b""


@pytest.mark.parametrize("damage", ["flipped", "lost", "moved"])
def test_a_damaged_ledger_neither_tells_nor_spends(tmp_path: Path, damage: str) -> None:
    made = ledger(tmp_path)
    lines = made.path.read_bytes().splitlines(keepends=True)
    changed = {
        "flipped": [lines[0].replace(b'"noise_multiplier": 4.0', b'"noise_multiplier": 9.0')],
        "lost": [],
        "moved": [lines[1], lines[0]],
    }[damage] + ([*lines[2:]] if damage == "moved" else lines[1:])
    assert changed != lines
    made.path.write_bytes(b"".join(changed))
    message = r"is damaged in line 1 of \d: put back the newest copy there is: an older one"
    for attempt in (
        lambda: made.releases(),
        lambda: made.epsilon(DELTA, TWO),
        lambda: made.spend(TWO, 2, Release(4.0)),
    ):
        with pytest.raises(ArtefactError, match=message):
            attempt()
    assert made.path.read_bytes() == b"".join(changed)


@pytest.mark.parametrize("entry", [{}, {"run": ONE}, {"count": 1}])
def test_lines_of_another_kind_are_an_error_and_never_nothing(
    tmp_path: Path, entry: dict[str, object]
) -> None:
    made = Ledger(tmp_path / "ledger.jsonl")
    with sealed_lines.Chained(made.path, "", "") as file:
        file.append(entry)
    for attempt in (lambda: made.releases(), lambda: made.spend(ONE, 1, Release(4.0))):
        with pytest.raises(ArtefactError, match="no ledger of this version: put back"):
            attempt()


def test_a_ledger_has_one_writer(tmp_path: Path) -> None:
    made = ledger(tmp_path)
    with (
        sealed_lines.Chained(made.path, "", ""),
        pytest.raises(ConfigError, match="another process is training as this client"),
    ):
        made.spend(ONE, 3, Release(4.0))


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot be written"):
        Ledger(tmp_path / "file" / "ledger.jsonl").spend(ONE, 1, Release(4.0))


def test_a_line_says_when_and_for_what(tmp_path: Path) -> None:
    line = json.loads(ledger(tmp_path).path.read_text().splitlines()[1])
    assert line.pop("time").endswith("Z")
    del line["sha256"]
    assert line == {
        "run": ONE,
        "round": 2,
        "noise_multiplier": 4.0,
        "sampling_probability": 1.0,
        "count": 2,
    }
