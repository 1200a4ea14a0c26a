"""The hardest sequences of a client: those that the model it received predicts worst.

Paul et al., "Deep Learning on a Data Diet: Finding Important Examples Early in Training", NeurIPS
2021, arXiv 2107.07075 (the score EL2N); in federations: Cao et al., "SFPrompt: Communication-
Efficient Split Federated Fine-Tuning for Large Pre-Trained Models over Resource-Limited Devices",
2024, arXiv 2407.17533. Right and certain is 0, wrong and certain sqrt(2). A model that has hardly
learnt ranks by noise, and what is mislabelled is hardest for ever: it is no cure for bad data.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from corolla import seeds
from corolla.config import schedule
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, collate
from corolla.evaluation.scoring import predictions
from corolla.models.trainable import Differentiable


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """‖softmax(z) - onehot(y)‖₂ of each row of logits (n, classes) and label (n,), in fp32."""
    off = torch.softmax(logits.float(), dim=-1)
    off[torch.arange(len(labels)), labels] -= 1
    found: Tensor = torch.linalg.vector_norm(off, dim=-1)
    return found


def kept(
    model: Differentiable, data: Sequence[Encoded], config: RunConfig, seed: int
) -> Sequence[Encoded]:
    """The `keep_hardest` of a client's sequences, in their order; all of them where it is 1.

    `model` holds what training starts from. Of a client with many sequences a part is scored that
    its seed decides (`schedule.scored`). Costs a pass forward over what is scored.
    """
    scored = schedule.scored(config, len(data))
    if not scored:
        return data
    drawn = list(range(len(data)))
    if scored < len(data):
        order = torch.randperm(len(data), generator=seeds.generator(seed, "hardest"))
        drawn = sorted(order[:scored].tolist())
    # With local_epochs the count of steps is of all sequences, and the server knows it.
    of = len(data) if config.local_epochs is not None else scored
    count = min(scored, schedule.hardest(config, of))
    found = scores(model, [data[i] for i in drawn], config.micro_batch_size or config.batch_size)
    order = torch.tensor(found).argsort(descending=True, stable=True)[:count]
    return [data[i] for i in sorted(drawn[place] for place in order.tolist())]


@torch.no_grad()
def scores(model: Differentiable, data: Sequence[Encoded], at_once: int) -> list[float]:
    """EL2N of each sequence: the mean over its targets, in evaluation mode."""
    network: nn.Module = model.model
    order = sorted(range(len(data)), key=lambda i: len(data[i].input_ids))
    found = [0.0] * len(data)
    for start in range(0, len(order), at_once):
        rows = order[start : start + at_once]
        batch = collate([data[i] for i in rows], model.base.pad_id, model.device)
        own = el2n(*predictions(network, batch)).cpu()
        pieces = torch.split(own, [data[i].targets for i in rows])
        for i, piece in zip(rows, pieces, strict=True):
            found[i] = float(piece.double().mean())
    return found
