"""The Flower ServerApp: the same rounds as in process, over a Grid of nodes."""

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from corolla.artefacts.sizes import sentence
from corolla.budgets import settle
from corolla.config import rules
from corolla.config.load import load, validate
from corolla.config.run import RunConfig
from corolla.errors import ConfigError, CorollaError, StoppedError
from corolla.host import files, logs
from corolla.host.processes import note_process
from corolla.models.experts.reach import Reach
from corolla.server.deployment.grid import GridNetwork, count_nodes, hello
from corolla.server.deployment.limits import Admission, Limits
from corolla.server.deployment.order import (
    FOLDER,
    LAST_WORDS,
    PROCESS,
    Outcome,
    RunOrder,
    read_order,
    refuse_simulated,
)
from corolla.server.rounds.federation import merges
from corolla.server.rounds.tasks import run_settings
from corolla.server.runs.folder import prepare_folder, stored_run
from corolla.server.runs.observer import Observer, Silent
from corolla.server.runs.run import Run
from corolla.server.runs.setup import Setup, set_up
from corolla.server.runs.summary import Summary
from corolla.starts import folder as starting_folder
from corolla.wire.task_settings import RunSettings

app = ServerApp()  # without annotation: `flwr build` looks for the bare assignment


@dataclass(frozen=True)
class SimulatedRun:
    """A run of simulated clients: what it does, and the folder for its artefacts."""

    config: RunConfig
    folder: Path
    run_id: str
    nodes: int = 0
    """Nodes to wait for; 0: until none has joined for a while."""
    keep_updates: bool = False
    resume: bool = False


def serve(
    grid: Grid, run: SimulatedRun, observer: Observer, stop: threading.Event | None = None
) -> Summary:
    """Do a simulated run over a Grid, until it is done or stopped."""
    config, nodes, stop = run.config, run.nodes, stop or threading.Event()
    if not nodes:
        nodes = count_nodes(grid, stop, config.deadline)
        config = config.model_copy(update={"clients": config.clients or nodes})
    if not run.resume:
        starting_folder.check(config)
    loaded = set_up(config, run.run_id)
    config = loaded.config
    task = hello(run.run_id, RunSettings(config.model_dump(mode="json")))
    network = GridNetwork(grid, task, config.deadline, stop, Admission(nodes))
    return Run(
        config,
        loaded.strategy,
        network,
        loaded.evaluator,
        run.folder,
        settle.recalled(loaded.facts, run.folder, run.resume),
        observer,
        run.keep_updates,
        run.resume,
    ).execute()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Started by `corolla server`, which names a folder, or by `flwr run` for a simulation."""
    if folder := os.environ.get(FOLDER):
        return _deployed(grid, Path(folder))
    return _simulated(grid, context)


def _deployed(grid: Grid, folder: Path) -> None:
    """The run of a folder, from its last committed round; its outcome is left for the supervisor.

    What is not a CorollaError is for the supervisor to try again.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # Flower's own would end it where it stands
        signal.signal(number, lambda *_: stop.set())
    try:
        note_process(folder / PROCESS, os.getpid())
        order = read_order(folder)
        sys.path.insert(0, order.path)
        logs.configure(folder / "logs" / "server.jsonl", order.run_id)
        _run(grid, folder, order, stop)
        _leave(Outcome("done"), folder)
    except StoppedError as error:  # it was told to; or nobody came, which is for the user
        _leave(Outcome("stopped" if stop.is_set() else "failed", str(error), 1), folder)
    except (CorollaError, OSError) as error:
        logs.logger("server").error("failed", why=str(error))
        _leave(Outcome("failed", str(error), getattr(error, "exit_code", 1)), folder)


def _leave(outcome: Outcome, folder: Path) -> None:
    """An outcome that cannot be written, on a full disk, is said in the log of the executor."""
    try:
        outcome.write(folder)
    except OSError as error:
        why = " ".join((outcome.error or f"{folder}: {error}").split())
        print(f"{LAST_WORDS}{why}", file=sys.stderr, flush=True)


