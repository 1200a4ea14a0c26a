"""LoRA factors as plain tensors: names, roles, and the linear algebra of B · A.

A module's update is B (out, r) times A (r, in). Everything here works on factors; an (out, in)
matrix is formed only by `product`, for tests and checks.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from corolla import seeds
from corolla.types import Params, Size

A, B, R = ".lora_A", ".lora_B", ".lora_R"


def is_a(name: str) -> bool:
    """Returns whether a tensor of this name is a factor A."""
    return name.endswith(A)


def is_b(name: str) -> bool:
    """Returns whether a tensor of this name is a factor B."""
    return name.endswith(B)


def is_r(name: str) -> bool:
    """Returns whether a tensor of this name is a core R (r, r) between B and A."""
    return name.endswith(R)


def is_head(name: str) -> bool:
    """Returns whether a tensor of this name is trained as it is: no LoRA factor."""
    return not name.endswith((A, B, R))


def fresh(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, Tensor]:
    """Factors of modules (name → (out, in)) before any training, in fp32, on the CPU.

    A (r, in) is Kaiming-uniform with a = sqrt(5), peft's default, B (out, r) is zero. The values
    depend only on `seed` and on the names of modules: who has no model can make them too.
    """
    params: dict[str, Tensor] = {}
    for name, (out, into) in shapes.items():
        uniform = torch.rand(rank, into, generator=seeds.generator(seed, "A", name))
        params[name + A] = (2 * uniform - 1) * (1 / math.sqrt(into))
        params[name + B] = torch.zeros(out, rank)
    return params


def select(params: Params, *roles: Callable[[str], bool]) -> Params:
    """The tensors for which one of the predicates (`is_a`, `is_b`, `is_head`) holds."""
    return {n: t for n, t in params.items() if any(role(n) for role in roles)}


def modules(params: Params) -> list[str]:
    """Names of the modules that have factors, sorted."""
    return sorted(name.removesuffix(A) for name in params if is_a(name))


def size(params: Params) -> Size:
    """How many values the A factors, the B factors and the head have; rank and modules."""
    a, b, head = (
        sum(params[n].numel() for n in params if role(n)) for role in (is_a, is_b, is_head)
    )
    return Size(a, b, head, rank=rank(params), modules=len(modules(params)))


def bake(params: Params, scaling: float) -> Params:
    """The same update with scaling 1: `scaling` goes into A alone, or it would count twice."""
    return {n: t * scaling if is_a(n) else t for n, t in params.items()}


def stack(parts: Sequence[Params]) -> Params:
    """Factors whose product is the sum of the parts' products.

    B side by side, (out, Σr); A on top of each other, (Σr, in). All need the same modules.
    """
    names = modules(parts[0])
    if any(modules(part) != names for part in parts):
        raise ValueError("cannot stack factors of different modules")
    stacked = {name + A: torch.cat([part[name + A] for part in parts], dim=0) for name in names}
    stacked |= {name + B: torch.cat([part[name + B] for part in parts], dim=1) for name in names}
    return stacked


def split(params: Params, rank: int) -> tuple[Params, Params]:
    """The first `rank` columns of each B with the rows of A that go with them, and the others."""
    first = {n: t[:rank] if is_a(n) else t[:, :rank] for n, t in params.items()}
    return first, {n: t[rank:] if is_a(n) else t[:, rank:] for n, t in params.items()}


def lengths(params: Params) -> dict[str, float]:
    """Module → the mean length of the rows of its A; 1 where they are all zero."""
    found = {m: params[m + A].double().norm(dim=1).mean() for m in modules(params)}
    return {m: float(length) or 1.0 for m, length in found.items()}


def product(params: Params, module: str) -> Tensor:
    """The (out, in) update of one module in fp64."""
    return params[module + B].double() @ params[module + A].double()


def rank(params: Params) -> int:
    """The largest rank over the modules; 0 without factors."""
    return max((params[name + A].shape[0] for name in modules(params)), default=0)


def full_rank(params: Params) -> int:
    """The largest rank a product can have: max over modules of min(out, in)."""
    return max(
        (min(params[m + B].shape[0], params[m + A].shape[1]) for m in modules(params)), default=0
    )


def svd(params: Params, rank: int | None = None) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(module, U (out, k), S (k,), Vᵀ (k, in)) of every product, in fp64; k ≤ rank, out, in.

    With `rank`, U and V have at most so many columns, those of the largest singular values; S is
    whole. QR of both factors, then the SVD of a small (R, R) matrix: O((out + in) R² + R³), and no
    (out, in) matrix.
    """
    for name in modules(params):
        left, tau_left = torch.geqrf(params[name + B].double())
        right, tau_right = torch.geqrf(params[name + A].double().T)
        core = left[: len(tau_left)].triu() @ right[: len(tau_right)].triu().T
        u, s, vt = torch.linalg.svd(core, full_matrices=False)
        u, v = _times(left, tau_left, u[:, :rank]), _times(right, tau_right, vt[:rank].T)
        yield name, u, s, v.T


