"""Payload ↔ bytes, as one safetensors buffer: bounds-checked, never able to run code."""

import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

from corolla.errors import WireError
from corolla.tensors import tree
from corolla.types import Params, Payload

_SEPARATOR = "/"
DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int32, torch.int64, torch.uint8),
}
_MAX_HEADER = 8 << 20


def encode(payload: Payload) -> bytes:
    """The payload as bytes; `decode` gives it back bit for bit."""
    flat = _apart(
        {
            f"{group}{_SEPARATOR}{name}": tensor
            for group, params in payload.items()
            for name, tensor in params.items()
        }
    )
    return save(flat, metadata={"groups": json.dumps(list(payload))})


def decode(data: bytes, max_header: int | None = None) -> Payload:
    """The payload of bytes made by `encode`.

    Raises WireError for anything else: a truncated buffer, a header that lies, a tensor type
    that no payload has, a tensor without a group, a header of more than `max_header` bytes
    (default: 8 MiB or an eighth): JSON takes thirty times its bytes when it is parsed.
    """
    length = int.from_bytes(data[:8], "little")
    if max_header is None:
        max_header = max(_MAX_HEADER, len(data) // 8)
    if length > max_header:
        raise WireError(
            f"payload of {len(data)} bytes cannot be read: its header has {length} bytes, "
            f"at most {max_header}"
        )
    try:
        header = json.loads(data[8 : 8 + length])
        groups: dict[str, dict[str, torch.Tensor]] = {
            str(group): {} for group in json.loads(header["__metadata__"]["groups"])
        }
        flat = load(data)
        for key, tensor in flat.items():
            group, _, name = key.partition(_SEPARATOR)
            if tensor.dtype not in DTYPES:
                raise WireError(f"payload tensor {key!r} has type {tensor.dtype}")
            groups[group][name] = tensor
    except (
        *(SafetensorError, ValueError, KeyError, TypeError, AttributeError),
        *(RecursionError, RuntimeError, OverflowError, MemoryError),
    ) as error:
        raise WireError(f"payload of {len(data)} bytes cannot be read: {error!r}") from error
    return groups


def content_bytes(payload: Payload) -> int:
    """Bytes of the tensors alone: what the formulas of papers count."""
    return sum(t.numel() * t.element_size() for params in payload.values() for t in params.values())


def file_bytes(params: Params) -> int:
    """Bytes of a file of Params, about: never less."""
    header = 1024 + sum(len(name.encode()) * 6 + 256 for name in params)
    return header + content_bytes({"": params})


def content_id(params: Params) -> str:
    """The name of a group by its content: the first 128 bits of its sha256, in hex."""
    return tree.digest(params)[:32]


def write(path: str, params: Params, metadata: Mapping[str, str] | None = None) -> None:
    """Save Params as a safetensors file."""
    # None, not {}: a file with empty metadata and no tensors cannot be read back.
    save_file(_apart(params), path, metadata=dict(metadata) if metadata else None)


def read(path: str) -> tuple[Params, Mapping[str, str]]:
    """Load a safetensors file and its metadata. Raises WireError when it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise WireError(f"{path} is not a safetensors file: {error}") from error


def _apart(params: Params) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors that share no memory: safetensors refuses tied ones."""
    flat: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, tensor in params.items():
        own = tensor.detach().cpu().contiguous()
        flat[name] = own.clone() if own.data_ptr() in places else own
        places.add(flat[name].data_ptr())
    return flat
