"""Ranks and scalings of single modules, where they differ from those of the adapter."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from corolla.config.run import RunConfig
from corolla.errors import ModelError
from corolla.tensors import factors
from corolla.types import LoraSpec, Params

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Patterns:
    """Ranks and numerators of scalings by the names of modules, or the last parts of them.

    Of several names that mean a module the longest counts. What is not named is as in the adapter.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig) -> "Patterns":
        """The patterns of a run."""
        return cls(config.rank_pattern, config.alpha_pattern)

    def __bool__(self) -> bool:
        return bool(self.ranks or self.alphas)

    def spec(self, module: str, usual: LoraSpec) -> LoraSpec:
        """Rank and scaling of a module in an adapter that usually has those of `usual`."""
        rank, alpha = _found(self.ranks, module), _found(self.alphas, module)
        if rank is None and alpha is None:
            return usual
        return replace(usual, rank=rank or usual.rank, alpha=alpha or usual.alpha)

    def fresh(
        self, shapes: Mapping[str, tuple[int, int]], usual: LoraSpec, seed: int
    ) -> dict[str, Tensor]:
        """Factors of modules (name → (out, in)) before any training, as `factors.fresh` makes."""
        params: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            params |= factors.fresh({name: shape}, self.spec(name, usual).rank, seed)
        return params

    def baked(self, params: Params, usual: LoraSpec) -> Params:
        """The same update with scaling 1: each module's own goes into its A."""
        scalings = {m: self.spec(m, usual).scaling for m in factors.modules(params)}
        return {
            n: t * scalings[n.removesuffix(factors.A)] if factors.is_a(n) else t
            for n, t in params.items()
        }

    def check_shapes(
        self, params: Params, shapes: Mapping[str, tuple[int, int]], usual: LoraSpec
    ) -> None:
        """Raises ValueError for factors of modules (name → (out, in)) that have another rank."""
        for name, (out, into) in shapes.items():
            rank = self.spec(name, usual).rank
            a, b = params[name + factors.A], params[name + factors.B]
            if a.shape != (rank, into) or b.shape != (out, rank):
                raise ValueError(f"factors of {name} do not have rank {rank}")

    def check(self, modules: Iterable[str], model: str) -> None:
        """Raises ModelError for a name that means none of the modules with an adapter."""
        known = [*modules]
        idle = [
            name
            for name in (*self.ranks, *self.alphas)
            if not any(means(name, module) for module in known)
        ]
        if idle:
            raise ModelError(
                f"rank-pattern and alpha-pattern: {', '.join(idle)} match no module of {model} "
                f"with an adapter, such as {', '.join(known[:3])}"
            )

    def check_ranks(self, shapes: Mapping[str, tuple[int, int]], usual: LoraSpec) -> None:
        """Raises ModelError for a rank larger than a module of these shapes (out, in) can have."""
        for name, (out, into) in shapes.items():
            if (rank := self.spec(name, usual).rank) > min(out, into):
                raise ModelError(
                    f"rank {rank} is larger than module {name} ({out} x {into}): "
                    f"at most {min(out, into)}, or choose other target_modules"
                )


def means(name: str, module: str) -> bool:
    """Returns whether a name means a module: its full name, or the last parts of it."""
    return module == name or module.endswith("." + name)


def _found(values: Mapping[str, Number], module: str) -> Number | None:
    named = [name for name in values if means(name, module)]
    return values[max(named, key=len)] if named else None
