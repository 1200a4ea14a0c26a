"""Tokens of a run's own: rows of the tables of a model, trained as they are beside LoRA.

A row of the input embeddings for each token, and one of the output layer where that is not tied to
them. They are peft's `trainable_token_indices`: rows that take the place of the base's own, which
stays as it is, so that plain peft loads the adapter on the base as others have it. A tensor of them
is `<module>.token_adapter.trainable_tokens_delta` (tokens, hidden), as in peft's files, no factor:
strategies average it as they average the head of a classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from corolla.errors import ModelError

if TYPE_CHECKING:  # tokenizers are loaded without the classes of models
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Gives a tokenizer the tokens that it lacks, with the next ids in the order of `tokens`."""
    tokenizer.add_tokens(list(tokens))


def ids(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], model: PreTrainedModel
) -> list[int]:
    """The ids of tokens that a tokenizer has. Raises ModelError where the model has no rows for it.

    Rows that a model of another size would get are drawn anew by each process that loads it.
    """
    found = [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]
    known = int(model.get_input_embeddings().weight.shape[0])
    if max(found, default=0) >= known:
        need = max(found) + 1
        raise ModelError(
            f"new_tokens: the tokenizer has {need} tokens with them, the model rows for {known}: "
            f"save it after model.resize_token_embeddings({need}), with its tokenizer, and give "
            f"that folder as the model"
        )
    return found


def indices(model: PreTrainedModel, tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """The rows that peft trains, name of a table → its rows; None without tokens."""
    if not tokens:
        return None
    tables = [model.get_input_embeddings()]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not tables[0].weight:
        tables.append(output)
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(table)]: list(tokens) for table in tables}


def trained(wrapped: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The rows that peft has put into a model for its adapter of this name, in fp32, by our names.

    A tied table has none of its own.
    """
    from peft.utils import TrainableTokensWrapper  # with the model that peft has wrapped

    found: dict[str, nn.Parameter] = {}
    for path, module in wrapped.named_modules():
        if isinstance(module, TrainableTokensWrapper) and not module.token_adapter.tied_adapter:
            rows = module.token_adapter.trainable_tokens_delta
            rows[name] = nn.Parameter(rows[name].detach().float(), requires_grad=False)
            found[f"{path}.token_adapter.trainable_tokens_delta"] = rows[name]
    return found
