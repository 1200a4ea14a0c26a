"""The portable sign stream, version 1: random directions of ±1 from Philox bits.

Direction k of a run and round has the sign z_k[i] = D[i] · (−1)^popcount(k & i) at index i of the
flat vector of all trained values; D is one Philox4x64-10 bit a value. A whole pool of K directions
is replayed by one Walsh–Hadamard transform and one pass over the weights. The definition is frozen
in proto/signs-v1.md, with test vectors beside it. A compiled kernel (signs.c) does the passes on
CPUs where it was built, NumPy where it was not, torch on other devices; all give the same bits,
whatever the number of threads and however a vector is cut.

A key is (run seed, round), each in [0, 2**64); `offset` is the flat index of a tensor's first
value. Non-finite weights are outside the definition. Philox: Salmon et al., SC 2011.
"""

import ctypes
import math
import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
Key = tuple[int, int]
MAX_POOL = 65536

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PIECE = 1 << 20  # values for one thread at a time; a multiple of every pool and of a counter's 256
_MANY = 1 << 22
"""From this many values on, several threads are faster than one: starting them takes as long as a
pass over a million."""
_BLOCK = 1 << 15  # values that stay in the cache; torch converts so few without threads of its own
_FOLD = 4096  # width of the running sums of `fold`
_KERNEL = 3  # version of the calls, not of the stream: an old build is left alone
_LOW, _HIGH = 0xFFFFFFFF, 1 << 63
# Signs of row 2^b of the Hadamard matrix in 64 consecutive columns, for b = 0..5.
_ROWS = (
    0xAAAAAAAAAAAAAAAA,
    0xCCCCCCCCCCCCCCCC,
    0xF0F0F0F0F0F0F0F0,
    0xFF00FF00FF00FF00,
    0xFFFF0000FFFF0000,
    0xFFFFFFFF00000000,
)
# The eight signs of a byte, and all-ones where popcount is odd for the upper ten bits of k.
_EIGHT = 1 - 2 * np.unpackbits(
    np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"
).astype(np.float32)
_ODD = np.array([-(i.bit_count() & 1) % (1 << 64) for i in range(MAX_POOL >> 6)], dtype=np.uint64)


class _Step(NamedTuple):
    """One addition of z[i] · values[i mod len(values)]; one value, or at least 64."""

    key: Key
    k: int
    values: NDArray[np.float32]


def words(key: Key, start: int, count: int, stream: int = 0) -> NDArray[np.uint64]:
    """Words start..start+count−1 of a stream: word 4b + j is output j of counter (b, stream, 0, 0).

    ValueError if a number is negative or too large.
    """
    key = _key(key)
    if min(start, count, stream) < 0 or start + count >= _HIGH or stream >= 1 << 64:
        raise ValueError(f"no words {start}..{start + count} of stream {stream}")
    first = start >> 2
    blocks = (start + count + 3 >> 2) - first
    make = _numpy_philox if _kernel is None else _c_philox
    return make((first, stream, 0, 0), key, blocks)[start - 4 * first :][:count]


def signs(key: Key, start: int, stop: int, k: int = 0) -> NDArray[np.float32]:
    """The values ±1 of direction k at flat indices [start, stop); k = 0 is D itself. [stop−start]

    ValueError unless 0 ≤ start ≤ stop and 0 ≤ k < 65536.
    """
    key, k = _key(key), _direction(k)
    _range(start, stop - start)
    base = start & ~63
    return _bits_to_signs(_direction_words(key, k, base, stop))[start - base : stop - base]


def choices(seed: int, count: int, size: int) -> NDArray[np.int64]:
    """The directions k_t in [0, size) that a client takes at its queries t = 0..count−1. [count]

    They are the words of stream 1 of the key (seed, 0), mod `size`; ValueError unless `size` is a
    power of two of at most 65536.
    """
    drawn = words((seed, 0), 0, count, stream=1) & np.uint64(_pool(size) - 1)
    return drawn.astype(np.int64)


