"""`--engine flower`: the same ServerApp code and ClientApp on Flower's simulation engine (Ray).

A composition root, apart from `in_process` because Flower and Ray are heavy to import.
"""

import importlib.util
import logging
import os
import secrets
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corolla.config.run import RunConfig
from corolla.data import census, federated
from corolla.errors import ConfigError, RoundError
from corolla.host.files import scratch_folder
from corolla.host.processes import terminate_as_interrupt
from corolla.models import pretrained
from corolla.server.runs.observer import Observer
from corolla.server.runs.summary import Summary

# Read when Flower and Ray are imported: no telemetry, no advice about accelerators.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def simulate_on_flower(
    config: RunConfig,
    folder: Path,
    observer: Observer,
    keep_updates: bool,
    resume: bool,
    run_id: str | None,
) -> Summary:
    """Run a federation on Ray: as many clients at once as there are cores for their threads.

    Raises ConfigError when Ray is not installed, RoundError when it fails, and what the server
    raises.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine flower needs Ray: pip install 'corolla[simulation]'")
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from corolla.client.app import app
    from corolla.server.app import SimulatedRun, serve

    # A model or data set that cannot be loaded is said here, not by every process of Ray.
    tokenizer = pretrained.load_tokenizer(config.model, added=config.new_tokens)
    nodes = len(census.with_targets(config, federated.load(config), tokenizer).clients)
    run = SimulatedRun(
        config,
        folder,
        run_id or secrets.token_hex(16),
        nodes=nodes,
        keep_updates=keep_updates,
        resume=resume,
    )
    stop = threading.Event()
    done: list[Summary] = []
    failed: list[BaseException] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            done.append(serve(grid, run, observer, stop))
        except BaseException as error:  # noqa: BLE001 - re-raised below; Flower would lose some
            failed.append(error)

    with _folders_of_clients(folder, keep_updates):
        try:
            with _quiet_flower(), terminate_as_interrupt():
                run_simulation(server, app, nodes, backend_config=_backend(config))
        except RuntimeError as error:  # of Flower, for whatever has ended Ray or kept it from work
            if not failed:
                raise RoundError(_why(error)) from error
        finally:
            stop.set()  # the server's thread would otherwise keep an interrupted process alive
    if failed:
        raise failed[0]
    if not done:
        raise RoundError("Flower's simulation engine ended without a result")
    return done[0]


def _why(error: BaseException) -> str:
    """One line for an error of the engine: what began it, and the way without the engine."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = " ".join(str(error).split()) or type(error).__name__
    return f"Flower's simulation engine failed: {first} Try again, or leave --engine flower out"


def _backend(config: RunConfig) -> Any:
    """Returns the resources that Ray may use, and how many of them each client takes."""
    cores = os.cpu_count() or 1
    return {
        "client_resources": {"num_cpus": min(config.threads or cores, cores), "num_gpus": 0.0},
        "init_args": {
            "num_cpus": cores,
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": "ERROR",
        },
    }


@contextmanager
def _folders_of_clients(folder: Path, keep_updates: bool) -> Iterator[None]:
    """Tell the processes of Ray, which inherit the environment, where clients keep files."""
    from corolla.client.app import KEPT, MEMORY, RECORD

    with scratch_folder("memory") as memory:
        os.environ[MEMORY] = str(memory)
        os.environ[KEPT] = str((folder / "clients").resolve())
        os.environ[RECORD] = str((folder / "updates").resolve()) if keep_updates else ""
        try:
            yield
        finally:
            del os.environ[MEMORY], os.environ[KEPT], os.environ[RECORD]


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Failures reach the user as errors; Flower would print each with its own stack of frames."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")
            warnings.filterwarnings("ignore", category=ResourceWarning)
            yield
    finally:
        logger.setLevel(level)
