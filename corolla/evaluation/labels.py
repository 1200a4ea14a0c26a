"""The classifier of a checkpoint: in which order it has its labels, and whether they fit the data.

A trained head says one label at each place. Rows that call them by the same words, but for upper
and lower case, are matched by these; numbers are matched by place where the checkpoint has no
words.
"""

from collections.abc import Sequence

import transformers

from corolla.config.run import RunConfig
from corolla.errors import ModelError
from corolla.models import pretrained

_SHOWN = 5
"""Labels in a refusal."""


def ordered(config: RunConfig, labels: Sequence[str]) -> list[str]:
    """All labels of a run in the order of the checkpoint's head, in the words of the data.

    `labels` are those of the data, as they are returned where the head is new. Labels that the data
    lacks are in the checkpoint's words. Raises ModelError where the two cannot be matched.
    """
    if not labels or config.task == "causal" or config.new_head:
        return list(labels)
    known = _of_checkpoint(config.model)
    if not known:
        return list(labels)
    places = _places(known, labels)
    if places is None:
        raise ModelError(
            f"the model has {_told(known)}, the data {_told(labels)}, and these are not the same: "
            f"rename those of the data, or begin a new head with --set new-head=true"
        )
    named = dict(zip(places, labels, strict=True))
    return [named.get(place, label) for place, label in enumerate(known)]


def _of_checkpoint(model: str) -> list[str]:
    """The labels of a checkpoint with a trained head, by place; [] without."""
    try:
        with pretrained.Quiet():
            config = transformers.AutoConfig.from_pretrained(
                pretrained.resolve(model), trust_remote_code=False
            )
    except pretrained.LOADING:
        return []  # said when the model itself is loaded
    if not any("ForSequenceClassification" in name for name in config.architectures or ()):
        return []
    return [str(config.id2label[place]) for place in sorted(config.id2label)]


def _places(known: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """The place in the head of each label of the data; None where one has none."""
    if known == [f"LABEL_{i}" for i in range(len(known))]:
        numbers = [label.upper().removeprefix("LABEL_") for label in labels]
        if all(number in map(str, range(len(known))) for number in numbers):
            return [int(number) for number in numbers]
        return None
    for form in (str, str.casefold):
        by_word = {form(label): place for place, label in enumerate(known)}
        places = [by_word.get(form(label)) for label in labels]
        distinct = len(by_word) == len(known) and len(set(places)) == len(places)
        if distinct and None not in places:
            return [place for place in places if place is not None]
    return None


def _told(labels: Sequence[str]) -> str:
    more = ", …" if len(labels) > _SHOWN else ""
    word = "label" if len(labels) == 1 else "labels"
    return f"{len(labels)} {word} ({', '.join(labels[:_SHOWN])}{more})"