def _run(grid: Grid, folder: Path, order: RunOrder, stop: threading.Event) -> None:
    config, resume = validate(order.config), (folder / "run.json").is_file()
    if resume:  # on another day perhaps
        begun = stored_run(folder)[0]
        config = config.model_copy(update={"template_date": begun.template_date})
        config = settle.resumed(config, begun)
    else:
        starting_folder.check(config)
    loaded = set_up(config, order.run_id, deployed=True)
    config = loaded.config
    told = RunSettings(run_settings(config, own_devices=True), loaded.evaluator.labels)
    network = GridNetwork(
        grid,
        hello(order.run_id, told, loaded.facts["model_sha256"]),
        config.deadline,
        stop,
        Admission(
            clients=order.min_clients,
            wait=config.wait,
            names=folder / "flower" / "names.json",
            members=Path(order.clients_keys) if order.clients_keys else None,
            limits=_limits(config, order, loaded),
        ),
    )
    Run(
        config,
        loaded.strategy,
        network,
        loaded.evaluator,
        folder,
        settle.recalled(loaded.facts, folder, resume),
        _Lines(),
        order.keep_updates,
        resume,
        own_devices=True,
    ).execute()


def _limits(config: RunConfig, order: RunOrder, loaded: Setup) -> Limits:
    try:
        rules.refuse_gateways(config, loaded.strategy)
        no_gateways = ""
    except ConfigError as error:
        no_gateways = str(error)
    trained = loaded.model.init(config.lora, 0).values()
    update = sum(tensor.numel() * tensor.element_size() for tensor in trained)
    # Each class may send groups of its own, in twice the precision.
    bundles = merges(config, loaded.strategy) is None
    sums = None if bundles else 4 * max(1, len(config.classes))
    return Limits(order.max_seats, config.max_examples, no_gateways, update, sums)


def _simulated(grid: Grid, context: Context) -> None:
    """Started by `flwr run`: settings come from the run config of the app."""
    settings = dict(context.run_config)
    folder = Path(str(settings.pop("out", "") or files.cache_dir() / "runs" / str(context.run_id)))
    more = shlex.split(str(settings.pop("set", "")))
    config = load(None, {key.replace("-", "_"): v for key, v in settings.items() if v != ""}, more)
    refuse_simulated(config)
    prepare_folder(folder, resume=False)
    summary = serve(grid, SimulatedRun(config, folder, f"{context.run_id:032x}"[:32]), _Log())
    log(
        INFO,
        "held-out loss %.4f -> %.4f; adapter %s (sha256 %s)%s",
        summary.base["loss"],
        summary.final["loss"],
        summary.artefact,
        summary.adapter_hash,
        f"; {sentence(summary.served.to_json(summary.final['loss']))}" if summary.served else "",
    )


class _Log(Silent):
    """Tells Flower's log what happens."""

    def started(self, facts: Mapping[str, Any], first_round: int) -> None:
        log(INFO, "%d clients, held-out loss %.4f", facts["num_clients"], facts["base"]["loss"])
        log(INFO, "%s", Reach(**facts["reach"]).line)
        for warning in facts["warnings"]:
            self.warned(warning["text"])

    def warned(self, text: str) -> None:
        log(WARNING, "%s", text)

    def round_started(self, round: int, cohort: int) -> None:
        log(INFO, "round %d: %d clients asked", round, cohort)

    def round_ended(self, line: Mapping[str, Any]) -> None:
        names = ("round", "train_loss", "eval_loss", "seconds", "dropped")
        shown = {name: line[name] for name in names if name in line}
        log(INFO, "%s", json.dumps(shown))


class _Lines(Silent):
    """Writes what happens in a run to the log of the server, with round and client."""

    def __init__(self) -> None:
        self._log, self._round = logs.logger("server"), 0

    def started(self, facts: Mapping[str, Any], first_round: int) -> None:
        self._log.info("started", round=first_round, clients=facts["num_clients"])
        self._log.info("reached", why=Reach(**facts["reach"]).line)
        for warning in facts["warnings"]:
            self.warned(warning["text"])

    def warned(self, text: str) -> None:
        self._log.warning("warned", why=text)

    def round_started(self, round: int, cohort: int) -> None:
        self._round = round
        self._log.info("asked", round=round, cohort=cohort)

    def replied(self, client: str) -> None:
        self._log.info("replied", round=self._round, client=client)