def fwht(a: NDArray[Any]) -> NDArray[np.float64]:
    """The Walsh–Hadamard transform v[i] = Σ_k (−1)^popcount(k & i) · a[k] in fp64, not scaled. [K]

    Butterflies (x, y) → (x + y, x − y) at distances 1, 2, 4, …: the order fixes the rounding.
    ValueError unless `a` is one-dimensional and its length a power of two.
    """
    v = np.array(a, dtype=np.float64)
    if v.ndim != 1 or v.size < 1 or v.size & (v.size - 1):
        raise ValueError(f"a Walsh–Hadamard transform needs 2^p values, not shape {v.shape}")
    h = 1
    while h < v.size:
        pairs = v.reshape(-1, 2, h)
        x, y = pairs[:, 0].copy(), pairs[:, 1].copy()
        np.add(x, y, out=pairs[:, 0])
        np.subtract(x, y, out=pairs[:, 1])
        h *= 2
    return v


def add(
    out: Tensor,
    key: Key,
    offset: int,
    terms: Sequence[tuple[int, float]],
    source: Tensor | None = None,
) -> None:
    """Out = source + Σ_j scale_j · z_{k_j}[offset : offset + n] for terms (k_j, scale_j), in place.

    `source` is `out` unless given. Every scale is rounded to fp32, and the terms are added one
    after the other in fp32; a half type is rounded once, at the end. Both tensors are contiguous,
    of one shape, device and type (fp32, bf16 or fp16). ValueError otherwise, and for a scale that
    is not finite in fp32.
    """
    key = _key(key)
    steps = []
    for k, scale in terms:
        value = ctypes.c_float(scale).value
        if not math.isfinite(value):
            raise ValueError(f"scale {scale} of direction {k} is not finite in fp32")
        steps.append(_Step(key, _direction(k), np.array([value], dtype=np.float32)))
    _apply(out, offset, steps, source)


def replay(
    out: Tensor,
    offset: int,
    logs: Sequence[tuple[Key, NDArray[np.float32]]],
    source: Tensor | None = None,
) -> None:
    """Out = source + Σ_r D_r[i] · v_r[i mod K_r] for logs (key_r, v_r), in order, in place.

    v_r is `fwht` of the sums a_r, times a scale, rounded to fp32: then this adds the whole round
    Σ_k scale · a_r[k] · z_k. The values are read once and written once however many logs there
    are. Tensors as for `add`; ValueError unless every v_r holds K_r = 2^p ≤ 65536 finite values.
    """
    steps = []
    for key, v in logs:
        if v.dtype != np.float32 or v.ndim != 1:
            raise ValueError(f"a log is one row of fp32 values, not {v.dtype} of shape {v.shape}")
        _pool(v.size)
        if not np.isfinite(v).all():
            raise ValueError(f"the log of key {key} has values that are not finite")
        # Fewer than 64 values are repeated: the loops take 64 at a time.
        steps.append(_Step(_key(key), 0, np.ascontiguousarray(np.resize(v, max(v.size, 64)))))
    _apply(out, offset, steps, source)


