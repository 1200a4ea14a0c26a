"""How much noise a run needs, and what it will have spent after each round."""

import math
from typing import TYPE_CHECKING

from corolla.errors import ConfigError
from corolla.privacy import accounting, banded
from corolla.privacy.accounting import Release
from corolla.privacy.guarantee import Guarantee, client_guarantee

if TYPE_CHECKING:
    from corolla.config.run import RunConfig


def client_plan(config: "RunConfig", population: int, cohort: int) -> list[Guarantee]:
    """Returns the guarantees after `planned_rounds` to a client that takes part when it may."""
    z, q = (
        client_noise(config, population, cohort),
        sampling_probability(config, population, cohort),
    )
    found = []
    for rounds in planned_rounds(config.rounds):
        if config.dp_sampling == "poisson":
            spent = accounting.epsilon([Release(z, q, rounds)], config.delta)
        else:
            mu = sensitivity(config, rounds) / z
            spent = accounting.gaussian_epsilon(mu, config.delta)
        found.append(client_guarantee(config, spent, q, participations(config, rounds)))
    return found


def planned_rounds(rounds: int, most: int = 20) -> list[int]:
    """At most so many rounds, evenly spaced, the last one among them."""
    return sorted({math.ceil(rounds * i / most) for i in range(1, most + 1)})


def sampling_probability(config: "RunConfig", population: int, cohort: int) -> float:
    """That a client is in a round by a chance that nobody knows the outcome of."""
    return min(1.0, cohort / population) if config.dp_sampling == "poisson" else 1.0


def client_noise(config: "RunConfig", population: int, cohort: int) -> float:
    """The noise multiplier of one round of a client-level run."""
    if config.dp_sampling == "poisson":
        return noise_multiplier_for(
            config, config.rounds, sampling_probability(config, population, cohort)
        )
    of_one = noise_multiplier_for(config, 1, 1.0)
    return of_one if config.epsilon is None else of_one * sensitivity(config, config.rounds)


def noise_multiplier_for(config: "RunConfig", count: int, q: float) -> float:
    """Returns the given noise multiplier, or the one by which so many releases cost `epsilon`."""
    budget, given = config.epsilon, config.noise_multiplier
    if budget is None and given is not None:
        return given
    if budget is not None and given is None:
        return accounting.calibrate(budget, config.delta, count, q) * (1 + 1e-9)  # sums round
    raise ConfigError(
        f"dp={config.dp} needs epsilon, which noise is made for, or noise-multiplier, found "
        f"{'neither' if budget is None else 'both'}: give one of them"
    )


def sensitivity(config: "RunConfig", rounds: int) -> float:
    """Of the sum of a run to one client, in clips, with the noise of the run's mechanism."""
    most = config.participations or rounds
    return banded.sensitivity(rounds, noise_bands(config), most, config.separation)


def noise_bands(config: "RunConfig") -> int:
    """Rounds over which the noise is correlated; 1 without correlation."""
    return config.separation if config.dp_mechanism == "banded" else 1


def participations(config: "RunConfig", rounds: int) -> int:
    """How often a client can take part in so many rounds."""
    possible = math.ceil(rounds / config.separation)
    return min(possible, config.participations or possible)


def refuse_mixture(config: "RunConfig") -> None:
    """Raises ConfigError for what the account of clients could not tell the truth about."""
    banded, chance = config.dp_mechanism == "banded", config.dp_sampling == "poisson"
    if chance and (banded or config.participations or config.separation > 1):
        raise ConfigError(
            "dp-sampling=poisson draws clients by chance alone: leave out participations, "
            "separation and dp-mechanism=banded, or use dp-sampling=fixed"
        )
    if banded and config.clip_quantile is not None:
        raise ConfigError("dp-mechanism=banded has one clip in all rounds: leave out clip-quantile")


def refuse_delta(config: "RunConfig", count: int, of: str) -> None:
    """Delta is a chance that anything may happen: for 1 / count, that one is published whole."""
    if not count:
        raise ConfigError(f"dp={config.dp} needs {of} to protect, found none")
    if config.delta >= 1 / count:
        raise ConfigError(
            f"delta={config.delta:g} is no protection among {count} {of}: set less than "
            f"{1 / count:.3g}"
        )
