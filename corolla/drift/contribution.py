"""TuCo: how much of what the blocks of a tuned model add comes from tuning.

Nuti et al., "TuCo: Measuring the Contribution of Fine-Tuning to Individual Responses of LLMs",
ICML 2025, arXiv 2506.23423. Along the tuned model's own stream x_l: PTC_l = f_base(x_l) and
FTC_l = f_tuned(x_l) - f_base(x_l), where f is what a block adds to its input; with their sums P and
F over blocks at the last token TuCo = ‖F‖ / (‖P‖ + ‖F‖), and x_0 + P + F is the last x.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corolla.drift.pair import Pair


@dataclass(frozen=True)
class Stream:
    """One batch through the blocks at its last tokens, each (rows, hidden) in fp64."""

    first: Tensor
    """The input of the first block."""
    base: Tensor
    """P, what the base's blocks add along the way."""
    tuning: Tensor
    """F, what tuning adds to that."""
    last: Tensor
    """The output of the last block."""

    @property
    def tuco(self) -> Tensor:
        """‖F‖ / (‖P‖ + ‖F‖) of each row; 0 where tuning has changed nothing."""
        own, rest = self.tuning.norm(dim=1), self.base.norm(dim=1)
        return torch.where(own > 0, own / (own + rest), 0.0)


def blocks(model: Any) -> Sequence[nn.Module]:
    """The blocks of a decoder, in their order; () where it has no list of as many as it says."""
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = [own for own in model.modules() if isinstance(own, nn.ModuleList)]
    found = [own for own in lists if wanted and len(own) == wanted]
    return list(found[0]) if found else ()


@torch.no_grad()
def stream(pair: Pair, batch: dict[str, Tensor]) -> Stream | None:
    """P and F of a batch of prompts, at the last token of each; None where blocks are unknown.

    The tuned model runs once, and what goes into its blocks is kept; then each block of the base
    runs on it. Memory: the inputs of all blocks for the batch.
    """
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], out: Any) -> None:
        inputs.append((args, given))
        outputs.append(_hidden(out))

    if pair.prompt:
        return None
    with pair.tuned() as model:
        own = blocks(model)
        hooks = [block.register_forward_hook(keep, with_kwargs=True) for block in own]
        try:
            asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
            model(**asked, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    if not own or len(inputs) != len(own):
        return None
    at = batch["attention_mask"].sum(1) - 1
    rows = torch.arange(len(at), device=at.device)
    starts = [_of_input(*own)[rows, at].double() for own in inputs]
    base, tuning = torch.zeros_like(starts[0]), torch.zeros_like(starts[0])
    with pair.base() as model:
        for number, block in enumerate(blocks(model)):
            args, given = inputs[number]
            plain = _hidden(block(*args, **given))[rows, at].double()
            base += plain - starts[number]
            tuning += outputs[number][rows, at].double() - plain
    return Stream(starts[0], base, tuning, outputs[-1][rows, at].double())


def _hidden(output: Any) -> Tensor:
    """The hidden states of a block's output, which may have more beside them."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _of_input(args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else given["hidden_states"]
    return found
