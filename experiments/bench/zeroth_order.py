"""What zeroth-order training costs beside forward passes alone: time of its parts, and memory.

    python experiments/bench/zeroth_order.py --model gemma-3-270m --json FILE

Sections: generator, replay, step, memory (all unless named). Whatever is compared runs in turn in
one process, so that other work on the machine slows all of it; what counts are the ratios. Nothing
fails for being slow. Tables are printed as Markdown. README.md says how to read them.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from corolla import seeds
from corolla.client.training.first_order import FirstOrder
from corolla.client.training.zeroth_order import ZerothOrder
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, collate
from corolla.directions import moving, signs
from corolla.directions.pools import SignPool
from corolla.evaluation.scoring import loss_sum
from corolla.models import pretrained, trainable
from corolla.models.lora import LoraModel
from corolla.models.pretrained import Base
from corolla.types import Move, Pool

KEY = (1, 1)
WARM_UP = 2
"""Steps that do not count: the first looks without taking anything away."""
MEMORY = ("inference", "full", "lora", "first_order")
Ratio = dict[str, str | float | bool | None]
Words = Callable[[Sequence[int], Sequence[int], int], NDArray[Any]]
"""(counter, key, blocks) → four words a block."""


class Took(NamedTuple):
    """Seconds by the clock, and of the CPU in all threads, which other work disturbs less."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Options:
    """How large everything is. The fields are the options of the command."""

    model: str = field(default="embedded", metadata={"help": "as for corolla simulate"})
    threads: int = field(default=0, metadata={"help": "of the CPU; 0: as torch chooses"})
    repetitions: int = field(default=7, metadata={"help": "of which the median and the best count"})
    signs: int = field(default=1 << 24, metadata={"help": "signs a generator makes at a time"})
    values: int = field(default=10_000_000, metadata={"help": "parameters that a replay moves"})
    pool: int = field(default=4096, metadata={"help": "directions, a power of two"})
    gaussians: int = field(default=3, metadata={"help": "directions drawn, of all of the pool"})
    batch: int = field(default=4, metadata={"help": "sequences"})
    length: int = field(default=64, metadata={"help": "tokens of each"})
    rank: int = field(default=8, metadata={"help": "of the adapter"})

    def arguments(self) -> list[str]:
        """The command line that gives these options."""
        return [part for name, value in asdict(self).items() for part in (f"--{name}", str(value))]


