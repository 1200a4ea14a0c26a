"""The proof that a saved model is the trained one: another process loads it, from the files.

The process has another seed, no memory of the run, and plain transformers and peft (reader.py): it
reads the base model from disk, so that what is in no file cannot be right by chance.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from corolla import seeds
from corolla.artefacts import served
from corolla.artefacts.served import Served
from corolla.config.run import RunConfig
from corolla.errors import ArtefactError
from corolla.evaluation import reader
from corolla.evaluation.other_process import Answer, OtherProcess
from corolla.evaluation.rounding import rounding
from corolla.models import pretrained
from corolla.models.trainable import Trainable
from corolla.server.runs.evaluate import Evaluator
from corolla.types import Adapter, Metrics

_EXACT = 1e-5
"""Largest difference of logits in fp32, of those of size 1: sums in another order."""
_ROUNDED = 0.1
"""The same of a base in half precision or quantised, where each layer's output is rounded."""
_AGAIN = 16
"""Times that by which rounding alone moved the logits, with other factors of the same products."""
_UPDATE = 1e-6
"""Largest relative distance of a saved update from the server's."""


@dataclass(frozen=True)
class Proof:
    """The findings of another process on a saved model."""

    difference: float
    """Largest difference of its logits from the server's."""
    tolerance: float
    """Largest difference that is allowed."""
    loss_difference: float
    """Of the rows' mean loss from the server's, in nats."""
    rows: int
    """Held-out sequences that were read."""
    positions: int
    """Places in the rows where logits were compared."""
    reader: str
    """PEFT, or transformers for a whole model."""
    dtype: str
    """Number type in which the base, or the whole model, was loaded."""
    quantization: str
    seed: int
    """Of torch in the other process."""

    @property
    def line(self) -> str:
        """The claim that was proven, as the end of a sentence."""
        what = "with the base anew from disk" if self.reader == "PEFT" else "from disk"
        how = "" if self.quantization == "none" else f", {self.quantization}"
        return (
            f"another process loads it with plain {self.reader}, {what}, dtype={self.dtype}{how}: "
            f"logits of {self.rows} held-out rows within {self.difference:.1e} of the server's, "
            f"{self.tolerance:.1e} allowed"
        )

    def to_json(self) -> dict[str, Any]:
        """The object of run.json beside the difference itself."""
        facts = {name: value for name, value in asdict(self).items() if name != "difference"}
        return {"claim": self.line, **facts}


def save(
    judge: Evaluator, adapter: Adapter, folder: Path, other: OtherProcess, final: Metrics
) -> tuple[Path, Proof, Served | None]:
    """The folder of the model, which is there once it is proven, the proof, and what is served.

    `final` are the scores of the model. Nothing is served of what has no rank. See `prove`.
    """
    there = folder / judge.model.artefact
    unproven = there.with_name(there.name + ".unproven")
    judge.save(adapter, unproven)
    smaller = None
    if judge.config.plain_lora:
        rank = judge.config.served_rank
        smaller = served.prepare(unproven, rank, final["loss"], judge.score)
    proof = prove(judge, adapter, unproven, other)
    shutil.rmtree(there, ignore_errors=True)
    unproven.replace(there)
    if smaller:
        smaller = served.write(smaller, folder, there, judge.config.model)
    return there, proof, smaller


def prove(judge: Evaluator, adapter: Adapter, folder: Path, other: OtherProcess) -> Proof:
    """Compare a saved model, as `other` loads it, with the server's.

    Also compares the effective updates themselves, in fp64, because logits of a half-precision or
    quantised base say little, and the base on disk with the one that was trained, bit for bit. Ends
    the evaluator: there is not always room for two models. Where large products of an adapter and
    its blocks make rounding visible in logits, more is allowed, as much as it was measured to need.
    Raises ArtefactError when a difference is more than that, or when something is random that is in
    no file.
    """
    model, config = judge.model, judge.config
    rows = judge.probe
    model.show(adapter, config.lora)
    ours, loss = reader.measure(model.model, rows)
    apart = model.distance_to(folder, config.lora)
    if not apart <= _UPDATE:
        raise ArtefactError(
            f"{folder} as saved is another update than the server's: {apart:.2e} apart"
        )
    request = _request(judge, folder)
    moved = rounding(model, config.lora, rows, ours) if config.kind.factors else 0.0
    model.release()
    answer, theirs = other.ask(request, rows)
    _refuse_other_base(model, folder, answer)
    exact = config.dtype == "float32" and config.quantization == "none"
    size = max(1.0, float(ours.abs().max()))
    least = max(size * _EXACT, _AGAIN * moved) if exact else size * _ROUNDED
    tolerance = min(least, size * _ROUNDED)
    difference = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
    # A loss moves by at most twice what logits do.
    if not (difference <= tolerance and abs(loss - answer.loss) <= 2 * tolerance):
        raise ArtefactError(
            f"{folder} loaded in another process differs from the server's model by "
            f"{difference:.2e} in the logits (allowed {tolerance:.0e}): do not use it"
        )
    return Proof(
        difference=difference,
        tolerance=tolerance,
        loss_difference=abs(loss - answer.loss),
        rows=len(rows["input_ids"]),
        positions=len(ours),
        dtype=config.dtype,
        quantization=config.quantization,
        seed=request["seed"],
        reader="PEFT" if model.artefact == "adapter" else "transformers",
    )


def _request(judge: Evaluator, folder: Path) -> dict[str, Any]:
    config, base = judge.config, judge.model.base
    return {
        "saved": str(folder.resolve()),
        "base": base.path,
        "whole": judge.model.artefact == "model",
        "labels": len(judge.labels) if base.task == "classify" else 0,
        "dtype": config.dtype,
        "quantised": pretrained.quantised(config),
        "device": str(judge.model.device),
        "threads": torch.get_num_threads(),
        "seed": _other_seed(config),
        "pad_id": base.pad_id,
        "new_head": sorted(base.missing) if config.new_head and base.task == "classify" else [],
    }


def _other_seed(config: RunConfig) -> int:
    """A seed that nothing of the run is drawn from."""
    return seeds.derive(config.seed, "proof") % (1 << 31)


def _refuse_other_base(model: Trainable, folder: Path, answer: Answer) -> None:
    """Raises ArtefactError where weights are random, or the base on disk is not what was loaded."""
    if answer.drawn:
        raise ArtefactError(
            f"{folder} lacks {', '.join(answer.drawn[:3])}, which the base model has not either: "
            f"each process that loads it draws others"
        )
    if model.artefact == "adapter" and answer.stored != model.base.stored:
        raise ArtefactError(
            f"base model {model.base.path} on disk (sha256 {answer.stored[:12]}) is not the one "
            f"of this run ({model.base.stored[:12]}) any more: {folder} goes with the latter alone"
        )
