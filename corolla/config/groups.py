"""Classes of clients: groups whose settings differ from those of the run."""

from typing import Annotated

from pydantic import Field

from corolla.config.section import Positive, Section
from corolla.types import TrainerName


class ClientClass(Section):
    """Clients that differ from the rest: what is not given here is as in the run."""

    share: Positive = Field(1, description="of clients, in turn, among all classes")
    trainer: TrainerName | None = None
    lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="zeroth order beside first: see config/kinds.py; else that of the run"
    )
    local_steps: Positive | None = None
    batch_size: Positive | None = None
    queries: Positive | None = None
    eps: Annotated[float, Field(ge=1e-20)] | None = None
    rank: Positive | None = Field(None, description="of its adapters; needs mixed ranks")
    alpha: Annotated[float, Field(gt=0)] | None = None

    speed: Annotated[float, Field(gt=0)] | None = Field(
        None, description="simulated: how many times as fast as the others it trains"
    )
    upload: Annotated[float, Field(gt=0)] | None = Field(
        None, description="simulated: bytes per second; None: no time"
    )
    download: Annotated[float, Field(gt=0)] | None = Field(
        None, description="simulated: bytes per second; None: no time"
    )
    drop: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="simulated: probability that a client does not answer in a round"
    )
