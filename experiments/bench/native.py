"""The native client beside torch and beside the Python client: time of a step, peak of memory.

    make phone
    python -m experiments.bench.phone_models MODEL
    corolla export MODEL --to executorch --out BUNDLE --key publisher.key
    python -m experiments.bench.native --model MODEL --bundle BUNDLE --publisher publisher.pub

`steps`: a step is one sequence of tokens, forward and backward, or two forward passes along a
direction. Each contender is a process of its own; they take turns, so that other work on the
machine slows all of them; what counts are the ratios. `session`: whole clients, from the download
of the bundle to the last report, as each of them measured itself. Nothing fails for missing a bar.
README.md has a table.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from corolla import seeds
from corolla.client.training.first_order import FirstOrder
from corolla.client.training.zeroth_order import ZerothOrder
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, collate
from corolla.directions import signs
from corolla.directions.pools import SignPool
from corolla.evaluation.scoring import loss_sum
from corolla.models import devices, pretrained
from corolla.models.lora import LoraModel
from experiments.bench.zeroth_order import Ratio, Section, command, now, peak, sequences, since
from experiments.native_phones import run as native_phones

ROOT = Path(__file__).resolve().parent.parent.parent
MEMORY_BAR = 60.0
"""MB of a whole zeroth-order client with a base of 4 bits and 16 million parameters."""
SHARE_BAR = 0.02
"""Of a zeroth-order step: all passes over the adapter."""
NATIVE = {
    "native, backpropagation": ("fp32", "grad"),
    "native, zeroth order, fp32": ("fp32", "loss"),
    "native, zeroth order, 4 bits": ("q4", "loss"),
}
PYTHON = (
    "torch, backpropagation",
    "torch, two forward passes",
    "Python client, first order",
    "Python client, zeroth order",
)
RATIOS = (
    ("native, backpropagation", "torch, backpropagation"),
    ("native, backpropagation", "Python client, first order"),
    ("native, zeroth order, fp32", "torch, two forward passes"),
    ("native, zeroth order, 4 bits", "torch, two forward passes"),
    ("native, zeroth order, 4 bits", "Python client, zeroth order"),
)
Measured = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How large everything is. The fields are the options of the command."""

    model: str = field(default="embedded", metadata={"help": "as for corolla simulate"})
    bundle: str = field(default="bundle", metadata={"help": "folder that it was exported to"})
    publisher: str = field(default="publisher.pub", metadata={"help": "key of who exported it"})
    client: str = field(
        default="build/native/corolla-phone", metadata={"help": "the native client"}
    )
    threads: int = field(default=1, metadata={"help": "of the CPU"})
    repetitions: int = field(default=3, metadata={"help": "processes of each contender"})
    steps: int = field(default=20, metadata={"help": "of each process, after two that warm up"})
    length: int = field(default=128, metadata={"help": "tokens of the sequence"})
    rank: int = field(default=8, metadata={"help": "of the adapter, and of the bundle"})
    batch: int = field(default=1, metadata={"help": "sequences of a step"})

    def arguments(self) -> list[str]:
        """The command line that gives these options."""
        return [part for name, value in asdict(self).items() for part in (f"--{name}", str(value))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables, write the JSON file."""
    return command(__doc__, Options, SECTIONS, PYTHON, python_of, arguments)


def steps(options: Options) -> Section:
    """All contenders in turn."""
    found = Section(f"{options.model}: one sequence of {options.length} tokens a step")
    contenders: dict[str, Callable[[], Measured]] = {
        **{name: (lambda name=name: native(name, options)) for name in NATIVE},  # type: ignore[misc]
        **{name: (lambda name=name: in_child(name, options)) for name in PYTHON},  # type: ignore[misc]
    }
    measured: dict[str, list[Measured]] = {name: [] for name in contenders}
    for _ in range(options.repetitions):
        for name, run in contenders.items():
            measured[name].append(run())
    for name, own in measured.items():
        found.rows.append(
            {
                "contender": name,
                "median ms": statistics.median(one["step_ms_p50"] for one in own),
                "best ms": min(one["step_ms_min"] for one in own),
                "peak MB": max(one["peak_rss_bytes"] for one in own) / 1e6,
            }
        )
    of = {str(row["contender"]): row for row in found.rows}
    for above, below in RATIOS:
        for what in ("median ms", "best ms", "peak MB"):
            value = float(of[above][what]) / float(of[below][what])
            found.ratios.append({"ratio": f"{above} / {below}, {what}", "value": value})
    light = measured["native, zeroth order, 4 bits"]
    share = statistics.median(one["perturb_share"] for one in light)
    memory = float(of["native, zeroth order, 4 bits"]["peak MB"])
    for name, value, bar in (
        ("passes over the adapter / step, 4 bits", share, SHARE_BAR),
        ("peak MB, 4 bits", memory, MEMORY_BAR),
    ):
        found.ratios.append(
            {"ratio": name, "value": value, "bar": f"≤ {bar:g}", "met": value <= bar}
        )
    return found


def native(name: str, options: Options) -> Measured:
    """A process of the native client."""
    program, method = NATIVE[name]
    words = ["bench", options.bundle, "--program", program]
    words += ["--method", method, "--length", str(options.length), "--steps", str(options.steps)]
    words += ["--threads", str(options.threads)]
    return _printed([str(Path(options.client).resolve()), *words], Path.cwd())


def in_child(name: str, options: Options) -> Measured:
    """`python_of` in a new process."""
    words = ["-m", "experiments.bench.native", "--child", name, *options.arguments()]
    return _printed([sys.executable, *words], ROOT)


def _printed(told: Sequence[str], folder: Path) -> Measured:
    done = subprocess.run(told, stdout=subprocess.PIPE, check=True, text=True, cwd=folder)
    found: Measured = json.loads(done.stdout.splitlines()[-1])
    return found


def python_of(name: str, options: Options) -> Measured:
    """Milliseconds of a step, and the peak of this process; run it in a new one."""
    config = RunConfig(
        strategy="fedavg" if "first order" in name else "seed_pool",
        model=options.model,
        device="cpu",
        threads=options.threads,
        local_steps=options.steps + 2,
        batch_size=1,
        max_length=options.length,
        rank=options.rank,
        alpha=2.0 * options.rank,
        optimizer="sgd",
    )
    devices.set_threads(config)
    base = pretrained.load(config)
    model = LoraModel(base)
    data = sequences(base, options)  # type: ignore[arg-type]
    took: list[float] = []
    if name.startswith("torch"):
        _bare(name, model, config, data, took)
    else:
        _client(name, model, config, data, took)
    took = [1e3 * seconds for seconds in took[2:]]
    return {
        "step_ms_p50": statistics.median(took),
        "step_ms_min": min(took),
        "peak_rss_bytes": peak(),
    }


def _bare(
    name: str, model: LoraModel, config: RunConfig, data: Sequence[Encoded], took: list[float]
) -> None:
    """Torch alone: what a loop costs that does nothing else."""
    model.write(model.init(config.lora, 0), config.lora)
    batch = collate(data, model.base.pad_id, model.device)
    parameters = [parameter for _, parameter in model.parameters()]
    backward = "backpropagation" in name
    for parameter in parameters:
        parameter.requires_grad_(backward)
    for _ in range(config.local_steps):
        began = now()
        with torch.set_grad_enabled(backward):
            if backward:
                loss_sum(model.model, batch).backward()  # type: ignore[no-untyped-call]
                for parameter in parameters:
                    parameter.data.add_(parameter.grad, alpha=-1e-6)  # type: ignore[arg-type]
                    parameter.grad = None
            else:
                for _ in range(2):
                    float(loss_sum(model.model, batch))
        took.append(since(began).wall)


def _client(
    name: str, model: LoraModel, config: RunConfig, data: Sequence[Encoded], took: list[float]
) -> None:
    """A round of the trainer that `corolla phone` has."""
    started = now()

    def told(_: int) -> None:
        nonlocal started
        took.append(since(started).wall)
        started = now()

    start = model.init(config.lora, seeds.derive(0, "init"))
    if "first order" in name:
        FirstOrder(model, config.lora, data, config, seed=0, round=1, on_step=told).fit(start)
        return
    trainer = ZerothOrder(model, config.lora, data, config, seed=0, round=1, on_step=told)
    taken = signs.choices(0, trainer.queries, 512).tolist()
    trainer.walk(start, (), SignPool(512, (1, 1)), taken)


def session(options: Options) -> Section:
    """Two rounds of four native phones with a gateway over TLS: forward passes over 4 bits."""
    found = Section(
        f"session: {options.model}, forward passes over 4 bits, {options.length} tokens"
    )
    settings = {**native_phones.ALWAYS, "model": options.model, "max_length": options.length}
    few = {"rounds": 2, "local_steps": options.steps, "batch_size": 1, "eval_examples": 4}
    config = RunConfig(
        **{**settings, **few, "rank": options.rank, "alpha": 2.0 * options.rank},
        strategy="seed_pool",
        eps=1e-2,
    )
    bundle, publisher, client = (
        Path(name).resolve() for name in (options.bundle, options.publisher, options.client)
    )
    with tempfile.TemporaryDirectory(prefix="corolla-native-") as scratch:
        native_phones.federate(config, Path(scratch), bundle, publisher, client, "loss")
        for own in native_phones.reported(Path(scratch)):
            found.rows.append(
                {
                    "peak MB": own["device_peak_rss_bytes"] / 1e6,
                    "step ms": own["device_step_ms_p50"],
                    "passes over the adapter / step": own["device_perturb_share"],
                    "bytes up": own["device_bytes_up"],
                    "bytes down": own["device_bytes_down"],
                }
            )
    value = max(float(row["peak MB"]) for row in found.rows)
    row: Ratio = {"ratio": "largest peak MB", "value": value, "bar": f"≤ {MEMORY_BAR:g}"}
    found.ratios.append({**row, "met": value <= MEMORY_BAR})
    return found


SECTIONS: dict[str, Callable[[Options], Section]] = {"steps": steps, "session": session}


if __name__ == "__main__":
    sys.exit(main())
