"""Corolla: federated fine-tuning of language models on Flower.

In a checkout or an app bundle the packages `corolla.server`, `corolla.client`,
`corolla.strategies` and `corolla.proto` lie at the top level beside this folder; in a wheel they
lie inside it. Both import under the same names.
"""

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "server" / "rounds.py").is_file():  # a checkout or an app bundle
    __path__.insert(0, str(_root))

__all__ = ["__version__"]
