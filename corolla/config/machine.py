"""The machine that trains: its device, numbers and memory."""

from typing import Annotated, Literal

from pydantic import Field

from corolla.config.adapter import Adapter
from corolla.config.rule import Rule


class Machine(Adapter):
    """Where the model is, and how its base is stored."""

    device: str = Field("auto", description="cpu, cuda, mps; auto: the best there is")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the base")
    quantization: Literal["none", "8bit", "4bit"] = "none"
    gradient_checkpointing: bool = False
    threads: Annotated[int, Field(ge=0)] = Field(0, description="of the CPU; 0: all cores")


QUANTIZED: tuple[Rule[Machine], ...] = (
    Rule(
        when=lambda run: run.quantization != "none" and not run.kind.quantised,
        why=lambda run: f"parameters={run.parameters} cannot train a base in {run.quantization}",
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

GRADIENT_START: tuple[Rule[Machine], ...] = (
    Rule(
        when=lambda run: (
            run.start == "gradient" and (not run.kind.factors or run.quantization != "none")
        ),
        why=lambda run: "start=gradient makes an adapter from gradients of the base",
        instead=lambda run: f"found parameters={run.parameters}, quantization={run.quantization}",
    ),
)
