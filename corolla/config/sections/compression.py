"""How updates and broadcasts are compressed on their way."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from corolla.config.sections.section import key
from corolla.config.sections.subject import Subject

if TYPE_CHECKING:  # it needs torch, which takes a second to import, and a command's help does not
    from corolla.wire.compression import Pipeline


class Compression(Subject):
    """Steps that payloads go through, by name."""

    codec: list[str] = key(
        [],
        "The steps that compress updates, in this order: rank:R, top_k:DENSITY, a type of numbers "
        "(fp16, bf16, int8, int4), zstd.",
        ["top_k:0.1", "int8", "zstd"],
        effect="none",
        against=("strategy=seed_pool", "strategy=flora", "strategy=fedsvd"),
    )
    codec_down: list[str] = key(
        [],
        "The steps that compress broadcasts: top_k:DENSITY of the factors A and of the factors B, "
        "fp16, bf16 or int8, and zstd; groups that are cached stay whole.",
        ["int8", "zstd"],
        effect="none",
        against=("strategy=seed_pool", 'codec_down=["int4"]'),
    )

    @property
    def uplink(self) -> Pipeline:
        """How updates are compressed. Raises ConfigError."""
        return _pipeline(self.codec)

    @property
    def downlink(self) -> Pipeline:
        """How broadcasts are compressed. Raises ConfigError."""
        found = _pipeline(self.codec_down)
        # A is larger than B at first, which is 0: the largest of both would be of A alone.
        return replace(found, roles=found.density is not None)


def _pipeline(steps: list[str]) -> Pipeline:
    from corolla.wire import compression

    return compression.pipeline(steps)
