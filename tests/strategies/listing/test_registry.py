import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.config.build import build_strategy
from corolla.config.load import validate
from corolla.errors import ConfigError
from corolla.interfaces import Strategy
from corolla.strategies import fedavg
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.ffa_lora import FfaLora
from corolla.strategies.flora import Flora
from corolla.strategies.listing.registry import STRATEGIES, create, find
from tests.strategies.sabotaged import Own

OWN = "tests.strategies.sabotaged:"


def test_names_stand_for_classes() -> None:
    assert {"fedavg": FedAvg, "ffa_lora": FfaLora, "flora": Flora}.items() <= STRATEGIES.items()
    for name, cls in STRATEGIES.items():
        assert find(name) is cls
        assert isinstance(create(name), cls)


def test_every_strategy_of_the_folder_is_listed_by_its_own_file() -> None:
    """After `fedavg` in alphabetical order, whatever was imported first."""
    marks = re.compile(
        r'^@listed$.*?^    name: ClassVar\[str\] = "(\w+)"', re.MULTILINE | re.DOTALL
    )
    files = Path(fedavg.__file__).parent.rglob("*.py")
    marked = [name for file in files for name in marks.findall(file.read_text())]
    assert list(STRATEGIES) == ["fedavg", *sorted(set(marked) - {"fedavg"})]
    assert len(STRATEGIES) == len(marked) >= 24


def test_a_class_of_a_user_is_not_listed(tmp_path: Path) -> None:
    """A user's class that begins with a copy of a strategy copies its mark."""
    source = Path(fedavg.__file__).read_text()
    (tmp_path / "mine.py").write_text(source)
    own = find(f"{tmp_path / 'mine.py'}:FedAvg")
    assert own is not FedAvg
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import mine\n"
        "from corolla.strategies.listing.registry import STRATEGIES\n"
        "print(STRATEGIES['fedavg'] is mine.FedAvg)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert (STRATEGIES["fedavg"] is FedAvg, done.stdout) == (True, "False\n")


