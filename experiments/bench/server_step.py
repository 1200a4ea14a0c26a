"""What FedEx-LoRA's and FlexLoRA's server step cost, beside the same on dense matrices.

    python -m experiments.bench.server_step --threads 1 --json FILE

One module of size x size, updates of all clients in memory: `aggregator().add` of each, `finalise`,
`apply`. Sections: time, memory (both unless named). Whatever is compared runs in turn in one
process; what counts are the ratios. Nothing fails for being slow. README.md says how to read it.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corolla import seeds
from corolla.interfaces import Strategy
from corolla.strategies.fedex_lora import FedExLora
from corolla.strategies.flexlora import FlexLora
from corolla.tensors import factors
from corolla.types import Params, Payload
from experiments.bench.zeroth_order import (
    Section,
    command,
    in_turn,
    peak,
    resident,
    restart_peak,
)

ROOT = Path(__file__).resolve().parents[2]
MODULE = "m"
FACTORED = ("fedex_lora", "fedex_lora, cut", "flexlora")
DENSE = ("dense mean", "dense mean, svd")


@dataclass(frozen=True)
class Options:
    """How large everything is. The fields are the options of the command."""

    size: int = field(default=3072, metadata={"help": "inputs and outputs of the module"})
    clients: int = field(default=20, metadata={"help": "updates of a round"})
    rank: int = field(default=16, metadata={"help": "of each update, and of what is cut"})
    threads: int = field(default=0, metadata={"help": "of the CPU; 0: as torch chooses"})
    repetitions: int = field(default=3, metadata={"help": "of which the median and the best count"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the sections asked for, print tables, write the JSON file."""
    return command(__doc__, Options, SECTIONS, (*FACTORED, *DENSE), memory_of, arguments)


# --- what is compared -----------------------------------------------------------------------------


def updates(options: Options) -> list[tuple[Params, int]]:
    """(factors at scaling 1, examples) of each client: what all share, and half as much noise."""

    def draw(rows: int, columns: int, *labels: str | int) -> Tensor:
        normal = torch.randn(rows, columns, generator=seeds.generator(0, *labels))
        return normal / math.sqrt(options.size)

    n, r = options.size, options.rank
    a, b = draw(r, n, "A"), draw(n, r, "B")
    return [
        (
            {
                MODULE + factors.A: a + draw(r, n, "A", client) / 2,
                MODULE + factors.B: b + draw(n, r, "B", client) / 2,
            },
            client + 1,
        )
        for client in range(options.clients)
    ]


def server_step(
    strategy: Strategy, state: Payload, group: str, sent: Sequence[tuple[Params, int]]
) -> Payload:
    """The state after a round of these updates."""
    aggregator = strategy.aggregator()
    for own, examples in sent:
        aggregator.add({group: own, "head": {}}, examples)
    return strategy.apply(state, aggregator.finalise())[0]


def contenders(options: Options) -> dict[str, Callable[[], Params]]:
    """Each gives its new global model, relative to what was before: factors, or "dense"."""
    sent = updates(options)
    n, r = options.size, options.rank
    start = {MODULE + factors.A: torch.zeros(r, n), MODULE + factors.B: torch.zeros(n, r)}

    def fedex(residual_rank: int | None) -> Params:
        strategy = FedExLora(residual_rank=residual_rank)
        state = server_step(strategy, {"adapter": start, "head": {}}, "adapter", sent)
        after = strategy.adapter(state)
        return factors.stack([after.trained, *after.residuals])

    def flexlora() -> Params:
        return server_step(FlexLora(), {"global": start, "head": {}}, "factors", sent)["global"]

    def mean() -> Tensor:
        total = sum(examples for _, examples in sent)
        dense = torch.zeros(n, n)
        for own, examples in sent:
            a, b = own[MODULE + factors.A], own[MODULE + factors.B]
            dense.addmm_(b, a, alpha=examples / total)
        return dense

    def cut() -> Params:
        u, s, vt = torch.linalg.svd(mean(), full_matrices=False)
        return {MODULE + factors.A: vt[:r], MODULE + factors.B: u[:, :r] * s[:r]}

    runs = (lambda: fedex(None), lambda: fedex(r), flexlora, lambda: {"dense": mean()}, cut)
    return dict(zip((*FACTORED, *DENSE), runs, strict=True))


