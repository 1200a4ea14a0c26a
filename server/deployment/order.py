"""Files in the folder by which `corolla server` and its ServerApp, another process, communicate."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corolla.config.load import SERVER, server_table
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.host import wording
from corolla.host.files import write_atomic
from corolla.server.runs.journal import ORDER
from corolla.wire.limits import MAX_SEATS

FOLDER = "COROLLA_SERVER"
"""The environment variable that names the folder: no path of the server enters the app bundle."""
OUTCOME = Path("flower", "outcome.json")
PROCESS = Path("flower", "serverapp.json")
SERVED = Path("flower", "settings.json")
LAST_WORDS = "corolla failed: "
"""Begins the line of a ServerApp that cannot write its outcome; stderr is the executor's log."""


class ServerSettings(BaseModel):
    """The `[server]` table: what belongs to this machine and not to the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str = "0.0.0.0:9092"
    """HOST:PORT for clients; "": nothing is opened, a proxy passes Fleet on to superlink_port."""
    certs: Path | None = None
    """The folder of server.pem, server.key and ca.pem."""
    clients_keys: Path | None = None
    """The folder of the public keys (*.pub) of clients that may join; watched while it runs.

    The name of a file is the name of its client alone (see members.py). Removing a file revokes
    nothing, `corolla members FOLDER --remove NAME` does: Flower keeps a key in its database, and
    one that it has unregistered it never takes again, so that a folder away for a moment would lock
    out all.
    """
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    min_clients: Annotated[int, Field(ge=1)] = 1
    """Clients to wait for before the first round."""
    max_seats: Annotated[int, Field(ge=1, le=MAX_SEATS)] = 1024
    """Of one gateway: devices that it is taken for, at most."""
    superlink_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """On loopback; 0: any that is free."""

    def write(self, folder: Path) -> None:
        """Keep them for a server that goes on with the run of a folder."""
        here = {key: path.resolve() for key, path in self if isinstance(path, Path)}
        kept = self.model_copy(update=here)
        write_atomic(folder / SERVED, (kept.model_dump_json(indent=2) + "\n").encode())


def read_settings(
    file: Path | None, overrides: Mapping[str, object], resumed: Path | None = None
) -> ServerSettings:
    """Settings of this machine: defaults, then the [server] table of the file, then options.

    In the place of defaults a folder that is `resumed` gives those its server had last, so that a
    door on loopback does not open to all networks. Raises ConfigError.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    before = _served(resumed) if resumed else {}
    try:
        return ServerSettings.model_validate(
            {**before, **(server_table(file) if file else {}), **given}
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join([SERVER, *(str(part).replace("_", "-") for part in first["loc"])])
        if first["type"] == "extra_forbidden":
            known = ", ".join(key.replace("_", "-") for key in ServerSettings.model_fields)
            raise ConfigError(f"{name}: there is no such key; known keys are {known}") from error
        told = wording.told(first, ServerSettings.model_fields, null=False)
        raise ConfigError(f"{name}: {told}") from error


def _served(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / SERVED).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"nothing to resume in {folder}: {SERVED} cannot be read, which has the address"
        ) from error


@dataclass(frozen=True)
class RunOrder:
    """A run as the ServerApp gets it."""

    run_id: str
    config: dict[str, Any]
    keep_updates: bool
    min_clients: int
    path: str
    """Where strategies of one's own are found: the folder in which the server was started."""
    max_seats: int = 1024
    clients_keys: str = ""
    """The folder of registered keys and members; "": there is none."""

    def write(self, folder: Path) -> None:
        write_atomic(folder / ORDER, (json.dumps(asdict(self), indent=2) + "\n").encode())


def read_order(folder: Path) -> RunOrder:
    """The run of a folder. Raises ConfigError."""
    try:
        return RunOrder(**json.loads((folder / ORDER).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"nothing to resume in {folder}: {ORDER} cannot be read") from error


@dataclass(frozen=True)
class Outcome:
    """How a ServerApp ended, where it could still say so."""

    status: Literal["done", "stopped", "failed"]
    error: str = ""
    exit_code: int = 0

    def write(self, folder: Path) -> None:
        write_atomic(folder / OUTCOME, json.dumps(asdict(self)).encode())


def read_outcome(folder: Path) -> Outcome | None:
    """None while there is none."""
    try:
        return Outcome(**json.loads((folder / OUTCOME).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def refuse_simulated(config: RunConfig) -> None:
    """Raises ConfigError for settings of simulations: of devices, or sums, that are not there."""
    if config.simulates_time or any(own.drop for own in config.classes.values()):
        raise ConfigError(
            "buffer, deadline-simulated, step-seconds, and speed, upload, download and drop of "
            "classes simulate devices: use corolla simulate"
        )
    if config.secure_sum:
        raise ConfigError(
            "secure-sum=true is for simulations: no device takes part in secure sums yet; leave it "
            "out, or use corolla simulate"
        )


def refuse_unbounded(config: RunConfig) -> None:
    """Raises ConfigError for a run of devices in which one may claim any weight."""
    if config.local_epochs is not None and config.max_examples is None:
        raise ConfigError(
            "with local-epochs the weight of a client is the number of examples it says it has: "
            "set max-examples to the most one may have, or use local-steps"
        )
