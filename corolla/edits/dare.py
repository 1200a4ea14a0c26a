"""DARE: drop values at random, and scale up those that are left.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
Lunch", ICML 2024, arXiv 2311.03099.
"""

import torch

from corolla import seeds
from corolla.edits.update import Full, Update, product


def drop(update: Update, density: float, seed: int, module: str, number: int) -> Full:
    """D / density where a coin of this probability falls, else 0: the mean over seeds is D.

    The coins depend on the seed, the module's name and the adapter's number, on nothing else.
    """
    matrix = product(update)
    coins = torch.rand(matrix.shape, generator=seeds.generator(seed, "dare", number, module))
    return Full(torch.where(coins < density, matrix / density, 0.0))
