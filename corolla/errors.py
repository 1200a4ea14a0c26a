"""Errors of Corolla, as a tree; every message says what was asked, what was found and what to do.

CorollaError                 anything a user can cause; the command line prints it in one line
├── ConfigError              an option or a combination of options (exit code 2)
├── DataError                a data file, a line of it, or a partition
├── ModelError               a base model, an adapter, or modules that cannot carry LoRA
├── WireError                a message that does not match its envelope
│   ├── SchemaError          one of another version of the wire schema
│   └── NotFiniteError       one with values that are NaN or infinite
├── RoundError               a round that could not be completed
│   └── DivergedError        the loss is not finite
├── SecureSumError           a step of a secure sum that a member or the server refuses
├── PeerError                a process beside this one that does not answer
├── DiskLimitError           what a run would keep on a device is more than its owner allows
├── StoppedError             the user or the engine has stopped the run
└── ArtefactError            a checkpoint or an adapter folder
"""

from collections.abc import Mapping, Sequence
from typing import Any


class CorollaError(Exception):
    """Base of all errors with a message meant for the user; `exit_code` is the command's."""

    exit_code = 1


class ConfigError(CorollaError):
    """An option, a config key, or a combination that is refused before anything is loaded."""

    exit_code = 2


class DataError(CorollaError):
    """A data set that is missing, malformed (the message names the line) or has no clients left."""


class ModelError(CorollaError):
    """A base model or adapter that cannot be loaded, or LoRA settings it cannot carry."""


class WireError(CorollaError):
    """A message whose schema, run, round, version, size or tensors are not what was agreed."""


class SchemaError(WireError):
    """A message of another version of the wire schema."""


class NotFiniteError(WireError):
    """A message with values that are NaN or infinite."""


class RoundError(CorollaError):
    """A round that could not be completed: too few valid replies.

    `verdicts` says of each reply what became of it (client → server.rounds.verdicts.Verdict).
    """

    def __init__(self, message: str, verdicts: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.verdicts: Mapping[str, Any] = verdicts or {}


class DivergedError(RoundError):
    """The training loss of a client is NaN or infinite."""


class SecureSumError(CorollaError):
    """A step of a secure sum that a member or the server refuses, in one line.

    `again` is True where another attempt of the same round may follow: nothing was opened. `named`
    are the numbers of members whose messages are to blame.
    """

    def __init__(self, message: str, again: bool = False, named: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.again = again
        self.named = tuple(named)


class PeerError(CorollaError):
    """A trainer or a gateway that does not answer; `gone`: it was not there, or ended meanwhile."""

    def __init__(self, message: str, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class DiskLimitError(CorollaError):
    """A run, or a gateway, that would take more of a device's disk than its owner allows."""


class StoppedError(CorollaError):
    """A run that was stopped from outside; the message says what is kept."""


class ArtefactError(CorollaError):
    """A checkpoint, an output folder or a saved adapter that is not what it should be."""