def _times(reflectors: Tensor, tau: Tensor, small: Tensor) -> Tensor:
    """Q · small of a QR: to form Q (n, R) would cost as much as to find it."""
    padded = small.new_zeros(len(reflectors), small.shape[1])
    padded[: len(small)] = small
    return torch.ormqr(reflectors[:, : len(tau)], tau, padded)


def compact(
    params: Params,
    max_rank: int | None = None,
    energy: float = 1.0,
    lengths: Mapping[str, float] | None = None,
) -> tuple[Params, float]:
    """The best factors of rank at most `max_rank` (per module at most min(out, in)) and the error.

    With `energy` below 1, of the smallest rank that keeps this part of Σ S² of each module. The
    truncation is the best one in Frobenius norm (Eckart and Young). Runs in fp64 and rounds once.
    Both factors carry the square roots of the singular values; with `lengths` (module → length)
    all rows of A are of that length, and B carries the rest.
    The error is ‖exact − compact‖_F / ‖exact‖_F over all modules, from the discarded singular
    values; it is 0 without truncation.
    """
    out: dict[str, Tensor] = {}
    lost = total = 0.0
    for name, u, s, vt in svd(params, max_rank):
        square = s.square()
        keep = min(len(s), max_rank or len(s))
        if energy < 1:
            enough = int((square.cumsum(0) < energy * square.sum()).sum()) + 1
            keep = min(keep, enough)
        lost += float(square[keep:].sum())
        total += float(square.sum())
        root = s[:keep].sqrt()
        right = torch.full_like(root, lengths[name]) if lengths else root
        left = s[:keep] / right if lengths else root
        out[name + B] = (u[:, :keep] * left).to(params[name + B].dtype)
        out[name + A] = (right[:, None] * vt[:keep]).to(params[name + A].dtype)
    return out, (lost / total) ** 0.5 if total else 0.0


def pad(params: Params, to_rank: int) -> Params:
    """The same products with every module at one rank: zero rows in A, zero columns in B."""
    out: dict[str, Tensor] = {}
    for name in modules(params):
        b, a = params[name + B], params[name + A]
        extra = to_rank - a.shape[0]
        out[name + A] = torch.cat([a, a.new_zeros(extra, a.shape[1])], dim=0)
        out[name + B] = torch.cat([b, b.new_zeros(b.shape[0], extra)], dim=1)
    return out


def mean(
    parts: Mapping[str, Params],
    weights: Mapping[str, float],
    role: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """Σ_m weights[m] · parts[m], name by name in fp64, of the tensors that `role` selects."""
    names = [name for name in next(iter(parts.values())) if role(name)]
    zero = torch.zeros((), dtype=torch.float64)
    return {n: sum((w * parts[c][n].double() for c, w in weights.items()), zero) for n in names}


def distance(a: Params, b: Params) -> float:
    """‖a - b‖_F / ‖b‖_F of the products over all modules, without forming them.

    The norm of a stack is that of R_B R_Aᵀ from two small QR decompositions, in fp64.
    """
    difference = stack([bake(b, -1.0), a])
    return _norm(difference) / max(_norm(b), 1e-30)


def _norm(params: Params) -> float:
    total: float = 0.0
    for name in modules(params):
        rb = torch.linalg.qr(params[name + B].double(), mode="r").R
        ra = torch.linalg.qr(params[name + A].double().T, mode="r").R
        total += float((rb @ ra.T).square().sum())
    return math.sqrt(total)
