"""The machine that trains: its device, numbers and memory."""

from typing import Annotated, Literal

from pydantic import Field

from corolla.config.sections.adapter import Adapter
from corolla.config.sections.rule import Rule
from corolla.config.sections.section import key


class Machine(Adapter):
    """Where the model is, and how its base is stored."""

    device: str = key(
        "auto",
        "The device that trains: cpu, cuda, cuda:N or mps.",
        "cpu",
        effect="the best there is",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = key(
        "float32", "The type of numbers that the base model is held in.", "bfloat16"
    )
    quantization: Literal["none", "8bit", "4bit"] = key(
        "none",
        "The bits of a quantised base model, by bitsandbytes.",
        "4bit",
        against=("parameters=full", "device=mps", "start=gradient public=public.jsonl"),
    )
    gradient_checkpointing: bool = key(
        False,
        "Whether activations are computed again instead of kept: less memory, more time.",
        True,
    )
    threads: Annotated[int, Field(ge=0)] = key(
        0,
        "The number of threads of the CPU.",
        2,
        effect="OMP_NUM_THREADS where it is set, else as many as there are cores",
    )


QUANTIZED: tuple[Rule[Machine], ...] = (
    Rule(
        when=lambda run: run.quantization != "none" and not run.kind.quantised,
        why=lambda run: f"parameters={run.parameters} cannot train a base in {run.quantization}",
    ),
)

EXPERTS: tuple[Rule[Machine], ...] = (
    Rule(
        when=lambda run: run.target_parameters and run.quantization != "none",
        why=lambda run: f"target-parameters needs a base in full, found {run.quantization}",
        instead="leave quantization out, or use dtype=bfloat16",
    ),
    Rule(
        when=lambda run: run.new_tokens and run.quantization != "none",
        why=lambda run: f"new-tokens needs a base in full, found {run.quantization}",
        instead="leave quantization out, or use dtype=bfloat16",
    ),
)

MAGNITUDES: tuple[Rule[Machine], ...] = (
    Rule(
        when=lambda run: run.dora and run.quantization != "none",
        why=lambda run: (
            f"dora needs the lengths of the rows of a base in full, found {run.quantization}"
        ),
        instead="leave quantization out, or use dtype=bfloat16",
    ),
)

FULL_PRECISION: tuple[Rule[Machine], ...] = (
    Rule(
        when=lambda run: run.dtype != "float32" and run.kind.sparse,
        why=lambda run: f"parameters={run.parameters} changes values of the base in place",
        instead=lambda run: f"{run.dtype} would round small changes away, use dtype=float32",
    ),
)

DEVICES: tuple[Rule[Machine], ...] = (
    Rule(
        when=lambda run: (
            run.quantization != "none" and run.engine == "inprocess" and run.device == "mps"
        ),
        why=lambda run: "4- and 8-bit base models need a CPU or CUDA device",
    ),
)

STARTS: tuple[Rule[Machine], ...] = (
    Rule(
        when=lambda run: run.start != "random" and not run.kind.factors,
        why=lambda run: f"start={run.start} makes an adapter",
        instead=lambda run: f"found parameters={run.parameters}, quantization={run.quantization}",
    ),
    Rule(
        when=lambda run: run.begins.weights and run.quantization != "none",
        why=lambda run: f"start={run.start} reads the weights of the base as they were trained",
        instead=lambda run: f"found parameters={run.parameters}, quantization={run.quantization}",
    ),
    Rule(
        when=lambda run: run.start == "loftq" and run.quantization == "none",
        why=lambda run: "start=loftq makes good what quantisation lost",
        instead="set quantization=4bit or 8bit, or use another start",
    ),
)
