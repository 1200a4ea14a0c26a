"""Tables that have a row for each token, by the names and shapes of a model's tensors."""

import re
from collections.abc import Mapping, Sequence

from corolla.errors import ModelError

Shape = tuple[int, ...]

_INPUT = re.compile(
    r"(^|\.)(embed_tokens|wte|(word_|tok_)?embeddings|word_embedding|tokens_embed|embed_in)\.weight$"
)
"""Names of the table of the embeddings of tokens."""
_OUTPUT = ("lm_head.weight", "embed_out.weight")


def of_input(tensors: Mapping[str, Shape], model: str) -> dict[str, Shape]:
    """The table of the embeddings of tokens. Raises ModelError where it is not known."""
    found: dict[str, Shape] = {n: s for n, s in tensors.items() if _INPUT.search(n) and len(s) == 2}
    if not found:
        raise ModelError(
            f"which tensor of {model} has the embeddings of tokens is not known, its size "
            f"neither; corolla simulate finds it in the model"
        )
    return found


def of_both(tensors: Mapping[str, Shape], model: str) -> dict[str, Shape]:
    """The same with an output layer that is not tied. Raises ModelError as `of_input`."""
    return of_input(tensors, model) | {n: tensors[n] for n in _OUTPUT if n in tensors}


def rows(tensors: Mapping[str, Shape], tokens: Sequence[str], model: str) -> dict[str, Shape]:
    """Shapes of the rows that are trained for tokens, by name (rows.py). Raises ModelError."""
    tables = of_both(tensors, model) if tokens else {}
    return {
        f"{name.removesuffix('.weight')}.token_adapter.trainable_tokens_delta": (
            len(tokens),
            shape[1],
        )
        for name, shape in tables.items()
    }
