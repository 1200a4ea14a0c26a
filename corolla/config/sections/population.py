"""Clients: how many there are, who is drawn, what they may answer, and when a run ends."""

from typing import Annotated, Literal

from pydantic import Field

from corolla.config.sections.rule import Rule
from corolla.config.sections.section import Positive, key, within
from corolla.config.sections.subject import Subject


class Population(Subject):
    """Rounds and their cohorts."""

    clients: Positive | None = key(
        None,
        "The number of clients, which rows without client_id are dealt out to.",
        6,
        effect="all that client_id names, else 10",
    )
    cohort: Positive | None = key(
        None,
        "The number of clients that train in a round.",
        4,
        effect="8, or all clients where there are fewer",
        against=("clients=2",),
    )
    rounds: Annotated[int, within("rounds")] = key(
        5, "The number of rounds, each of which updates the global model.", 20
    )
    quorum: Annotated[float, Field(gt=0, le=1)] = key(
        0.5,
        "The part of a cohort that must send valid replies; a round with fewer is abandoned.",
        0.8,
    )

    deadline: Annotated[float, Field(gt=0)] = key(
        3600.0, "Seconds that a round may take on Flower; later replies are dropped.", 600.0
    )
    attempts: Positive = key(
        3,
        "The number of attempts at a round that is abandoned, each with another cohort, before "
        "the run ends.",
        5,
    )
    wait: Annotated[float, Field(ge=0)] = key(
        3600.0,
        "Seconds that a run pauses while too few clients are online, before it stops.",
        600.0,
    )
    max_norm: Annotated[float, Field(gt=0)] | None = key(
        None,
        "The joint L2 norm that one client's update may have; a larger update is refused.",
        10.0,
        effect="any norm",
        against=("dp=client epsilon=8",),
    )

    max_examples: Positive | None = key(
        None,
        "The number of training examples that a client of corolla server may have; one that says "
        "it has more is left out.",
        10_000,
        effect="any number",
    )

    max_seconds: Annotated[float, Field(gt=0)] | None = key(
        None,
        "Seconds after which the run ends, those before a resumption included.",
        1800.0,
        effect="no limit",
    )
    target_loss: Annotated[float, Field(gt=0)] | None = key(
        None,
        "The held-out loss, in nats per target, at which the run ends.",
        2.0,
        effect="no target",
    )
    patience: Positive | None = key(
        None,
        "The number of evaluations without a lower held-out loss after which the run ends.",
        3,
        effect="all rounds are run",
    )

    selection: Literal["uniform", "weighted"] = key(
        "uniform",
        "How a cohort is drawn: each client alike, or by numbers of training examples, which then "
        "count in the draw; in the mean a client still counts by the distinct examples that it "
        "trained on in the round.",
        "weighted",
        against=("dp=client epsilon=8",),
    )
    availability: str | None = key(
        None,
        'A .jsonl file of rows {"client_id", "from", "to"}: the rounds in which a client can be '
        "drawn, both ends included.",
        "available.jsonl",
        effect="every client in every round",
    )
    step_seconds: Annotated[float, Field(gt=0)] | None = key(
        None,
        "Simulated seconds that a local step takes at speed 1.",
        0.5,
        effect="1.0 where another key simulates time, else time is not simulated",
    )
    deadline_simulated: Annotated[float, Field(gt=0)] | None = key(
        None,
        "Simulated seconds that a round may take; later replies are dropped.",
        60.0,
        effect="no deadline",
        against=("buffer=2",),
    )
    buffer: Positive | None = key(
        None,
        "The number of updates after which the server steps, while the rest of the cohort stays at "
        "work: asynchronous rounds.",
        2,
        effect="synchronous rounds",
        against=(
            "cohort=1",
            "deadline_simulated=60",
            "strategy=seed_pool",
            "dp=client epsilon=8",
        ),
    )
    staleness_power: Annotated[float, Field(ge=0)] = key(
        0.5,
        "The power of (1 + rounds behind) that the weight of a late update is divided by.",
        1.0,
        beside="buffer=2",
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
