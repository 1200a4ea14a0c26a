import pytest

from corolla.errors import ConfigError
from corolla.strategies import STRATEGIES, create, find
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.ffa_lora import FfaLora
from corolla.strategies.flora import Flora
from corolla.types import Strategy
from tests.strategies.sabotaged import Own

OWN = "tests.strategies.sabotaged:"


def test_names_stand_for_classes() -> None:
    assert {"fedavg": FedAvg, "ffa_lora": FfaLora, "flora": Flora}.items() <= STRATEGIES.items()
    for name, cls in STRATEGIES.items():
        assert find(name) is cls
        assert isinstance(create(name), cls)


def test_a_hyphen_is_as_good_as_an_underscore() -> None:
    assert find("ffa-lora") is FfaLora


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fedavgg", "unknown strategy 'fedavgg': did you mean 'fedavg'?"),
        ("ffalora", "did you mean 'ffa_lora'?"),
        ("FLoRA", "unknown strategy 'FLoRA'"),
        ("zzz", f"choose from {', '.join(STRATEGIES)}, or name your own as module:Class"),
        ("", "unknown strategy ''"),
    ],
)
def test_unknown_names_get_a_suggestion(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        find(name)
    assert message in str(raised.value)


def test_a_class_of_ones_own_by_module_and_name() -> None:
    found: object = find(OWN + "Own")
    assert found is Own
    made: object = create(OWN + "Own", {"server_lr": 0.5})
    assert made == Own(server_lr=0.5)
    assert isinstance(made, Strategy)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such.module:Mine", "cannot import strategy 'no.such.module:Mine'"),
        (OWN + "Missing", "cannot import strategy .*Missing"),
        (OWN, "cannot import strategy"),
        (":Mine", "cannot import strategy"),
        (".mine:Mine", "cannot import strategy"),
        (OWN + "NOT_A_CLASS", "is not a class"),
        (
            OWN + "NoStrategy",
            "lacks adapter, aggregates, aggregator, apply, broadcast, cost, full, init, local, "
            "mixed_ranks, trainers, update_like",
        ),
    ],
)
def test_what_cannot_be_a_strategy_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "flora",
            {"max_rnk": 8},
            "strategy flora has no option 'max_rnk': did you mean 'max_rank'?",
        ),
        ("flora", {"qqq": 8}, "its options are max_rank, compact_at"),
        ("fedavg", {"mu": 0.1}, "strategy fedavg has no option 'mu': it has no options"),
        (
            "flora",
            {"max_rank": 0},
            "strategy flora: max_rank must be a whole number from 1, found 0",
        ),
        ("flora", {"max_rank": 2.5}, "strategy flora: max_rank must be"),
        ("flora", {"compact_at": "often"}, "strategy flora: "),
        (OWN + "Own", {"server_lr": -1}, "server_lr must be positive, found -1"),
    ],
)
def test_bad_options_are_a_users_error(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        create(name, options)
    assert message in str(raised.value)
    assert raised.value.exit_code == 2


def test_options_reach_the_strategy() -> None:
    assert create("flora", {"max_rank": 8, "compact_at": 3.0}) == Flora(8, 3.0)
    assert create("fedavg", {}) == create("fedavg") == FedAvg()
