import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from corolla.config import load as config
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.config.sections.groups import ClientClass
from corolla.errors import ConfigError
from corolla.strategies.fedex_lora import FedExLora
from tests.corolla.config.configs import load, refused


def test_nothing_given_is_the_default(tmp_path: Path) -> None:
    assert load(tmp_path) == RunConfig()


def test_later_sources_win(tmp_path: Path) -> None:
    toml = "rounds = 2\nrank = 3\nseed = 4"
    found = load(tmp_path, toml, ["rank=5"], seed=7)
    assert (found.rounds, found.rank, found.seed) == (2, 5, 7)


def test_one_key_as_an_option_and_another_with_set_is_refused(tmp_path: Path) -> None:
    said = refused(tmp_path, None, ["rounds=2"], rounds=1)
    assert said == "rounds is given twice, as --set rounds=2 and as 1: give one"
    assert "local-steps" in refused(tmp_path, None, ["local-steps=2"], local_steps=1)
    assert load(tmp_path, None, ["rounds=2", "lr=3e-3"], rounds=2, lr=0.003).rounds == 2


def test_options_of_another_strategy_are_refused_where_one_is_chosen(tmp_path: Path) -> None:
    """In a file they may stand: one serves a comparison."""
    said = refused(tmp_path, None, ["fedex_lora.residual-rank=3"])
    assert said == "fedex_lora.NAME in --set is for strategy fedex_lora, found fedavg"
    assert load(tmp_path, "[fedex_lora]\nresidual_rank = 3").options == {}


def test_a_class_without_settings_is_a_class(tmp_path: Path) -> None:
    for toml, settings in (
        ("[classes.a]\nlr = 1e-3\n[classes.b]", []),
        (None, ['classes={"a":{"lr":1e-3},"b":{}}']),
    ):
        assert list(load(tmp_path, toml, settings).classes) == ["a", "b"]


def test_an_option_that_was_not_given_decides_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, "rounds = 2", rounds=None, strategy=None).rounds == 2


@pytest.mark.parametrize("key", ["local-steps", "local_steps"])
def test_keys_may_have_dashes(tmp_path: Path, key: str) -> None:
    assert load(tmp_path, f"{key} = 3").local_steps == 3
    assert load(tmp_path, None, [f"{key}=4"]).local_steps == 4


@pytest.mark.parametrize(
    ("setting", "key", "wanted"),
    [
        ("lr=1e-4", "lr", 1e-4),
        ("rslora=true", "rslora", True),
        ("local_epochs=null", "local_epochs", None),
        ("ranks=[4, 8]", "ranks", [4, 8]),
        ('target_modules=["q_proj","v_proj"]', "target_modules", ["q_proj", "v_proj"]),
        ("schedule=linear", "schedule", "linear"),
        ("model=a=b", "model", "a=b"),
        ("model = some/name ", "model", "some/name"),
    ],
)
def test_settings_are_read_as_their_type(
    tmp_path: Path, setting: str, key: str, wanted: object
) -> None:
    settings = [setting, "strategy=flora"] if key == "ranks" else [setting]
    assert getattr(load(tmp_path, None, settings), key) == wanted


@pytest.mark.parametrize(
    ("toml", "settings", "names"),
    [
        ("local_step = 3", [], ["'local_step'", "'local_steps'", "config.toml"]),
        ("local-step = 3", [], ["'local_steps'"]),
        (None, ["learnin_rate=1"], ["'learnin_rate'", "--set"]),
        (None, ["batchsize=1"], ["'batch_size'"]),
        ("[fedex_lra]\nresidual_rank = 3", [], ["'fedex_lra'", "'fedex_lora'"]),
        (None, ["fedex_lra.residual_rank=3"], ["'fedex_lra'", "'fedex_lora'", "--set"]),
        (None, ["strategi.residual_rank=3"], ["'strategy'"]),
        (
            None,
            ["strategy=fedex_lora", "strategy.residual_rnk=3"],
            ["'residual_rnk'", "'residual_rank'"],
        ),
        (
            "strategy = 'fedex_lora'\n[fedex_lora]\nresidual-rnk = 3",
            [],
            ["'residual_rnk'", "'residual_rank'"],
        ),
        (None, ["strategy.mu=3"], ["fedavg", "no options", "'mu'"]),
        (None, ["strategy=fedavgg"], ["'fedavgg'", "'fedavg'"]),
        (None, ["zzzzzz=3"], ["'zzzzzz'", "no key is like it, corolla keys lists all"]),
        (None, ["beta=0.5"], ["'beta'", "'strategy.beta', an option of fedavgm?"]),
        ("[training]\nlr = 1.0", [], ["'training'", "'lr', which stands in no table?"]),
        (None, ["lora.r=8"], ["'lora'", "'rank', which stands in no table?"]),
        (None, ["zzz.zzz=8"], ["'zzz'", "there are classes, strategy"]),
        (None, ["lr.a=1"], ["lr: expected a number from", "found a table with 'a'"]),
        ("[ranks]\na = 1", [], ["ranks: expected a list such as [4,8], found a table"]),
        (None, ["options.residual_rank=3"], ["set as 'strategy.residual_rank'"]),
    ],
)
def test_an_unknown_key_gets_the_nearest_one(
    tmp_path: Path, toml: str | None, settings: list[str], names: list[str]
) -> None:
    message = refused(tmp_path, toml, settings)
    assert [name for name in names if name not in message] == []


