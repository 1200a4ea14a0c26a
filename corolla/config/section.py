"""What all groups of settings have in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """Settings that cannot be changed, and have no others beside them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
