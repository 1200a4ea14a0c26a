"""Sizes of a classifier before anything of it is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from corolla.errors import ModelError
from corolla.models import pretrained
from corolla.models.anatomy import Anatomy
from corolla.models.files import missing

if TYPE_CHECKING:  # only a classifier needs the classes of models
    from transformers import PreTrainedModel


def sized(anatomy: Anatomy, labels: int) -> Anatomy:
    """The anatomy of the classifier of so many labels that is made of a base model.

    Its class says the shapes: it is built without memory for weights. A base of which there is no
    folder stays as it is. Raises ModelError for a class that has no classifier.
    """
    if anatomy.tokenizer is None:
        return anatomy
    auto: Any = AutoModelForSequenceClassification
    try:
        with pretrained.Quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(
                anatomy.tokenizer.parent, num_labels=labels, trust_remote_code=False
            )
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
    except pretrained.LOADING as error:
        raise ModelError(f"cannot load model {anatomy.name!r}: {pretrained.why(error)}") from error
    prefix = f"{model.base_model_prefix}."
    shapes = {name: tuple(own.shape) for name, own in model.named_parameters()}
    known = anatomy.tensors.keys()
    lost = [n for n in shapes if n not in known and n.removeprefix(prefix) not in known]
    whole = [*missing.outside(model), *missing.poolers(model, lost)]
    head = {name: shape for name, shape in shapes.items() if missing.within(name, whole)}
    rest = {
        name: anatomy.tensors.get(name, shape)  # where linear layers are (in, out) it is turned
        for name, shape in shapes.items()
        if name not in head
    }
    return replace(anatomy, tensors=rest, head=head)