def by_peft(options: Options) -> Callable[[], Params]:
    """The svd kind of `add_weighted_adapter`, which forms the dense mean as well."""
    sent = updates(options)
    plain = nn.Sequential()
    plain.add_module(MODULE, nn.Linear(options.size, options.size, bias=False))
    plan = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=[MODULE])
    model: Any = get_peft_model(plain, plan, adapter_name="0")
    for client in range(1, options.clients):
        model.add_adapter(str(client), plan)
    layer = model.base_model.model.get_submodule(MODULE)
    for client, (own, _) in enumerate(sent):
        layer.lora_A[str(client)].weight.data = own[MODULE + factors.A]
        layer.lora_B[str(client)].weight.data = own[MODULE + factors.B]
    total = sum(examples for _, examples in sent)
    shares = [examples / total for _, examples in sent]
    names = [str(client) for client in range(options.clients)]

    def run() -> Params:
        if "mean" in model.peft_config:
            model.delete_adapter("mean")
        model.add_weighted_adapter(
            names, shares, "mean", combination_type="svd", svd_rank=options.rank
        )
        a, b = layer.lora_A["mean"].weight.detach(), layer.lora_B["mean"].weight.detach()
        return {MODULE + factors.A: a, MODULE + factors.B: layer.scaling["mean"] * b}

    return run


# --- time -----------------------------------------------------------------------------------------


def time(options: Options) -> Section:
    """Seconds of a server step, and how far the results are apart."""
    found = Section(
        f"time: {options.clients} updates of rank {options.rank}, one module of "
        f"{options.size} x {options.size}"
    )
    runs = contenders(options)
    runs["peft svd"] = by_peft(options)
    times = in_turn(runs, options.repetitions)
    for name, took in times.items():
        found.times(name, took, 1e3, "ms")
    for name in FACTORED:
        found.ratio(f"dense mean, svd / {name}", times["dense mean, svd"], times[name], at_least=50)
    found.ratio("peft svd / flexlora", times["peft svd"], times["flexlora"])
    found.ratio("dense mean / fedex_lora", times["dense mean"], times["fedex_lora"])
    exact, whole = runs["fedex_lora"](), runs["dense mean"]()["dense"].double()
    off = float((factors.product(exact, MODULE) - whole).norm() / whole.norm())
    found.notes.append(f"fedex_lora against the dense mean: {off:.1e} apart, relative")
    own = runs["flexlora"]()
    for name in ("dense mean, svd", "peft svd"):
        off = factors.distance(own, runs[name]())
        found.notes.append(f"flexlora against {name}: {off:.1e} apart, relative")
    return found


# --- memory ---------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most values of any tensor that is made, or seen as larger than it is stored."""

    values: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        own = (leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
        self.values = max(self.values, *own, 0)
        return made


def largest(run: Callable[[], object]) -> int:
    """The most values of any tensor that is made in a call."""
    seen = Largest()  # type: ignore[no-untyped-call]
    with seen:
        run()
    return int(seen.values)


def memory_of(name: str, options: Options) -> dict[str, float]:
    """The largest tensor of a server step, in values; what it takes beside the updates, in bytes.

    The latter is resident memory: also what libraries take for themselves.
    """
    run = contenders(options)[name]
    before = resident()
    restart_peak()
    run()
    above = peak() - before
    return {"largest tensor": largest(run), "peak above the updates": above}


def in_child(name: str, options: Options) -> dict[str, float]:
    """`memory_of` in a new process."""
    given = [part for key, value in asdict(options).items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "experiments.bench.server_step", "--child", name, *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(
    options: Options, measure: Callable[[str, Options], dict[str, float]] = in_child
) -> Section:
    """The largest tensors beside an (out, in) matrix; peaks, each in a process of its own."""
    found = Section(
        f"memory: {options.clients} updates of rank {options.rank}, one module of "
        f"{options.size} x {options.size}"
    )
    sent = sum(sum(t.nbytes for t in own.values()) for own, _ in updates(options)) / 1e6
    for name in (*FACTORED, *DENSE):
        own = measure(name, options)
        found.rows.append(
            {
                "contender": name,
                "largest tensor, values": int(own["largest tensor"]),
                "peak above the updates, MB": own["peak above the updates"] / 1e6,
            }
        )
        ratio = own["largest tensor"] / options.size**2
        bar, met = ("< 1", ratio < 1) if name in FACTORED else ("", None)
        found.ratios.append(
            {"ratio": f"{name}: largest / (out, in)", "value": ratio, "bar": bar, "met": met}
        )
    found.notes.append(f"the updates themselves, which the server holds: {sent:.1f} MB")
    return found


SECTIONS: dict[str, Callable[[Options], Section]] = {"time": time, "memory": memory}


if __name__ == "__main__":
    sys.exit(main())
