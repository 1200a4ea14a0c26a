"""The settings of a run: one flat list of keys, the same in a TOML file, in --set and in code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import (
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from corolla.config import mistakes
from corolla.config.sections import adapter, learning_rates, machine, population, privacy, training
from corolla.config.sections.rule import Rule, refusal
from corolla.config.sections.section import given
from corolla.config.sections.settings import Settings
from corolla.errors import ConfigError
from corolla.strategies.listing import files, registry
from corolla.types import TrainerName


class RunConfig(Settings):
    """Everything that decides the result of a run, checked before anything is loaded."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_fit(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = given(values)
        if values.get("dp") == "example":  # what is noised is clipped already
            values = {"clip_norm": None, **values}
        return {**learning_rates.defaults(values, _usual_trainer(values)), **values}

    @field_validator("strategy")
    @classmethod
    def _absolute_file(cls, name: str) -> str:
        """As paths of model and data: FILE.py:Class must mean the same from another folder.

        A name of Corolla's own is written with _. Raises ConfigError for a strategy that there is
        not.
        """
        registry.find(name)
        return files.absolute(name) if ":" in name else name.replace("-", "_")

    @field_validator("model", "data", "availability", "public", "explored")
    @classmethod
    def _absolute(cls, name: str | None) -> str | None:
        """A path must mean the same from another folder: run.json is read later."""
        if name is None or name == "embedded" or not Path(name).exists():
            return name
        return str(Path(name).resolve())

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if reason := refusal(RULES, self):
            raise ValueError(reason)
        return self

    @model_validator(mode="wrap")  # the last: it sees what all others find
    @classmethod
    def _in_one_line(
        cls, values: Any, check: ModelWrapValidatorHandler["RunConfig"]
    ) -> "RunConfig":
        """A mistake in code is said as on the command line. Raises ConfigError."""
        try:
            return check(values)
        except ValidationError as error:
            raise mistakes.first_of(error, cls.model_fields) from None

    def of_class(self, name: str) -> "RunConfig":
        """The settings of the clients of a class. Raises ConfigError for an unknown one."""
        if not name:
            return self
        if name not in self.classes:
            raise ConfigError(f"unknown class {name!r}: known are {', '.join(self.classes)}")
        given = self.classes[name].model_dump(
            include=set(RunConfig.model_fields), exclude_none=True
        )
        usual = registry.find(self.strategy).trainers[0]
        if self.trainer_of(name) == "zeroth_order" != usual and "lr" not in given:
            embedded = self.model == "embedded"
            given["lr"] = self.kind.zeroth_order.of(embedded)
        changed = self.model_copy(update=given)
        micro = changed.micro_batch_size
        return changed.model_copy(
            update={"micro_batch_size": micro and min(micro, changed.batch_size)}
        )

    def trainer_of(self, name: str) -> TrainerName:
        """How the clients of a class train."""
        wanted = self.classes[name].trainer if name else None
        return wanted or registry.find(self.strategy).trainers[0]

    @property
    def partial(self) -> bool:
        """True where clients of some class train a part of the blocks alone."""
        return any(own.layers or own.budget for own in self.classes.values())

    @property
    def budgeted(self) -> bool:
        """True where blocks or modules are still to be chosen under a budget."""
        return bool(self.budget) or any(own.budget for own in self.classes.values())

    @property
    def simulates_time(self) -> bool:
        """True where metrics tell how long rounds would take on the devices of the classes."""
        given = (own.speed or own.upload or own.download for own in self.classes.values())
        return bool(self.step_seconds or self.deadline_simulated or self.buffer or any(given))


def _usual_trainer(values: Mapping[str, Any]) -> TrainerName:
    """How clients of the strategy train, unless their class says otherwise."""
    try:
        return registry.find(str(values.get("strategy", "fedavg"))).trainers[0]
    except ConfigError:  # said when the strategy is checked
        return "first_order"


_POOLED = Rule[RunConfig](
    when=lambda run: run.pooled and max(run.cohort or 1, run.buffer or 1) > 1,
    why=lambda run: f"pooled=true leaves one client, found cohort {run.cohort or run.buffer}",
    instead="leave cohort and buffer out",
)


RULES: tuple[Rule[RunConfig], ...] = (
    *population.COHORT,
    _POOLED,
    *adapter.ALPHAS,
    *training.MICRO_BATCH,
    *training.RANKS,
    *population.BUFFER,
    *machine.QUANTIZED,
    *machine.FULL_PRECISION,
    *training.RANKS_OF_ADAPTERS,
    *adapter.PATTERNS,
    *adapter.DORA,
    *adapter.TARGETS,
    *machine.DEVICES,
    *adapter.SELECTION,
    *adapter.STARTS,
    *machine.STARTS,
    *machine.EXPERTS,
    *machine.MAGNITUDES,
    *privacy.SETTINGS,
    *privacy.CLIENTS,
    *privacy.EXAMPLES,
)
"""Combinations that the settings alone refuse: of several that apply, the first is told."""
