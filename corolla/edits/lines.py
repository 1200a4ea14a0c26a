"""LiNeS: the deeper a block, the more of its update is kept.

Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging",
ICLR 2025, arXiv 2410.17146: λ_l = α + β l / (L - 1) for block l of L, from 0.
"""

from collections.abc import Collection

from corolla.errors import ArtefactError
from corolla.tensors.units import block


def factor(module: str, alpha: float, beta: float | None, blocks: int) -> float:
    """Computes λ of the block of a module; α for a module outside of blocks.

    β is 1 - α unless given: the last block stays as it is, and all do at α = 1.
    """
    place = block(module)
    slope = 1 - alpha if beta is None else beta
    if place is None or blocks < 2:
        return alpha if place is None else alpha + slope
    return alpha + slope * (place[1] / (blocks - 1))


def check(modules: Collection[str], blocks: int) -> None:
    """Raises ArtefactError for modules of no blocks, of two stacks, or of more blocks than told."""
    places = [place for name in modules if (place := block(name))]
    stacks = sorted({stack for stack, _ in places})
    if len(stacks) != 1:
        has = f"stacks {', '.join(stacks)}" if stacks else "no numbered blocks"
        raise ArtefactError(f"lines needs the modules of one stack of blocks, found {has}")
    if (last := max(number for _, number in places)) >= blocks:
        raise ArtefactError(
            f"lines: the adapter has block {last}, its base {blocks} blocks: name the right base "
            f"with --model"
        )
