"""The account of differential privacy of a run, opened with what earlier processes have spent."""

from collections import Counter

from corolla.errors import ConfigError
from corolla.privacy.client_level import ClientLevel
from corolla.privacy.guarantee import Unit
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.spending import Spending
from corolla.server.runs.journal import Past


def open_account(federation: Federation, past: Past, unit: Unit = "example") -> Spending:
    """The account of a run with what its earlier processes have spent.

    `unit` is what dp=example protects, as far as is known before clients tell.

    Raises ConfigError where that would be no protection, and for cohorts that can never be.
    """
    config, events = federation.config, past.privacy
    population = past.population or federation.population
    if config.dp == "none":
        return Spending(config)
    cohort = min(config.cohort or 8, population)
    if not federation.own_devices:  # of those, others may join
        _refuse_rounds(federation, population, cohort)
    if config.dp == "example":
        _refuse_delta(federation, unit)
        most = max((float(event["epsilon"]) for event in events), default=0.0)
        who = {client for event in events for client in event["clients"]}
        users = {client for event in events for client in event.get("users", ())}
        unnamed = {c for event in events for c in event.get("unnamed", event["clients"])}
        return Spending(config, None, Counter(past.asked), most, who, users, unnamed, unit)
    if federation.own_devices:
        cohort = config.cohort or cohort
    elif (apart := cohort * config.separation) > population:
        raise ConfigError(
            f"separation={config.separation} with cohorts of {cohort} needs {apart} clients, found "
            f"{population}: lower one of them"
        )
    return Spending(config, ClientLevel(config, population, cohort, events))


def _refuse_rounds(federation: Federation, population: int, cohort: int) -> None:
    """More rounds than all turns of all clients can fill, were each as small as it may be."""
    config, needed = federation.config, federation.quorum(cohort)
    turns = (config.participations or config.rounds) * population
    if turns < needed * config.rounds:
        raise ConfigError(
            f"rounds={config.rounds} with participations={config.participations} need "
            f"{needed * config.rounds} turns of clients, {needed} a round, and {population} "
            f"clients have {turns}: set rounds to {turns // needed} or less, or more participations"
        )


def _refuse_delta(federation: Federation, unit: Unit) -> None:
    """The largest client's share of delta; devices of others refuse for themselves."""
    most = max((n for m, n in federation.clients.items() if m not in federation.seats), default=0)
    of = "users" if unit == "user" else "training examples"
    if not federation.own_devices and most * federation.config.delta >= 1:
        raise ConfigError(
            f"delta={federation.config.delta:g} is no protection among {most} {of} of a client: "
            f"set less than {1 / most:.3g}"
        )
