"""Robust aggregation: rules that bound what a few hostile clients can do to a round.

median, trimmed_mean   of every coordinate: Yin et al., ICML 2018, arXiv 1803.01498
krum, multi_krum       the updates nearest to the others: Blanchard et al., NeurIPS 2017,
                       arXiv 1703.02757
norm_clip              no update longer than usual: Sun et al., arXiv 1911.07963, with the running
                       median of norms as the bound

A rule looks at updates in the space they are averaged in. "tensors" is that of their values.
"products" is that of B · A, for strategies that send factors with their scaling in a group
"factors" and add up the products; there (A, B) and (100 A, B / 100) are one update. Where factors
are averaged they are not, and a check of products would be blind to them.

No rule sees an attack within one standard deviation of the honest updates (Baruch et al., NeurIPS
2019, arXiv 1902.06156), and a backdoor may be as small as that.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Self, get_args

import torch
from torch import Tensor

from corolla.interfaces import Aggregator, Traits
from corolla.tensors import factors, tree
from corolla.tensors.factors import A, B
from corolla.types import Metrics, Params, Payload, RobustRule, Space

_COORDINATES = ("median", "trimmed_mean")
_KRUM = ("krum", "multi_krum")

COUNTING = ("trimmed_mean", *_KRUM)
"""Rules that must be told how many updates may be hostile."""

_MEMORY = 20
"""Rounds whose median of norms counts."""


class Robust:
    """One rule between the updates of a round and the aggregator of a strategy.

    With norm_clip all updates go on to `inner`, the long ones shortened; with krum the best one,
    with multi_krum the n - f best. With median and trimmed_mean, which ignore how many examples a
    client has, all send the same: their result. Keeps all updates until `finalise`, so secure sums
    do not apply.

    `byzantine` is f, how many updates may be hostile; None: a fifth, at least 1. `history` holds
    the medians of the norms of the last 20 rounds, after `finalise` also that of this one;
    `metrics` says what a rule has done.

    Raises ValueError for a rule that is unknown or not in this space; `finalise` when too few
    updates were added for it, or updates that cannot be compared.
    """

    linear = False

    def __init__(
        self,
        rule: RobustRule,
        inner: Callable[[], Aggregator],
        space: Space = "tensors",
        byzantine: int | None = None,
        history: Sequence[float] = (),
    ) -> None:
        if rule not in get_args(RobustRule):
            raise ValueError(
                f"unknown rule {rule!r}: choose from {', '.join(get_args(RobustRule))}"
            )
        if space == "products" and rule in _COORDINATES:
            raise ValueError(f"{rule} is of coordinates, which products do not have")
        self.metrics: Metrics = {}
        self.history = tuple(history)
        self._rule, self._inner, self._space = rule, inner, space
        self._byzantine, self._history = byzantine, tuple(history)
        self._parts: list[tuple[Payload, float]] = []

    def add(self, payload: Payload, weight: float) -> None:
        self._parts.append((payload, weight))

    def merge(self, other: Self) -> None:
        self._parts.extend(other._parts)

    def finalise(self) -> Payload:
        inner = self._inner()
        for payload, weight in self._defended():
            inner.add(payload, weight)
        return inner.finalise()

    def _defended(self) -> Sequence[tuple[Payload, float]]:
        """Returns the updates and their weights that the inner aggregator may see."""
        n = len(self._parts)
        f = hostile(n, self._byzantine)
        if n < (needed := least(self._rule, f)):
            raise ValueError(
                f"{self._rule} needs {needed} updates where {f} may be hostile, found {n}"
            )
        updates, weights = [p for p, _ in self._parts], [w for _, w in self._parts]
        _check_alike(updates, self._rule, self._space)
        if self._space == "products":
            updates = [_balanced(update) for update in updates]
        if self._rule in _COORDINATES:
            result = _trimmed(updates, (n - 1) // 2 if self._rule == "median" else f)
            return [(result, weight) for weight in weights]
        if self._rule in _KRUM:
            best = by_score(updates, squared_distances(updates, self._space), f)
            chosen = best[: 1 if self._rule == "krum" else n - f]
            self.metrics = {"robust_selected": len(chosen)}
            return [(updates[i], weights[i]) for i in chosen]
        norms = squared_norms(updates, self._space).sqrt().tolist()
        bound, usual = statistics.median([*norms, *self._history]), statistics.median(norms)
        self.history = (*self._history, usual)[-_MEMORY:]
        self.metrics = {
            "robust_norm": usual,
            "robust_clipped": sum(norm > bound for norm in norms),
        }
        return [
            (_scaled(update, bound / norm, self._space) if norm > bound else update, weight)
            for update, weight, norm in zip(updates, weights, norms, strict=True)
        ]


def hostile(updates: int, byzantine: int | None) -> int:
    """How many of the updates may be hostile: what is said, or a fifth, at least 1."""
    return max(1, updates // 5) if byzantine is None else byzantine


def least(rule: RobustRule, byzantine: int) -> int:
    """How many updates a rule needs against that many hostile ones."""
    if rule in _KRUM:
        return 2 * byzantine + 3
    return 2 * byzantine + 1 if rule == "trimmed_mean" else 1


def space_of(traits: Traits) -> Space:
    """Where a strategy of these traits adds up the updates of its clients."""
    return "products" if traits.updates == "factors" else "tensors"


def refusal(rule: RobustRule, space: Space, traits: Traits, likes: Sequence[Payload]) -> str | None:
    """Why a rule does not fit a strategy of these traits, in one line; None where it does.

    `likes` are its updates' forms (`Strategy.update_like`), one of each rank and trainer.
    """
    like = likes[0]
    own = any("scalars" in p and p.keys() & {"seed", "directions"} for p in like.values())
    if any(other.keys() != like.keys() for other in likes):
        return "its clients send updates of different kinds, which cannot be compared"
    if rule in _COORDINATES and (space_of(traits) == "products" or traits.individual):
        return (
            f"{rule} puts one update together from coordinates, and it needs those of clients, "
            f"whose factors belong together: use norm_clip, krum or multi_krum"
        )
    if space == "products" != space_of(traits):
        return "it averages values, and factors may be hostile where their product is not"
    if space == "tensors" != space_of(traits):
        return "it adds up products, whose factors have another random basis at each client"
    if rule == "norm_clip" and traits.updates == "values":
        return "norm_clip shortens changes, and its clients send values: use another rule"
    if rule != "norm_clip" and own:
        return f"{rule} compares updates, and each has its own directions: use norm_clip"
    if rule != "norm_clip" and space == "tensors" and _shapes(likes) > 1:
        return f"{rule} compares updates, and those of different ranks differ in shape"
    return None


def squared_norms(updates: Sequence[Payload], space: Space) -> Tensor:
    """The squared length of each update in fp64, (n,); shapes may differ."""
    return torch.tensor([_squared_norm(update, space) for update in updates], dtype=torch.float64)


def squared_distances(updates: Sequence[Payload], space: Space) -> Tensor:
    """|u_i - u_j|² in fp64, (n, n).

    Values are subtracted first: |x|² + |y|² - 2 <x, y> of float32 is noise once updates agree to
    4 digits. Products are not formed: theirs come from that formula in fp64, which is as exact as
    products of float32 factors (to 1e-7 of the norm).
    """
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for rows in _rows(updates, space):
        total += torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    for module in _modules(updates, space):
        inner = _inner_products(updates, module)
        own = inner.diag()
        total += (own[:, None] + own - inner - inner.T).clamp(min=0)
    return total


def by_score(updates: Sequence[Payload], distances: Tensor, byzantine: int) -> list[int]:
    """Krum's order, the best first: by the sum of the n - f - 2 smallest squared distances.

    Equal scores are told apart by the sha256 of the updates, so the order of clients is no matter.
    """
    nearest = distances.sort(dim=1).values[:, 1 : len(updates) - byzantine - 1]  # 0: to itself
    scores = nearest.sum(dim=1).tolist()
    return sorted(range(len(updates)), key=lambda i: (scores[i], tree.digest_all(updates[i])))


def _squared_norm(update: Payload, space: Space) -> float:
    squares = [float(rows.square().sum()) for rows in _rows([update], space)]
    squares += [float(_inner_products([update], m)) for m in _modules([update], space)]
    return max(0.0, math.fsum(squares))


def _inner_products(updates: Sequence[Payload], module: str) -> Tensor:
    """<B_i A_i, B_j A_j> = tr(B_iᵀB_j A_jA_iᵀ) in fp64, (n, n); ranks may differ."""
    parts = [update["factors"] for update in updates]
    a = torch.cat([part[module + A].double() for part in parts], dim=0)  # (Σr, in)
    b = torch.cat([part[module + B].double() for part in parts], dim=1)  # (out, Σr)
    ranks = torch.tensor([len(part[module + A]) for part in parts])
    owner = torch.eye(len(parts), dtype=torch.float64).repeat_interleave(ranks, dim=1)  # (n, Σr)
    return owner @ ((b.T @ b) * (a @ a.T)) @ owner.T


def _rows(updates: Sequence[Payload], space: Space) -> Iterator[Tensor]:
    """Each tensor of the updates that counts by its values, in fp64: (n, values)."""
    for group, params in sorted(updates[0].items()):
        if space == "products" and group == "factors":
            continue
        for name in sorted(name for name in params if _has_coordinates(params[name])):
            yield torch.stack([_values(update[group], name) for update in updates])


def _values(params: Params, name: str) -> Tensor:
    """One tensor, flat; of scalars the move along each direction, step · Σ_t g_t.

    Summed by direction where a client names them: it may name the same one each time.
    """
    values = params[name].double().flatten()
    if name == "scalars" and "step" in params:
        values = values * params["step"].double()
    if name == "scalars" and "directions" in params:
        sums = torch.zeros(1 << 16, dtype=torch.float64)
        return sums.index_add_(0, params["directions"].long(), values)
    return values


def _modules(updates: Sequence[Payload], space: Space) -> Sequence[str]:
    return factors.modules(updates[0]["factors"]) if space == "products" else ()


def _balanced(update: Payload) -> Payload:
    """The same products from factors that share their norm.

    Huge factors whose product cancels would pass for a short update, here where sums of squares
    round, and then drown everything in rounding on clients that multiply in float32.
    """
    return {**update, "factors": factors.compact(update["factors"])[0]}


def _trimmed(updates: Sequence[Payload], cut: int) -> Payload:
    """The mean of every coordinate without its `cut` lowest and highest values."""
    return {
        group: {name: _middle([update[group][name] for update in updates], cut) for name in params}
        for group, params in updates[0].items()
    }


def _middle(tensors: Sequence[Tensor], cut: int) -> Tensor:
    if not _has_coordinates(tensors[0]):
        return tensors[0]
    ordered = torch.stack([tensor.double() for tensor in tensors]).sort(dim=0).values
    return ordered[cut : len(tensors) - cut].mean(dim=0).to(tensors[0].dtype)


def _scaled(update: Payload, factor: float, space: Space) -> Payload:
    """Factor · u; of a product through B alone."""

    def scales(name: str, tensor: Tensor) -> bool:
        return _has_coordinates(tensor) and not (space == "products" and factors.is_a(name))

    return {
        group: {n: t * factor if scales(n, t) else t for n, t in params.items()}
        for group, params in update.items()
    }


def _has_coordinates(tensor: Tensor) -> bool:
    """Neither whole numbers nor a single one: seeds, directions and steps are no coordinates."""
    return tensor.is_floating_point() and tensor.dim() > 0


def _shapes(updates: Sequence[Payload]) -> int:
    """How many different sets of shapes there are."""
    return len(
        {
            tuple((g, n, tuple(p[n].shape)) for g, p in sorted(update.items()) for n in sorted(p))
            for update in updates
        }
    )


def _check_alike(updates: Sequence[Payload], rule: RobustRule, space: Space) -> None:
    """Raises ValueError for updates that a rule cannot take together."""
    first = updates[0]
    if any(update.keys() != first.keys() for update in updates):
        raise ValueError("updates cannot be compared: they differ in their groups")
    if rule == "norm_clip":
        return
    if space == "tensors" and _shapes(updates) > 1:
        raise ValueError("updates cannot be compared: they differ in shape")
    for group, params in first.items():
        for name, tensor in params.items():
            others = [] if _has_coordinates(tensor) else [u[group][name] for u in updates[1:]]
            if any(not torch.allclose(o.double(), tensor.double(), rtol=1e-5) for o in others):
                raise ValueError(f"updates cannot be compared: they differ in {name!r}")
