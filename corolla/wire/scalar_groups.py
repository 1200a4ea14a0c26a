"""Scalar groups, the updates of zeroth-order training, as tensors and as bytes."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from corolla.errors import WireError
from corolla.proto import update_pb2 as pb
from corolla.types import Params, Payload
from corolla.wire.limits import MAX_GROUPS, MAX_NAME, MAX_SCALARS

if TYPE_CHECKING:
    from numpy.typing import NDArray


_KEYS = ("scalars", "directions", "seed", "step")


def is_scalars(params: Params) -> bool:
    """Returns whether a group is a scalar group: it has a tensor named "scalars"."""
    return "scalars" in params


def split(payload: Payload) -> tuple[Payload, Payload]:
    """The dense groups of a payload and its scalar groups, each in the order of the payload."""
    dense = {group: params for group, params in payload.items() if not is_scalars(params)}
    return dense, {group: params for group, params in payload.items() if is_scalars(params)}


def scalar_bytes(params: Params) -> int:
    """Bytes of a scalar group as it is sent: values, directions, 4 for a seed, 4 for a step.

    The tags and lengths of protobuf are framing and do not count. Raises ValueError when `params`
    is not a scalar group.
    """
    entry = pack_group(params)
    content = (entry.fp32, entry.fp16, entry.fixed32, entry.varint, entry.bitmap)
    return sum(map(len, content)) + 4 * entry.HasField("seed") + 4 * entry.HasField("step")


def pack_groups(groups: Payload) -> list[pb.Scalars]:
    """The messages of scalar groups. Raises ValueError when one is none, or there are too many."""
    if len(groups) > MAX_GROUPS:
        raise ValueError(f"message has {len(groups)} scalar groups, at most {MAX_GROUPS}")
    for group in groups:
        if not 0 < len(group) <= MAX_NAME:
            raise ValueError(
                f"name of a scalar group has {len(group)} characters, not 1–{MAX_NAME}"
            )
    return [pack_group(params, group) for group, params in groups.items()]


def unpack_groups(entries: Sequence[pb.Scalars]) -> Payload:
    """The scalar groups of messages. Raises WireError when one cannot be read."""
    if len(entries) > MAX_GROUPS:
        raise WireError(f"message has {len(entries)} scalar groups, at most {MAX_GROUPS}")
    groups: dict[str, Params] = {}
    for entry in entries:
        name = entry.group
        if not 0 < len(name) <= MAX_NAME:
            raise WireError(f"name of a scalar group has {len(name)} characters, not 1–{MAX_NAME}")
        if name in groups:
            raise WireError(f"scalar group {name!r} is there twice")
        groups[name] = unpack_group(entry, f"scalar group {name!r}")
    return groups


def pack_group(params: Params, group: str = "") -> pb.Scalars:
    """The message of a scalar group. Raises ValueError when it is not one."""
    if "scalars" not in params or not set(params) <= set(_KEYS):
        raise ValueError(f"scalar group has {sorted(params)}: only {', '.join(_KEYS)}")
    scalars = params["scalars"]
    n = scalars.numel()
    _expect("scalars", scalars, (n,), torch.float32, torch.float16)
    if n > MAX_SCALARS:
        raise ValueError(f"scalar group has {n} scalars, at most {MAX_SCALARS}")
    half = scalars.dtype == torch.float16
    bits = _numpy(scalars).view(np.uint16 if half else np.uint32)
    entry = pb.Scalars(group=group, size=n)
    if "directions" in params:
        _expect("directions", params["directions"], (n,), torch.int32)
        directions = _numpy(params["directions"])
        if n and not 0 <= directions.min() <= directions.max() < MAX_SCALARS:
            raise ValueError(f"direction is not in [0, {MAX_SCALARS})")
        entry.fixed32 = directions.astype("<u4").tobytes()
    else:
        bits = _shortest(entry, bits)
    if half:
        entry.fp16 = bits.astype("<u2").tobytes()
    else:
        entry.fp32 = bits.astype("<u4").tobytes()
    if "seed" in params:
        _expect("seed", params["seed"], (), torch.int64)
        if not 0 <= params["seed"].item() < 1 << 32:
            raise ValueError(f"seed {params['seed'].item()} is not in [0, 2**32)")
        entry.seed = int(params["seed"].item())
    if "step" in params:
        _expect("step", params["step"], (), torch.float32)
        if not math.isfinite(params["step"].item()):
            raise ValueError(f"step {params['step'].item()} is not finite")
        entry.step = params["step"].item()
    return entry


def unpack_group(entry: pb.Scalars, where: str) -> Params:
    """The scalar group of a message. Raises WireError, which starts with `where`."""
    size, form = entry.size, entry.WhichOneof("directions")
    if size > MAX_SCALARS:
        raise WireError(f"{where} has size {size}, at most {MAX_SCALARS}")
    kind: np.dtype[Any]
    match entry.WhichOneof("values"):
        case "fp32":
            data, stored, kind = entry.fp32, "<u4", np.dtype(np.float32)
        case "fp16":
            data, stored, kind = entry.fp16, "<u2", np.dtype(np.float16)
        case _:
            raise WireError(f"{where} has no values")
    indices = None
    if form == "bitmap":
        indices = _from_bitmap(entry.bitmap, size, where)
    elif form == "varint":
        indices = _from_gaps(entry.varint, size, where)
    count = size if indices is None else len(indices)
    if len(data) != count * kind.itemsize:
        raise WireError(f"{where} has {len(data)} bytes of values, {count} are {kind.name}")
    # Bits, not numbers: a NaN keeps its payload.
    bits = np.zeros(size, dtype=f"u{kind.itemsize}")
    bits[slice(None) if indices is None else indices] = np.frombuffer(data, stored)
    params = {"scalars": torch.from_numpy(bits.view(kind))}
    if form == "fixed32":
        if len(entry.fixed32) != 4 * size:
            raise WireError(f"{where} has {len(entry.fixed32)} bytes of directions for {size}")
        directions = np.frombuffer(entry.fixed32, "<u4")
        if size and directions.max() >= MAX_SCALARS:
            raise WireError(f"{where} has direction {directions.max()}, at most {MAX_SCALARS - 1}")
        params["directions"] = torch.from_numpy(directions.astype(np.int32))
    if entry.HasField("seed"):
        params["seed"] = torch.tensor(entry.seed, dtype=torch.int64)
    if entry.HasField("step"):
        if not math.isfinite(entry.step):
            raise WireError(f"{where} has step {entry.step}, not a finite one")
        params["step"] = torch.tensor(entry.step, dtype=torch.float32)
    return params


def _shortest(entry: pb.Scalars, bits: "NDArray[Any]") -> "NDArray[Any]":
    """Choose the form of a dense vector with the fewest bytes; returns the values to send."""
    kept = np.flatnonzero(bits)
    dropped = (len(bits) - len(kept)) * bits.itemsize
    if dropped == 0:
        return bits
    gaps, bitmap = _to_gaps(kept), np.packbits(bits != 0, bitorder="little").tobytes()
    if dropped <= min(len(gaps), len(bitmap)):
        return bits
    if len(bitmap) <= len(gaps):
        entry.bitmap = bitmap
    else:
        entry.varint = gaps
    return bits[kept]


def _from_bitmap(data: bytes, size: int, where: str) -> "NDArray[Any]":
    if len(data) != (size + 7) // 8:
        raise WireError(f"{where} has a bitmap of {len(data)} bytes for size {size}")
    indices = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little"))
    if len(indices) and indices[-1] >= size:
        raise WireError(f"{where} has direction {indices[-1]} in a bitmap of size {size}")
    return indices


def _to_gaps(indices: "NDArray[Any]") -> bytes:
    """Ascending indices below 2²¹ as unsigned LEB128: the first, then differences."""
    gaps = np.diff(indices, prepend=0)[:, None]
    more = gaps >= np.array([1 << 7, 1 << 14, 1 << 21])
    parts = (gaps >> np.array([0, 7, 14])) & 127 | more << 7
    used = np.hstack([np.ones_like(more[:, :1]), more[:, :2]])
    return bytes(parts[used].astype(np.uint8))


def _from_gaps(data: bytes, size: int, where: str) -> "NDArray[Any]":
    if len(data) > 5 * size:
        raise WireError(f"{where} has {len(data)} bytes of varints for size {size}")
    parts = np.frombuffer(data, np.uint8)
    if not len(parts):
        return np.zeros(0, dtype=np.int64)
    if parts[-1] > 127:
        raise WireError(f"{where} has a truncated varint")
    ends = np.flatnonzero(parts <= 127) + 1
    starts = np.concatenate([[0], ends[:-1]])
    if (ends - starts).max() > 5:
        raise WireError(f"{where} has a varint of {(ends - starts).max()} bytes, at most 5")
    shifts = 7 * (np.arange(len(parts)) - np.repeat(starts, ends - starts))
    gaps = np.add.reduceat((parts & 127).astype(np.int64) << shifts, starts)
    if not gaps[1:].all():
        raise WireError(f"{where} has a direction twice")
    indices = np.cumsum(gaps)
    if indices[-1] >= size:
        raise WireError(f"{where} has direction {indices[-1]}, its size is {size}")
    return indices


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name} is {found}, not {' or '.join(map(str, dtypes))} {shape}")


def _numpy(tensor: torch.Tensor) -> "NDArray[Any]":
    return np.ascontiguousarray(tensor.detach().cpu().numpy())
