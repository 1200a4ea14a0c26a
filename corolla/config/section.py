"""What all groups of settings have in common."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from corolla.wire.ranges import RANGES

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """Settings that cannot be changed, and have no others beside them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def within(name: str) -> Any:
    """The bounds of a number that a server chooses for its clients, for an annotation."""
    return Field(ge=RANGES[name].least, le=RANGES[name].most)


def key(
    default: Any,
    text: str,
    example: Any,
    *,
    effect: str = "",
    beside: str = "",
    against: tuple[str, ...] = (),
) -> Any:
    """A field that explains itself: all that `corolla keys` prints of a key stands here.

    `text` is a sentence; `effect` says which value a run takes by itself where that is not the
    default. `beside` are other settings that the example needs, KEY=VALUE with spaces between
    them; with each of `against` the example is refused.
    """
    about: dict[str, Any] = {"effect": effect, "beside": beside, "against": list(against)}
    return Field(default, description=text, examples=[example], json_schema_extra=about)
