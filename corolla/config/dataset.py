"""How the data set is read, and how it is dealt out to clients."""

from typing import Annotated, Literal

from pydantic import Field

from corolla.config.section import Fraction, Positive
from corolla.config.subject import Subject


class Dataset(Subject):
    """Rows of the data set and their clients."""

    task: Literal["auto", "causal", "classify"] = "auto"
    partition: Literal[
        "auto", "natural", "iid", "dirichlet", "shards", "linear", "square", "exponential"
    ] = Field("auto", description="auto: natural where the data has client_id, else iid")
    partition_alpha: Annotated[float, Field(gt=0)] = Field(0.5, description="of dirichlet")
    shards_per_client: Positive = 2
    eval_fraction: Fraction = Field(0.1, description="of each client, and again held out globally")
    min_examples: Positive = Field(
        2, description="clients with fewer training examples are left out"
    )
    max_length: Annotated[int, Field(ge=8)] = Field(256, description="tokens")