@pytest.mark.parametrize(
    ("toml", "settings"),
    [
        ("strategy = 'fedex_lora'\n[fedex_lora]\nresidual-rank = 7\n[fedavg]", []),
        ("strategy = 'fedex_lora'\nfedex_lora.residual_rank = 7", []),
        ("strategy = 'fedex_lora'\noptions = { residual_rank = 7 }", []),
        (None, ["strategy=fedex_lora", "fedex_lora.residual-rank=7"]),
        (None, ["strategy=fedex_lora", "strategy.residual_rank=7"]),
        (None, ["strategy.residual_rank=7", "strategy=fedex_lora"]),
        (
            "strategy = 'fedex_lora'\n[fedex_lora]\nresidual_rank = 9",
            ["fedex_lora.residual_rank=7"],
        ),
    ],
)
def test_options_of_a_strategy_reach_it(
    tmp_path: Path, toml: str | None, settings: list[str]
) -> None:
    assert build_strategy(load(tmp_path, toml, settings)) == FedExLora(residual_rank=7)


def test_tables_of_other_strategies_are_kept_out(tmp_path: Path) -> None:
    """One file serves a comparison of strategies."""
    toml = "strategy = 'fedavg'\n[fedex_lora]\nresidual_rank = 7"
    assert load(tmp_path, toml).options == {}
    assert load(tmp_path, toml, strategy="fedex_lora").options == {"residual_rank": 7}


def test_names_of_strategies_may_have_dashes(tmp_path: Path) -> None:
    for found in (
        load(tmp_path, "strategy = 'ffa-lora'"),
        load(tmp_path, None, ["strategy=ffa-lora"]),
        load(tmp_path, strategy="ffa-lora"),
        RunConfig(strategy="ffa-lora"),
    ):
        assert found.strategy == "ffa_lora"


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["rounds=0"], ["rounds", "a whole number from 1 to 100000", "0"]),
        (["rounds=many"], ["rounds", "a whole number from 1", "'many'"]),
        (["lr=-1"], ["lr", "a number from 1e-30 to 1e+06"]),
        (["lr=0"], ["lr"]),
        (["batch-size=0"], ["batch-size"]),
        (["eval_fraction=1"], ["eval-fraction", "a number above 0 below 1, found 1"]),
        (["dropout=1"], ["dropout"]),
        (["quorum=0"], ["quorum"]),
        (["seed=-1"], ["seed"]),
        (["engine=ray"], ["engine", "one of inprocess, flower", "'ray'"]),
        (["schedule=step"], ["schedule", "one of constant, linear, cosine"]),
        (["ranks=[4,0]"], ["ranks", "0"]),
        (["ranks=4"], ["ranks", "list"]),
        (["clients=3", "cohort=4"], ["cohort 4", "clients 3"]),
        (["micro_batch_size=9"], ["micro_batch_size 9", "batch_size 8"]),
        (["strategy=flora", "ranks=[4,8]", "alphas=[1]"], ["alphas has 1", "ranks 2"]),
        (["rank"], ["'rank'", "key=value"]),
        (["=3"], ["unknown key"]),
        (["strategy=no.such.module:Class"], ["no.such.module:Class"]),
        (["strategy=math:pi"], ["math:pi", "not a class"]),
        (["strategy=pathlib:Path"], ["pathlib:Path", "lacks", "aggregator"]),
        (
            ["strategy=fedex_lora", "fedex_lora.residual_rank=0"],
            ["residual_rank must be a whole number from 1"],
        ),
        (["strategy=fedex_lora", "fedex_lora.residual_rank=many"], ["fedex_lora"]),
        (["model=[1,\n2]"], ["model"]),
        (["options=3"], ['options: expected a table such as {"residual_rank":8}, found 3']),
        (
            ["strategy=fedex_lora", "options=[1]", "fedex_lora.residual_rank=8"],
            ["options: expected a table", "[1]"],
        ),
        (["ranks=" + "[" * 100_000], ["ranks: expected a list such as [4,8], found '[[["]),
    ],
)
def test_a_bad_value_is_refused_in_one_line(
    tmp_path: Path, settings: list[str], names: list[str]
) -> None:
    message = refused(tmp_path, None, settings)
    assert [name for name in names if name not in message] == []


