"""The [server] table, and what the supervisor and the ServerApp tell each other."""

from pathlib import Path

import pytest

from corolla.config.load import load
from corolla.errors import ConfigError
from corolla.server.deployment.order import (
    Outcome,
    RunOrder,
    ServerSettings,
    read_order,
    read_outcome,
    read_settings,
    refuse_simulated,
    refuse_unbounded,
)


def test_the_table_stands_beside_the_keys_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'rounds = 7\n[server]\naddress = "10.0.0.1:1"\nclients-keys = "k"\nmin-clients = 3\n'
    )
    assert load(file, {}).rounds == 7
    found = read_settings(file, {"min_clients": 4, "certs": Path("c"), "metrics_port": None})
    assert found == ServerSettings(
        address="10.0.0.1:1", certs=Path("c"), clients_keys=Path("k"), min_clients=4
    )
    assert read_settings(None, {}) == ServerSettings()


def test_a_server_that_goes_on_opens_no_other_door_than_before(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read, which has the address"):
        read_settings(None, {}, resumed=tmp_path)
    (tmp_path / "flower").mkdir()
    served = ServerSettings(
        address="127.0.0.1:28092", certs=Path("certs"), clients_keys=Path("keys"), metrics_port=9
    )
    served.write(tmp_path)
    here = {"certs": Path.cwd() / "certs", "clients_keys": Path.cwd() / "keys"}
    assert read_settings(None, {}, resumed=tmp_path) == served.model_copy(update=here)
    given = read_settings(None, {"address": "127.0.0.1:1"}, resumed=tmp_path)
    assert (given.address, given.metrics_port) == ("127.0.0.1:1", 9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[server]\nadress = 'a'",
            r"server\.adress: there is no such key; known keys are address, certs",
        ),
        (
            "[server]\nmin-clients = 0",
            r"server\.min-clients: expected a whole number from 1, found 0",
        ),
        (
            "[server]\nmetrics-port = 70000",
            r"server\.metrics-port: expected a whole number from 0 to 65535, found 70000",
        ),
        ("server = 3", "is no table"),
    ],
)
def test_what_is_wrong_in_it_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_settings(file, {})
    assert "\n" not in str(caught.value)


def test_an_order_and_an_outcome_come_back_as_they_were(tmp_path: Path) -> None:
    order = RunOrder("5f" * 16, load(None, {"rounds": 3}).model_dump(mode="json"), True, 2, "/here")
    order.write(tmp_path)
    assert read_order(tmp_path) == order
    (tmp_path / "flower").mkdir()
    assert read_outcome(tmp_path) is None
    Outcome("failed", "why", 2).write(tmp_path)
    assert read_outcome(tmp_path) == Outcome("failed", "why", 2)
    (tmp_path / "server.json").write_text("{}")
    with pytest.raises(ConfigError, match="nothing to resume"):
        read_order(tmp_path)


def test_what_simulates_devices_is_refused() -> None:
    refuse_simulated(load(None, {}))
    simulated = ({"step_seconds": 1.0}, {"buffer": 2, "step_seconds": 1.0}, {"secure_sum": True})
    for options in simulated:
        with pytest.raises(ConfigError, match="use corolla simulate"):
            refuse_simulated(load(None, options))


def test_on_devices_epochs_need_a_bound_of_what_a_client_may_claim() -> None:
    refuse_unbounded(load(None, {}))
    refuse_unbounded(load(None, {"local_epochs": 1, "max_examples": 100}))
    with pytest.raises(ConfigError, match="set max-examples") as caught:
        refuse_unbounded(load(None, {"local_epochs": 1}))
    assert "\n" not in str(caught.value)
