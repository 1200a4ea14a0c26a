"""A start for an adapter from gradients on public data.

Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely
Efficient Low-Rank Fine-Tuning" (LoRA-SB), 2024, arXiv 2411.19557.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.data.encoding import Encoded, Encoder, collate
from corolla.data.rows import read_rows
from corolla.errors import ConfigError, DataError, ModelError
from corolla.evaluation.scoring import loss_sum
from corolla.models.lora import LoraModel
from corolla.models.pretrained import Base
from corolla.models.trainable import Trainable
from corolla.tensors import factors
from corolla.types import LoraSpec, Params

_AT_ONCE = 1 << 26
"""Values of the gradients that exist at a time, unless one module alone has more: 256 MB."""


def adapter(
    model: Trainable, fresh: Params, config: RunConfig, labels: Sequence[str] = ()
) -> Params:
    """The adapter of the run's rank that comes nearest to AdamW's first step on whole weights.

    That step is -lr · sign(G), where G (out, in) is the gradient of the mean loss over all targets
    of up to `public_examples` rows of `config.public`. With its singular values S, B = U_r and
    A = S_r V_rᵀ / scaling; the head stays that of `fresh`. Leaves `model` showing `fresh`.

    Raises ConfigError for a model without adapter, DataError for rows that cannot be used or belong
    to a client, ModelError when a gradient is not finite.
    """
    if not isinstance(model, LoraModel):
        raise ConfigError(f"start=gradient is for adapters: parameters={config.parameters}")
    public = _public(model.base, config, labels)
    size, rank = config.micro_batch_size or config.batch_size, config.lora.rank
    start = dict(fresh)
    for module, gradient in gradients(model, fresh, config.lora, public, size):
        if not bool(torch.isfinite(gradient).all()):
            raise ModelError(
                f"the gradient of {module} on {config.public} is not finite: use dtype=float32"
            )
        u, s, vt = torch.linalg.svd(-config.lr * gradient.sign(), full_matrices=False)
        start[module + factors.B] = u[:, :rank].cpu().contiguous()
        start[module + factors.A] = (s[:rank, None] * vt[:rank] / config.lora.scaling).cpu()
    return start


def gradients(
    model: LoraModel, fresh: Params, spec: LoraSpec, batches: Sequence[Encoded], size: int
) -> Iterator[tuple[str, Tensor]]:
    """(module, gradient (out, in) in fp32 of the mean loss) of all modules, at an adapter.

    `size` sequences go through the model at a time. All are passed once for each set of modules
    whose gradients fit _AT_ONCE: memory for time.
    """
    model.write(fresh, spec)
    plain = model.model.base_model.model
    layers = {name: plain.get_submodule(name).get_base_layer() for name in model.shapes}
    targets = sum(sequence.targets for sequence in batches)
    for names in _sets(model):
        weights = [layers[name].weight.requires_grad_(True) for name in names]
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        try:
            for at in range(0, len(batches), size):
                batch = collate(batches[at : at + size], model.base.pad_id, model.device)
                loss = loss_sum(model.model, batch) / targets
                for own, part in zip(
                    sums, torch.autograd.grad(loss, weights, materialize_grads=True), strict=True
                ):
                    own += part
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        for name, own in zip(names, sums, strict=True):
            yield name, own.T if isinstance(layers[name], Conv1D) else own


def _public(base: Base, config: RunConfig, labels: Sequence[str]) -> list[Encoded]:
    """Sequences of the public rows, evenly spread over them."""
    rows, _ = read_rows(str(config.public))
    owned = next((row.client for row in rows if row.client is not None), None)
    if owned is not None:
        raise DataError(
            f"{config.public}: rows for start=gradient belong to no client, found client_id "
            f"{owned!r}: what is made from them is sent to everybody"
        )
    encoder = Encoder.of(config, base.tokenizer, labels)
    encoded = [s for row in federated.spread(rows, config.public_examples) for s in encoder(row)]
    if not encoded:
        raise DataError(
            f"{config.public}: no row has a target left within max_length={config.max_length}"
        )
    return encoded


def _sets(model: LoraModel) -> Iterator[list[str]]:
    names: list[str] = []
    values = 0
    for name, (out, into) in model.shapes.items():
        if names and values + out * into > _AT_ONCE:
            yield names
            names, values = [], 0
        names.append(name)
        values += out * into
    yield names
