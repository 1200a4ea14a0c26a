"""What is printed of a run that has ended."""

import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from corolla.commands.simulate import progress


def test_bytes_of_a_client_are_said_to_be_a_mean() -> None:
    """Clients of classes send different sizes: no client may have sent the one that is shown."""
    summary: Any = SimpleNamespace(
        bytes_up=4000, bytes_down=8000, per_client=((2000.0, 1900.0), (4000.0, 3900.0))
    )
    summary.sim_seconds, summary.seconds, summary.peak_rss = None, 1.0, 1
    shown = io.StringIO()
    progress._print_costs(Console(file=shown, width=120), summary)
    (line,) = [line for line in shown.getvalue().splitlines() if "2.0 KB" in line]
    assert "mean of the last round's clients (by the formula)" in line


def test_a_secure_sum_says_what_the_server_learns() -> None:
    """Eight members, one corrupt: with two lost h = 7 and F = 7 - ⌊14 / 5⌋ = 5."""
    facts = {"config": {"secure_sum": True}, "num_clients": 8, "cohort": 8}
    told = progress._sums(facts)
    assert "8 members, of which 2 may be lost" in told
    assert "at least 6 updates" in told and "1 members on its side" not in told
    assert told.endswith("sums of at least 5 honest ones")
