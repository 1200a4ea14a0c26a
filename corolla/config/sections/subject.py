"""The subject of a run: which strategy fine-tunes which model on which data."""

from typing import Annotated, Any, Literal

from pydantic import Field

from corolla.config.sections.section import Section, key


class Subject(Section):
    """The strategy, the model and the data: every other section builds on these."""

    strategy: str = key(
        "fedavg",
        "The strategy that trains and aggregates: one that `corolla strategies` lists, or your "
        "own as FILE.py:Class or module:Class.",
        "fedex_lora",
    )
    options: dict[str, Any] = key(
        {},
        "Options of the strategy by name; strategy.NAME=value sets one of them.",
        {"residual_rank": 8},
        beside="strategy=fedex_lora",
        against=("strategy=fedavg",),
    )
    model: str = key(
        "embedded",
        "The base model: 'embedded', a hub name, a folder or a .gguf file.",
        "models/mine.gguf",
    )
    data: str = key(
        "embedded",
        "The data set: 'embedded', a file (JSON lines, JSON array, CSV, parquet; packed or not), a "
        "folder of such files, or a hub name.",
        "rows.jsonl",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = key(
        0,
        "The number that everything random is drawn from: equal seeds give equal runs.",
        7,
    )
    engine: Literal["inprocess", "flower"] = key(
        "inprocess",
        "Where simulated clients run: in this process, or on Ray as Flower simulates.",
        "flower",
    )
