"""Smaller payloads, exact to the byte: lower ranks, top-k, 16-, 8- and 4-bit numbers, zstd.

A pipeline is a list of steps, each optional, in this order:
  rank:R         baked factors (group "factors") of rank at most R, the best in Frobenius norm
                 (Eckart and Young); decoding pads with zeros;
  top_k:DENSITY  the ⌊DENSITY · P⌋ largest of all P values by magnitude (at least one), ties by
                 index (FLASC, Kuo et al., arXiv 2406.05233); of a broadcast those of all factors A
                 and those of all B apart, and whatever is no factor as a whole;
  fp16, bf16     rounded to nearest, saturating;
  int8, int4     symmetric per tensor, x ≈ code · peak / levels with peak = max |x| and 127 or 7
                 levels; stochastic rounding: unbiased, off by less than a level;
  zstd           lossless (RFC 8878); left out where it does not help.

On the wire all tensors are one uint8 tensor: the peaks (4 bytes a tensor), the support (int32
indices or a bitmap, whichever is less; nothing when all is sent) and the numbers, little-endian,
in the order of (group, name). Names and shapes do not travel: the receiver knows them. Integers,
single values and scalar groups (see wire/scalar_groups.py) stay as they are.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import zstandard
from torch import Tensor

from corolla import seeds
from corolla.errors import ConfigError, NotFiniteError, WireError
from corolla.host.text import nearest
from corolla.tensors import factors, tree
from corolla.types import Params, Payload
from corolla.wire import codec, packing, scalar_groups, supports
from corolla.wire.supports import Part

_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_LEVELS = {"int8": 127, "int4": 7}
_BITS = {"fp16": 16, "bf16": 16, "int8": 8, "int4": 4}
_PLACES = {"rank": 0, "top_k": 1, **dict.fromkeys(_BITS, 2), "zstd": 3}

_BOX = ""
"""The group of what is compressed."""

Key = tuple[str, str]
"""(group, name)."""

Form = Mapping[str, Mapping[str, tuple[str, Sequence[int]]]]
"""Groups, names, types and shapes of a payload, as JSON takes them."""


@dataclass(frozen=True)
class _Layout:
    """The layout known to the receiver before: tensors as they are sent, and bytes of each part."""

    shapes: Mapping[Key, tuple[int, ...]]
    dtype: torch.dtype
    parts: Sequence[Part]
    peaks: int
    numbers: int

    @property
    def count(self) -> int:
        """All values."""
        return sum(part.count for part in self.parts)

    @property
    def kept(self) -> int:
        """The values that are sent."""
        return sum(part.kept for part in self.parts)

    @property
    def support(self) -> int:
        """Bytes that say which they are."""
        return sum(part.support for part in self.parts)

    @property
    def sizes(self) -> list[int]:
        """Values of each tensor."""
        return [math.prod(shape) for shape in self.shapes.values()]

    @property
    def bytes(self) -> int:
        """All parts."""
        return self.peaks + self.support + self.numbers


@dataclass(frozen=True)
class Pipeline:
    """Payload ↔ bytes by the steps it has (see `pipeline`); without any it is codec.py.

    Methods raise ValueError where `rank` is to truncate a payload without a group "factors".
    """

    rank: int | None = None
    density: Fraction | None = None
    number: str | None = None
    zstd: bool = False
    roles: bool = False
    """The density is of factors A and of factors B, each apart; else of all values."""

    @property
    def lossy(self) -> bool:
        """True where a decoded payload may differ from the one that was encoded."""
        return self.needs_factors or self.needs_differences or self.number is not None

    @property
    def needs_differences(self) -> bool:
        """Values that are left out are decoded as 0, which must mean "no change"."""
        return self.density is not None

    @property
    def needs_factors(self) -> bool:
        """It keeps products of the group "factors", not the factors."""
        return self.rank is not None

    def encode(self, payload: Payload, seed: int) -> bytes:
        """The payload as bytes; see `pack`."""
        return codec.encode(self.pack(payload, seed))

    def decode(self, data: bytes, like: Payload) -> Payload:
        """The payload of bytes made by `encode`; see `unpack`. Raises WireError for more groups."""
        found = codec.decode(data)
        strange = found.keys() - like.keys() - {_BOX}
        if strange and self != PLAIN:
            raise WireError(f"payload has a group {min(strange)!r}, expected {sorted(like)}")
        return self.unpack(found, like)

    def pack(self, payload: Payload, seed: int) -> Payload:
        """Returns the payload as it travels; `seed` decides the stochastic rounding.

        Raises WireError for values that are not finite, which no lossy step carries.
        """
        layout = self._layout(payload)
        if self == PLAIN or not layout.shapes:
            return payload
        if self.lossy and not tree.finite({f"{g}/{n}": payload[g][n] for g, n in layout.shapes}):
            raise NotFiniteError("payload has values that are not finite")
        rest = _untouched(payload)
        if self.rank:
            payload = {**payload, "factors": _truncated(payload["factors"], self.rank)}
        tensors = [payload[g][n].detach().cpu().reshape(-1) for g, n in layout.shapes]
        values, sizes = torch.cat([torch.empty(0, dtype=layout.dtype), *tensors]), layout.sizes
        parts: list[Tensor] = []
        if layout.support:
            support, parts = supports.largest(values, layout.parts)
            values, sizes = values[support], packing.kept_of_each(support, sizes)
        if self.number in _FLOATS:
            parts += [packing.saturated(values, _FLOATS[self.number])]
        elif self.number in _LEVELS:
            levels, rng = _LEVELS[self.number], seeds.generator(seed, "codec")
            peaks, codes = packing.quantise(values, sizes, levels, rng)
            parts = [peaks, *parts, packing.pack_codes(codes) if self.number == "int4" else codes]
        else:
            parts += [values]
        content = torch.cat([part.view(torch.uint8) for part in parts])
        box = {"content": content}
        if self.zstd:
            frame = zstandard.ZstdCompressor().compress(content.numpy().tobytes())
            if len(frame) < len(content):
                box = {"zstd": torch.frombuffer(bytearray(frame), dtype=torch.uint8)}
        return {_BOX: box, **rest}

    def unpack(self, found: Payload, like: Payload) -> Payload:
        """The payload of what an equal pipeline packed of one with the form of `like`.

        Only groups, names, shapes and types of `like` count: it may be on the meta device. Groups
        that it has not stay as they are. Allocates in proportion to `found` and `like`. Raises
        WireError for anything else.
        """
        layout = self._layout(like)
        if self == PLAIN or not layout.shapes:
            return found
        content = _open(found.get(_BOX, {}), layout.bytes, self.zstd)
        beside = {g: params for g, params in found.items() if g in like}
        if form(beside) != form(_untouched(like)):
            raise WireError(f"payload has {form(beside)} beside what is compressed")
        lengths = [layout.peaks, layout.support, layout.numbers]
        peaks, support, numbers = torch.split(content, lengths)
        kept, sizes = None, layout.sizes
        if layout.support:
            kept = supports.load(support, layout.parts)
            sizes = packing.kept_of_each(kept, sizes)
        values = self._load_numbers(numbers, peaks, sizes, layout)
        if self.lossy and not bool(torch.isfinite(values).all()):
            raise NotFiniteError("payload has values that are not finite")
        if kept is not None:
            values = torch.zeros(layout.count, dtype=values.dtype).index_copy_(0, kept, values)
        pieces = zip(layout.shapes.items(), torch.split(values, layout.sizes), strict=True)
        decoded = {
            (g, n): _padded(piece.reshape(shape), like[g][n]) for ((g, n), shape), piece in pieces
        }
        return {
            **{g: params for g, params in found.items() if g not in (_BOX, *like)},
            **{
                g: {n: decoded[g, n] if (g, n) in decoded else found[g][n] for n in params}
                for g, params in like.items()
            },
        }

    def content_bytes(self, like: Payload) -> tuple[int, bool]:
        """Bytes of an encoded payload of `like`'s form, framing apart, and whether at most those.

        Peaks, support, numbers, and what stays as it is. At most: with zstd, and for scalar
        groups, which a message may send sparse.
        """
        at_most = self.zstd or any(map(scalar_groups.is_scalars, like.values()))
        if self == PLAIN:
            return codec.content_bytes(like), at_most
        return self._layout(like).bytes + codec.content_bytes(_untouched(like)), at_most

    def _layout(self, like: Payload) -> _Layout:
        if self.rank and "factors" not in like:
            raise ValueError(f"rank needs a group 'factors', found {sorted(like)}")
        keys = _compressible(like)
        if self.roles:
            keys.sort(key=lambda key: supports.role(key[1]))  # stable: as before within a role
        dtypes = (like[g][n].dtype for g, n in keys)
        dtype = functools.reduce(torch.promote_types, dtypes, torch.bool)  # bool yields to all
        shapes = {key: self._shape(like, key) for key in keys}
        sizes = {key: math.prod(shape) for key, shape in shapes.items()}
        parts = supports.parts(sizes, self.density, self.roles)
        bits = _BITS[self.number] if self.number else 8 * dtype.itemsize
        return _Layout(
            shapes,
            dtype,
            parts,
            peaks=4 * len(keys) if self.number in _LEVELS else 0,
            numbers=-(-sum(part.kept for part in parts) * bits // 8),
        )

    def _shape(self, like: Payload, key: Key) -> tuple[int, ...]:
        group, name = key
        shape = tuple(like[group][name].shape)
        if self.rank is None or group != "factors" or factors.is_head(name):
            return shape
        module = name.removesuffix(factors.A).removesuffix(factors.B)
        a, b = like[group][module + factors.A], like[group][module + factors.B]
        rank = a.shape[0]
        if rank > self.rank:
            rank = min(self.rank, a.shape[1], b.shape[0])
        return (rank, shape[1]) if factors.is_a(name) else (shape[0], rank)

    def _load_numbers(
        self, numbers: Tensor, peaks: Tensor, sizes: list[int], layout: _Layout
    ) -> Tensor:
        if self.number not in _LEVELS:
            dtype = _FLOATS[self.number] if self.number else layout.dtype
            return numbers.clone().view(dtype)  # a clone is aligned
        if self.number == "int4":
            numbers = packing.unpack_codes(numbers, layout.kept)
        scales = peaks.clone().view(torch.float32)
        return packing.dequantise(numbers, scales, sizes, _LEVELS[self.number])


PLAIN = Pipeline()
"""No steps: payloads travel as they are."""


def pipeline(steps: Sequence[str]) -> Pipeline:
    """The pipeline of steps by name, as ["top_k:0.1", "int8", "zstd"].

    Raises ConfigError for unknown steps, wrong values, two of a kind, another order.
    """
    rank, density, number, place = None, None, None, -1
    for step in steps:
        name, colon, text = step.partition(":")
        if name not in _PLACES:
            hint = nearest(name, _PLACES, cutoff=0.5) or f"known are {', '.join(_PLACES)}"
            raise ConfigError(f"unknown codec step {step!r}: {hint}")
        if _PLACES[name] <= place:
            raise ConfigError(
                f"codec {', '.join(steps)}: {name} cannot stand there; the order is rank:R, "
                f"top_k:DENSITY, one of {', '.join(_BITS)}, zstd, each at most once"
            )
        place = _PLACES[name]
        if name == "rank":
            rank = _rank(step, text)
        elif name == "top_k":
            density = _density(step, text)
        elif colon:
            raise ConfigError(f"codec step {step!r}: {name} takes no value")
        elif name in _BITS:
            number = name
    return Pipeline(rank, density, number, zstd=place == _PLACES["zstd"])


def feedback(
    pipeline: Pipeline, payload: Payload, residual: Payload, seed: int
) -> tuple[Payload, Payload]:
    """Pack payload + residual: (what travels, what that leaves out, for the next payload).

    What is unpacked plus the new residual is payload + residual; the first residual is {}. Error
    feedback: Stich et al., NeurIPS 2018, arXiv 1809.07599; Karimireddy et al., ICML 2019, arXiv
    1901.09847. For differences: truncated factors have another basis each time.
    """
    owed: dict[str, dict[str, Tensor]] = {
        group: {name: tensor.cpu() for name, tensor in params.items()}
        for group, params in payload.items()
    }
    left: dict[str, dict[str, Tensor]] = {}
    for group, params in residual.items():
        for name, tensor in params.items():
            if name in owed.get(group, {}):
                owed[group][name] = owed[group][name] + tensor
            else:  # not part of this round's update: still owed
                left.setdefault(group, {})[name] = tensor
    packed = pipeline.pack(owed, seed)
    sent = pipeline.unpack(packed, payload)
    for group, name in _compressible(payload):
        left.setdefault(group, {})[name] = owed[group][name] - sent[group][name]
    return packed, left


def form(payload: Payload) -> Form:
    """The form of a payload."""
    return {
        group: {n: (str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in params.items()}
        for group, params in payload.items()
    }


def blank(described: Form) -> Payload:
    """A payload of a form, without values (on the meta device). Raises WireError for another."""
    types = {str(dtype).removeprefix("torch."): dtype for dtype in codec.DTYPES}
    try:
        return {
            group: {
                n: torch.empty(tuple(s), dtype=types[d], device="meta") for n, (d, s) in own.items()
            }
            for group, own in described.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise WireError(f"form of a payload cannot be read: {error!r}"[:300]) from error


def _rank(step: str, text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise ConfigError(f"codec step {step!r}: expected a whole number from 1, as rank:4")
    return int(text)


def _density(step: str, text: str) -> Fraction:
    try:
        if 0 < float(text) <= 1:
            return Fraction(text)  # 0.29 of 100 values is 29: not so for the nearest binary number
    except ValueError:
        pass
    raise ConfigError(f"codec step {step!r}: expected a density in (0, 1], as top_k:0.1")


def _compressible(payload: Payload) -> list[Key]:
    """Returns the keys of the tensors that are compressed, in canonical order."""
    dense, _ = scalar_groups.split(payload)
    return sorted(
        (group, name)
        for group, params in dense.items()
        for name, tensor in params.items()
        if tensor.is_floating_point() and tensor.dim()
    )


def _untouched(payload: Payload) -> Payload:
    """Returns the tensors that stay as they are; groups without such tensors are left out."""
    taken = set(_compressible(payload))
    rest = {g: {n: t for n, t in p.items() if (g, n) not in taken} for g, p in payload.items()}
    return {group: params for group, params in rest.items() if params}


def _truncated(params: Params, rank: int) -> Params:
    """The factors of larger rank truncated; others stay bit for bit."""
    wide = [m for m in factors.modules(params) if params[m + factors.A].shape[0] > rank]
    pairs = {m + role: params[m + role] for m in wide for role in (factors.A, factors.B)}
    return {**params, **factors.compact(pairs, rank)[0]}


def _padded(tensor: Tensor, like: Tensor) -> Tensor:
    out = torch.zeros(like.shape, dtype=like.dtype)
    out[tuple(slice(length) for length in tensor.shape)] = packing.saturated(tensor, like.dtype)
    return out


def _open(box: Params, size: int, zstd: bool) -> Tensor:
    """The content of a box, uint8 (size,). A frame that claims another size is not inflated."""
    name = next(iter(box), "nothing")
    if len(box) != 1 or name not in ("content", "zstd")[: 1 + zstd]:
        raise WireError(f"compressed payload has {form({_BOX: box})}, expected one content")
    content = box[name]
    if content.dtype != torch.uint8 or content.dim() != 1:
        raise WireError(f"compressed payload is {content.dtype} of {content.dim()} dimensions")
    if name == "zstd":
        frame = content.numpy().tobytes()
        try:
            claimed = zstandard.frame_content_size(frame)
            if claimed != size:
                raise WireError(f"zstd frame claims {claimed} bytes, expected {size}")
            inflated = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise WireError(f"zstd frame cannot be read: {error}") from error
        content = torch.frombuffer(bytearray(inflated), dtype=torch.uint8)
    if len(content) != size:
        raise WireError(f"compressed payload has {len(content)} bytes, expected {size}")
    return content
