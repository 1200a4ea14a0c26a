"""The metrics of a run for Prometheus: read from its folder at each request, sent to nobody."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import get_args
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from corolla.errors import ConfigError, CorollaError
from corolla.host.files import written
from corolla.server.runs import journal
from corolla.server.runs.journal import alive
from corolla.server.runs.status import State, Status, status


@dataclass(frozen=True)
class RunCollector(Collector):
    """The status of the run in a folder as metrics; corolla_up is 0 while there is none."""

    folder: Path

    @property
    def files(self) -> tuple[Path, Path]:
        """The files that a status is read from, again only when one of them has changed."""
        return self.folder / journal.NAME, self.folder / "metrics.jsonl"

    def collect(self) -> Iterator[Metric]:
        try:
            found = _status(self.folder, alive(self.folder), *map(written, self.files))
        except CorollaError:
            yield GaugeMetricFamily("corolla_up", "Whether there is a run to tell of", 0)
            return
        yield GaugeMetricFamily("corolla_up", "Whether there is a run to tell of", 1)
        yield from _counters(found)
        yield from _gauges(found)


@lru_cache(maxsize=1)
def _status(folder: Path, living: bool | None, *written: tuple[int, int]) -> Status:
    return status(folder)


def _counters(found: Status) -> Iterator[Metric]:
    yield CounterMetricFamily("corolla_rounds", "Committed rounds", found.round)
    yield CounterMetricFamily("corolla_abandoned", "Abandoned attempts", found.abandoned)
    yield CounterMetricFamily("corolla_seconds", "Seconds the run has been at work", found.seconds)
    if found.unit != "client":  # of whom no exact count is public
        replies = CounterMetricFamily("corolla_replies", "Replies by verdict", labels=["verdict"])
        for code, count in found.verdicts.items():
            replies.add_metric([code], count)
        yield replies
    moved = CounterMetricFamily("corolla_bytes", "Payload bytes", labels=["direction"])
    moved.add_metric(["up"], found.bytes_up)
    moved.add_metric(["down"], found.bytes_down)
    yield moved


def _gauges(found: Status) -> Iterator[Metric]:
    state = GaugeMetricFamily("corolla_state", "1 for the state the run is in", labels=["state"])
    for name in get_args(State):
        state.add_metric([name], name == found.state)
    yield state
    yield GaugeMetricFamily("corolla_paused", "Too few are online", found.state == "paused")
    yield GaugeMetricFamily("corolla_clients", "Members of the federation", found.clients)
    for name, text, value in (
        ("corolla_clients_online", "That could be asked at the last look", found.online),
        ("corolla_train_loss", "Training loss of the last round", found.train_loss),
        ("corolla_eval_loss", "Held-out loss, last measured", found.eval_loss),
        ("corolla_last_round_seconds", "Of the last committed round", found.last_round_seconds),
        ("corolla_epsilon", "Privacy budget spent", found.epsilon),
        ("corolla_epsilon_budget", "What may be spent in the run", found.budget),
    ):
        if value is not None:
            yield GaugeMetricFamily(name, text, value)


@dataclass(frozen=True)
class Served:
    """A running endpoint."""

    server: WSGIServer
    thread: Thread

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server.server_port)

    def stop(self) -> None:
        """End it and free the port."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def serve(folder: Path, port: int, host: str = "127.0.0.1") -> Served:
    """Serve http://host:port/metrics from a thread; port 0 takes a free one.

    Raises ConfigError when the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(RunCollector(folder))
    try:
        server, thread = start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"metrics cannot be served on {host}:{port}: {error}; name another port"
        ) from error
    return Served(server, thread)
