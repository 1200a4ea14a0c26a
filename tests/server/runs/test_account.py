"""The account of differential privacy of a run: what opens it, what it allows, when it ends."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.privacy.accounting import gaussian_epsilon
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.spending import Spending
from corolla.server.runs.account import open_account
from corolla.server.runs.journal import Past, past
from tests.server.rounds.lying import EXAMPLES, FRESH


def begun(
    clients: Mapping[str, int] = EXAMPLES, before: Past | None = None, **given: Any
) -> Spending:
    config = RunConfig(**{"cohort": 2, "rounds": 4, **given})
    strategy = build_strategy(config)
    federation = Federation("ab" * 16, config, strategy, clients, lambda spec: FRESH)
    return open_account(federation, before or Past())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"dp": "client", "participations": 1, "quorum": 0.5}, ""),
        (
            {"dp": "client", "participations": 1, "rounds": 5},
            "rounds=5 with participations=1 need 5 turns of clients, 1 a round, and 4 clients have "
            "4: set rounds to 4 or less",
        ),
        (
            {"dp": "example", "participations": 2, "quorum": 1.0, "rounds": 5},
            "need 10 turns of clients, 2 a round, and 4 clients have 8: set rounds to 4 or less",
        ),
        ({"dp": "client", "delta": 0.05}, ""),
        ({"dp": "client", "delta": 0.05, "clients": 20}, "delta=0.05 is no protection among 20"),
        ({"dp": "example", "delta": 0.05}, ""),
        ({"dp": "example", "delta": 0.0999, "examples": 11}, "among 11 training examples"),
        ({"dp": "client", "separation": 2}, ""),
        ({"dp": "client", "separation": 3}, "cohorts of 2 needs 6 clients, found 4"),
    ],
)
def test_a_run_that_could_protect_nobody_is_refused(given: dict[str, Any], why: str) -> None:
    clients = {f"c{i}": EXAMPLES["ada"] for i in range(given.pop("clients", 4))}
    clients["c0"] = given.pop("examples", 5)
    if not why:
        begun(clients, epsilon=8.0, **given)
        return
    with pytest.raises(ConfigError, match=why):
        begun(clients, epsilon=8.0, **given)


def events(*clients: Sequence[str]) -> Past:
    """The past of a run whose rounds had these clients, none of which is committed."""
    return past(
        [
            {"event": "started", "round": 0, "roster": dict(EXAMPLES), "seats": {}},
            *(
                {
                    "event": "privacy",
                    "round": 1,
                    "attempt": 0,
                    "unit": "client",
                    "clients": list(own),
                    "noise_multiplier": begun(dp="client", epsilon=8.0).to_json()[
                        "noise_multiplier"
                    ],  # type: ignore[index]
                    "sampling_probability": 1.0,
                    "clip": 1.0,
                    "mechanism": "gaussian",
                }
                for own in clients
            ),
        ]
    )


def test_the_journal_goes_on_being_the_account() -> None:
    before = events(["ada", "ben"], ["ada", "cyd"])
    account = begun(before=before, dp="client", epsilon=8.0)
    z = account.level.noise_multiplier if account.level else 0.0
    found = account.guarantee()
    assert found and found.epsilon == pytest.approx(gaussian_epsilon(math.sqrt(2) / z, 1e-5))
    federation = Federation(
        "ab" * 16, account.config, build_strategy(account.config), EXAMPLES, lambda spec: FRESH
    )
    assert account.ended(federation, 2) == ""
    spent = begun(before=events(*[["ada"]] * 4), dp="client", epsilon=8.0)
    why = spent.ended(federation, 5)
    assert why.startswith("privacy budget: with round 5, epsilon would be 9") and "of 8" in why


def test_the_population_is_that_of_the_start() -> None:
    grown = past(
        [
            {"event": "started", "round": 0, "roster": {"ada": 4, "gate": 0}, "seats": {"gate": 7}},
            {"event": "joined", "roster": {"ben": 3}, "seats": {}},
        ]
    )
    assert grown.population == 8
    account = begun(before=grown, dp="client", epsilon=8.0, dp_sampling="poisson")
    assert account.level and account.level.sampling_probability == 2 / 8


def test_clients_say_what_their_examples_have_cost() -> None:
    account = begun(dp="example", epsilon=8.0)
    assert account.hear({"ada": {"epsilon": 1.5}, "ben": {"epsilon": 0.5}})["epsilon"] == 1.5
    heard = account.hear({"ben": {"epsilon": 0.7}, "cyd": {"loss": 9.0}})
    assert heard == {"unit": "example", "epsilon": 1.5, "clients": ["ben"]}
    found = account.guarantee()
    assert found and (found.unit, found.epsilon, found.budget) == ("example", 1.5, 8.0)
    assert "2 clients" in found.line()


def test_the_unit_is_what_clients_say() -> None:
    """A gateway says the part of its phones; a resumed run knows what was said before."""
    user, row = {"epsilon": 1.0, "per_user": 1.0}, {"epsilon": 2.0}
    account = begun(dp="example", epsilon=8.0)
    assert account.unit == "example"
    first = account.hear({"ada": user, "cyd": {"loss": 1.0, "per_user": 1.0}})
    assert (account.unit, first["unit"], first["users"]) == ("user", "user", ["ada"])
    assert first["neighbours"] == "add or remove one user of a client, with all rows"
    second = account.hear({"ben": row})
    assert (account.unit, second["unit"]) == ("example or user", "example or user")
    found = account.guarantee()
    assert found and "Poisson sampling of examples or users" in found.line()
    assert "one user of a client with all rows where these name users" in found.line()
    for notes, unit in (([first], "user"), ([first, second], "example or user")):
        notes = [{"event": "privacy", "round": 1, "attempt": 0, **note} for note in notes]
        assert begun(before=past(notes), dp="example", epsilon=8.0).unit == unit
    gate = begun(dp="example", epsilon=8.0)
    assert gate.hear({"gate": {**user, "per_user": 0.4}})["unit"] == "example or user"
    assert gate.hear({"gate": user})["unit"] == "example or user"  # others of its phones were there
    for other in (row, {**row, "per_user": 0.5}):
        phones = begun(dp="example", epsilon=8.0)
        heard = [phones.hear({"gate": told}) for told in (user, other)]
        assert [note["unit"] for note in heard] == ["user", "example or user"]
        notes = [{"event": "privacy", "round": 1, "attempt": 0, **note} for note in heard]
        assert begun(before=past(notes), dp="example", epsilon=8.0).unit == "example or user"
    odd = begun(dp="example", epsilon=8.0)
    assert odd.hear({"ada": {**user, "per_user": -3.0}})["unit"] == "example"


def test_a_client_is_asked_as_often_as_it_may_train_on_its_examples() -> None:
    federation = Federation(
        "ab" * 16,
        RunConfig(dp="example", epsilon=8, participations=2, cohort=4, rounds=4),
        build_strategy(RunConfig()),
        EXAMPLES,
        lambda spec: FRESH,
    )
    plan = {"event": "planned", "round": 1, "attempt": 0, "cohort": {"ada": 1, "ben": 1}}
    account = open_account(federation, past([plan, {**plan, "attempt": 1}]))
    assert account.able(federation, EXAMPLES, 2) == ["cyd", "dot"]
    assert account.ended(federation, 2) == ""
    account.asked.update({"cyd": 2})
    assert "1 clients may still take part" in account.ended(federation, 2)


def test_devices_that_separation_bars_wait_for_others() -> None:
    """Unless they have had all their turns; and of clients that are all there the run ends."""
    account = begun(dp="client", epsilon=8.0, cohort=2, separation=2, participations=2)
    config = account.config
    own = Federation(
        "ab" * 16, config, build_strategy(config), EXAMPLES, lambda spec: FRESH, own_devices=True
    )
    assert account.level is not None
    event = {"clients": list(EXAMPLES), "noise_multiplier": 1.0}
    account.level._charge(1, event)
    assert account.able(own, EXAMPLES, 2) == []
    assert account.ended(own, 2) == ""
    why = account.ended(replace(own, own_devices=False), 2)
    assert why == "separation: 0 clients may still take part in round 2, 1 are needed"
    account.level._charge(3, event)
    assert account.ended(own, 4).startswith("participations: 0 clients may still take part")


def test_without_privacy_there_is_no_account() -> None:
    account = begun()
    assert (account.guarantee(), account.to_json(), account.probability) == (None, None, None)
