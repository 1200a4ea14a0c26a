"""An order of `corolla export`, carried out: what is asked, checked, written and told."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from corolla.artefacts.adapters import write_lora
from corolla.artefacts.card import write_card
from corolla.commands.export import merged, push
from corolla.commands.export.subject import Subject, open_subject, refuse_filled
from corolla.errors import ConfigError

Form = Literal["merged", "adapter", "gguf"]
TYPES: dict[Form, tuple[str, ...]] = {
    "merged": ("float32", "bfloat16", "float16"),
    "adapter": (),
    "gguf": ("f32", "f16", "q8_0"),
}
"""The types that each form is written in."""


@dataclass(frozen=True)
class Order:
    """An order to export a run's folder, an adapter or a model; how, and where to."""

    source: Path
    to: Form
    model: str | None = None
    out: Path | None = None
    dtype: str | None = None
    rank: int | None = None
    push: str | None = None


def export(order: Order) -> Sequence[str]:
    """Carry out an order: a line for each thing that was written.

    Raises ConfigError for an order that makes no sense, ArtefactError for what cannot be written.
    """
    known = TYPES[order.to]
    if order.dtype is not None and order.dtype not in known:
        others = ", ".join(known) or "none: an adapter keeps its own"
        raise ConfigError(f"--dtype {order.dtype}: of --to {order.to} there is {others}")
    if order.push:
        push.refuse_offline(order.push)
    subject = open_subject(order.source, order.model)
    folder = order.out or _usual(subject.folder, order)
    lines = [*_write(subject, folder, order)]
    if order.push:
        lines.append(f"{folder}: sent to {push.push(folder, order.push)}")
    return lines


def _usual(folder: Path, order: Order) -> Path:
    there = folder.resolve()
    what = f"rank-{order.rank}" if order.to == "adapter" and order.rank else order.to
    return there.with_name(f"{there.name}-{what}")


def _write(subject: Subject, folder: Path, order: Order) -> Sequence[str]:
    if order.to == "gguf":
        from corolla.commands.export.llama_cpp import write_gguf

        return write_gguf(subject, folder, order.dtype or "f16", order.rank)  # type: ignore[arg-type]
    if order.to == "adapter":
        refuse_filled(folder)
        saved, error = subject.lora(order.rank)
        write_lora(folder, saved, subject.folder, subject.base_name)
        write_card(folder, subject.info, {"error": error} if error else None)
        return [f"{folder}: rank {saved.spec.rank}, {error:.2%} off in effective weights"]
    if subject.whole:
        raise ConfigError(f"{subject.folder} is a whole model already: any tool loads it as it is")
    if order.dtype is None and order.rank is None:
        difference = merged.export_merged(subject.folder, order.model, folder)
        return [f"{folder}: reloaded, logits within {difference:.1e} of base + adapter"]
    kind = order.dtype or "float32"
    done = merged.write_merged(subject, folder, kind, order.rank)  # type: ignore[arg-type]
    cut = f"rank {order.rank}: {done.error:.2%} off in effective weights; " if order.rank else ""
    return [f"{folder}: {cut}rounding to {kind} takes {done.rounding.share:.2%} of the update"]