def test_a_hyphen_is_as_good_as_an_underscore() -> None:
    assert find("ffa-lora") is FfaLora


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fedavgg", "unknown strategy 'fedavgg': did you mean 'fedavg'?"),
        ("ffalora", "did you mean 'ffa_lora'?"),
        ("FLoRA", "unknown strategy 'FLoRA'"),
        (
            "zzz",
            f"choose from {', '.join(STRATEGIES)}, or name your own as module:Class or "
            "FILE.py:Class",
        ),
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
            {"energie": 8},
            "strategy flora has no option 'energie': did you mean 'energy'?",
        ),
        ("flora", {"qqq": 8}, "its options are compact_at, energy"),
        ("fedavg", {"mu": 0.1}, "strategy fedavg has no option 'mu': it has no options"),
        (
            "fedex_lora",
            {"residual_rank": 0},
            "strategy fedex_lora: residual_rank must be a whole number from 1, found 0",
        ),
        ("fedex_lora", {"residual_rank": 2.5}, "strategy fedex_lora: residual_rank must be"),
        ("flora", {"compact_at": "often"}, "strategy flora: compact_at is a number, found 'often'"),
        ("fedavgm", {"beta": [0.5]}, "strategy fedavgm: beta is a number, found [0.5]"),
        ("fedavgm", {"lr": True}, "strategy fedavgm: lr is a number, found True"),
        ("fedmezo", {"lozo_rank": 1.5}, "fedmezo: lozo_rank is a whole number, found 1.5"),
        ("flexlora", {"balanced": 1}, "flexlora: balanced is true or false, found 1"),
        (OWN + "Own", {"server_lr": -1}, "server_lr must be positive, found -1"),
    ],
)
def test_bad_options_are_a_users_error(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        create(name, options)
    assert message in str(raised.value)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("value", ["x", [1], {}, math.nan])
@pytest.mark.parametrize("name", STRATEGIES)
def test_an_option_of_another_type_is_said_in_words(name: str, value: object) -> None:
    for option in dataclasses.fields(cast(Any, STRATEGIES[name])):
        with pytest.raises(ConfigError) as raised:
            create(name, {option.name: value})
        assert option.name in str(raised.value)
        assert "not supported between" not in str(raised.value)


def test_options_reach_the_strategy() -> None:
    assert create("flora", {"compact_at": 3.0, "energy": 0.9}) == Flora(3.0, 0.9)
    assert create("fedavg", {}) == create("fedavg") == FedAvg()


MINE = """from dataclasses import dataclass
from typing import ClassVar

from corolla.strategies import fedavg
from corolla.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class Mine(FedAvg):
    name: ClassVar[str] = "mine"
    half: float = 0.5


NUMBER = 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "my strategy.py"
    path.write_text(MINE)
    return path


def test_a_class_in_a_file_is_one_class_until_the_file_changes(mine: Path) -> None:
    found = find(f"{mine}:Mine")
    assert found.name == "mine"
    assert issubclass(found, FedAvg)
    assert dataclasses.asdict(create(f"{mine}:Mine", {"half": 0.25})) == {"half": 0.25}  # type: ignore[call-overload]
    assert find(f"{mine}:Mine") is found
    mine.write_text(MINE.replace('"mine"', '"another"'))
    assert find(f"{mine}:Mine").name == "another"


def test_a_file_means_the_same_from_another_folder(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mine.parent)
    config = validate({"strategy": f"{mine.name}:Mine"})
    assert config.strategy == f"{mine.resolve()}:Mine"
    assert config.lr == 3e-3
    monkeypatch.chdir("/")
    assert build_strategy(validate(json.loads(config.model_dump_json()))).name == "mine"
    assert validate({"strategy": "flora"}).strategy == "flora"
    assert validate({"strategy": OWN + "Own"}).strategy == OWN + "Own"


@pytest.mark.parametrize(
    ("content", "attribute", "message"),
    [
        (None, "Mine", "cannot read strategy file .*file.py: No such file"),
        (MINE, "Missing", "cannot import strategy .*file.py:Missing.*Missing"),
        (MINE, "", "cannot import strategy"),
        (MINE, "NUMBER", "is not a class"),
        ("class Mine:\n    pass\n", "Mine", "lacks adapter, aggregates"),
        ("class Mine(\n", "Mine", "cannot import strategy .*SyntaxError"),
        ("import no_such_module\n", "Mine", "cannot import strategy .*no_such_module"),
        ("open('/no/such/file')\n", "Mine", "cannot import strategy .*FileNotFoundError"),
        ("1 / 0\n", "Mine", "cannot import strategy .*ZeroDivisionError"),
    ],
)
def test_every_mistake_with_a_file_is_one_line(
    content: str | None, attribute: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.py"
    if content is not None:
        path.write_text(content)
    for _ in range(2):  # a file that failed once is not half there the second time
        with pytest.raises(ConfigError, match=message) as raised:
            find(f"{path}:{attribute}")
        assert "\n" not in str(raised.value)


def test_check_and_simulate_take_a_file(mine: Path, tmp_path: Path) -> None:
    mine.write_text(MINE.replace("    half: float = 0.5\n", ""))  # it has no effect
    run = CliRunner().invoke
    checked = run(app, ["check", f"{mine}:Mine", "--json"])
    assert checked.exit_code == 0, checked.output
    small = ["--clients", "2", "--rounds", "1", "--local-steps", "1", "--set", "threads=1"]
    small += ["--set", "eval-examples=4", "--set", "eval-clients=0"]
    result = run(
        app, ["simulate", "--strategy", f"{mine}:Mine", *small, "--out", str(tmp_path / "run")]
    )
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["config"]["strategy"] == f"{mine.resolve()}:Mine"
