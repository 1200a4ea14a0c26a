"""What is measured in a run, on how many examples and clients."""

from typing import Annotated, Literal

from pydantic import Field

from corolla.config.section import Positive
from corolla.config.subject import Subject


class Evaluation(Subject):
    """Losses by round, and answers before and after the run."""

    eval_every: Positive = 1
    eval_examples: Positive = Field(256, description="held-out examples per evaluation, at most")
    eval_client_examples: Positive = Field(32, description="of each client that is evaluated")
    eval_participants: bool = Field(
        False,
        description="only clients that train are evaluated; always so for personal strategies",
    )
    eval_clients: Annotated[int, Field(ge=0)] = Field(32, description="clients evaluated, at most")
    answer: Literal["none", "exact", "gsm8k"] = Field(
        "none", description="what of generated answers is compared, before and after the run"
    )
    max_new_tokens: Positive = Field(256, description="of a generated answer")
