"""What a step of DP-SGD costs beside the same step without privacy.

    python -m experiments.bench.private_step --threads 1 --json FILE

Both are steps of `FirstOrder`, with AdamW, on batches of the same number of random sequences: the
Poisson sample of the private step is made to have its expected size. Noise comes from the operating
system, as in a run. Contenders take turns; a time is that of a round over its steps. Sections:
lora, full (both unless named). Nothing fails for missing a bar. README.md has a table.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from corolla import seeds
from corolla.client.training import dpsgd
from corolla.client.training.first_order import FirstOrder
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded
from corolla.models import pretrained, trainable
from corolla.models.dense import DenseModel
from corolla.models.lora import LoraModel
from corolla.privacy.example_level import ExampleLevel
from corolla.types import Params
from experiments.bench.zeroth_order import Section, Took, command, in_turn

BAR = 1.7


@dataclass(frozen=True)
class Options:
    """How large everything is. The fields are the options of the command."""

    model: str = field(default="embedded", metadata={"help": "as for corolla simulate"})
    threads: int = field(default=0, metadata={"help": "of the CPU; 0: as torch chooses"})
    repetitions: int = field(default=9, metadata={"help": "of which the median and the best count"})
    steps: int = field(default=10, metadata={"help": "of a round"})
    batch: int = field(default=8, metadata={"help": "sequences of a step"})
    length: int = field(default=64, metadata={"help": "tokens of each"})
    rank: int = field(default=8, metadata={"help": "of the adapter"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the sections asked for, print tables, write the JSON file."""
    return command(__doc__, Options, SECTIONS, (), lambda *_: None, arguments)


@dataclass(frozen=True)
class Setting:
    """A model with what is trained of it, and data."""

    model: LoraModel | DenseModel
    config: RunConfig
    data: Sequence[Encoded]
    start: Params

    def round(self, private: ExampleLevel | None, **changes: int) -> None:
        """One round of a client."""
        config = self.config.model_copy(update=changes)
        lora = config.lora
        FirstOrder(self.model, lora, self.data, config, 0, 1, private=private).fit(self.start)


def setting(parameters: Literal["lora", "full"], options: Options) -> Setting:
    """Four batches of random sequences, on a model as a client has it."""
    config = RunConfig(
        model=options.model,
        parameters=parameters,
        rank=options.rank,
        alpha=2.0 * options.rank,
        local_steps=options.steps,
        batch_size=options.batch,
        max_length=max(8, options.length),
        threads=options.threads,
        device="cpu",
    )
    model = trainable.build(config, pretrained.load(config))
    if not isinstance(model, LoraModel | DenseModel):
        raise TypeError("no model with gradients")
    draw = seeds.generator(0, "bench")
    vocabulary = model.base.model.config.get_text_config().vocab_size
    shape = (4 * options.batch, options.length)
    ids = torch.randint(vocabulary, shape, generator=draw).tolist()
    return Setting(model, config, [Encoded(row, row) for row in ids], model.init(config.lora, 0))


def level(found: Setting, options: Options) -> ExampleLevel:
    """Of all examples; each sample has exactly its expected size."""
    examples = len(found.data)
    draw = seeds.generator(0, "coins")
    return ExampleLevel(
        examples=examples,
        batch=options.batch,
        steps=options.steps,
        clip=1.0,
        noise_multiplier=1.0,
        delta=1e-5,
        budget=None,
        uniform=lambda n: torch.randperm(n, generator=draw).double() / n,
    )


def compared(parameters: Literal["lora", "full"], options: Options) -> Section:
    """A private step over a plain one, and what is in it."""
    found = setting(parameters, options)
    private = level(found, options)
    nobody = replace(private, uniform=lambda n: torch.ones(n, dtype=torch.float64))
    contenders: dict[str, Callable[[], object]] = {
        "plain step": lambda: found.round(None),
        "private step": lambda: found.round(private),
        "noise alone": lambda: found.round(nobody),
    }
    if parameters == "lora":
        contenders["plain step, one sequence at a time"] = lambda: found.round(
            None, micro_batch_size=1
        )
        contenders["private step, one sequence at a time"] = lambda: found.round(
            private, micro_batch_size=1
        )
    times = in_turn(contenders, options.repetitions)
    values = sum(tensor.numel() for tensor in found.start.values())
    what = f"LoRA of rank {options.rank}" if parameters == "lora" else "all parameters"
    section = Section(
        f"{what}: {options.model}, {options.batch} x {options.length} random tokens, fp32",
        notes=[f"{values:,} trained values"],
    )
    for name, took in times.items():
        section.times(name, took, 1e3 / options.steps, "ms")
    plain = times["plain step"]
    bar = BAR if parameters == "lora" else None
    section.ratio("private step / plain step", times["private step"], plain, at_most=bar)
    section.ratio("noise alone / plain step", times["noise alone"], plain)
    if parameters == "lora":
        section.ratio(
            "private / plain step, one sequence at a time",
            times["private step, one sequence at a time"],
            times["plain step, one sequence at a time"],
        )
        first = first_comparison(found, private, options)
        section.times("comparison before the first private step", first, 1e3, "ms")
    return section


def first_comparison(found: Setting, private: ExampleLevel, options: Options) -> list[Took]:
    """The comparison with gradients by hand, which is made once for a model in a process."""
    known = dpsgd.examples(found.data, private.examples)
    found.model.write(dpsgd.lively(found.start), found.config.lora)
    trained = dict(found.model.parameters())
    for parameter in trained.values():
        parameter.requires_grad_(True)
    clipper = dpsgd.Clipper(found.model, trained, options.batch)
    found.model.model.train()
    times = in_turn(
        {"": lambda: dpsgd.compare(found.model, clipper, known[:4])}, options.repetitions
    )
    found.model.model.eval()
    return times[""]


SECTIONS: dict[str, Callable[[Options], Section]] = {
    "lora": lambda options: compared("lora", options),
    "full": lambda options: compared("full", options),
}

if __name__ == "__main__":
    sys.exit(main())
