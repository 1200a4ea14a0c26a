"""The settings that secure sums go with: what the server would have to see is refused."""

from corolla.config.asked import Asked, able, is_mean
from corolla.config.run import RunConfig
from corolla.config.sections.rule import Rule
from corolla.interfaces import Strategy
from corolla.strategies.listing import registry
from corolla.sums import thresholds


def not_summed(strategy: Strategy | type[Strategy]) -> str:
    """Why the updates of a strategy cannot go to a secure sum; "" if they can."""
    made = strategy() if isinstance(strategy, type) else strategy
    traits = registry.traits(made)
    if traits.personal:
        return "its clients measure models of their own, which would be told of each"
    if traits.squares:
        return "squared gradients and what they weigh have no common bound"
    if traits.mirrors:
        return "the server adds up what its clients keep, which would have to be rounded too"
    if traits.individual or not made.aggregator().linear:
        return "its updates are not added up, each is used by itself"
    if not is_mean(made.aggregator()):
        return "what it adds up is not one mean over all clients"
    return ""


def corrupt(config: RunConfig, clients: int) -> int:
    """How many of all clients of a run are taken to be on the server's side."""
    return config.sum_corrupt or thresholds.default_corrupt(clients)


def _only_alone(key: str, why: str, instead: str) -> Rule[Asked]:
    """Refuses secure sums beside a setting that is given."""
    name = key.replace("_", "-")
    return Rule(
        when=lambda asked: (
            asked.config.secure_sum
            and getattr(asked.config, key) != type(asked.config).model_fields[key].default
        ),
        why=lambda asked: f"secure-sum=true does not go with {name}={_shown(asked, key)}: {why}",
        instead=instead,
    )


def _shown(asked: Asked, key: str) -> str:
    found = getattr(asked.config, key)
    if isinstance(found, list):
        return ",".join(map(str, found))
    if isinstance(found, bool):
        return str(found).lower()
    return f"{found:g}" if isinstance(found, float) else str(found)


def _assumed(asked: Asked) -> int:
    """The clients that may be on the server's side, where the number of all is not known yet."""
    return corrupt(asked.config, asked.config.clients or asked.cohort)


SECURE: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: asked.config.smallest_sum != 5 and not asked.config.secure_sum,
        why=lambda asked: f"smallest-sum={asked.config.smallest_sum} is for secure-sum=true",
        instead="add it, or leave smallest-sum out",
    ),
    Rule(
        when=lambda asked: asked.config.sum_corrupt and not asked.config.secure_sum,
        why=lambda asked: f"sum-corrupt={asked.config.sum_corrupt} is for secure-sum=true",
        instead="add it, or leave sum-corrupt out",
    ),
    Rule(
        when=lambda asked: asked.config.secure_sum and not_summed(asked.strategy),
        why=lambda asked: f"secure-sum=true does not fit {asked.subject}",
        instead=lambda asked: (
            f"{not_summed(asked.strategy)}; use {able(lambda cls: not not_summed(cls))}"
        ),
    ),
    _only_alone("robust", "a rule compares single updates", "leave robust out"),
    _only_alone(
        "max_norm",
        "the server sees no single update to refuse",
        "leave it out, each member bounds its own",
    ),
    _only_alone("codec", "masked numbers cannot be compressed", "leave codec out"),
    _only_alone(
        "codec_down", "members must see the same broadcast, bit for bit", "leave codec-down out"
    ),
    _only_alone("buffer", "updates are applied in a round, not one by one", "leave buffer out"),
    Rule(
        when=lambda asked: asked.config.secure_sum and asked.config.dp == "example",
        why=lambda asked: (
            "secure-sum=true does not go with dp=example: each client tells its epsilon"
        ),
        instead="use dp=client, whose noise is put on the sum",
    ),
    _only_alone("dp_sampling", "members see who is in a secret cohort", "use dp-sampling=fixed"),
    _only_alone(
        "deadline_simulated",
        "a masked update that comes late cannot be taken out of the sum",
        "leave deadline-simulated out",
    ),
    _only_alone(
        "eval_participants", "nothing is measured on single clients", "leave eval-participants out"
    ),
    _only_alone("engine", "the three steps of a sum run in one process", "leave engine out"),
    Rule(
        when=lambda asked: (
            asked.config.secure_sum
            and (
                asked.config.partial or len(asked.trainers) > 1 or len(set(asked.config.loras)) > 1
            )
        ),
        why=lambda asked: "secure-sum=true adds up updates of one form",
        instead="give all clients one rank, one trainer and all blocks",
    ),
    Rule(
        when=lambda asked: (
            asked.config.secure_sum and asked.cohort - _assumed(asked) < asked.config.smallest_sum
        ),
        why=lambda asked: (
            f"secure-sum=true with cohort {asked.cohort}, of which {_assumed(asked)} may be on the "
            f"server's side (sum-corrupt), has fewer than smallest-sum={asked.config.smallest_sum} "
            f"honest updates"
        ),
        instead=lambda asked: (
            f"raise cohort to {asked.config.smallest_sum + _assumed(asked)} or more, or lower "
            f"smallest-sum or sum-corrupt"
        ),
    ),
)
