"""The metrics endpoint, read over HTTP with the parser of the Prometheus client."""

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from corolla.errors import ConfigError
from corolla.server.deployment.exporter import serve
from corolla.server.runs.journal import Journal
from tests.server.runs.test_status import begun, committed, line, write

Samples = dict[tuple[str, str], float]


@contextmanager
def served(folder: Path) -> Iterator[int]:
    endpoint = serve(folder, 0)
    try:
        yield endpoint.port
    finally:
        endpoint.stop()


def scrape(port: int) -> Samples:
    """(name, value of its label or "") → value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_tells_how_the_run_stands(tmp_path: Path) -> None:
    with begun(tmp_path) as journal, served(tmp_path) as port:
        found = scrape(port)
        assert found["corolla_up", ""] == 1
        assert found["corolla_rounds_total", ""] == 1
        assert found["corolla_replies_total", "accepted"] == 2
        assert found["corolla_replies_total", "not_finite"] == 1
        assert found["corolla_bytes_total", "up"] == 1000
        assert found["corolla_bytes_total", "down"] == 2000
        assert found["corolla_eval_loss", ""] == 3.0
        assert found["corolla_train_loss", ""] == 2.0
        assert found["corolla_clients", ""] == 4
        assert found["corolla_clients_online", ""] == 3
        assert found["corolla_paused", ""] == 0
        assert found["corolla_state", "running"] == 1
        assert found["corolla_last_round_seconds", ""] == 1.5
        assert ("corolla_epsilon", "") not in found
        write(tmp_path, line(1), line(2, epsilon=0.5))
        committed(journal, 2)
        journal.append("paused", round=3, online=0, needed=1)
        found = scrape(port)
        assert found["corolla_rounds_total", ""] == 2
        assert found["corolla_bytes_total", "up"] == 2000
        assert found["corolla_epsilon", ""] == 0.5
        assert ("corolla_epsilon_budget", "") not in found
        assert (found["corolla_paused", ""], found["corolla_clients_online", ""]) == (1, 0)
        assert (found["corolla_state", "running"], found["corolla_state", "paused"]) == (0, 1)


def test_replies_of_protected_clients_are_not_counted(tmp_path: Path) -> None:
    promised = {"unit": "client", "sampling": "fixed", "delta": 1e-6, "budget": 8.0}
    with Journal(tmp_path) as journal, served(tmp_path) as port:
        journal.append("started", run="r", rounds=1, round=0, state="", roster={}, privacy=promised)
        committed(journal, 1)
        write(tmp_path, line(1))
        found = scrape(port)
    assert found["corolla_rounds_total", ""] == 1
    assert not any(name.startswith("corolla_replies") for name, _ in found)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_scrape_without_a_run_is_answered(tmp_path: Path, damaged: bool) -> None:
    if damaged:
        (tmp_path / "journal.jsonl").write_text("junk\n")
    with served(tmp_path) as port:
        assert scrape(port) == {("corolla_up", ""): 0}
        if not damaged:
            with Journal(tmp_path) as journal:
                journal.append("started", run="r", rounds=1, round=0, state="", roster={})
                assert scrape(port)["corolla_up", ""] == 1


def test_only_this_machine_can_ask(tmp_path: Path) -> None:
    with served(tmp_path) as port, socket.socket() as other:
        other.bind(("127.0.0.2", port))  # free: the endpoint does not listen on all addresses


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with served(tmp_path) as port, pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
        serve(tmp_path, port)
    with pytest.raises(ConfigError, match="name another port"):
        serve(tmp_path, 99999)


def test_a_stopped_endpoint_frees_its_port(tmp_path: Path) -> None:
    with served(tmp_path) as port:
        pass
    with pytest.raises(urllib.error.URLError):
        scrape(port)
    serve(tmp_path, port).stop()


def test_a_scrape_tells_what_is_left_of_a_privacy_budget(tmp_path: Path) -> None:
    promised = {"unit": "example", "delta": 1e-6, "budget": 8.0}
    with Journal(tmp_path) as journal, served(tmp_path) as port:
        journal.append("started", run="r", rounds=1, round=0, state="", roster={}, privacy=promised)
        journal.append("privacy", round=1, attempt=0, unit="example", epsilon=3.25, clients=[])
        found = scrape(port)
    assert (found["corolla_epsilon", ""], found["corolla_epsilon_budget", ""]) == (3.25, 8.0)
