"""Adapters through the steps of an edit, a module at a time: what comes out is one adapter."""

from collections.abc import Sequence
from dataclasses import replace
from operator import is_

import torch
from torch import Tensor

from corolla.artefacts.adapters import SavedLora
from corolla.edits import heads
from corolla.edits.grammar import Step
from corolla.edits.job import Job
from corolla.edits.table import bind
from corolla.edits.update import Full, Low, Update
from corolla.errors import ArtefactError
from corolla.tensors import factors
from corolla.types import LoraSpec, Params


def shapes_of(adapters: Sequence[SavedLora]) -> dict[str, tuple[int, int]]:
    """(out, in) of the modules that one of the adapters is on, by name.

    Raises ArtefactError for a module of two shapes.
    """
    found: dict[str, tuple[int, int]] = {}
    for number, saved in enumerate(adapters, start=1):
        for name in factors.modules(saved.update):
            own = (len(saved.update[name + factors.B]), saved.update[name + factors.A].shape[1])
            if found.setdefault(name, own) != own:
                raise ArtefactError(
                    f"adapters of unlike models: {name} is {found[name][0]} x {found[name][1]} in "
                    f"one before, {own[0]} x {own[1]} in number {number}"
                )
    if not found:
        raise ArtefactError("the adapters have no factors: there is nothing to edit")
    return found


def edit(adapters: Sequence[SavedLora], steps: Sequence[Step], job: Job, labels: int) -> SavedLora:
    """One adapter from several; what was cut and changed is noted in the job.

    A module that an adapter lacks counts as zero. What no step touches keeps its bits. Memory is
    that of the adapters, and of the matrices of one module where a step needs them. Raises
    ArtefactError and ConfigError as the steps do.
    """
    bound = [bind(step, job) for step in steps]
    head = _head(adapters, steps, labels)
    done: dict[str, Low] = {}
    job.changed = [0] * len(bound)
    for module in sorted(job.shapes):
        updates: Sequence[Update] = [_update(saved, module, job) for saved in adapters]
        for number, step in enumerate(bound):
            before, updates = updates, step(module, updates)
            _check(updates, module, steps[number])
            same = len(before) == len(updates) and all(map(is_, before, updates))
            job.changed[number] += not same
        (last,) = updates
        if isinstance(last, Full):
            raise ValueError(f"{module} has no factors after the last step")
        done[module] = last
    update, spec = _adapter(done, adapters[0].spec)
    return replace(adapters[0], update=update, spec=spec, heads=head)


def _check(updates: Sequence[Update], module: str, step: Step) -> None:
    """Raises ArtefactError where a step has made values that fp32 cannot hold."""
    for own in updates:
        parts = (own.matrix,) if isinstance(own, Full) else (own.left, own.right)
        if not all(bool(torch.isfinite(part.float()).all()) for part in parts):
            raise ArtefactError(
                f"{step.name} makes values of {module} that are too large for fp32: give it a "
                f"smaller number"
            )


def _update(saved: SavedLora, module: str, job: Job) -> Low:
    if module + factors.A not in saved.update:
        out, into = job.shapes[module]
        return Low(torch.zeros(out, 0).double(), torch.zeros(0, into).double())
    b, a = (saved.update[module + role].double() for role in (factors.B, factors.A))
    return Low(b, a, saved.spec.scaling)


def _head(adapters: Sequence[SavedLora], steps: Sequence[Step], labels: int) -> Params:
    """The head after all steps; where adapters are combined it is the mean of theirs."""
    parts = [saved.heads for saved in adapters]
    for step in steps:
        if step.form.combines:
            equal = [1 / len(parts)] * len(parts)
            weights = step.values if step.form.many and step.values else equal
            parts = [heads.merge(parts, weights)]
        elif step.name == "balance-head":
            parts = [heads.balance(head, labels) for head in parts]
    (found,) = parts
    return found


def _adapter(done: dict[str, Low], first: LoraSpec) -> tuple[Params, LoraSpec]:
    """All modules at one rank, in fp32; at the first adapter's scaling where all still have it."""
    rank = max(1, *(low.rank for low in done.values()))
    kept = rank == first.rank and all(low.scaling == first.scaling for low in done.values())
    update: dict[str, Tensor] = {}
    for module, low in done.items():
        right = low.right if kept else low.right * low.scaling
        update[module + factors.B] = low.left.float()
        update[module + factors.A] = right.float()
    return factors.pad(update, rank), first if kept else LoraSpec(rank, float(rank))
