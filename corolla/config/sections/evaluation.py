"""The evaluation of a run: what is measured, on how many examples and clients."""

from typing import Annotated, Literal

from pydantic import Field

from corolla.config.sections.section import Positive, key
from corolla.config.sections.subject import Subject


class Evaluation(Subject):
    """Losses by round, and answers before and after the run."""

    eval_every: Positive = key(1, "The number of rounds from one evaluation to the next.", 5)
    eval_examples: Positive = key(
        256, "The number of held-out examples that an evaluation takes at most.", 512
    )
    eval_client_examples: Positive = key(
        32, "The number of its own examples that a client is evaluated on at most.", 16
    )
    eval_participants: bool = key(
        False,
        "Whether only clients that train are evaluated.",
        True,
        effect="false, but always true for personal strategies",
    )
    eval_clients: Annotated[int, Field(ge=0)] = key(
        32,
        "The number of clients that are evaluated at most.",
        0,
        against=("strategy=fedsa_lora",),
    )
    drift: list[str] = key(
        [],
        "The rows on which base and finished model are compared, to see what tuning has changed "
        "beside its task: FILE, NAME=FILE, or refusals, knowledge, texts, all, which ship with "
        "Corolla.",
        ["texts"],
        effect="none",
        unsaid=True,
    )
    answer: Literal["none", "exact", "gsm8k"] = key(
        "none",
        "What is compared of answers that the model writes before and after the run: nothing, the "
        "exact text, or the final number.",
        "exact",
    )
    max_new_tokens: Positive = key(
        256, "The number of tokens that a written answer has at most.", 64, beside="answer=exact"
    )
