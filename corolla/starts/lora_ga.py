"""LoRA-GA: align the first step of an adapter with that of full fine-tuning.

Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024,
arXiv 2407.05000.
"""

from torch import Tensor

from corolla.errors import ModelError
from corolla.starts.decomposition import largest
from corolla.starts.gradient import finite
from corolla.starts.material import Material
from corolla.tensors import factors
from corolla.types import Params

GAMMA = 16.0
"""The published γ of the scale ζ = out^(1/4) / √γ."""


def adapter(material: Material) -> Params:
    """The start of the gradient G = U S Vᵀ on public rows: A = ζ V_{1..r}ᵀ, B = ζ U_{r+1..2r}.

    The first step of SGD at rate η then changes the effective weight by -η s² ζ² G_2r, G_2r being
    the best approximation of G of rank 2 r, whatever the scale of the loss. Rank stabilisation
    (`rslora`) is the paper's; its best rate is that of full fine-tuning, about a tenth of LoRA's.

    Raises DataError and ModelError as the start `gradient` does, ModelError for a rank of more
    than half a module's full rank.
    """
    rank = material.spec.rank
    start: dict[str, Tensor] = {}
    for module, gradient in finite(material):
        out = gradient.shape[0]
        if 2 * rank > min(gradient.shape):
            raise ModelError(
                f"start=lora_ga needs twice the rank in directions, and {module} has "
                f"{min(gradient.shape)}: lower rank={rank} to {min(gradient.shape) // 2}"
            )
        u, _, vt = largest(gradient, 2 * rank, material.generator(module))
        scale = out**0.25 / GAMMA**0.5
        start[module + factors.A] = scale * vt[:rank]
        start[module + factors.B] = scale * u[:, rank:]
    return start
