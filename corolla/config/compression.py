"""How updates and broadcasts are compressed on their way."""

from pydantic import Field

from corolla.config.subject import Subject
from corolla.wire import compression
from corolla.wire.compression import Pipeline


class Compression(Subject):
    """Steps that payloads go through, by name."""

    codec: list[str] = Field(
        [], description="of updates, in this order: rank:R, top_k:DENSITY, a number type, zstd"
    )
    codec_down: list[str] = Field(
        [], description="of broadcasts: fp16, bf16 or int8, zstd; groups that are cached stay whole"
    )

    @property
    def uplink(self) -> Pipeline:
        """How updates are compressed. Raises ConfigError."""
        return compression.pipeline(self.codec)

    @property
    def downlink(self) -> Pipeline:
        """How broadcasts are compressed. Raises ConfigError."""
        return compression.pipeline(self.codec_down)