def fold(x: Tensor, key: Key, offset: int, size: int) -> NDArray[np.float64]:
    """s[j] = Σ over i ≡ j (mod size) of D[i] · x[i − offset], in fp64; its `fwht` is all ⟨z_k, x⟩.

    Running sums of width W = max(size, 4096) within each 2^20 flat indices, those in order, then
    halves added until `size` are left: one order for any number of threads. `x` as `out` of
    `add`; ValueError otherwise, and unless `size` is a power of two of at most 65536. [size]
    """
    key, width = _key(key), max(_pool(size), _FOLD)
    flat = _flat(x, "x")
    _range(offset, flat.numel())

    def one(edges: tuple[int, int]) -> NDArray[np.float64]:
        sums = np.zeros(width)
        with torch.inference_mode():
            piece = flat[edges[0] - offset : edges[1] - offset].cpu()
            if _kernel is not None:
                _c_fold(piece, edges[0], key, sums)
                return sums
            for start, stop in _cuts(edges[0], edges[1], _BLOCK):
                block = piece[start - edges[0] : stop - edges[0]].float()
                _numpy_fold(block, start, key, sums)
        return sums

    total = np.zeros(width)
    for sums in _spread(one, offset, offset + flat.numel()):
        total += sums
    while total.size > size:
        total = total[: total.size // 2] + total[total.size // 2 :]
    return total


def compiled() -> bool:
    """Returns whether the C kernel is in use."""
    return _kernel is not None


def _apply(out: Tensor, offset: int, steps: list[_Step], source: Tensor | None) -> None:
    into = _flat(out, "out")
    origin = into if source is None else _flat(source, "source")
    if source is not None and (source.shape, source.dtype, source.device) != (
        out.shape,
        out.dtype,
        out.device,
    ):
        raise ValueError(
            f"source is {source.dtype} {tuple(source.shape)} on {source.device}, "
            f"out {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    _range(offset, into.numel())
    if out.device.type != "cpu":
        run: Callable[[Tensor, Tensor, int, list[_Step]], None] = _torch_add
    else:
        run = _numpy_add if _kernel is None else _c_add

    def one(edges: tuple[int, int]) -> None:
        start, stop = edges
        piece, origins = into, origin
        if stop - start < into.numel():
            piece, origins = (x[start - offset : stop - offset] for x in (into, origin))
        if run is _c_add or (run is not _torch_add and piece.dtype == torch.float32):
            run(piece, origins, start, steps)
            return
        with torch.inference_mode():  # a thread's own, and tensors made in it demand it
            if piece.dtype == torch.float32:
                run(piece, origins, start, steps)
                return
            for low, high in _cuts(start, stop, _BLOCK if run is not _torch_add else _PIECE):
                scratch = origins[low - start : high - start].float()
                run(scratch, scratch, low, steps)
                piece[low - start : high - start].copy_(scratch)

    if out.device.type == "cpu":
        _spread(one, offset, offset + into.numel())
    else:
        for edges in _cuts(offset, offset + into.numel(), _PIECE):
            one(edges)


def _cuts(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in parts that end at multiples of `step`."""
    edges = [start, *range((start // step + 1) * step, stop, step), stop] if start < stop else []
    return pairwise(edges)


def _spread(one: Callable[[tuple[int, int]], T], start: int, stop: int) -> list[T]:
    """The results for all pieces of [start, stop), in order; many values take several threads.

    The caller works too: it need not wait for a thread to start. NumPy's calls are too short for
    threads, which would only pass Python's lock around.
    """
    cuts = list(_cuts(start, stop, _PIECE))
    threads = 1 if _kernel is None or stop - start < _MANY else torch.get_num_threads()
    results: dict[int, T] = {}
    left = deque(enumerate(cuts))

    def work() -> None:
        while left:
            try:
                number, edges = left.popleft()
            except IndexError:  # another thread took the last
                return
            results[number] = one(edges)

    if threads == 1:
        work()
    else:
        with ThreadPoolExecutor(threads - 1) as pool:
            others = [pool.submit(work) for _ in range(threads - 1)]
            work()
            for other in others:
                other.result()
    return [results[number] for number in range(len(cuts))]


# --- checks ---------------------------------------------------------------------------------------


def _key(key: Key) -> Key:
    low, high = (operator.index(part) for part in key)
    if not (0 <= low < 1 << 64 and 0 <= high < 1 << 64):
        raise ValueError(f"a key is two numbers in [0, 2**64), not ({low}, {high})")
    return low, high


def _direction(k: int) -> int:
    k = operator.index(k)
    if not 0 <= k < MAX_POOL:
        raise ValueError(f"a direction is a number in [0, {MAX_POOL}), not {k}")
    return k


def _pool(size: int) -> int:
    if not 1 <= size <= MAX_POOL or size & (size - 1):
        raise ValueError(f"a pool has a power of two of at most {MAX_POOL} directions, not {size}")
    return size


def _range(offset: int, count: int) -> None:
    if offset < 0 or count < 0 or offset + count >= _HIGH:
        raise ValueError(f"no {count} values at offset {offset}")


def _flat(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; fp32, bf16 and fp16 can be signed")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: shape {tuple(tensor.shape)}")
    return tensor.detach().view(-1)


# --- NumPy ----------------------------------------------------------------------------------------


def _numpy_philox(counter: tuple[int, int, int, int], key: Key, blocks: int) -> NDArray[np.uint64]:
    """`blocks` times four words, from counters whose first word counts up."""
    first = sum(word << 64 * i for i, word in enumerate(counter))
    before = (first - 1) % (1 << 256)  # NumPy counts before it generates
    state = [before >> 64 * i & (1 << 64) - 1 for i in range(4)]
    generator = np.random.Philox(
        counter=np.array(state, dtype=np.uint64), key=np.array(key, dtype=np.uint64)
    )
    drawn: NDArray[np.uint64] = generator.random_raw(4 * blocks)
    return drawn


def _direction_words(key: Key, k: int, start: int, stop: int) -> NDArray[np.uint64]:
    """The sign bits of direction k from index `start`, a multiple of 64, to `stop` or beyond."""
    first, last = start >> 6, stop + 63 >> 6
    bits = words(key, first, last - first)
    if k:
        flips = _ODD[np.arange(first, last, dtype=np.int64) & (k >> 6)]
        bits = bits ^ flips ^ np.uint64(_pattern(k))
    return bits


def _pattern(k: int) -> int:
    """The sign bits of row k of the Hadamard matrix in columns 0..63."""
    bits = 0
    for b, row in enumerate(_ROWS):
        bits ^= row if k >> b & 1 else 0
    return bits


def _bits_to_signs(
    bits: NDArray[np.uint64], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    octets = bits.astype("<u8", copy=False).view(np.uint8)
    rows = None if out is None else out[: 8 * octets.size].reshape(-1, 8)
    # "clip" never applies, but without it NumPy would fill a copy of `out` first.
    return np.take(_EIGHT, octets, axis=0, out=rows, mode="clip").reshape(-1)


@np.errstate(over="ignore", invalid="ignore")  # as C and torch: weights may diverge
def _numpy_add(out: Tensor, source: Tensor, start: int, steps: list[_Step]) -> None:
    into, origin = out.numpy(), source.numpy()
    scratch = np.empty(_BLOCK, dtype=np.float32)
    for first, last in _cuts(start, start + into.size, 8 * _BLOCK):  # a generator costs 10 µs
        edge = first & ~63
        bits = [_direction_words(step.key, step.k, edge, last) for step in steps]
        for low, high in _cuts(first, last, _BLOCK):
            block = into[low - start : high - start]
            if out is not source:
                block[...] = origin[low - start : high - start]
            base = low & ~63
            part = slice(base - edge >> 6, high + 63 - edge >> 6)
            for step, step_bits in zip(steps, bits, strict=True):
                z = _bits_to_signs(step_bits[part], scratch)
                _scale(z, step.values, base)
                block += z[low - base : high - base]


def _scale(z: NDArray[np.float32], values: NDArray[np.float32], base: int) -> None:
    """Z[i] ← z[i] · values[(base + i) mod their number]: by ±1, so exact."""
    first = base & (values.size - 1)
    if values.size == 1:
        z *= values
    elif first == 0 and z.size % values.size == 0:
        rows = z.reshape(-1, values.size)
        np.multiply(rows, values, out=rows)
    else:
        z *= np.resize(np.concatenate((values[first:], values[:first])), z.size)


def _numpy_fold(x: Tensor, start: int, key: Key, sums: NDArray[np.float64]) -> None:
    values = x.numpy()
    for first, last in _cuts(start, start + values.size, 8 * _BLOCK):
        edge = first & ~63
        z = _bits_to_signs(_direction_words(key, 0, edge, last))[first - edge : last - edge]
        z *= values[first - start : last - start]
        for low, high in _cuts(first, last, sums.size):
            at = low & (sums.size - 1)
            sums[at : at + high - low] += z[low - first : high - first]


# --- C --------------------------------------------------------------------------------------------


def _library() -> ctypes.CDLL:
    if _kernel is None:
        raise RuntimeError("there is no compiled kernel")
    return _kernel


def _c_philox(counter: tuple[int, int, int, int], key: Key, blocks: int) -> NDArray[np.uint64]:
    drawn = np.empty(4 * blocks, dtype=np.uint64)
    at, by = np.array(counter, dtype=np.uint64), np.array(key, dtype=np.uint64)
    _library().corolla_words(at.ctypes.data, by.ctypes.data, blocks, drawn.ctypes.data)
    return drawn


def _c_add(
    out: Tensor,
    source: Tensor,
    start: int,
    steps: list[_Step],
    kernel: ctypes.CDLL | None = None,
) -> None:
    kernel = kernel or _library()
    table: list[int] = []
    for (low, high), k, values in steps:
        alone = values.size == 1
        at = int(values.view(np.uint32)[0]) if alone else values.ctypes.data
        table += (low, high, k, values.size - 1, at)
    kernel.corolla_add(
        out.data_ptr(),
        source.data_ptr(),
        _DTYPES.index(out.dtype),
        start,
        out.numel(),
        len(steps),
        (ctypes.c_uint64 * len(table))(*table),
    )


def _c_fold(x: Tensor, start: int, key: Key, sums: NDArray[np.float64]) -> None:
    by = np.array(key, dtype=np.uint64)
    _library().corolla_fold(
        x.data_ptr(),
        _DTYPES.index(x.dtype),
        start,
        x.numel(),
        by.ctypes.data,
        sums.ctypes.data,
        sums.size - 1,
    )


def _load() -> ctypes.CDLL | None:
    """The kernel built from signs.c, or None where there is none that works."""
    places = [Path(__file__).with_name("_signs" + suffix) for suffix in EXTENSION_SUFFIXES]
    for path in filter(Path.is_file, places):
        try:
            library = ctypes.CDLL(str(path))
            if library.corolla_signs_version() != _KERNEL:
                continue
        except (OSError, AttributeError):  # of another machine, or another version
            continue
        u64, i64, at = ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p
        library.corolla_words.argtypes = [at, at, i64, at]
        library.corolla_add.argtypes = [at, at, i64, u64, u64, i64, at]
        library.corolla_fold.argtypes = [at, i64, u64, u64, at, at, u64]
        for function in (library.corolla_words, library.corolla_add, library.corolla_fold):
            function.restype = None
        if _agrees(library):
            return library
    return None


def _agrees(library: ctypes.CDLL) -> bool:
    """Returns whether a kernel gives NumPy's bits for a short replay across a block's edge."""
    start = 4096 - 70
    first = _Step((3, 1), 77, np.arange(128, dtype=np.float32))
    steps = [first, _Step((5, 2), 0, np.ones(64, dtype=np.float32))]
    wanted = torch.linspace(-1, 1, 200)
    rounded = wanted.clone()
    _numpy_add(rounded, rounded, start, steps)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = wanted.clone().to(dtype)
        if dtype != torch.float32:
            rounded = got.float()
            _numpy_add(rounded, rounded, start, steps)
        _c_add(got, got, start, steps, library)
        if not torch.equal(rounded.to(dtype), got):
            return False
    return True


# --- torch: any device ----------------------------------------------------------------------------


def _signed(number: int) -> int:
    """The int64 with the bits of a uint64."""
    return number - (1 << 64) if number >= _HIGH else number


def _torch_philox(
    counter: tuple[int, int, int, int],
    key: Key,
    blocks: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """As `_numpy_philox`, the words as int64: torch has no 64-bit unsigned arithmetic."""
    c0 = torch.arange(blocks, dtype=torch.int64, device=device) + _signed(counter[0])
    c1, c2, c3 = (torch.full_like(c0, _signed(word)) for word in counter[1:])
    k0, k1 = key
    for _ in range(10):
        h0, l0 = _multiply(0xD2E7470EE14C6C93, c0)
        h1, l1 = _multiply(0xCA5A826395121157, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ _signed(k0), l1, h0 ^ c3 ^ _signed(k1), l0
        k0 = k0 + 0x9E3779B97F4A7C15 & (1 << 64) - 1
        k1 = k1 + 0xBB67AE8584CAA73B & (1 << 64) - 1
    return torch.stack((c0, c1, c2, c3), dim=1).view(-1)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 64 bits of a · b, unsigned, from parts of 32 bits."""
    al, ah, bl, bh = a & _LOW, a >> 32, b & _LOW, b >> 32 & _LOW
    ll, lh, hl = bl * al, bh * al, bl * ah
    cross = (ll >> 32 & _LOW) + (lh & _LOW) + (hl & _LOW)
    high = bh * ah + (lh >> 32 & _LOW) + (hl >> 32 & _LOW) + (cross >> 32)
    return high, b * _signed(a)


def _torch_add(out: Tensor, source: Tensor, start: int, steps: list[_Step]) -> None:
    stop, base = start + out.numel(), start & ~255
    if out is not source:
        out.copy_(source)
    shifts = torch.arange(64, device=out.device)
    numbers = torch.arange(base >> 6, stop + 63 >> 6, device=out.device)
    for key, k, values in steps:
        bits = _torch_philox((base >> 8, 0, 0, 0), key, (stop + 255 >> 8) - (base >> 8), out.device)
        flips = numbers & k >> 6
        for shift in (8, 4, 2, 1):
            flips = flips ^ flips >> shift
        bits = bits[: numbers.numel()] ^ -(flips & 1) ^ _signed(_pattern(k))
        negative = (bits[:, None] >> shifts & 1).view(-1)[start - base : stop - base]
        v = torch.from_numpy(values).to(out.device)
        v = v[torch.arange(start, stop, device=out.device) & (values.size - 1)]
        out += torch.where(negative.bool(), -v, v)


_kernel: ctypes.CDLL | None = None
_kernel = _load()
