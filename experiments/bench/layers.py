"""Time and memory that it saves to train the last blocks of a model alone.

    python -m experiments.bench.layers --model embedded --threads 1 --json FILE

An adapter on all blocks, and one on the last quarter of them (`layers=last:N`), each on a copy of
the model, take turns. Sections: blocks (the backward pass through the blocks, from a gradient of
the last hidden state on, and what autograd keeps of them until then: head and loss apart), and step
(a whole step of `FirstOrder`). Nothing fails for missing a bar.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from corolla import seeds
from corolla.client.training.first_order import FirstOrder
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from experiments.bench.zeroth_order import Section, Took, clock, command, in_turn

TIME, MEMORY = 0.40, 0.35
"""Parts of the blocks' backward seconds and of their kept bytes, at most."""


@dataclass(frozen=True)
class Options:
    """How large everything is. The fields are the options of the command."""

    model: str = field(default="embedded", metadata={"help": "as for corolla simulate"})
    threads: int = field(default=0, metadata={"help": "of the CPU; 0: as torch chooses"})
    repetitions: int = field(default=9, metadata={"help": "of which the median and the best count"})
    batch: int = field(default=4, metadata={"help": "sequences of a step"})
    length: int = field(default=128, metadata={"help": "tokens of each"})
    rank: int = field(default=8, metadata={"help": "of the adapter"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the sections asked for, print tables, write the JSON file."""
    return command(__doc__, Options, SECTIONS, (), lambda *_: None, arguments)


@dataclass(frozen=True)
class Contender:
    """A model of its own with an adapter on some blocks."""

    config: RunConfig
    model: LoraModel
    rows: Sequence[Encoded]

    @property
    def ids(self) -> Tensor:
        """The tokens of a batch, (sequences, tokens)."""
        return torch.tensor([row.input_ids for row in self.rows[: self.config.batch_size]])

    def hidden(self) -> Tensor:
        """The last hidden state of a batch, (sequences, tokens, width), with its graph."""
        decoder = self.model.model.base_model.model.get_decoder()
        found: Tensor = decoder(input_ids=self.ids).last_hidden_state
        return found

    def step(self) -> None:
        """One step of local training."""
        lora = self.config.lora
        FirstOrder(self.model, lora, self.rows, self.config, 0, 1).fit(self.model.init(lora, 0))


def contender(layers: str | None, options: Options) -> Contender:
    """A model as a client has it, its adapter written and trained."""
    config = RunConfig(
        model=options.model,
        layers=layers,
        rank=options.rank,
        alpha=2.0 * options.rank,
        local_steps=1,
        batch_size=options.batch,
        max_length=options.length,
        device="cpu",
    )
    model = LoraModel(pretrained.load(config), blocks=layers)
    model.write(model.init(config.lora, 0), config.lora)
    for _, parameter in model.parameters():
        parameter.requires_grad_(True)
    vocabulary = model.base.model.config.get_text_config().vocab_size
    shape = (2 * options.batch, options.length)
    ids = torch.randint(vocabulary, shape, generator=seeds.generator(0, "bench")).tolist()
    return Contender(config, model, [Encoded(row, row) for row in ids])


def pair(options: Options) -> tuple[Contender, Contender, str]:
    """An adapter on all blocks, one on the last quarter, and what that is called."""
    whole = contender(None, options)
    count = int(whole.model.base.model.config.get_text_config().num_hidden_layers)
    some = f"last:{max(1, count // 4)}"
    return whole, contender(some, options), f"{some} of {count} blocks"


def blocks(options: Options) -> Section:
    """The backward pass through the blocks and what is kept for it."""
    whole, some, called = pair(options)
    section = Section(f"blocks: {options.model}, {options.batch} x {options.length} tokens, fp32")
    times: dict[str, list[Took]] = {"all blocks": [], called: []}
    for repetition in range(-1, options.repetitions):  # the first does not count
        for name, own in zip(times, (whole, some), strict=True):
            hidden = own.hidden()
            took = clock(partial(hidden.backward, torch.ones_like(hidden)))
            if repetition >= 0:
                times[name].append(took)
    for name, took_all in times.items():
        section.times(f"backward, {name}", took_all, 1e3, "ms")
    section.ratio(f"backward: {called} / all", times[called], times["all blocks"], at_most=TIME)
    kept = [_kept(own) for own in (whole, some)]
    section.notes.append(
        f"autograd keeps {kept[0] / 1e6:.1f} MB of all blocks, {kept[1] / 1e6:.1f} MB of {called}: "
        f"{kept[1] / kept[0]:.3f}, bar {MEMORY}"
    )
    return section


def step(options: Options) -> Section:
    """A whole step, with head and loss."""
    whole, some, called = pair(options)
    section = Section(f"step: {options.model}, {options.batch} x {options.length} tokens, fp32")
    times = in_turn({"all blocks": whole.step, called: some.step}, options.repetitions)
    for name, took in times.items():
        section.times(f"step, {name}", took, 1e3, "ms")
    section.ratio(f"step: {called} / all", times[called], times["all blocks"])
    return section


def _kept(own: Contender) -> int:
    """Bytes that autograd keeps of the blocks and the model does not own."""
    owned = {t.untyped_storage().data_ptr() for t in own.model.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = own.hidden()
    assert hidden.requires_grad
    return sum(kept.values())


SECTIONS = {"blocks": blocks, "step": step}

if __name__ == "__main__":
    sys.exit(main())
