"""Which program of a bundle a native phone is to run: what its memory and its speed are enough for.

Nothing here knows of calls or files. What a phone says of itself is used for this choice alone and
is not stored: only the letter of its budget goes into the log.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from corolla.phones.bundle import Manifest, Method, Program
from corolla.types import TrainerName

TRAINERS: Mapping[str, TrainerName] = {"grad": "first_order", "loss": "zeroth_order"}
"""Method of a program → the trainer that it is."""

SHARE = 0.6
"""Of the free memory, what a program may take: it grows while it runs, and others do too."""
SHORTEST = 16
"""Tokens of a sequence: fewer are of no use."""

_VERSION = re.compile(r"executorch (\d+)\.(\d+)(?:\.(\d+))?\b")


@dataclass(frozen=True)
class Budget:
    """A class of devices by the bytes of memory that are free: where the choice begins.

    Those that can be expected to backpropagate (`first` is "grad") do so on sequences of at most
    `tokens`. What the manifest plans decides in the end.
    """

    name: str
    memory: float
    first: str
    tokens: float = math.inf


BUDGETS = (
    Budget("A", 2e9, "grad"),
    Budget("B", 800e6, "grad", 128),
    Budget("C", 200e6, "loss"),
    Budget("D", 0.0, "loss"),
)


@dataclass(frozen=True)
class Timing:
    """How long a pass over a sequence takes; as of the message of this name."""

    program: str
    method: str
    length: int
    seconds: float


@dataclass(frozen=True)
class Able:
    """The abilities that a native phone reports; `memory` are the bytes that it may use now."""

    methods: Sequence[str]
    strategies: Sequence[str]
    signs: int
    runtime: str
    memory: int
    length: int = 0
    """Tokens of a sequence, at most; 0: as the program."""
    timings: Sequence[Timing] = ()
    examples: int = 1
    held: str = ""
    """The program whose files it has."""


@dataclass(frozen=True)
class Demand:
    """The demand of a round on native phones. Where no demand is known yet, the defaults."""

    kinds: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(TRAINERS, ""))
    """Method → class of who trains by it."""
    strategy: str = ""
    length: int = 0
    """Tokens of a sequence, at most; 0: as the program."""
    passes: Mapping[str, Callable[[int], int]] = field(default_factory=dict)
    """Method → passes of a round over each sequence of a batch, by a phone's examples."""
    batch: Mapping[str, int] = field(default_factory=dict)
    """Method → sequences of a batch, at most."""
    seconds: float = math.inf
    """That are left."""


@dataclass(frozen=True)
class Assignment:
    """As the message of this name; `budget` is a letter for logs."""

    kind: str
    program: str
    method: str
    rank: int
    length: int
    planned_bytes: int
    budget: str


def assign(manifest: Manifest, able: Able, demand: Demand) -> Assignment | str:
    """Returns the Assignment of a phone, or why there is nothing for it, in one line.

    In this order: backpropagation, forward passes of a quantised base, those of the exact one; for
    a phone of little memory, backpropagation comes last. Sequences are halved until the program
    fits. Whatever fits of the program that a phone holds comes before all others: free memory
    changes from hour to hour, and programs are large downloads.
    """
    if why := _mismatch(manifest, able, demand):
        return why
    budget = next(own for own in BUDGETS if able.memory >= own.memory)
    most = int(SHARE * able.memory)
    smallest: tuple[int, str] | None = None
    slow = ""
    for program, kind, method in _candidates(manifest, able, demand, budget):
        for length in _lengths(manifest, able, demand, budget.tokens if kind == "grad" else 0):
            planned = method.bytes_at(length)
            what = f"{kind} of {program.name} at {length} tokens"
            if smallest is None or planned < smallest[0]:
                smallest = planned, what
            if planned > most:
                continue
            needed = _seconds(able, demand, program.name, kind, length)
            if needed <= demand.seconds:
                own = demand.kinds[kind], program.name, kind, manifest.rank
                return Assignment(*own, length, planned, budget.name)
            slow = f"{what} would take {needed:.0f} s, the round has {demand.seconds:.0f} s left"
    if slow:
        return f"it is too slow: {slow}"
    if smallest is None:
        return (
            f"nothing here is for it: it can do {_named(able.methods)}, "
            f"wanted is {_named(sorted(demand.kinds))}"
        )
    return (
        f"too little memory: {smallest[1]} needs {_mb(smallest[0])}, found {_mb(most)} "
        f"({SHARE:.0%} of {_mb(able.memory)} that are free)"
    )


def _mismatch(manifest: Manifest, able: Able, demand: Demand) -> str:
    """Why a phone can run no program of a bundle for a round, whatever its memory; "" if it can."""
    if able.signs != manifest.signs:
        return f"it speaks sign streams of version {able.signs}, this gateway {manifest.signs}"
    found, least = _version(able.runtime), _version(f"executorch {manifest.executorch_min}")
    if found is None or (least and found < least):
        return (
            f"its programs need executorch {manifest.executorch_min} or later, "
            f"found {able.runtime or 'none'!r}"
        )
    if demand.strategy and demand.strategy not in able.strategies:
        return f"the run is of strategy {demand.strategy}, it knows {_named(able.strategies)}"
    return ""


def _candidates(
    manifest: Manifest, able: Able, demand: Demand, budget: Budget
) -> Iterator[tuple[Program, str, Method]]:
    """(program, name of the method, method) that a phone can do and a round wants, best first."""
    found = [
        (program, kind, method)
        for program in manifest.programs
        for kind, method in program.methods.items()
        if kind in able.methods and kind in demand.kinds
    ]

    def worse(candidate: tuple[Program, str, Method]) -> tuple[bool, bool, bool]:
        program, kind, _ = candidate
        exact = program.base == "fp32"
        return program.name != able.held, kind != budget.first, exact != (kind == "grad")

    yield from sorted(found, key=worse)


def _lengths(manifest: Manifest, able: Able, demand: Demand, most: float) -> Iterator[int]:
    """Tokens of a sequence to try: the most that all allow (0: any), then half of it, and so on."""
    length = int(min(n for n in (manifest.length, able.length, demand.length, most) if n))
    yield length
    while (length := length // 2) >= SHORTEST:
        yield length


def _seconds(able: Able, demand: Demand, program: str, kind: str, length: int) -> float:
    """How long a round would take by what the phone has measured; 0 where it has measured nothing.

    The time of a pass is taken to be in proportion to its tokens.
    """
    of_a_round = demand.passes.get(kind)
    passes = of_a_round(able.examples) if of_a_round else 0
    passes *= min(demand.batch.get(kind, 1), able.examples)
    known = [
        timing.seconds / timing.length
        for timing in able.timings
        if (timing.program, timing.method) == (program, kind) and timing.length > 0
    ]
    sound = [own for own in known if 0 <= own < math.inf]
    return passes * length * min(sound, default=0.0)


def _version(text: str) -> tuple[int, ...] | None:
    found = _VERSION.search(text)
    return tuple(int(part or 0) for part in found.groups()) if found else None


def _named(names: Sequence[str]) -> str:
    return " and ".join(names) or "none"


def _mb(count: float) -> str:
    return f"{count / 1e6:.0f} MB"
