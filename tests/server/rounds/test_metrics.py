"""Means of what clients report."""

from corolla.server.rounds.metrics import mean_metrics
from tests.server.rounds.lying import EXAMPLES


def test_of_epsilon_the_largest_counts() -> None:
    metrics = {
        "ada": {"epsilon": 1.0, "local_steps": 2.0},
        "ben": {"epsilon": 3.0, "local_steps": 2.0},
    }
    assert mean_metrics(metrics, EXAMPLES) == {"epsilon": 3.0, "local_steps": 4.0}


def test_who_counts_users_is_told_as_a_part_of_all() -> None:
    metrics = {"ada": {"epsilon": 1.0, "per_user": 1.0}, "ben": {"epsilon": 3.0}}
    assert mean_metrics(metrics, EXAMPLES) == {"epsilon": 3.0, "per_user": 0.5}
    metrics["ben"]["per_user"] = 1.0
    assert mean_metrics(metrics, EXAMPLES)["per_user"] == 1.0
