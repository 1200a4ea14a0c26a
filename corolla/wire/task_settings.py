"""The settings of a task, which stand beside its payload as the JSON text in its header."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corolla.errors import WireError
from corolla.types import LoraSpec, Payload
from corolla.wire import compression, ranges


@dataclass(frozen=True)
class RunSettings:
    """The settings that every task tells of its run, a hello included."""

    run: Mapping[str, Any]
    """The settings of the run, by their keys."""
    labels: Sequence[str] | None = None
    """Of a classification task, for devices that know their own rows only; None: not told."""

    def to_json(self) -> str:
        """The settings of a hello."""
        told = {"run": self.run}
        return json.dumps(told if self.labels is None else {**told, "labels": [*self.labels]})

    @classmethod
    def from_json(cls, text: str) -> "RunSettings":
        """Reads them from the settings of any task. Raises WireError when they cannot be read."""
        try:
            told = json.loads(text or "{}")
        except (ValueError, RecursionError) as error:
            raise WireError("the task's settings are not JSON") from error
        if not isinstance(told, dict):
            raise WireError("the task's settings are not an object")
        run, labels = told.get("run", {}), told.get("labels", [])
        if not isinstance(run, dict) or not isinstance(labels, list):
            raise WireError("the task's settings are not an object with run and labels")
        return cls(run, [str(label) for label in labels])


@dataclass(frozen=True)
class TaskSettings:
    """The settings that a task to train or to evaluate tells its receiver."""

    lora: LoraSpec
    """Rank and scaling of its adapter."""
    kind: str
    """The name of its class; "" without classes."""
    population: int
    """How many clients can take part at a time."""
    accepted: int
    """The last round whose update of the receiver was accepted, 0 before."""
    run: Mapping[str, Any]
    """The settings of the run, by their keys."""
    like: Payload | None = None
    """Of the form of what is compressed of the broadcast; None: nothing."""
    labels: Sequence[str] | None = None
    """Of a classification task, for devices that know their own rows only; None: not told."""
    fresh: Payload | None = None
    """For a gateway, which has no model: of the form of an adapter of its phones."""
    chosen: Sequence[str] = ()
    """Units that a gateway's phones train, of a strategy that is Choosing."""

    def to_json(self) -> str:
        """The settings as a task has them: forms without values, nothing of what is None."""
        return json.dumps(
            {
                "lora": vars(self.lora),
                "class": self.kind,
                "population": self.population,
                "accepted": self.accepted,
                **({} if self.like is None else {"form": compression.form(self.like)}),
                **({} if self.labels is None else {"labels": [*self.labels]}),
                **({} if self.fresh is None else {"fresh": compression.form(self.fresh)}),
                **({"chosen": [*self.chosen]} if self.chosen else {}),
                "run": self.run,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "TaskSettings":
        """Reads them from the settings of a task; payloads are on the meta device.

        Raises WireError for a form that is none and a number out of its range, and for other
        settings LookupError, TypeError or ValueError, of which each receiver says what is wrong in
        its own words.
        """
        try:
            told = json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        lora = LoraSpec(**told["lora"])
        for name in ("rank", "alpha"):
            ranges.check(name, getattr(lora, name))
        for name in ("population", "accepted"):
            ranges.check(name, told[name])
        form, fresh = told.get("form"), told.get("fresh")
        return cls(
            lora,
            told["class"],
            told["population"],
            told["accepted"],
            told["run"],
            None if form is None else compression.blank(form),
            told.get("labels"),
            None if fresh is None else compression.blank(fresh),
            tuple(map(str, told.get("chosen", ()))),
        )
