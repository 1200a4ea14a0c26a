"""Batches of private rows, in a form that is fixed before any row is looked at.

What a step computes then depends on how many rows were drawn, never on what is in them: neither
its time nor its memory tells of a row.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from corolla.data.encoding import IGNORE, Encoded, collate
from corolla.models.trainable import Trainable


def blank(model: Trainable) -> Encoded:
    """A sequence without a target, which stands for a row of which nothing is left.

    Its loss is 0 for any model, and costs what another costs.
    """
    ids = [model.base.pad_id]
    return Encoded(ids, IGNORE if model.base.task == "classify" else [IGNORE])


def filled(example: Sequence[Encoded], blank: Encoded) -> list[Encoded]:
    """The sequences of an example, a blank for each row of which nothing is left; at least one."""
    found = [s if s.input_ids else replace(blank, example=s.example, unit=s.unit) for s in example]
    return found or [blank]


def padded(model: Trainable, part: Sequence[Encoded], length: int | None) -> dict[str, Tensor]:
    """`collate` at `length` tokens a sequence; None: at those of the longest.

    At a given length a causal model gets no mask: its tokens never see the padding, which is at
    their right, and transformers takes another way where a mask happens to be all ones. Raises
    ValueError for a sequence that is longer.
    """
    batch = collate(part, model.base.pad_id, model.device, length)
    if length and model.base.task == "causal":
        del batch["attention_mask"]
    return batch
