"""A start for an adapter from gradients on public data.

Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely
Efficient Low-Rank Fine-Tuning" (LoRA-SB), 2024, arXiv 2411.19557.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from corolla.data.encoding import Encoded
from corolla.errors import ModelError
from corolla.evaluation import weight_gradients
from corolla.models.lora import LoraModel
from corolla.starts.material import Material
from corolla.tensors import factors
from corolla.types import LoraSpec, Params


def adapter(material: Material) -> Params:
    """The adapter of the run's rank that comes nearest to AdamW's first step on whole weights.

    That step is -lr · sign(G), where G (out, in) is the gradient of the mean loss over all targets
    of up to `public_examples` rows of `config.public`. With its singular values S, B = U_r and
    A = S_r V_rᵀ / scaling. Leaves the model showing a fresh adapter.

    Raises DataError for rows that cannot be used or belong to a client, ModelError when a gradient
    is not finite.
    """
    config, rank = material.config, material.spec.rank
    start: dict[str, Tensor] = {}
    for module, gradient in finite(material):
        u, s, vt = torch.linalg.svd(-config.lr * gradient.sign(), full_matrices=False)
        start[module + factors.B] = u[:, :rank].cpu().contiguous()
        start[module + factors.A] = (s[:rank, None] * vt[:rank] / config.lora.scaling).cpu()
    return start


def finite(material: Material) -> Iterator[tuple[str, Tensor]]:
    """The gradients of the mean loss over all targets of the public rows, at the base.

    Raises ModelError when one is not finite.
    """
    config, model = material.config, material.model
    size = config.micro_batch_size or config.batch_size
    for module, gradient in gradients(model, material.fresh, config.lora, material.rows, size):
        if not bool(torch.isfinite(gradient).all()):
            raise ModelError(
                f"the gradient of {module} on {config.public} is not finite: use dtype=float32"
            )
        yield module, gradient


def gradients(
    model: LoraModel, fresh: Params, spec: LoraSpec, rows: Sequence[Encoded], size: int
) -> Iterator[tuple[str, Tensor]]:
    """(module, gradient (out, in) in fp32 of the mean loss) of all modules, at an adapter.

    `size` sequences go through the model at a time.
    """
    model.write(fresh, spec)
    plain = model.model.base_model.model
    layers = {name: plain.get_submodule(name).get_base_layer() for name in model.shapes}
    weights = {name: layer.weight for name, layer in layers.items()}
    batches = [rows[at : at + size] for at in range(0, len(rows), size)]
    targets = sum(row.targets for row in rows)
    for name, gradient in weight_gradients.sums(model, weights, batches, targets):
        yield name, gradient.T if isinstance(layers[name], Conv1D) else gradient
