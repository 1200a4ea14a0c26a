"""Signal-to-noise ratios of updates under the noise of dp=client, by aggregation.

    python -m experiments.bench.noise --json FILE

One module of size x size, one round from the start (A random with rows of about norm 1, B = 0), n
clients. Half the energy of each raw update is common to all clients, half its own, both Gaussian;
its joint L2 norm is the clip, 1, before clipping already. Strategies that Corolla lets run with
dp=client go through its own ClippedSum, ClientLevel and Strategy.apply; the two that it refuses are
computed as they would have to be. README.md says how to read the table.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corolla import seeds
from corolla.config.run import RunConfig
from corolla.interfaces import Strategy
from corolla.privacy.client_level import ClientLevel
from corolla.privacy.clipped_sum import ClippedSum
from corolla.privacy.randomness import Normal, clip_factors
from corolla.strategies.listing import registry
from corolla.tensors import factors
from corolla.types import Params, Payload

CLIENTS = (10, 100, 1000)
NOISE = (1.0, 4.0)
MODULE = "m"


@dataclass(frozen=True)
class Options:
    """How large everything is."""

    size: int = 256
    rank: int = 8
    draws: int = 5
    """Of the noise: squares of its norms are averaged."""


def ratios(options: Options, clients: int, noise: float) -> dict[str, float]:
    """Aggregation → ‖effective update without noise‖ / ‖what noise adds to it‖ (Frobenius)."""
    found = {}
    for name, (strategy, make) in _allowed(options).items():
        found[name] = _released(options, strategy, make, clients, noise)
        if name == "FedAvg on (A, B)":
            found["  its quadratic term alone"] = _quadratic(options, clients, noise)
    found["FLoRA stack, noise on every factor"] = _stack(options, clients, noise)
    found["FLoRA as one dense product"] = _dense(options, clients, noise)
    return found


Updates = Callable[[int], Payload]
"""Number of a client → its raw update, of joint norm 1."""


def _allowed(options: Options) -> dict[str, tuple[Strategy, Updates]]:
    """What dp=client allows, and what clients send."""
    size, rank = options.size, options.rank
    a, b, r = (rank, size), (size, rank), (rank, rank)
    factor_a, factor_b, core = MODULE + factors.A, MODULE + factors.B, MODULE + factors.R
    made: dict[str, tuple[Strategy, Updates]] = {
        "FedAvg on (A, B)": (
            registry.create("fedavg"),
            lambda m: {"adapter": _update({factor_a: a, factor_b: b}, m)},
        ),
        "FFA-LoRA": (
            registry.create("ffa_lora"),
            lambda m: {"adapter": _update({factor_b: b}, m)},
        ),
        "Fed-SB": (
            registry.create("fed_sb"),
            lambda m: {"adapter": _update({core: r}, m)},
        ),
    }
    for pool in (1, 16, 512):
        made[f"seed_pool, K = {pool}"] = (
            registry.create("seed_pool", {"size": pool, "scalars": "fp32"}),
            lambda m, pool=pool: {"scalars": _scalars(pool, m)},  # type: ignore[misc]
        )
    return made


def _update(shapes: dict[str, tuple[int, ...]], client: int) -> dict[str, Tensor]:
    """Gaussian: half the energy from the seed of all, half from that of the client."""
    drawn = {
        name: torch.randn(shape, generator=seeds.generator(0, "all", name))
        + torch.randn(shape, generator=seeds.generator(0, "own", client, name))
        for name, shape in shapes.items()
    }
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in drawn.values()))
    return {name: tensor / norm for name, tensor in drawn.items()}


def _scalars(pool: int, client: int) -> Params:
    """A scalar for each direction of the pool, as a client of seed_pool would send them."""
    return {
        "scalars": _update({"g": (pool,)}, client)["g"],
        "directions": torch.arange(pool, dtype=torch.int32),
        "step": torch.tensor(1.0),
    }


def _released(
    options: Options, strategy: Strategy, make: Updates, clients: int, noise: float
) -> float:
    """By the real mechanism: with its noise, and with zeros in its place."""
    state = strategy.init(_start(options), 0)
    config = RunConfig(strategy=strategy.name, dp="client", noise_multiplier=noise, clip=1.0)
    names = [f"c{client}" for client in range(clients)]
    summed = ClippedSum(strategy.aggregator, config.clip, make(0))
    for client in range(clients):
        summed.add(make(client), 1.0)

    def change(normal: Normal) -> Tensor:
        level = ClientLevel(config, clients, clients, normal=normal)
        aggregate, _, _ = level.release(summed, names, {}, lambda event: None, round=1)
        return _effective(strategy, state, strategy.apply(state, aggregate)[0])

    def drawn(draw: int) -> Normal:
        generator = seeds.generator(0, "noise", draw)
        return lambda shape: torch.randn(tuple(shape), generator=generator, dtype=torch.float64)

    clean = change(lambda shape: torch.zeros(tuple(shape), dtype=torch.float64))
    return _ratio(clean, [change(drawn(draw)) for draw in range(options.draws)])


def _effective(strategy: Strategy, before: Payload, after: Payload) -> Tensor:
    """The change of the weights; of seeded directions the scalars: these are orthogonal."""
    if "log-000001" in after:
        row = after["log-000001"]
        return row["scalars"].double() * row["step"]
    old, new = (strategy.adapter(state).trained for state in (before, after))
    return factors.product(new, MODULE) - factors.product(old, MODULE)


def _quadratic(options: Options, clients: int, noise: float) -> float:
    """Of FedAvg: the signal over ξ_B ξ_A alone."""
    _, make = _allowed(options)["FedAvg on (A, B)"]
    mean = _mean(lambda m: make(m)["adapter"], clients)
    start = _start(options)
    moved = {n: start[n].double() + mean[n] for n in mean}
    terms = []
    for draw in range(options.draws):
        xi = {n: noise / clients * _noise(t, draw, n) for n, t in mean.items()}
        terms.append(factors.product(moved, MODULE) + factors.product(xi, MODULE))
    return _ratio(factors.product(moved, MODULE), terms)


def _stack(options: Options, clients: int, noise: float) -> float:
    """FLoRA: every block of the released stack is one client's, so each needs noise z · clip."""
    _, make = _allowed(options)["FedAvg on (A, B)"]
    start = _start(options)
    clean: Tensor = torch.zeros(())
    noisy: list[Tensor] = [torch.zeros(()) for _ in range(options.draws)]
    for client in range(clients):
        own = {n: start[n].double() + t for n, t in make(client)["adapter"].items()}
        clean = clean + factors.product(own, MODULE) / clients
        for draw in range(options.draws):
            loud = {n: t + noise * _noise(t, draw, f"{n}{client}") for n, t in own.items()}
            noisy[draw] = noisy[draw] + factors.product(loud, MODULE) / clients
    return _ratio(clean, noisy)


