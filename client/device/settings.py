"""Settings that belong to a device and not to a run: its data, its model and its limits.

A server's settings decide how it trains; these decide on what, and with how much of the machine.
They come from options and from a TOML file with the same names.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from corolla.errors import ConfigError
from corolla.host import wording
from corolla.host.text import nearest, parse_bytes
from corolla.storage.disk import USUAL, DiskLimits

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
Positive = Annotated[int, Field(ge=1)]


def state_folder() -> Path:
    """Where a device keeps what is its own, unless it says where."""
    root = os.environ.get("XDG_STATE_HOME", "~/.local/state")
    return Path(root).expanduser() / "corolla"


class Own(BaseModel):
    """The settings of a device."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    server: str = Field(description="HOST:PORT of corolla server")
    root_certificates: Path | None = Field(
        None, description="of the server's CA, in PEM; None: those of the system"
    )
    data: str = Field(description="file, folder or hub set; all rows are this client's")
    columns: dict[str, str] = Field({}, description="names of its columns, by ours: {prompt=body}")
    splits: dict[str, str] = Field({}, description="names of its splits, by ours: {train=all}")
    subset: str | None = Field(None, description="configuration of a hub set; None: the only one")
    name: str | None = Field(None, description="in the federation; None: made from the key")
    model: str = Field("embedded", description="as for a run: name, folder or .gguf file")
    state: Path = Field(
        default_factory=state_folder, description="folder of the key, the logs and what is kept"
    )

    memory: int | None = Field(None, description="bytes that training may take: 2GB; None: any")
    run_disk: Positive = Field(
        USUAL.run, description="bytes that one run may keep on this device's disk"
    )
    disk: Positive = Field(
        USUAL.whole,
        description="bytes that all runs and a gateway's files may keep",
        validate_default=True,  # it may be less than the other
    )
    device: str = Field("auto", description="cpu, cuda, mps; auto: the best there is")
    threads: Annotated[int, Field(ge=0)] = Field(0, description="of the CPU; 0: all cores")
    quantization: Literal["none", "8bit", "4bit"] = "none"
    micro_batch_size: Positive | None = Field(None, description="None: as the run says")
    gradient_checkpointing: bool = False

    epsilon: Annotated[float, Field(gt=0)] | None = Field(
        None, description="that this device's examples may cost in all runs; None: each run's own"
    )
    delta: Annotated[float, Field(gt=0, lt=0.1)] = Field(1e-5, description="of that epsilon")

    allow: list[str] = Field(
        [], description="strategies of one's own (FILE.py:Class, module:Class) a server may name"
    )

    @property
    def disk_limits(self) -> DiskLimits:
        """Bytes of the disk that runs may take."""
        return DiskLimits(self.run_disk, self.disk)

    @property
    def models(self) -> Path:
        """The folder of base models that gateways have offered."""
        return self.state / "models"

    @field_validator("columns", "splits", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        """Names of a table, or of options that each give one as OURS=ITS."""
        if not isinstance(value, list | tuple):
            return value
        pairs = [str(own).partition("=") for own in value]
        if not all(ours and its for ours, _, its in pairs):
            raise ValueError("expected names as prompt=body")
        return {ours: its for ours, _, its in pairs}

    @field_validator("memory", "run_disk", "disk", mode="before")
    @classmethod
    def _bytes(cls, value: object) -> object:
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("disk")
    @classmethod
    def _holds_a_run(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("run_disk", 0):
            raise ValueError("expected at least the bytes of --run-disk")
        return value

    @field_validator("server")
    @classmethod
    def _address(cls, value: str) -> str:
        found = _ADDRESS.fullmatch(value)
        if not found or not 0 < int(found[2]) < 65536:
            raise ValueError("expected HOST:PORT, without https://")
        return value

    @field_validator("name")
    @classmethod
    def _allowed(cls, value: str | None) -> str | None:
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError("a name has 1 to 64 characters of A-Z a-z 0-9 . _ -")
        return value

    @field_validator("state", "root_certificates")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value.expanduser().absolute() if value else None

    @field_validator("data")
    @classmethod
    def _there(cls, value: str) -> str:
        if Path(value).suffix in (".jsonl", ".json") and not Path(value).is_file():
            raise ValueError("there is no such file")  # known before torch is imported
        return str(Path(value).resolve()) if Path(value).exists() else value

    @field_validator("model")
    @classmethod
    def _found(cls, value: str) -> str:
        return str(Path(value).resolve()) if Path(value).exists() else value


def load(file: Path | None, options: Mapping[str, object]) -> Own:
    """A TOML file's settings with the options put over them. Raises ConfigError with one line."""
    # 0 and "" say nothing, but an epsilon of 0.0 must not be taken for no limit at all.
    given = {k: v for k, v in options.items() if v or isinstance(v, float)}
    values = {**(_read(file) if file else {}), **given}
    for key in values.keys() - Own.model_fields.keys():
        hint = nearest(key, Own.model_fields) or f"known are {', '.join(Own.model_fields)}"
        raise ConfigError(f"unknown key {key!r} in {file}: {hint}")
    try:
        return Own.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        if first["type"] == "missing":
            raise ConfigError(f"{option} is missing") from error
        told = wording.told(first, Own.model_fields, null=False)
        raise ConfigError(f"{option}: {told}") from error


def state_of(file: Path | None, options: Mapping[str, object]) -> Path:
    """The state folder of a device that need not have data or a server yet. Raises ConfigError."""
    state = options.get("state") or (_read(file) if file else {}).get("state") or state_folder()
    return Path(str(state)).expanduser().absolute()


def _read(file: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config file {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file} is not TOML: {error}") from error
    return {key.replace("-", "_"): value for key, value in found.items()}
