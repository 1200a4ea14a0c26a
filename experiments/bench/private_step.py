"""What a step of DP-SGD costs beside the same step without privacy.

    python -m experiments.bench.private_step --threads 1 --json FILE

Both are steps of `FirstOrder`, with AdamW, on batches of the same number of random sequences: the
Poisson sample of the private step is made to have its expected size. Noise comes from the operating
system, as in a run. Contenders take turns; a time is that of a round over its steps. Sections:
lora, full, rows (all unless named), and before. Nothing fails for missing a bar. README.md has a
table.

rows: what a private round takes with one row of `length` tokens among short ones, and without it.
before: a private step of another checkout, named by --before, and of this one, in turn:

    git worktree add /tmp/earlier COMMIT
    python -m experiments.bench.private_step before --before /tmp/earlier --threads 1
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
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
LONG_ROW = 1.02
"""Times the CPU seconds of a round without a long row, at most."""
BEFORE = 1.2
"""Times the seconds of a private step of an earlier checkout, at most."""

_CHILD = """
import json, sys, time, torch
from experiments.bench import private_step as bench
options = bench.Options(**json.loads(sys.argv[1]))
torch.set_num_threads(options.threads or torch.get_num_threads())
found = bench.setting(sys.argv[2], options)
private = bench.level(found, options)
for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    found.round(private)
    print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)
"""
"""A process of one checkout: each line that it reads is a round."""


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
    before: str = field(default="", metadata={"help": "another checkout, for the section before"})


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


def rows(options: Options) -> Section:
    """A private round with one long row among short ones, over the same without it."""
    section = Section(
        f"rows: {options.model}, 12 rows of 4 tokens, or 11 and one of {options.length}, "
        f"max_length {options.length}",
        notes=["all rows are drawn in each step"],
    )
    for size in (1, options.batch):
        found = setting("lora", options)
        short = [Encoded(row.input_ids[:4], row.input_ids[:4]) for row in found.data[:12]]
        private = replace(level(found, options), examples=12, batch=12)
        lacking = replace(found, data=short)
        having = replace(found, data=[*short[:-1], found.data[12]])
        contenders: dict[str, Callable[[], object]] = {
            f"no long row, {size} at a time": partial(
                lacking.round, private, micro_batch_size=size
            ),
            f"a long row, {size} at a time": partial(having.round, private, micro_batch_size=size),
        }
        times = in_turn(contenders, options.repetitions)
        for name, took in times.items():
            section.times(name, took, 1e3 / options.steps, "ms")
        without, with_it = ([Took(own.cpu, own.cpu) for own in took] for took in times.values())
        name = f"a long row / none, {size} at a time, CPU"
        section.ratio(name, with_it, without, at_most=LONG_ROW)
    return section


def before(options: Options) -> Section:
    """A private step of this checkout over one of another, each in a process of its own."""
    if not options.before:
        return Section("before: nothing to compare with, see --before")
    here = Path(__file__).resolve().parents[2]
    section = Section(
        f"before: {options.model}, {options.batch} x {options.length} random tokens, fp32"
    )
    for parameters in ("lora", "full"):
        checkouts = {"before": Path(options.before), "now": here}
        children = {name: _child(path, parameters, options) for name, path in checkouts.items()}
        times: dict[str, list[Took]] = {name: [] for name in children}
        try:
            for repetition in range(options.repetitions + 1):  # the first does not count
                for name in list(children)[:: -1 if repetition % 2 else 1]:
                    times[name].append(_round_of(children[name]))
        finally:
            for child in children.values():
                child.kill()
        for name, took in times.items():
            section.times(f"{parameters}: private step {name}", took[1:], 1e3 / options.steps, "ms")
        now, earlier = times["now"][1:], times["before"][1:]
        section.ratio(f"{parameters}: now / before", now, earlier, at_most=BEFORE)
    return section


def _child(checkout: Path, parameters: str, options: Options) -> "subprocess.Popen[str]":
    own = {name: value for name, value in asdict(options).items() if name != "before"}
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(own), parameters],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _round_of(child: "subprocess.Popen[str]") -> Took:
    assert child.stdin
    assert child.stdout
    child.stdin.write("\n")
    child.stdin.flush()
    wall, cpu = child.stdout.readline().split()
    return Took(float(wall), float(cpu))


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
    "rows": rows,
    "before": before,
}

if __name__ == "__main__":
    sys.exit(main())
