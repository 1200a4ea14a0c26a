"""An order of `corolla edit`, carried out: adapters read, edited, and written as one."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from corolla.artefacts.adapters import SavedLora, read_addition, write_lora
from corolla.artefacts.card import write_brief_card
from corolla.commands import artefacts
from corolla.commands.export.subject import refuse_filled
from corolla.edits import grammar, pipeline
from corolla.edits.job import Job
from corolla.errors import ArtefactError, ConfigError
from corolla.host.files import making_folder
from corolla.models.files import adapter_files
from corolla.tensors import factors
from corolla.version import __version__

RECORD = "edit.json"
"""The file beside an edited adapter that says what it was made of, and how."""

_FINDING = ("safe", "intruders", "reset")
"""Steps that change the modules alone in which they find something."""


@dataclass(frozen=True)
class Order:
    """An order to edit adapters: run folders or adapters, the steps as written, where to, how."""

    adapters: Sequence[Path]
    steps: str
    out: Path
    model: str | None = None


@dataclass(frozen=True)
class Edited:
    """The outcome of an order."""

    folder: str
    rank: int
    error: float
    """The largest ‖exact - cut‖_F / ‖exact‖_F of the steps that cut, over all modules; else 0."""
    steps: list[str]
    changed: list[int]
    """In how many modules each step has changed something."""
    modules: int

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    @property
    def line(self) -> str:
        """The sentence that is shown."""
        cut = f", {self.error:.2%} off in effective weights by what was cut" if self.error else ""
        found = "".join(
            f"; {step} changed {changed} of {self.modules} modules"
            for step, changed in zip(self.steps, self.changed, strict=True)
            if step.startswith(_FINDING)
        )
        return f"{self.folder}: rank {self.rank}{cut}{found}; {RECORD} says how it was made"


def edit(order: Order) -> Edited:
    """Carry out an order, and write the adapter whole or not at all.

    Raises ConfigError for steps or a folder that make no sense, ArtefactError and ModelError for
    adapters or models that do not fit.
    """
    refuse_filled(order.out)
    steps = grammar.read(order.steps, len(order.adapters))
    written = grammar.texts(order.steps)
    folders = [artefacts.result_of(own) for own in order.adapters]
    saved = [_read(folder) for folder in folders]
    base = order.model or _base(folders)
    labels = _labels(folders)
    job = Job(
        base=base,
        shapes=pipeline.shapes_of(saved),
        rank=max(own.spec.rank for own in saved),
        transposed=_alike(folders, saved, "fan_in_fan_out"),
        some_blocks=any(own.config.get("layers_to_transform") is not None for own in saved),
    )
    made = pipeline.edit(saved, steps, job, len(labels))
    made = replace(made, config=_config(saved, made))
    record = {
        "corolla": __version__,
        "steps": written,
        "base": adapter_files.portable(base, order.out),
        "adapters": [_told(folder, own) for folder, own in zip(folders, saved, strict=True)],
        "rank": made.spec.rank,
        "error": job.error,
        "changed": job.changed,
        "cuts": [own.to_json() for own in job.cuts],
    }
    with making_folder(order.out) as scratch:
        write_lora(scratch, made, folders[0], base)
        (scratch / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        what = f"Made by `corolla edit` of {len(saved)} adapters with: {' '.join(written)}."
        write_brief_card(scratch, what, base)
    return Edited(str(order.out), made.spec.rank, job.error, written, job.changed, len(job.shapes))


def _read(folder: Path) -> SavedLora:
    """An adapter. Raises ArtefactError for a whole model, and where factors mean something else."""
    if artefacts.is_model(folder):
        raise ArtefactError(f"{folder} is a whole model: only adapters of LoRA are edited")
    return read_addition(folder)


def _base(folders: Sequence[Path]) -> str:
    """The base model of all adapters. Raises ConfigError where they name several."""
    named = {adapter_files.base_of(folder): folder for folder in folders}
    if len(named) > 1:
        told = ", ".join(f"{name} ({folder})" for name, folder in named.items())
        raise ConfigError(
            f"the adapters are of several bases: {told}; port them to one with corolla port, or "
            f"name it with --model where it is the same"
        )
    return next(iter(named))


def _labels(folders: Sequence[Path]) -> Sequence[str]:
    """The labels of classifiers, () of others. Raises ConfigError where adapters have unlike ones.

    Where no run says them their number counts.
    """
    first, *others = [artefacts.labels_of(folder) for folder in folders]
    for folder, labels in zip(folders[1:], others, strict=True):
        if list(labels) != list(first):
            raise ConfigError(
                f"{folders[0]} has the labels {', '.join(first) or 'none'}, {folder} "
                f"{', '.join(labels) or 'none'}: only heads of the same labels in the same order "
                f"can be combined"
            )
    return first


def _alike(folders: Sequence[Path], saved: Sequence[SavedLora], key: str) -> bool:
    """A setting that all adapters share. Raises ArtefactError where they differ in it."""
    found = [bool(own.config.get(key)) for own in saved]
    if len({*found}) > 1:
        raise ArtefactError(f"{folders[found.index(True)]} has {key}, others have not")
    return found[0]


def _config(saved: Sequence[SavedLora], made: SavedLora) -> dict[str, Any]:
    """The configuration of the first adapter, on the modules that the edited one has."""
    config = dict(saved[0].config)
    modules = factors.modules(made.update)
    if modules != factors.modules(saved[0].update):
        whole = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
        config |= {**whole, "target_modules": modules}
    return config


def _told(folder: Path, saved: SavedLora) -> dict[str, Any]:
    return {
        "name": folder.resolve().parent.name + "/" + folder.resolve().name,
        "sha256": adapter_files.adapter_hash(folder),
        "rank": saved.spec.rank,
        "scaling": saved.spec.scaling,
    }
