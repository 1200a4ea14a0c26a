"""Base and adapter as one model: in memory and proven by its logits, or streamed in any type."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from corolla.artefacts.adapters import copy_tokenizer
from corolla.artefacts.weights import Rounding, Weights
from corolla.commands import artefacts
from corolla.commands.export.subject import Subject, refuse_filled
from corolla.data.encoding import Encoded, collate
from corolla.errors import ArtefactError, ConfigError
from corolla.host.files import making_folder
from corolla.models import pretrained
from corolla.models.files import adapter_files
from corolla.models.files.folders import folder_of
from corolla.tensors.stored import write_stored

MergedType = Literal["float32", "bfloat16", "float16"]


def export_merged(adapter: Path, model: str | None, folder: Path) -> float:
    """Write base + adapter as one model; the largest difference of logits after reloading.

    Merges in fp32, whatever the base's stored precision, and saves fp32: adding a small update to
    half-precision weights would lose most of it. Raises ConfigError for a folder that is not
    empty, ArtefactError when the reloaded model differs by more than rounding.
    """
    refuse_filled(folder)
    if artefacts.is_model(adapter):
        raise ConfigError(f"{adapter} is a whole model already: any tool loads it as it is")
    config = artefacts.config_of(adapter, model, None, ())
    plain = {"dtype": "float32", "quantization": "none", "device": "cpu", "max_length": 8}
    config = config.model_copy(update=plain)
    labels = artefacts.labels_of(adapter)
    base = pretrained.load(config, labels)
    probe = _probe(base)
    with torch.no_grad():
        tuned = artefacts.tuned_of(adapter, base)
        wanted = tuned(**probe).logits
        merged = adapter_files.merge(tuned)
    with making_folder(folder) as scratch:
        with pretrained.Quiet():
            merged.save_pretrained(scratch)
        base.tokenizer.save_pretrained(scratch)
        copy_tokenizer(adapter, scratch)  # it may have tokens of its own
        del merged, tuned, base
        again = artefacts.whole(scratch, config, labels)
        with torch.no_grad():
            found = again.model(**probe).logits
        difference = float((wanted - found).abs().max())
        if not difference <= 1e-4 * max(1.0, float(wanted.abs().max())):
            raise ArtefactError(f"the merged model differs by {difference:.2e} in its logits")
    return difference


def write_merged(subject: Subject, folder: Path, dtype: MergedType, rank: int | None) -> "Streamed":
    """Write base + adapter as one model of a type, file by file as the base is, and what it cost.

    Memory is that of a million values. An update is added in fp64 and rounded once.
    """
    refuse_filled(folder)
    saved, error = subject.lora(rank)
    weights = subject.weights(saved)
    base, kind = folder_of(subject.base), getattr(torch, dtype)
    streamed = Streamed(error)
    with making_folder(folder) as scratch:
        files = sorted({tensor.path for tensor in weights.tensors.values()})
        for path in files:
            shapes = {n: t.shape for n, t in weights.tensors.items() if t.path == path}
            write_stored(scratch / path.name, shapes, kind, streamed.parts(weights, shapes, kind))
        _write_index(scratch, weights, kind, len(files))
        config = json.loads((base / "config.json").read_text())
        config.pop("torch_dtype", None)
        config |= {"dtype": dtype}
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if (base / "generation_config.json").is_file():
            shutil.copyfile(base / "generation_config.json", scratch / "generation_config.json")
        copy_tokenizer(base, scratch)
    return streamed


class Streamed:
    """The parts of a merged model, and what rounding took from the update while they went by.

    `error` is that of a smaller rank, relative on effective weights.
    """

    def __init__(self, error: float) -> None:
        self.error = error
        self.rounding = Rounding()

    def parts(
        self, weights: Weights, names: Mapping[str, Any], kind: torch.dtype
    ) -> Iterator[Tensor]:
        """All parts of the named tensors, merged, in their type.

        Raises ArtefactError where the type has no number for a value.
        """
        for name in names:
            for rows, added in weights.parts(name):
                wanted = rows if added is None else rows.double() + added
                made = wanted.to(kind)
                if not bool(torch.isfinite(made).all()):
                    raise ArtefactError(f"{name} has values that {kind} has not: use float32")
                if added is not None:
                    lost = made.double() - wanted
                    self.rounding = self.rounding.plus(
                        float(added.square().sum()), float(lost.square().sum())
                    )
                yield made


def _write_index(folder: Path, weights: Weights, kind: torch.dtype, files: int) -> None:
    """Which file has which tensor, as transformers asks where there are several."""
    if files > 1:
        size = sum(tensor.count for tensor in weights.tensors.values()) * kind.itemsize
        index = {
            "metadata": {"total_size": size},
            "weight_map": {name: tensor.path.name for name, tensor in weights.tensors.items()},
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")


def _probe(base: pretrained.Base) -> dict[str, torch.Tensor]:
    size = base.model.config.get_text_config().vocab_size
    ids = [[(7 * i) % size for i in range(1, 17)]]
    batch = collate([Encoded(row, row) for row in ids], base.pad_id, base.model.device)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}
