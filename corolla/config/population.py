"""Clients: how many there are, who is drawn, what they may answer, and when a run ends."""

from typing import Annotated, Literal

from pydantic import Field

from corolla.config.rule import Rule
from corolla.config.section import Positive
from corolla.config.subject import Subject


class Population(Subject):
    """Rounds and their cohorts."""

    clients: Positive | None = Field(None, description="how many; None: all of the data set")
    cohort: Positive | None = Field(None, description="clients per round; None: 8 or all")
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 5
    quorum: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="a round needs valid replies from this part of its cohort"
    )

    deadline: Annotated[float, Field(gt=0)] = Field(
        3600.0, description="seconds for a round on Flower; late replies are dropped"
    )
    attempts: Positive = Field(
        3, description="at a round that is abandoned, each with another cohort, before the run ends"
    )
    wait: Annotated[float, Field(ge=0)] = Field(
        3600.0, description="seconds to pause while too few clients are online, then the run stops"
    )
    max_norm: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of one update (joint L2 norm); what is larger is refused"
    )

    max_examples: Positive | None = Field(
        None, description="of one client of corolla server; who says it has more is left out"
    )

    max_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="end after so long, resumptions included"
    )
    target_loss: Annotated[float, Field(gt=0)] | None = Field(
        None, description="end when the held-out loss is at most this"
    )
    patience: Positive | None = Field(
        None, description="end after so many evaluations without a lower held-out loss"
    )

    selection: Literal["uniform", "weighted"] = Field(
        "uniform",
        description="of a cohort; weighted: by numbers of training examples, which then count "
        "twice, in the draw and in the mean",
    )
    availability: str | None = Field(
        None, description='.jsonl of {"client_id", "from", "to"}: rounds, both ends included'
    )
    step_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="simulated: of a local step at speed 1; None: 1 where time is simulated"
    )
    deadline_simulated: Annotated[float, Field(gt=0)] | None = Field(
        None, description="simulated seconds for a round; late replies are dropped"
    )
    buffer: Positive | None = Field(
        None, description="asynchronous: updates a round takes of the cohort always at work"
    )
    staleness_power: Annotated[float, Field(ge=0)] = Field(
        0.5, description="with buffer: weights are examples / (1 + rounds behind)^this"
    )


COHORT: tuple[Rule[Population], ...] = (
    Rule(
        when=lambda run: run.clients and run.cohort and run.cohort > run.clients,
        why=lambda run: f"cohort {run.cohort} is larger than clients {run.clients}",
    ),
)

BUFFER: tuple[Rule[Population], ...] = (
    Rule(
        when=lambda run: run.buffer and run.cohort and run.buffer > run.cohort,
        why=lambda run: f"buffer {run.buffer} is larger than cohort {run.cohort}",
    ),
    Rule(
        when=lambda run: run.buffer and run.deadline_simulated,
        why=lambda run: "with buffer no reply is late",
        instead="leave deadline-simulated out",
    ),
)