def _dense(options: Options, clients: int, noise: float) -> float:
    """The (size, size) products, clipped to 1, summed, and noise on every entry."""
    _, make = _allowed(options)["FedAvg on (A, B)"]
    start = _start(options)

    def product(client: int) -> Params:
        own = {n: start[n].double() + t for n, t in make(client)["adapter"].items()}
        dense = factors.product(own, MODULE)
        return {MODULE: dense * clip_factors(dense.norm(), 1.0)}

    clean = _mean(product, clients)[MODULE]
    draws = range(options.draws)
    return _ratio(clean, [clean + noise / clients * _noise(clean, d, "dense") for d in draws])


def _start(options: Options) -> Params:
    """Rows of A have norm 1 in the mean; B = 0."""
    a = torch.randn(options.rank, options.size, generator=seeds.generator(0, "A"))
    b = torch.zeros(options.size, options.rank)
    return {MODULE + factors.A: a / math.sqrt(options.size), MODULE + factors.B: b}


def _mean(make: Callable[[int], Params], clients: int) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for client in range(clients):
        for name, tensor in make(client).items():
            total[name] = total.get(name, 0) + tensor.double() / clients
    return total


def _noise(like: Tensor, draw: int, name: str) -> Tensor:
    generator = seeds.generator(0, "noise", draw, name)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


def _ratio(clean: Tensor, noisy: Sequence[Tensor]) -> float:
    """The norm of the signal over the root mean square of what noise adds."""
    square = sum(float((one - clean).square().sum()) for one in noisy) / len(noisy)
    return float(clean.norm()) / math.sqrt(square)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table in Markdown; write all numbers where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    usual = Options()
    parser.add_argument("--size", type=int, default=usual.size, help="inputs and outputs")
    parser.add_argument("--rank", type=int, default=usual.rank, help="of the adapter")
    parser.add_argument("--draws", type=int, default=usual.draws, help="of the noise")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, help="numbers of them")
    parser.add_argument("--noise", type=float, nargs="+", default=NOISE, help="multipliers")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    given = parser.parse_args(arguments)
    options = Options(given.size, given.rank, given.draws)
    cells = {(n, z): ratios(options, n, z) for z in given.noise for n in given.clients}
    print("| aggregation |" + "".join(f" n = {n}, z = {z:g} |" for n, z in cells))
    print("|---" * (1 + len(cells)) + "|")
    for name in next(iter(cells.values())):
        print(f"| {name} |" + "".join(f" {cell[name]:.2g} |" for cell in cells.values()))
    if given.json:
        facts: dict[str, Any] = {
            "options": vars(options),
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.platform(),
            "torch": torch.__version__,
            "ratios": [{"clients": n, "noise": z, **cell} for (n, z), cell in cells.items()],
        }
        given.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
