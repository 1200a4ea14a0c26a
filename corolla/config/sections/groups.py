"""Classes of clients: groups whose settings differ from those of the run."""

from typing import Annotated

from pydantic import Field

from corolla.config.sections.section import Budget, Layers, Positive, Section, key, within
from corolla.types import TrainerName


class ClientClass(Section):
    """Clients that differ from the rest: what is not given here is as in the run."""

    share: Positive = key(
        1, "The number of clients in turn, among all classes, that are of this one.", 2
    )
    trainer: TrainerName | None = key(
        None,
        "How its clients train: with gradients, or with forward passes alone.",
        "zeroth_order",
        effect="as the strategy asks for",
        beside="strategy=mixed classes.laptop.trainer=first_order",
        against=("strategy=fedavg", "classes.laptop.trainer=zeroth_order"),
    )
    lr: Annotated[float, within("lr")] | None = key(
        None,
        "The learning rate of its clients.",
        1e-3,
        effect="the run's; where only this class is zeroth order, the default rate of such runs",
    )
    local_steps: Annotated[int, within("local_steps")] | None = key(
        None,
        "The number of steps that its clients take in a round.",
        5,
        effect="the run's",
    )
    batch_size: Annotated[int, within("batch_size")] | None = key(
        None, "The number of sequences of a step.", 4, effect="the run's"
    )
    queries: Annotated[int, within("queries")] | None = key(
        None,
        "The number of directions that a zeroth-order step measures.",
        4,
        effect="the run's",
        beside="strategy=seed_pool",
        against=("local_steps=20000",),
    )
    eps: Annotated[float, within("eps")] | None = key(
        None,
        "The distance along a direction at which a zeroth-order step looks.",
        1e-2,
        effect="the run's",
        beside="strategy=seed_pool",
    )
    rank: Annotated[int, within("rank")] | None = key(
        None,
        "The rank of its clients' adapters.",
        4,
        effect="the run's",
        beside="strategy=flora",
        against=("strategy=fedavg classes.laptop.rank=8", "ranks=[4,8]"),
    )
    alpha: Annotated[float, within("alpha")] | None = key(
        None,
        "The numerator of the scaling of its clients' adapters.",
        8.0,
        effect="the run's",
        beside="strategy=flora",
        against=("ranks=[4,8]",),
    )

    layers: Layers | None = key(
        None,
        "The blocks that its clients train and send, counted among those of the run.",
        "last:2",
        effect="the run's",
        against=("strategy=hetlora", "robust=median", "parameters=bias"),
        unsaid=True,
    )
    budget: Budget | None = key(
        None,
        "The share of what training the run's modules takes that its clients may take; the best "
        "blocks within it become its `layers` before the first round.",
        "flops:0.5",
        effect="none",
        against=("strategy=hetlora", "robust=median", "parameters=bias"),
        unsaid=True,
    )
    speed: Annotated[float, Field(gt=0)] | None = key(
        None,
        "How many times as fast as others its clients train, in simulated time.",
        0.25,
        effect="1.0",
    )
    upload: Annotated[float, Field(gt=0)] | None = key(
        None,
        "Bytes a second that its clients send, in simulated time.",
        250_000.0,
        effect="sending takes no time",
    )
    download: Annotated[float, Field(gt=0)] | None = key(
        None,
        "Bytes a second that its clients receive, in simulated time.",
        1_000_000.0,
        effect="receiving takes no time",
    )
    drop: Annotated[float, Field(ge=0, le=1)] = key(
        0.0, "The probability that a client does not answer in a round, simulated.", 0.1
    )
