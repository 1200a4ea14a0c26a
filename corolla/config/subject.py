"""What a run is about: which strategy fine-tunes which model on which data."""

from typing import Annotated, Any, Literal

from pydantic import Field

from corolla.config.section import Section


class Subject(Section):
    """The strategy, the model and the data: every other section builds on these."""

    strategy: str = Field(
        "fedavg", description="name; module:Class or FILE.py:Class for one of your own"
    )
    options: dict[str, Any] = Field({}, description="hyper-parameters of the strategy")
    model: str = Field("embedded", description="'embedded', hub name, folder or .gguf file")
    data: str = Field("embedded", description="'embedded', .jsonl file or hub name")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    engine: Literal["inprocess", "flower"] = "inprocess"