@dataclass
class Section:
    """What was measured: rows of one table, and the ratios that count, in another."""

    title: str
    rows: list[dict[str, str | float]] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def times(self, name: str, took: Sequence[Took], scale: float, unit: str) -> None:
        """A row: the median and the best of some seconds, times a scale."""
        wall, cpu = ([each[i] * scale for each in took] for i in (0, 1))
        row = {"median": statistics.median(wall), "best": min(wall), "cpu": statistics.median(cpu)}
        self.rows.append({"contender": name, **row, "unit": unit, "repetitions": len(took)})

    def ratio(
        self,
        name: str,
        above: Sequence[Took],
        below: Sequence[Took],
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """The ratio of two contenders: of medians, of best repetitions, and of CPU medians."""
        (wall, cpu), (wall_below, cpu_below) = zip(*above, strict=True), zip(*below, strict=True)
        ratios = {
            "median": statistics.median(wall) / statistics.median(wall_below),
            "best": min(wall) / min(wall_below),
            "cpu": statistics.median(cpu) / statistics.median(cpu_below),
        }
        bar, met = "", None
        if at_most is not None:
            bar, met = f"≤ {at_most:g}", ratios["median"] <= at_most
        if at_least is not None:
            bar, met = f"≥ {at_least:g}", ratios["median"] >= at_least
        self.ratios.append({"ratio": name, **ratios, "bar": bar, "met": met})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the sections asked for, print tables, write the JSON file."""
    return command(__doc__, Options, SECTIONS, MEMORY, memory_of, arguments)


def command(
    about: str | None,
    kind: type[Any],
    sections: Mapping[str, Callable[[Any], "Section"]],
    children: Iterable[str],
    memory_of: Callable[[str, Any], Any],
    arguments: Sequence[str] | None,
) -> int:
    """The command line of a bench.

    `kind` is a dataclass whose fields, with a help text as metadata, are the options; `children`
    are what `memory_of` measures in a process of its own.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"{', '.join(sections)}; none: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--child", choices=tuple(children), help=argparse.SUPPRESS)
    for option in fields(kind):
        known = f"{option.metadata['help']} (default {option.default})"
        parser.add_argument(
            f"--{option.name}", type=type(option.default), default=option.default, help=known
        )
    given = parser.parse_args(arguments)
    options = kind(**{option.name: getattr(given, option.name) for option in fields(kind)})
    unknown = [name for name in given.sections if name not in sections]
    if unknown:
        parser.error(f"unknown section {unknown[0]}: known are {', '.join(sections)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    if given.child:
        print(json.dumps(memory_of(given.child, options)))
        return 0
    found: dict[str, Any] = {"machine": machine(), "options": asdict(options), "sections": {}}
    console = Console(width=200 if not sys.stdout.isatty() else None)
    console.print(", ".join(f"{name} {value}" for name, value in found["machine"].items()) + "\n")
    for name in given.sections or sections:
        section = sections[name](options)
        found["sections"][name] = asdict(section)
        show(section, console)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return 0


# --- generator ------------------------------------------------------------------------------------

# Random123's known answers: counter, key, words.
_PI = "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 082efa98 ec4e6c89"
_PI += " 452821e6 38d01377 be5466cf 34e90c6c"
KNOWN_32 = (
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (" ".join(["f" * 8] * 4), " ".join(["f" * 8] * 2), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (_PI[:35], _PI[36:53], "d16cfe09 94fdcceb 5001e420 24126ea1"),
)
_PI = _PI.replace(" ", "")
_PI = " ".join(_PI[at : at + 16] for at in range(0, len(_PI), 16))
KNOWN_64 = (
    ("0 0 0 0", "0 0", "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    (
        " ".join(["f" * 16] * 4),
        " ".join(["f" * 16] * 2),
        "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
    ),
    (_PI[:67], _PI[68:], "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6"),
)


def generator(options: Options) -> Section:
    """Nanoseconds of one sign from both widths of Philox, compiled and in NumPy."""
    found = Section("generator: Philox with ten rounds, one bit a sign, one thread")
    makers: dict[str, tuple[Words, int]] = {
        "4x64 NumPy": (numpy_philox_64, 64),
        "4x32 NumPy": (numpy_philox_32, 32),
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, flags in (("C", ()), ("C, own CPU", ("-march=native",))):
            library = compiled(Path(scratch, f"philox{len(flags)}.so"), *flags)
            if library is None:
                found.notes.append(f"{name}: skipped, no C compiler that builds philox.c")
                continue
            makers[f"4x64 {name}"] = (_caller(library.philox4x64, np.uint64), 64)
            makers[f"4x32 {name}"] = (_caller(library.philox4x32, np.uint32), 32)
        for name, (make, width) in makers.items():
            check_known_answers(name, make, width)
        found.notes.append("known answers of Random123: equal for all, and 1000 blocks on")
        contenders: dict[str, Callable[[], object]] = {
            name: partial(make, (0, 0, 0, 0), KEY, options.signs // (4 * width))
            for name, (make, width) in makers.items()
        }
        contenders["signs.words"] = lambda: signs.words(KEY, 0, options.signs // 64)
        times = in_turn(contenders, options.repetitions)
    for name, took in times.items():
        found.times(name, took, 1e9 / options.signs, "ns a sign")
    for name in ("NumPy", "C", "C, own CPU"):
        if f"4x32 {name}" in times:
            found.ratio(f"4x32 / 4x64, {name}", times[f"4x32 {name}"], times[f"4x64 {name}"])
    return found


def compiled(target: Path, *flags: str) -> ctypes.CDLL | None:
    """philox.c as a library; None without a C compiler that can build it."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    source = Path(__file__).with_name("philox.c")
    command = [compiler, "-O3", *flags, "-shared", "-fPIC", "-o", str(target), str(source)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    return ctypes.CDLL(str(target))


def _caller(function: Any, dtype: type[np.uint32] | type[np.uint64]) -> Words:
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    function.restype = None

    def make(counter: Sequence[int], key: Sequence[int], blocks: int) -> NDArray[Any]:
        out = np.empty(4 * blocks, dtype=dtype)
        at, by = np.array(counter, dtype=dtype), np.array(key, dtype=dtype)
        function(at.ctypes.data, by.ctypes.data, blocks, out.ctypes.data)
        return out

    return make


def numpy_philox_64(counter: Sequence[int], key: Sequence[int], blocks: int) -> NDArray[np.uint64]:
    """NumPy's own generator, which adds one to its counter before it generates."""
    before = sum(word << 64 * i for i, word in enumerate(counter)) - 1
    state = [before >> 64 * i & (1 << 64) - 1 for i in range(4)]
    made = np.random.Philox(
        counter=np.array(state, dtype=np.uint64), key=np.array(key, dtype=np.uint64)
    )
    drawn: NDArray[np.uint64] = made.random_raw(4 * blocks)
    return drawn


def numpy_philox_32(counter: Sequence[int], key: Sequence[int], blocks: int) -> NDArray[np.uint32]:
    """Vectors of counters, so many at a time that they stay in the cache."""
    out = np.empty((blocks, 4), dtype=np.uint32)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for start in range(0, blocks, 8192):
        some = min(8192, blocks - start)
        c0 = np.arange(start, start + some, dtype=np.uint64) + np.uint64(counter[0]) & low
        c1, c2, c3 = (np.full(some, word, dtype=np.uint64) for word in counter[1:])
        k0, k1 = key
        for _ in range(10):
            p, q = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
            c0 = q >> half ^ c1 ^ np.uint64(k0)
            c1 = q & low
            c2 = p >> half ^ c3 ^ np.uint64(k1)
            c3 = p & low
            k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
        for column, word in enumerate((c0, c1, c2, c3)):
            out[start : start + some, column] = word
    return out.reshape(-1)


def check_known_answers(name: str, make: Words, width: int) -> None:
    """Raises ValueError unless a generator is the one of Random123."""
    for counter, key, wanted in KNOWN_64 if width == 64 else KNOWN_32:
        at, by = ([int(word, 16) for word in text.split()] for text in (counter, key))
        if [f"{word:0{width // 4}x}" for word in make(at, by, 1).tolist()] != wanted.split():
            raise ValueError(f"{name} is no Philox4x{width}-10: wrong words for counter {counter}")
    other = numpy_philox_64 if width == 64 else numpy_philox_32
    if not np.array_equal(make((5, 1, 2, 3), KEY, 1000), other((5, 1, 2, 3), KEY, 1000)):
        raise ValueError(f"{name} does not count up as NumPy does")


# --- replay ---------------------------------------------------------------------------------------


def replay(options: Options) -> Section:
    """A whole pool of accumulated scalars against passes over the weights and Gaussian draws."""
    found = Section(f"replay: {options.pool} scalars over {options.values:,} fp32 parameters")
    weights = torch.randn(options.values, generator=seeds.generator(0, "weights"))
    other = torch.randn(options.values, generator=seeds.generator(0, "other"))
    scalars = torch.randn(options.pool, generator=seeds.generator(0, "scalars"))
    moves = [Move(SignPool(options.pool, KEY), scalars, step=-1e-9)]
    own = torch.Generator()

    def signed() -> None:
        moving.apply(weights, 0, moves)

    def in_numpy() -> None:
        with without_kernel():
            signed()

    def gaussian() -> None:
        for k in range(options.gaussians):
            z = torch.randn(options.values, generator=own.manual_seed(k))
            weights.add_(z, alpha=1e-9 * float(scalars[k]))

    contenders: dict[str, Callable[[], object]] = {
        "add_(c)": lambda: weights.add_(1e-9),
        "add_(y)": lambda: weights.add_(other),
        "gaussian": gaussian,
        "fwht": lambda: signs.fwht(scalars.double().numpy()),
        "replay, NumPy": in_numpy,
    }
    if signs.compiled():
        contenders["replay, compiled"] = signed
        _check_same_bits(moves, options)
        found.notes.append("replay, compiled and NumPy: the same bits")
    else:
        found.notes.append(
            "replay, compiled: skipped, the kernel of corolla.directions.signs is not built"
        )
    times = in_turn(contenders, options.repetitions)
    drawn = options.gaussians * options.repetitions
    gaussians = f"Gaussian, {options.pool} directions"
    scale = options.pool / options.gaussians
    times[gaussians] = [Took(t.wall * scale, t.cpu * scale) for t in times.pop("gaussian")]
    found.notes.append(f"{gaussians}: extrapolated from {drawn} that were drawn and added")
    for name, took in times.items():
        found.times(name, took, 1e3, "ms")
    for name in ("replay, compiled", "replay, NumPy"):
        if name in times:
            found.ratio(f"{name} / add_(c)", times[name], times["add_(c)"], at_most=3)
            found.ratio(f"{name} / add_(y)", times[name], times["add_(y)"], at_most=3)
            found.ratio(f"Gaussian / {name}", times[gaussians], times[name], at_least=5000)
    return found


@contextmanager
def without_kernel() -> Iterator[None]:
    """What corolla.directions.signs does where no kernel was built."""
    kernel, signs._kernel = signs._kernel, None
    try:
        yield
    finally:
        signs._kernel = kernel


def _check_same_bits(moves: Sequence[Move], options: Options) -> None:
    start = torch.linspace(-1, 1, min(options.values, 3 * options.pool + 100))
    ends = [start.clone(), start.clone()]
    moving.apply(ends[0], 0, moves)
    with without_kernel():
        moving.apply(ends[1], 0, moves)
    if torch.equal(start, ends[0]) or not torch.equal(*ends):
        raise ValueError("the compiled replay and NumPy's differ")


# --- step -----------------------------------------------------------------------------------------


@dataclass
class Timed:
    """A pool that knows how long its passes took."""

    pool: Pool
    took: Took = Took(0.0, 0.0)  # noqa: RUF009 - a tuple

    def add(
        self,
        out: Tensor,
        offset: int,
        terms: Sequence[tuple[int, float]],
        source: Tensor | None = None,
    ) -> None:
        own = clock(lambda: self.pool.add(out, offset, terms, source))
        self.took = Took(self.took.wall + own.wall, self.took.cpu + own.cpu)


def step(options: Options) -> Section:
    """A zeroth-order step against the two forward passes in it, and against MeZO's loop."""
    found = Section(
        f"step: {options.model}, {options.batch} x {options.length} random tokens, fp32"
    )
    for kind, bar in (("full", 1.25), ("lora", 1.03)):
        times, count = steps(kind, options)
        gc.collect()  # a model holds itself: its hooks know it
        trained = "all parameters" if kind == "full" else f"LoRA of rank {options.rank}"
        found.notes.append(f"{kind}: {trained}, {count:,} values")
        for name, took in times.items():
            found.times(f"{kind}: {name}", took, 1e3, "ms")
        bare = times["two forward passes"]
        found.ratio(
            f"{kind}: step / two forward passes", times["zeroth-order step"], bare, at_most=bar
        )
        found.ratio(f"{kind}: MeZO / two forward passes", times["MeZO step"], bare)
        found.ratio(
            f"{kind}: MeZO step / zeroth-order step", times["MeZO step"], times["zeroth-order step"]
        )
    return found


def steps(kind: str, options: Options) -> tuple[dict[str, list[Took]], int]:
    """Times of the contenders, and how many values are trained.

    The trainer does all its steps in one go; after each, the others have their turn.
    """
    config = settings(kind, options, options.repetitions + WARM_UP)
    base = pretrained.load(config)
    model = trainable.build(config, base)
    data = sequences(base, options)
    batch = collate(data, base.pad_id, model.device)
    pool = Timed(SignPool(options.pool, KEY))
    times: dict[str, list[Took]] = {
        "two forward passes": [],
        "zeroth-order step": [],
        "passes over the values, in it": [],
        "MeZO step": [],
    }

    started = now()

    def two_passes() -> None:
        for _ in range(2):
            float(loss_sum(model.model, batch))

    def mezo_step() -> None:
        parameters = model.parameters() if isinstance(model, LoraModel) else named
        mezo([tensor.data for _, tensor in parameters], loss, len(times["MeZO step"]), config)

    def loss() -> float:
        return float(loss_sum(model.model, batch)) / sum(own.targets for own in data)

    def others(_: int) -> None:
        nonlocal started
        times["zeroth-order step"].append(since(started))
        times["passes over the values, in it"].append(pool.took)
        contenders = [("two forward passes", two_passes), ("MeZO step", mezo_step)]
        for name, run in contenders[:: 1 if len(times["MeZO step"]) % 2 else -1]:
            times[name].append(clock(run))
        pool.took, started = Took(0.0, 0.0), now()

    named = list(base.model.named_parameters())
    trainer = ZerothOrder(model, config.lora, data, config, seed=0, round=1, on_step=others)
    taken = signs.choices(0, trainer.queries, options.pool).tolist()
    start = model.init(config.lora, 0)
    trainer.walk(start, (), pool, taken)
    trained = start.values() if start else [tensor for _, tensor in named]
    count = sum(tensor.numel() for tensor in trained)
    return {name: took[WARM_UP:] for name, took in times.items()}, count


def mezo(
    tensors: Sequence[Tensor], loss: Callable[[], float], seed: int, config: RunConfig
) -> None:
    """A step of MeZO: every pass over the tensors draws the same Gaussian values again."""
    own = torch.Generator(tensors[0].device)

    def add(scale: float) -> None:
        own.manual_seed(seed)
        for tensor in tensors:
            z = torch.randn(tensor.shape, generator=own, device=tensor.device, dtype=tensor.dtype)
            tensor.add_(z, alpha=scale)

    add(config.eps)
    above = loss()
    add(-2 * config.eps)
    below = loss()
    add(config.eps)
    add(-config.lr * (above - below) / (2 * config.eps))


# --- memory ---------------------------------------------------------------------------------------


def in_child(kind: str, options: Options) -> dict[str, float]:
    """`memory_of` in a new process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", kind]
    done = subprocess.run(
        [*command, *options.arguments()], stdout=subprocess.PIPE, check=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(
    options: Options, measure: Callable[[str, Options], dict[str, float]] = in_child
) -> Section:
    """The peak of resident memory, each contender in a process of its own."""
    found = Section(
        f"memory: {options.model}, {options.batch} x {options.length} random tokens, fp32, MB"
    )
    peaks = {kind: measure(kind, options) for kind in MEMORY}
    for kind, own in peaks.items():
        sizes = {name: value / 1e6 for name, value in own.items()}
        sizes["above the model"] = sizes["peak"] - sizes["model loaded"]
        found.rows.append({"process": kind, **sizes})
    for kind in MEMORY[1:]:
        for name in ("peak", "peak with loading"):
            ratio = peaks[kind][name] / peaks["inference"][name]
            bar = 1.1 if name == "peak" and kind != "first_order" else None
            row: Ratio = {"ratio": f"{kind} / inference, {name}", "value": ratio}
            row |= {"bar": f"≤ {bar:g}" if bar else "", "met": ratio <= bar if bar else None}
            found.ratios.append(row)
    if any(own["mapped at the end"] for own in peaks.values()):
        found.notes.append(
            "mapped: pages of files, above all weights that nothing has changed; a system short "
            "of memory can drop them and read them again"
        )
    return found


def memory_of(kind: str, options: Options) -> dict[str, float]:
    """Bytes that are resident after loading, and at most: since then, and since the beginning."""
    config = settings(kind, options, options.repetitions)
    base = pretrained.load(config)
    data = sequences(base, options)
    loaded, before = resident(), peak()
    restart_peak()
    if kind == "inference":
        batch = collate(data, base.pad_id, base.model.device)
        with torch.no_grad():
            for _ in range(2 * options.repetitions):
                float(loss_sum(base.model, batch))
    else:
        model = trainable.build(config, base)
        start = model.init(config.lora, 0)
        if kind == "first_order":
            assert isinstance(model, LoraModel)
            FirstOrder(model, config.lora, data, config, seed=0, round=1).fit(start)
        else:
            trainer = ZerothOrder(model, config.lora, data, config, seed=0, round=1)
            taken = signs.choices(0, trainer.queries, options.pool).tolist()
            trainer.walk(start, (), SignPool(options.pool, KEY), taken)
    after = peak()
    return {
        "model loaded": loaded,
        "peak": after,
        "peak with loading": max(before, after),
        "mapped at the end": _status("RssFile"),
    }


def peak() -> float:
    """The largest resident memory so far, in bytes.

    On Linux from /proc: there getrusage counts the process that started this one, too.
    """
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident() -> float:
    """Resident memory now, in bytes; the largest so far where the system does not tell."""
    return _status("VmRSS") or peak()


def restart_peak() -> None:
    """Have `peak` count from here on. Linux only; elsewhere it goes on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(name: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0.0)


# --- what all share -------------------------------------------------------------------------------


def settings(kind: str, options: Options, count: int) -> RunConfig:
    """The config of a client that takes `count` steps."""
    return RunConfig(
        strategy="fedavg" if kind == "first_order" else "seed_pool",
        model=options.model,
        parameters="full" if kind == "full" else "lora",
        device="cpu",
        threads=torch.get_num_threads(),
        local_steps=count,
        batch_size=options.batch,
        max_length=max(8, options.length),
        rank=options.rank,
        alpha=2.0 * options.rank,
    )


def sequences(base: Base, options: Options) -> list[Encoded]:
    """One batch of random tokens."""
    vocabulary = int(base.model.config.get_text_config().vocab_size)
    shape = (options.batch, options.length)
    drawn = torch.randint(vocabulary, shape, generator=seeds.generator(0, "tokens"))
    return [Encoded(row, row) for row in drawn.tolist()]


def now() -> Took:
    """Both clocks."""
    return Took(time.perf_counter(), time.process_time())


def since(started: Took) -> Took:
    """What both clocks have counted since."""
    return Took(time.perf_counter() - started.wall, time.process_time() - started.cpu)


def clock(run: Callable[[], object]) -> Took:
    """What one call takes."""
    started = now()
    run()
    return since(started)


def in_turn(
    contenders: Mapping[str, Callable[[], object]], repetitions: int
) -> dict[str, list[Took]]:
    """What each takes, after one call that does not count; every other turn is in reverse."""
    times: dict[str, list[Took]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for repetition in range(repetitions):
        for name in list(contenders)[:: -1 if repetition % 2 else 1]:
            times[name].append(clock(contenders[name]))
    return times


def machine() -> dict[str, str | float]:
    """Where and when this was measured, and how busy it was before."""
    name = platform.processor()
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        lines = facts.read_text().splitlines()
        name = next(
            (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), name
        )
    known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else math.nan
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": name or platform.machine(),
        "cores": os.cpu_count() or 0,
        "memory_gb": round(memory / 1e9, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "compiled_signs": signs.compiled(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else math.nan,
    }


def show(section: Section, console: Console) -> None:
    """Print a section as Markdown."""
    console.print(f"### {section.title}\n", markup=False, highlight=False)
    for rows in (section.rows, section.ratios):
        if rows:
            table = Table(box=box.MARKDOWN)
            for column, value in rows[0].items():
                table.add_column(column, justify="left" if isinstance(value, str) else "right")
            for row in rows:
                table.add_row(*map(cell, row.values()))
            with console.capture() as capture:
                console.print(table, highlight=False)
            lines = [line.rstrip() for line in capture.get().splitlines()]
            console.print("\n".join(filter(None, lines)) + "\n", markup=False, highlight=False)
    for note in section.notes:
        console.print(f"{note}.\n", markup=False, highlight=False)


def cell(value: str | float | bool | None) -> str:
    """A number with three or four digits that count."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


SECTIONS: dict[str, Callable[[Options], Section]] = {
    "generator": generator,
    "replay": replay,
    "step": step,
    "memory": memory,
}


if __name__ == "__main__":
    sys.exit(main())
