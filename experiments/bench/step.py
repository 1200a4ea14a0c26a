"""Time and memory of a local step, beside peft with a plain loop on the same batches.

    python -m experiments.bench.step --model gemma-3-270m --threads 1 --json FILE

Contenders take turns, each in a process of its own: peft's layers on transformers' model, batches
padded to their longest, the loss that the model computes, clipping and AdamW of torch; and
`FirstOrder`. They have the same rows, order and start, which equal first losses show. Seconds are
of forward, backward, clipping and optimiser, after a batch that does not count; memory is the peak
above the loaded model. Nothing fails for missing a bar.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from corolla.client.training.first_order import FirstOrder
from corolla.config import schedule
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, Encoder, collate
from corolla.data.rows import read_rows
from corolla.models import devices, pretrained
from corolla.models.lora import LoraModel
from corolla.models.pretrained import Base
from corolla.tensors import factors
from experiments.bench.zeroth_order import Section, Took, command, now, peak, restart_peak, since

SPEED, MEMORY = 2.0, 0.25
"""Times as fast as the plain loop at least, in so much of its memory at most."""
SEED = 0
ROOT = Path(__file__).resolve().parent.parent.parent
Measured = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How large everything is. The fields are the options of the command."""

    model: str = field(default="embedded", metadata={"help": "as for corolla simulate"})
    data: str = field(default="embedded", metadata={"help": "as for corolla simulate"})
    threads: int = field(default=1, metadata={"help": "of the CPU"})
    repetitions: int = field(default=3, metadata={"help": "processes of each contender"})
    batch: int = field(default=8, metadata={"help": "sequences of a step"})
    micro: int = field(default=0, metadata={"help": "of them at a time for us, 0: as we choose"})
    length: int = field(default=256, metadata={"help": "tokens of a sequence, at most"})
    rank: int = field(default=8, metadata={"help": "of the adapter"})
    steps: int = field(default=5, metadata={"help": "that count"})

    def arguments(self) -> list[str]:
        """The command line that gives these options."""
        return [part for name, value in asdict(self).items() for part in (f"--{name}", str(value))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables, write the JSON file."""
    return command(__doc__, Options, {"step": step}, CONTENDERS, measured, arguments)


def settings(options: Options) -> RunConfig:
    """The run of which a client's steps are measured."""
    given = {"micro_batch_size": options.micro} if options.micro else {}
    return RunConfig.model_validate(
        {
            "model": options.model,
            "data": options.data,
            "device": "cpu",
            "threads": options.threads,
            "rank": options.rank,
            "alpha": 2.0 * options.rank,
            "local_steps": options.steps + 1,
            "batch_size": options.batch,
            "max_length": options.length,
            "schedule": "constant",
            **given,
        }
    )


def sequences(base: Base, config: RunConfig) -> list[Encoded]:
    """As many rows as the steps take, in the order of the file."""
    rows, _ = read_rows(config.data)
    encoder = Encoder.of(config, base.tokenizer)
    found: list[Encoded] = []
    for row in rows:
        found += encoder(row)[:1]
        if len(found) == config.local_steps * config.batch_size:
            return found
    raise ValueError(f"{config.data} has {len(found)} sequences: take fewer steps")


def measured(name: str, options: Options) -> Measured:
    """Seconds of each step, the loss of the first, and bytes above the loaded model."""
    config = settings(options)
    devices.set_threads(config)
    base = pretrained.load(config)
    data = sequences(base, config)
    restart_peak()
    before = peak()
    took, loss = CONTENDERS[name](base, data, config)
    tokens = sum(len(own.input_ids) for own in data)
    return {"took": took[1:], "loss": loss, "bytes": peak() - before, "tokens": tokens}


def ours(base: Base, data: Sequence[Encoded], config: RunConfig) -> tuple[list[Took], float]:
    """Steps of `FirstOrder`."""
    model = LoraModel(base, dropout=config.dropout)
    took, started = list[Took](), [now()]

    def told(tokens: int) -> None:
        took.append(since(started[0]))
        started[0] = now()

    trainer = FirstOrder(model, config.lora, data, config, SEED, 1, told)
    start = model.init(config.lora, SEED)
    first = config.model_copy(update={"local_steps": 1})
    loss = FirstOrder(model, config.lora, data, first, SEED, 1).fit(start).metrics["train_loss"]
    started[0] = now()
    trainer.fit(start)
    return took, loss


def plain(base: Base, data: Sequence[Encoded], config: RunConfig) -> tuple[list[Took], float]:
    """Steps of a loop as tutorials have it."""
    own = LoraConfig(
        r=config.rank,
        lora_alpha=int(config.lora.alpha),
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base.model, own).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    shapes = {n: (p.shape[0], _width(trained, n)) for n, p in trained.items() if "lora_B" in n}
    names = {n: n.partition("base_model.model.")[2].partition(".lora_")[0] for n in trained}
    fresh = factors.fresh({names[n]: shape for n, shape in shapes.items()}, config.rank, SEED)
    with torch.no_grad():
        for name, parameter in trained.items():
            role = factors.A if "lora_A" in name else factors.B
            parameter.copy_(fresh[names[name] + role])
    optimiser = torch.optim.AdamW(trained.values(), lr=config.lr, weight_decay=config.weight_decay)
    took, losses = list[Took](), list[float]()
    for indices in schedule.batches(config, len(data), SEED):
        started = now()
        batch = collate([data[i] for i in indices], base.pad_id, base.model.device)
        loss: Tensor = model(**batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(trained.values(), config.clip_norm)
        optimiser.step()
        optimiser.zero_grad()
        took.append(since(started))
        losses.append(float(loss.detach()))
    return took, losses[0]


def _width(trained: dict[str, nn.Parameter], name: str) -> int:
    return int(trained[name.replace("lora_B", "lora_A")].shape[1])


CONTENDERS: dict[str, Callable[[Base, Sequence[Encoded], RunConfig], tuple[list[Took], float]]] = {
    "peft, plain loop": plain,
    "corolla": ours,
}


def in_child(name: str, options: Options) -> Measured:
    """`measured` in a new process."""
    script = [sys.executable, "-m", "experiments.bench.step", "--child", name]
    done = subprocess.run(
        [*script, *options.arguments()],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        cwd=ROOT,
    )
    found: Measured = json.loads(done.stdout.splitlines()[-1])
    return found


def step(options: Options, measure: Callable[[str, Options], Measured] = in_child) -> Section:
    """Both contenders in turn, and their ratios."""
    found: dict[str, list[Measured]] = {name: [] for name in CONTENDERS}
    for _ in range(options.repetitions):
        for name, own in found.items():
            own.append(measure(name, options))
    first = {name: own[0]["loss"] for name, own in found.items()}
    section = Section(
        f"step: {options.model}, {options.batch} rows of {options.data}, fp32, rank {options.rank}"
    )
    if max(first.values()) > min(first.values()) * (1 + 1e-5):
        raise ValueError(f"the contenders do not train the same: first losses {first}")
    taken = {
        name: [Took(*each) for run in own for each in run["took"]] for name, own in found.items()
    }
    for name, each in taken.items():
        section.times(name, each, 1, "s a step")
    theirs, mine = taken.values()
    section.ratio("steps of plain loop / ours", theirs, mine, at_least=SPEED)
    sizes = {n: statistics.median(run["bytes"] for run in own) for n, own in found.items()}
    large, small = sizes.values()
    ratio = small / max(large, 1)  # of a tiny model nothing may be left above the base
    section.ratios.append(
        {
            "ratio": "memory above the base, ours / plain loop",
            "median": ratio,
            "best": "",
            "cpu": "",
            "bar": f"≤ {MEMORY:g}",
            "met": ratio <= MEMORY,
        }
    )
    section.notes.append(
        f"memory above the base, MB: plain loop {large / 1e6:.0f}, ours {small / 1e6:.0f}; "
        f"first losses {', '.join(f'{loss:.7g}' for loss in first.values())}; commit {_commit()}"
    )
    return section


def _commit() -> str:
    """The commit of this checkout; unknown outside of one."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
