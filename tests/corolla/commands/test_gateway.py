"""The words of `corolla gateway --policy`."""

import dataclasses
import json
from pathlib import Path

import pytest

from corolla.commands.gateway import GatewayOptions, order, read_policy
from corolla.errors import ConfigError
from corolla.server.gateway.daemon import GatewayOrder
from corolla.server.gateway.settings import Policy
from tests.server.gateway import gateways


def nothing(**asked: object) -> Policy:
    return Policy(**{"charging": False, "unmetered": False, "idle": False, **asked})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", nothing()),
        ("", nothing()),
        ("charging,unmetered,idle", Policy()),
        ("idle", nothing(idle=True)),
        ("battery=20, thermal=3", nothing(battery_percent=20, thermal=3)),
        ("storage=100MB,examples=8", nothing(storage_bytes=10**8, examples=8)),
        ("separation=2,period=24h", nothing(separation=2, period_seconds=86_400.0)),
        ("period=90m", nothing(period_seconds=5400.0)),
        ("period=7d", nothing(period_seconds=604_800.0)),
        (
            "daily-bytes=50MB,daily-seconds=1800,daily-battery=5",
            nothing(daily_bytes=5 * 10**7, daily_seconds=1800.0, daily_battery_percent=5.0),
        ),
    ],
)
def test_words_of_a_policy(text: str, expected: Policy) -> None:
    assert read_policy(text) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("charging,warm", "--policy 'warm' is not known: choose from charging, .* or none"),
        ("charging=1", "--policy 'charging=1' is not known"),
        ("battery", "--policy battery: expected percent, 1 to 100; found ''"),
        ("battery=0", "found '0'"),
        ("battery=101", "found '101'"),
        ("battery=half", "found 'half'"),
        ("thermal=7", "--policy thermal: expected 1 .light. to 6 .shutdown.; found '7'"),
        ("storage=-1MB", "--policy storage: expected bytes, as 100MB; found '-1MB'"),
        ("storage=999999999999GB", "found '999999999999GB'"),
        ("examples=1.5", "found '1.5'"),
        ("separation=0", "found '0'"),
        ("period=nan", "--policy period: expected a time"),
        ("period=-1h", "found '-1h'"),
        ("period=1w", "found '1w'"),
        ("period=h", "found 'h'"),
        ("daily-battery=inf", "found 'inf'"),
        ("daily-battery=0", "found '0'"),
        ("idle,,charging", "--policy '' is not known"),
    ],
)
def test_a_word_that_is_none_is_one_line(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        read_policy(text)
    assert "\n" not in str(caught.value)


def an_order(folder: Path, **changes: object) -> GatewayOrder:
    own = gateways.certificates(folder / "certs")
    gateways.tokens(folder)
    (folder / "tokens").chmod(0o600)
    usual: dict[str, object] = {
        "name": "gate",
        "state": folder / "state",
        "listen": "localhost:0",
        "certificate": own / "gateway.pem",
        "key": own / "gateway.key",
        "tokens": folder / "tokens",
        "share_model": None,
        "share_bundle": None,
        "publisher": None,
        "policy": "charging,separation=2",
        "over_select": 1.3,
        "seats": 0,
        "retry": 10.0,
        "lease": 60.0,
        "allow": (),
    }
    return order(GatewayOptions(**{**usual, **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [True, False])
def test_what_a_gateways_process_is_told_arrives_as_it_was(shared: bool, tmp_path: Path) -> None:
    both = {"share_bundle": tmp_path / "bundle", "publisher": tmp_path / "publisher.pub"}
    made = an_order(tmp_path, **(both if shared else {}))
    told = json.loads(json.dumps(made.to_json()))
    found = GatewayOrder.from_json(told, told.pop("gateway"))
    assert found.gateway == dataclasses.replace(made.gateway, allow=[])
    assert found.gateway.policy == nothing(charging=True, separation=2)
    assert found.gateway.share_bundle == (tmp_path / "bundle" if shared else None)


def test_a_publisher_without_a_bundle_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--publisher is for --share-bundle"):
        an_order(tmp_path, publisher=tmp_path / "publisher.pub")