@pytest.mark.parametrize("key", ["lr", "alpha", "weight_decay"])
@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_numbers_are_finite(tmp_path: Path, key: str, value: str) -> None:
    assert key.replace("_", "-") in refused(tmp_path, None, [f"{key}={value}"])


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert "not TOML" in refused(tmp_path, "rounds = = 3")
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "none.toml", {})
    (tmp_path / "latin.toml").write_bytes(b"model = '\xff'")
    with pytest.raises(ConfigError, match="not TOML"):
        config.load(tmp_path / "latin.toml", {})


@pytest.mark.parametrize(
    ("toml", "settings"),
    [
        ("strategy = 'seed_pool'\n[classes.phone]\nlr = 0.5\nlocal-steps = 3", []),
        ("strategy = 'seed_pool'\n[classes]\nphone = { lr = 0.5, local_steps = 3 }", []),
        ("strategy = 'seed_pool'\nclasses.phone.lr = 0.5\nclasses.phone.local_steps = 3", []),
        ("strategy = 'seed_pool'", ["classes.phone.lr=0.5", "classes.phone.local-steps=3"]),
        ("strategy = 'seed_pool'\n[classes.phone]\nlr = 0.5", ["classes.phone.local_steps=3"]),
        (
            "strategy = 'seed_pool'\n[classes.phone]\nlr = 0.1\nlocal_steps = 3",
            ["classes.phone.lr=0.5"],
        ),
        (None, ['classes={"phone": {"lr": 0.5, "local_steps": 3}}', "strategy=seed_pool"]),
        (None, ['classes.phone={"lr": 0.5, "local-steps": 3}', "strategy=seed_pool"]),
    ],
)
def test_classes_are_given_in_a_file_or_with_set(
    tmp_path: Path, toml: str | None, settings: list[str]
) -> None:
    found = load(tmp_path, toml, settings)
    assert found.classes == {"phone": ClientClass(lr=0.5, local_steps=3)}
    assert found.options == {}


@pytest.fixture
def stored(tmp_path: Path) -> RunConfig:
    made = RunConfig(strategy="fedex_lora", options={"residual_rank": 3}, rounds=4, lr=0.5)
    (tmp_path / "run.json").write_text(json.dumps({"config": made.model_dump(mode="json")}))
    return made


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        ({}, []),
        ({"rounds": 4, "strategy": "fedex_lora"}, []),
        ({"lr": 0.5}, ["rounds=4"]),
        ({}, ["strategy.residual_rank=3"]),
        ({}, ["fedex_lora.residual_rank=3"]),
        ({"rounds": None}, []),
    ],
)
def test_a_resumed_run_keeps_its_config(
    tmp_path: Path, stored: RunConfig, overrides: Mapping[str, Any], settings: list[str]
) -> None:
    assert config.resumed(tmp_path, None, overrides, settings) == stored


@pytest.mark.parametrize(
    ("overrides", "settings", "reason"),
    [
        ({"rounds": 3}, [], "rounds=4, found 3"),
        ({"rounds": 5, "lr": 0.25}, [], "lr="),
        ({"lr": 0.25}, [], "lr=0.5"),
        ({}, ["batch-size=3"], "batch-size=8, found 3"),
        ({}, ["strategy.residual_rank=5"], "residual_rank"),
        ({"strategy": "fedavg"}, [], "residual_rank"),
        ({"strategy": "ffa-lora"}, ["options={}"], "goes on with"),
    ],
)
def test_a_resumed_run_refuses_what_contradicts_it(
    tmp_path: Path,
    stored: RunConfig,
    overrides: Mapping[str, Any],
    settings: list[str],
    reason: str,
) -> None:
    with pytest.raises(ConfigError, match=reason):
        config.resumed(tmp_path, None, overrides, settings)


def test_a_resumed_run_may_be_given_more_rounds(tmp_path: Path, stored: RunConfig) -> None:
    longer = config.resumed(tmp_path, None, {"rounds": 7})
    assert longer == stored.model_copy(update={"rounds": 7})


def test_more_rounds_are_refused_where_privacy_was_accounted_for(tmp_path: Path) -> None:
    made = RunConfig(rounds=4, dp="client", epsilon=8.0)
    (tmp_path / "run.json").write_text(json.dumps({"config": made.model_dump(mode="json")}))
    assert config.resumed(tmp_path, None, {"rounds": 4}) == made
    with pytest.raises(ConfigError, match="rounds=4 with dp=client cannot be extended"):
        config.resumed(tmp_path, None, {"rounds": 5})


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"config": []}',
        '{"config": {"rounds": 0}}',
        '{"config": 3}',
    ],
)
def test_a_folder_without_a_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError):
        config.resumed(tmp_path, None, {})
