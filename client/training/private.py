"""A client under example-level differential privacy: what it pays, shows and tells.

How its gradients are clipped and noised is in dpsgd.py; here is what surrounds the training.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from corolla.client.training.dpsgd import SelfTestError
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, Encoder
from corolla.data.rows import Example, units
from corolla.errors import ArtefactError, ConfigError, CorollaError, RoundError, StoppedError
from corolla.host import logs
from corolla.interfaces import Client, ForwardTrainer, LocalTrainer
from corolla.privacy.example_level import ExampleLevel
from corolla.privacy.ledger import Ledger, Limit
from corolla.types import PER_USER, Payload, Update
from corolla.wire.messages import Kind, Task

_PUBLIC = ("local_steps",)
"""Metrics of training that are not measured on data."""

_PUBLIC_ERRORS = (ConfigError, SelfTestError, StoppedError)
"""Errors of settings, of who stops, and of the comparison before the first step: of no example."""

_CHARACTERS = 32
"""Characters of a row that are looked at for each token that it may have."""

_NOTHING = Encoded((), ())
"""The place of a row that gave no sequence, among those of its user."""

_log = logs.logger("worker")


class _Trainer:
    """The methods of a `LocalTrainer` alone."""

    def __init__(self, whole: LocalTrainer) -> None:
        self.init = whole.init
        self.fit = whole.fit


class _Forward:
    """The members of a `ForwardTrainer` alone."""

    def __init__(self, whole: ForwardTrainer) -> None:
        self.queries = whole.queries
        self.walk = whole.walk


class Guarded:
    """A client under dp=example as its strategy sees it: the members of `interfaces.Client` alone.

    A strategy of a user's own so does not come across examples, or a trainer without privacy, by
    accident. It is no sandbox: code of the same process that means to find them will.
    """

    def __init__(self, whole: Client) -> None:
        self.seed, self.lora, self.population = whole.seed, whole.lora, whole.population
        self.kept, self.kind = whole.kept, whole.kind
        self._trainer: Callable[[], LocalTrainer] = lambda: _Trainer(whole.trainer)
        self._forward: Callable[[], ForwardTrainer] = lambda: _Forward(whole.forward)

    @property
    def trainer(self) -> LocalTrainer:
        return self._trainer()

    @property
    def forward(self) -> ForwardTrainer:
        return self._forward()


def refuse(config: RunConfig, limit: Limit | None, kind: Kind) -> None:
    """Raises ConfigError for what would tell of single examples more than was agreed on."""
    if limit and config.dp != "example":
        raise ConfigError(
            f"this device gives at most epsilon {limit.epsilon:g} of its examples: it "
            f"takes part in runs with dp=example alone, found dp={config.dp}"
        )
    if kind == Kind.EVALUATE and config.dp != "none":
        raise ConfigError(f"dp={config.dp}: nothing is measured on this device's examples")


def spend(ledger: Ledger, limit: Limit | None, task: Task, private: ExampleLevel) -> float:
    """Writes down what a round costs; the result is what this run has cost with it.

    Raises ConfigError when that is more than the run or the owner allows, or the owner's delta
    protects nobody; RoundError when the ledger cannot be read or written.
    """
    release = private.release
    if limit and limit.delta * private.examples >= 1:
        _log.error("no privacy limit", delta=limit.delta, examples=private.examples)
        raise ConfigError(
            "the delta of this device's own privacy limit is no protection among its examples: "
            "its owner has to set one below 1 / examples"
        )
    try:
        run = ledger.epsilon(private.delta, task.run_id, [release])
        if private.budget is not None and run > private.budget:
            raise ConfigError(
                f"privacy budget: this round would bring the run to epsilon {run:.4g} of "
                f"{private.budget:g} at delta {private.delta:g} for this client's examples"
            )
        if limit:
            life = ledger.epsilon(limit.delta, more=[release])
            if life > limit.epsilon:  # by how much tells of runs of others
                _log.error("privacy limit", epsilon=life, limit=vars(limit))
                raise ConfigError("this round would exceed this device's own privacy limit")
        ledger.spend(task.run_id, task.round, release)
    except ArtefactError as error:  # names a file: for the owner
        _log.error("no privacy ledger", why=str(error))
        raise RoundError(
            "this device's privacy ledger cannot be used; its own log says why"
        ) from error
    return run


def once(private: ExampleLevel) -> ExampleLevel:
    """An ExampleLevel that refuses more steps than the ledger was charged for."""
    left = iter(range(private.steps))

    def uniform(count: int) -> Tensor:
        if next(left, None) is None:
            raise ConfigError(
                f"dp=example: the strategy takes more than the {private.steps} steps of a round"
            )
        return private.uniform(count)

    return replace(private, uniform=uniform)


def sequences(encoder: Encoder, rows: Sequence[Example]) -> list[Encoded]:
    """At most one sequence of each row, the start of a longer one, none of one that fails.

    Where rows name users, one without tokens stands for it, so that the row still takes its time.
    How long a row is decides neither how many sequences there are nor, beyond what may fill one,
    how long it takes to make them; a failure would tell of the row.
    """
    longest = encoder.max_length - bool(encoder.labels)  # a mask of ones would be left out
    encoder = replace(encoder, max_length=longest)
    found, failed, shortened = list[Encoded](), 0, 0
    for number, (row, unit) in enumerate(zip(rows, units(rows), strict=True)):
        most = _CHARACTERS * longest
        try:
            own = encoder(row.shortened(most))
        except Exception:  # noqa: BLE001 - of a tokenizer, or of a row that it cannot take
            own, failed = [], failed + 1
        shortened += len(own) > 1 or row.size > most
        own = own[:1] if own or unit is None else [_NOTHING]
        found += [replace(first, example=number, unit=unit) for first in own]
    if failed or shortened:
        _log.warning("rows in part", of=len(rows), not_encoded=failed, cut=shortened)
    return found


def answered(with_rows: Callable[[], Update], without: Callable[[], Update]) -> Update:
    """An update made with a client's rows; where that fails, one made without any: noise alone.

    Raises ConfigError, SelfTestError and StoppedError, which no row decides, and RoundError where
    the update fails without rows as well.
    """
    try:
        return with_rows()
    except _PUBLIC_ERRORS:
        raise
    except Exception as error:  # noqa: BLE001 - an error would tell of rows
        _log.error("trained without rows", why=_why(error))
    with withheld():
        return without()


@contextmanager
def withheld() -> Iterator[None]:
    """Keeps for the owner's log what goes wrong while an update is made from examples.

    Raises RoundError in place of any error but those of settings, of who stops, and of the
    comparison before the first step, which looks at no example.
    """
    try:
        yield
    except _PUBLIC_ERRORS:
        raise
    except Exception as error:
        _log.error("not trained", why=_why(error))
        raise RoundError("this device could not train; its own log says why") from error


def published(update: Update, private: ExampleLevel, epsilon: float) -> Update:
    """An update with what is known without its data, and what its run has cost with it.

    Values that are not finite, after noise and whatever a strategy makes of it, become 0.
    """
    known = {name: update.metrics[name] for name in _PUBLIC if name in update.metrics}
    most = min(private.examples, private.steps * private.batch)
    unit = {PER_USER: 1.0} if private.unit == "user" else {}
    metrics = {**known, "epsilon": epsilon, **unit}
    return Update(_finite(update.payload), most, metrics, _finite(update.keep))


def _finite(payload: Payload) -> Payload:
    return {
        group: {name: torch.nan_to_num(tensor, 0, 0, 0) for name, tensor in params.items()}
        for group, params in payload.items()
    }


def _why(error: Exception) -> str:
    """For the owner's log; the text of an error of other code may be of the data."""
    return str(error) if isinstance(error, CorollaError) else type(error).__name__
