"""Corolla: federated fine-tuning of language models on Flower.

    from corolla import RunConfig, evaluate, simulate
    done = simulate(RunConfig(strategy="flora", rounds=3, clients=6, cohort=3), "runs/flora")
    print(done.base["loss"], done.final["loss"], evaluate("runs/flora"))

`simulate`, `evaluate`, `export`, `compare` and `look` do what the commands do (`look` is `corolla
data`). `RunConfig` takes the keys that `corolla keys` explains, `conform` is `corolla check`, and
`Strategy` is what an algorithm of one's own is (see CONTRIBUTING.md).

In a checkout or an app bundle the packages `corolla.server`, `corolla.client`,
`corolla.strategies` and `corolla.proto` lie at the top level beside this folder; in a wheel they
lie inside it. Both import under the same names. The public names below load on first use: torch
and peft take seconds to import.
"""

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from corolla.version import __version__

if TYPE_CHECKING:
    from corolla.api import compare, evaluate, export, look, simulate
    from corolla.commands.check.proofs import conform
    from corolla.config.run import RunConfig
    from corolla.errors import CorollaError
    from corolla.interfaces import Client, Strategy
    from corolla.types import Adapter, Broadcast, Cost, Params, Payload, Update

# Where the extra `phones` is installed, transformers imports torchao, which warns of its CUDA
# libraries, and has torch warn of how it registers its types. Nobody here can act on either.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(
    lambda record: "register_constant" not in record.getMessage()
)

__all__ = [
    "Adapter",
    "Broadcast",
    "Client",
    "CorollaError",
    "Cost",
    "Params",
    "Payload",
    "RunConfig",
    "Strategy",
    "Update",
    "__version__",
    "compare",
    "conform",
    "evaluate",
    "export",
    "look",
    "simulate",
]

_root = Path(__file__).resolve().parent.parent
if (_root / "server" / "app.py").is_file():  # a checkout or an app bundle
    __path__.insert(0, str(_root))

_HOME = {
    "Client": "corolla.interfaces",
    "CorollaError": "corolla.errors",
    "RunConfig": "corolla.config.run",
    "Strategy": "corolla.interfaces",
    "conform": "corolla.commands.check.proofs",
    **dict.fromkeys(("compare", "evaluate", "export", "look", "simulate"), "corolla.api"),
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'corolla' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "corolla.types")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
