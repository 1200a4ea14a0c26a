"""How right the memory is that `corolla plan` predicts: peak resident memory of real processes.

    python experiments/bench/memory.py --model gemma-3-270m --batch 4 --length 64 --json FILE

Sections: constants, clients, simulation (all unless named). Each case is a process of its own that
loads the model and trains a few steps on random tokens, or runs a whole simulation; what it took at
most, loading included, is held against the prediction. README.md says how to read the tables.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from corolla.client.training.first_order import FirstOrder
from corolla.client.training.zeroth_order import ZerothOrder
from corolla.commands.plan.plan import plan
from corolla.commands.simulate.in_process import simulate
from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.directions import signs
from corolla.directions.pools import SignPool
from corolla.estimates import footprint
from corolla.estimates.footprint import Batch, Estimate, Workload
from corolla.models import anatomy, devices, pretrained, trainable
from corolla.models.anatomy import Anatomy
from corolla.models.lora import LoraModel
from experiments.bench import zeroth_order
from experiments.bench.zeroth_order import Section, command, peak, resident, sequences

BAR = 0.2


@dataclass(frozen=True)
class Case:
    """One way to train: factors of batch and length, and keys of the config."""

    settings: Mapping[str, object] = field(default_factory=dict)
    batch: int = 1
    length: int = 1
    parts: int = 1


FIRST, ZEROTH = {"strategy": "fedavg"}, {"strategy": "seed_pool"}
SPARING = {"gradient_checkpointing": True}
CASES: Mapping[str, Case] = {
    "first order": Case(FIRST),
    "first order, length x 4": Case(FIRST, length=4),
    "first order, batch x 4": Case(FIRST, batch=4),
    "first order, batch x 4 in 4 micro-batches": Case(FIRST, batch=4, parts=4),
    "first order, checkpointing": Case({**FIRST, **SPARING}),
    "first order, length x 4, checkpointing": Case({**FIRST, **SPARING}, length=4),
    "zeroth order": Case(ZEROTH),
    "zeroth order, length x 4": Case(ZEROTH, length=4),
    "zeroth order, all parameters": Case({**ZEROTH, "parameters": "full"}),
}
ALONE = ("imports", "tokenizer", "simulation")
Measured = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How large everything is. The fields are the options of the command."""

    model: str = field(default="embedded", metadata={"help": "as for corolla simulate"})
    threads: int = field(default=1, metadata={"help": "of the CPU"})
    batch: int = field(default=8, metadata={"help": "sequences of the smallest case"})
    length: int = field(default=64, metadata={"help": "tokens of each"})
    rank: int = field(default=8, metadata={"help": "of the adapter"})
    steps: int = field(default=4, metadata={"help": "that are trained"})
    data: str = field(default="embedded", metadata={"help": "of the simulation"})
    cases: str = field(default="", metadata={"help": "of clients, by number from 1: 1,5,7; all"})

    def arguments(self) -> list[str]:
        """The command line that gives these options."""
        return [part for name, value in asdict(self).items() for part in (f"--{name}", str(value))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the sections asked for, print tables, write the JSON file."""
    return command(__doc__, Options, SECTIONS, (*CASES, *ALONE), memory_of, arguments)


def memory_of(name: str, options: Options) -> Measured:
    """The peak of this process in bytes, and what was predicted; run it in a new one."""
    if name == "imports":
        return {"measured": resident(), "predicted": footprint.LIBRARIES}
    model = anatomy.read(options.model)
    if name == "tokenizer":
        return _tokenizer(options, model)
    if name == "simulation":
        return _simulation(options)
    config, batch = settings(CASES[name], options)
    estimate = predicted(model, config, batch)
    imports = resident()
    _train(config, batch)
    found = {"measured": peak(), "predicted": estimate.total, "terms": dict(estimate.terms)}
    return {**found, "imports": imports}


def settings(case: Case, options: Options) -> tuple[RunConfig, Batch]:
    """The config of a case, and the batch that its steps are trained on."""
    size, length = case.batch * options.batch, case.length * options.length
    config = RunConfig.model_validate(
        {
            "model": options.model,
            "device": "cpu",
            "threads": options.threads,
            "local_steps": options.steps,
            "batch_size": size,
            "micro_batch_size": max(1, size // case.parts),
            "max_length": max(8, length),
            "rank": options.rank,
            **case.settings,
        }
    )
    return config, Batch(size, length, size * (length - 1), padded=False)


def predicted(model: Anatomy, config: RunConfig, batch: Batch) -> Estimate:
    """Returns the estimate of `corolla plan` for a client without messages: it has none here."""
    return footprint.client(Workload(model, batch), config, config.trainer_of(""), messages=0)


def _train(config: RunConfig, batch: Batch) -> None:
    devices.set_threads(config)
    base = pretrained.load(config)
    model = trainable.build(config, base)
    data = sequences(base, zeroth_order.Options(batch=batch.sequences, length=batch.tokens))
    start = model.init(config.lora, 0)
    if config.trainer_of("") == "first_order":
        assert isinstance(model, LoraModel)
        FirstOrder(model, config.lora, data, config, seed=0, round=1).fit(start)
    else:
        trainer = ZerothOrder(model, config.lora, data, config, seed=0, round=1)
        taken = signs.choices(0, trainer.queries, 4096).tolist()
        trainer.walk(start, (), SignPool(4096, (1, 1)), taken)


def _tokenizer(options: Options, model: Anatomy) -> Measured:
    from transformers import AutoTokenizer

    before = resident()
    tokenizer = AutoTokenizer.from_pretrained(pretrained.resolve(options.model))
    tokenizer("A text.")
    took = resident() - before
    return {
        "measured": took,
        "predicted": footprint.TOKENIZER * model.tokenizer_bytes,
        "bytes": model.tokenizer_bytes,
    }


def _simulation(options: Options) -> Measured:
    given = {"model": options.model, "data": options.data, "batch_size": options.batch}
    few = ["rounds=2", "clients=4", "cohort=2", f"local-steps={options.steps}", "eval-examples=16"]
    few += ["eval-clients=2", "eval-client-examples=8", f"threads={options.threads}"]
    config = load(None, given, few)
    estimate = plan(config).memory.simulation
    with tempfile.TemporaryDirectory() as scratch:
        simulate(config, Path(scratch))
    return {"measured": peak(), "predicted": estimate.total, "terms": dict(estimate.terms)}


def in_child(name: str, options: Options) -> Measured:
    """`memory_of` in a new process."""
    script = [sys.executable, "-m", "experiments.bench.memory", "--child", name]
    done = subprocess.run(
        [*script, *options.arguments()],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent.parent,
    )
    found: Measured = json.loads(done.stdout.splitlines()[-1])
    return found


Measure = Callable[[str, Options], Measured]


def constants(options: Options, measure: Measure = in_child) -> Section:
    """The constants of corolla.estimates.footprint, measured again."""
    found = Section(f"constants, {options.model}")
    imports = measure("imports", options)
    found.rows.append(_row("LIBRARIES, MB", imports, 1e6))
    tokenizer = measure("tokenizer", options)
    found.rows.append(_row("TOKENIZER, bytes a byte", tokenizer, tokenizer["bytes"]))
    cases = [measure(name, options) for name in list(CASES)[:2]]
    if any(own["terms"]["logits"] >= footprint.MAPPED * 3 for own in cases):
        found.notes.append("HEAP and WORK: not measured, blocks of this model are mapped")
        return found
    heap, work = _heap(cases)
    found.rows.append({"case": "HEAP, bytes a byte", "predicted": footprint.HEAP, "measured": heap})
    sizes = {"predicted": footprint.WORK / 1e6, "measured": work / 1e6}
    found.rows.append({"case": "WORK, MB", **sizes})
    return found


def _heap(two: Sequence[Measured]) -> tuple[float, float]:
    """(HEAP, WORK): the line through two cases of which no block is large enough to be mapped."""
    needed = [
        (own["terms"]["activations"] + own["terms"]["logits"]) / footprint.HEAP for own in two
    ]
    rest = [own["predicted"] - footprint.HEAP * n for own, n in zip(two, needed, strict=True)]
    took = [own["measured"] - r + footprint.WORK for own, r in zip(two, rest, strict=True)]
    heap = (took[1] - took[0]) / (needed[1] - needed[0])
    return heap, took[0] - heap * needed[0]


def clients(options: Options, measure: Measure = in_child) -> Section:
    """Training, each case in a process of its own."""
    found = Section(
        f"clients: {options.model}, {options.batch} x {options.length} random tokens, fp32, MB"
    )
    wanted = [int(number) for number in options.cases.split(",") if number]
    for number, name in enumerate(CASES, start=1):
        if not wanted or number in wanted:
            _add(found, name, measure(name, options))
    return found


def simulation(options: Options, measure: Measure = in_child) -> Section:
    """A whole run, from loading to the proof of the saved adapter."""
    found = Section(f"simulation: {options.model}, data {Path(options.data).name}, MB")
    _add(found, "simulation", measure("simulation", options))
    return found


def _add(section: Section, name: str, measured: Measured) -> None:
    section.rows.append(_row(name, measured, 1e6))
    apart = measured["predicted"] / measured["measured"] - 1
    row = {"ratio": name, "predicted / measured - 1": apart, "bar": f"± {BAR:g}"}
    section.ratios.append({**row, "met": abs(apart) <= BAR})


def _row(name: str, measured: Measured, unit: float) -> dict[str, str | float]:
    sizes = {key: measured[key] / unit for key in ("predicted", "measured")}
    return {"case": name, **sizes}


SECTIONS: dict[str, Callable[[Options], Section]] = {
    "constants": constants,
    "clients": clients,
    "simulation": simulation,
}


if __name__ == "__main__":
    sys.exit(main())
