"""Secure sums: the server learns the sum of a round's updates, and no update by itself."""

from typing import Annotated

from pydantic import Field

from corolla.config.sections.section import key
from corolla.config.sections.subject import Subject


class SecureSums(Subject):
    """Whether updates go to secure sums, and how many there are in one at least."""

    secure_sum: bool = key(
        False,
        "Whether the server learns the sum of a round's updates alone, and no update by itself.",
        True,
        beside="smallest_sum=2",
        against=(
            "robust=median",
            "max_norm=10",
            "buffer=2",
            "dp=example epsilon=8",
            "dp=client epsilon=8",
            'codec=["fp16"]',
            'codec_down=["fp16"]',
            "engine=flower",
            "eval_participants=true",
            "deadline_simulated=9",
            "cohort=1",
            "strategy=flora",
            "strategy=fedsa_lora",
            "strategy=scaffold optimizer=sgd",
            "strategy=fisher",
        ),
        unsaid=True,
    )
    smallest_sum: Annotated[int, Field(ge=2, le=250)] = key(
        5,
        "The fewest honest updates that a secure sum may hold, whatever the server does.",
        3,
        beside="secure_sum=true",
        against=("secure_sum=false",),
        unsaid=True,
    )
    sum_corrupt: Annotated[int, Field(ge=1, le=250)] | None = key(
        None,
        "The number of clients, of all there are, that are taken to be on the server's side.",
        1,
        effect="a tenth of all clients",
        beside="secure_sum=true smallest_sum=2",
        against=("secure_sum=false smallest_sum=5",),
        unsaid=True,
    )
