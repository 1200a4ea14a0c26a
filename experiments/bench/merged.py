"""Memory and time that it takes to merge an adapter into a model of a billion parameters.

    python -m experiments.bench.merged --json FILE

A synthetic Llama in fp32, in several files, with an adapter of rank 8 on all linear layers, is
written to a temporary folder (4.4 GB, and 2.2 GB beside it), and `corolla export --to merged
--dtype bfloat16` is carried out in a process of its own. Memory is resident, above what the process
had before. README.md says how to read it.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from corolla.artefacts.adapters import CONFIG, TENSORS
from corolla.commands.export.order import Order, export
from corolla.models.files.adapter_files import PREFIX
from corolla.tensors.stored import StoredTensor, stored_tensors, write_stored
from corolla.wire import codec
from experiments.bench.zeroth_order import Section, command, peak, resident, restart_peak

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8
BLOCK = 1 << 22
"""Values that are drawn once, and written again and again."""

Measured = dict[str, float]


@dataclass(frozen=True)
class Options:
    """How large the model is. The fields are the options of the command."""

    hidden: int = field(default=2048, metadata={"help": "values of a hidden state"})
    layers: int = field(default=16, metadata={"help": "of the model"})
    vocabulary: int = field(default=32_000, metadata={"help": "tokens that it knows"})
    files: int = field(default=8, metadata={"help": "that its tensors are in"})
    folder: str = field(default="", metadata={"help": "that holds model and adapter already"})
    threads: int = field(default=1, metadata={"help": "of the CPU"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the model, merge it in a new process, print the table, write the JSON file."""
    return command(__doc__, Options, {"merged": merged}, ("export",), memory_of, arguments)


def merged(options: Options) -> Section:
    """The peak of memory of an export, beside the largest file and the largest tensor."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sizes = make(folder, options)
        script = [sys.executable, "-m", "experiments.bench.merged", "--child", "export"]
        own = {**asdict(options), "folder": scratch}
        done = subprocess.run(
            [*script, *(part for name, value in own.items() for part in (f"--{name}", str(value)))],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        found: Measured = json.loads(done.stdout.splitlines()[-1])
    section = Section(f"merged: {sizes['parameters']:,.0f} parameters, fp32 to bfloat16")
    section.rows.append({**{f"{n}, MB": sizes[n] / 1e6 for n in ("file", "tensor")}, **found})
    bar = (sizes["file"] + sizes["tensor"]) / 1e6
    above = found["peak above idle, MB"]
    section.ratios.append(
        {"ratio": "peak above idle, MB", "found": above, "bar": f"≤ {bar:.0f}", "met": above <= bar}
    )
    return section


def memory_of(name: str, options: Options) -> Measured:
    """The peak of an export in this process, and whether what it wrote is right."""
    del name
    folder = Path(options.folder)
    idle = resident()
    restart_peak()
    began = time.process_time()
    export(Order(folder / "adapter", "merged", str(folder / "model"), folder / "out", "bfloat16"))
    above = (peak() - idle) / 1e6
    took = time.process_time() - began
    return {
        "idle, MB": idle / 1e6,
        "peak above idle, MB": above,
        "cpu s": took,
        "largest error": _error(folder),
    }


def make(folder: Path, options: Options) -> Measured:
    """Write model and adapter; the number of parameters, bytes of largest file and tensor."""
    config = transformers.LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        vocab_size=options.vocabulary,
    )
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()
        }
    config.save_pretrained(folder / "model")
    names = list(shapes)
    for i in range(options.files):
        part = {name: shapes[name] for name in names[i :: options.files]}
        path = folder / "model" / f"model-{i + 1:05}-of-{options.files:05}.safetensors"
        write_stored(path, part, torch.float32, _noise(part))
    _write_adapter(folder / "adapter", folder / "model", shapes)
    counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    return {
        "parameters": sum(counts.values()),
        "tensor": 4 * max(counts.values()),
        "file": max(path.stat().st_size for path in (folder / "model").glob("*.safetensors")),
    }


def _noise(shapes: dict[str, tuple[int, ...]]) -> Iterator[Tensor]:
    """The same values for all tensors, as many as they have."""
    block = 0.02 * torch.randn(BLOCK, generator=torch.Generator().manual_seed(1))
    for shape in shapes.values():
        left = torch.Size(shape).numel()
        while left:
            yield block[:left]
            left -= min(left, BLOCK)


def _write_adapter(folder: Path, base: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """An adapter on all linear layers, in the form of peft."""
    folder.mkdir()
    tensors = dict[str, Tensor]()
    noise = torch.Generator().manual_seed(2)
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in LINEAR:
            for factor, size in (("A", (RANK, shape[1])), ("B", (shape[0], RANK))):
                drawn = 0.02 * torch.randn(size, generator=noise)
                tensors[f"{PREFIX}{module}.lora_{factor}.weight"] = drawn
    codec.write(str(folder / TENSORS), tensors, {"format": "pt"})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(LINEAR),
        "base_model_name_or_path": str(base),
    }
    (folder / CONFIG).write_text(json.dumps(config))


def _error(folder: Path) -> float:
    """The largest error of the first rows of three modules, in units of bfloat16's rounding.

    At most 1 where each value is rounded once.
    """
    factors, _ = codec.read(str(folder / "adapter" / TENSORS))
    before, after = (_tensors(folder / name) for name in ("model", "out"))
    worst = 0.0
    for module in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.0.mlp.up_proj"):
        name = f"model.{module}.weight"
        width, rows = before[name].shape[1], 64
        a, b = (factors[f"{PREFIX}model.{module}.lora_{f}.weight"].double() for f in "AB")
        wanted = before[name].read(0, rows * width).double().view(rows, width) + 2 * b[:rows] @ a
        made = after[name].read(0, rows * width).view(rows, width)
        half = wanted.abs().log2().floor().exp2() / 2**8
        worst = max(worst, float(((made.double() - wanted).abs() / half).max()))
    return worst


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in stored_tensors(path).items()}


if __name__ == "__main__":
    sys.exit(main())
