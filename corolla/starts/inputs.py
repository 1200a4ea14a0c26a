"""Second moments of what goes into the layers of the base, over public rows."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from corolla.data.encoding import collate
from corolla.errors import ModelError
from corolla.evaluation.weight_gradients import sets
from corolla.starts.material import Material


def moments(material: Material, relative: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(module, (in, in) mean over sequences of Xᵀ X in fp64) of all modules, at the base.

    X (tokens, in) are a layer's inputs at all positions of a sequence, prompt and target alike;
    one sequence goes through the model at a time, so that none is padding. With `relative`
    X is divided by the largest |x| of the sequence. All are passed once for each set of modules
    whose moments are at most AT_ONCE values: memory for time.

    Raises ModelError when one is not finite, DataError as Material.rows does.
    """
    model = material.model
    model.write(material.fresh, material.spec)
    plain = model.model.base_model.model
    sizes = {name: into for name, (_, into) in model.shapes.items()}
    for names in sets({name: into * into for name, into in sizes.items()}):
        sums = {
            name: torch.zeros(2 * [sizes[name]], dtype=torch.float64, device=model.device)
            for name in names
        }
        hooks = [
            plain.get_submodule(name).register_forward_pre_hook(_adding(total, relative))
            for name, total in sums.items()
        ]
        try:
            with torch.no_grad():
                for sequence in material.rows:
                    batch = collate([sequence], model.base.pad_id, model.device)
                    batch.pop("labels", None)
                    model.model(**batch)
        finally:
            for hook in hooks:
                hook.remove()
        for name, total in sums.items():
            if not bool(torch.isfinite(total).all()):
                raise ModelError(
                    f"the inputs of {name} on {material.config.public} are not finite: use "
                    f"dtype=float32"
                )
            yield name, total / len(material.rows)


def _adding(total: Tensor, relative: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().double().flatten(0, -2)
        peak = x.abs().max() if relative else None
        if peak is not None and bool(peak):
            x = x / peak
        total.add_(x.T @ x)

    return hook
