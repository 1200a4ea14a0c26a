import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from corolla.config import rules
from corolla.config import run as config
from corolla.config.run import LR_ZEROTH_ORDER, ClientClass, RunConfig
from corolla.errors import ConfigError
from corolla.strategies.flora import Flora
from corolla.types import LoraSpec


def load(
    tmp_path: Path,
    toml: str | None = None,
    settings: Sequence[str] = (),
    **overrides: object,
) -> RunConfig:
    file = None
    if toml is not None:
        file = tmp_path / "config.toml"
        file.write_text(toml)
    return config.load(file, overrides, settings)


def refused(
    tmp_path: Path, toml: str | None = None, settings: Sequence[str] = (), **overrides: object
) -> str:
    """The message, which is one line, of a config that is refused."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, toml, settings, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_nothing_given_is_the_default(tmp_path: Path) -> None:
    assert load(tmp_path) == RunConfig()


def test_later_sources_win(tmp_path: Path) -> None:
    toml = "rounds = 2\nrank = 3\nseed = 4"
    found = load(tmp_path, toml, ["rank=5", "seed=6"], seed=7)
    assert (found.rounds, found.rank, found.seed) == (2, 5, 7)


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
        ("[flra]\nmax_rank = 3", [], ["'flra'", "'flora'"]),
        (None, ["flra.max_rank=3"], ["'flra'", "'flora'", "--set"]),
        (None, ["strategi.max_rank=3"], ["'strategy'"]),
        (None, ["strategy=flora", "strategy.max_rnk=3"], ["'max_rnk'", "'max_rank'"]),
        ("strategy = 'flora'\n[flora]\nmax-rnk = 3", [], ["'max_rnk'", "'max_rank'"]),
        (None, ["strategy.mu=3"], ["fedavg", "no options", "'mu'"]),
        (None, ["strategy=fedavgg"], ["'fedavgg'", "'fedavg'"]),
        (None, ["zzzzzz=3"], ["'zzzzzz'", "known keys", "local_steps"]),
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
        ("strategy = 'flora'\n[flora]\nmax-rank = 7\n[fedavg]", []),
        ("strategy = 'flora'\nflora.max_rank = 7", []),
        ("strategy = 'flora'\noptions = { max_rank = 7 }", []),
        (None, ["strategy=flora", "flora.max-rank=7"]),
        (None, ["strategy=flora", "strategy.max_rank=7"]),
        (None, ["strategy.max_rank=7", "strategy=flora"]),
        ("strategy = 'flora'\n[flora]\nmax_rank = 9", ["flora.max_rank=7"]),
    ],
)
def test_options_of_a_strategy_reach_it(
    tmp_path: Path, toml: str | None, settings: list[str]
) -> None:
    assert load(tmp_path, toml, settings).build_strategy() == Flora(max_rank=7)


def test_tables_of_other_strategies_are_kept_out(tmp_path: Path) -> None:
    """One file serves a comparison of strategies."""
    toml = "strategy = 'fedavg'\n[flora]\nmax_rank = 7"
    assert load(tmp_path, toml).options == {}
    assert load(tmp_path, toml, strategy="flora").options == {"max_rank": 7}


def test_names_of_strategies_may_have_dashes(tmp_path: Path) -> None:
    for found in (
        load(tmp_path, "strategy = 'ffa-lora'"),
        load(tmp_path, None, ["strategy=ffa-lora"]),
        load(tmp_path, strategy="ffa-lora"),
    ):
        assert found.strategy == "ffa_lora"


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["rounds=0"], ["rounds", "greater than or equal to 1", "0"]),
        (["rounds=many"], ["rounds", "integer", "'many'"]),
        (["lr=-1"], ["lr", "greater than 0"]),
        (["lr=0"], ["lr"]),
        (["batch-size=0"], ["batch-size"]),
        (["eval_fraction=1"], ["eval-fraction", "less than 1"]),
        (["dropout=1"], ["dropout"]),
        (["quorum=0"], ["quorum"]),
        (["seed=-1"], ["seed"]),
        (["engine=ray"], ["engine", "'inprocess' or 'flower'", "'ray'"]),
        (["schedule=step"], ["schedule", "'cosine'"]),
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
        (["strategy=flora", "flora.max_rank=0"], ["max_rank must be a whole number from 1"]),
        (["strategy=flora", "flora.max_rank=many"], ["flora"]),
        (["model=[1,\n2]"], ["model"]),
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


@pytest.mark.parametrize("strategy", ["fedavg", "ffa_lora"])
def test_mixed_ranks_need_a_strategy_that_mixes(tmp_path: Path, strategy: str) -> None:
    message = refused(tmp_path, None, [f"strategy={strategy}", "ranks=[4,8]"])
    assert "one rank" in message
    assert "flora" in message
    assert load(tmp_path, None, [f"strategy={strategy}", "ranks=[4,4]"]).ranks == [4, 4]
    assert load(tmp_path, None, ["strategy=flora", "ranks=[4,8]"]).ranks == [4, 8]


def test_different_scalings_are_mixed_ranks_too(tmp_path: Path) -> None:
    """B and A of different scalings cannot be averaged apart."""
    settings = ["ranks=[4,4]", "alphas=[8,16]"]
    assert "flora" in refused(tmp_path, None, settings)
    assert load(tmp_path, None, ["strategy=flora", *settings]).alphas == [8, 16]


def test_ranks_go_to_clients_in_turn() -> None:
    found = RunConfig(strategy="flora", ranks=[4, 8], alphas=[8.0, 4.0], rank=2, alpha=3.0)
    assert [found.client_lora(i) for i in range(4)] == [
        LoraSpec(4, 8.0),
        LoraSpec(8, 4.0),
        LoraSpec(4, 8.0),
        LoraSpec(8, 4.0),
    ]
    assert found.lora == LoraSpec(8, 4.0)  # the global one: that of the largest rank
    assert RunConfig(rank=2, alpha=3.0).lora == LoraSpec(2, 3.0)


def test_ranks_of_classes_go_to_their_clients() -> None:
    classes = {"hub": {"rank": 16, "alpha": 4.0}, "phone": {"rank": 2, "share": 2}, "other": {}}
    found = RunConfig(strategy="flora", classes=classes, rank=8, alpha=8.0, rslora=True)
    ranks = [(16, 4.0), (2, 8.0), (2, 8.0), (8, 8.0)]
    wanted = [LoraSpec(rank, alpha, rslora=True) for rank, alpha in ranks]
    assert [found.client_lora(i) for i in range(5)] == [*wanted, wanted[0]]
    assert found.lora == wanted[0]


# All parameters, classes of clients and the learning rates of their trainers

BOTH = {trainer: {"trainer": trainer} for trainer in ("first_order", "zeroth_order")}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["parameters=all"], ["parameters", "'head' or 'full'", "'all'"]),
        (
            ["parameters=full", "strategy=flora"],
            ["strategy flora trains LoRA factors", "parameters=full", "use fedavg or", "seed_pool"],
        ),
        (["parameters=bias", "strategy=ffa_lora"], ["ffa_lora trains LoRA", "parameters=bias"]),
        (["parameters=ia3", "strategy=mixed"], ["mixed trains LoRA factors", "fedavg", "fedmezo"]),
        (["parameters=prompt", "virtual-tokens=0"], ["virtual-tokens", "1", "found 0"]),
        (["parameters=bias", "quantization=8bit"], ["parameters=bias", "8bit"]),
        (["parameters=ia3", "quantization=4bit"], ["parameters=ia3", "4bit"]),
        (["parameters=head", "ranks=[4,4]"], ["ranks", "parameters=head"]),
        (["parameters=bias", 'target-modules=["q"]'], ["target-modules", "parameters=bias"]),
        (
            ["parameters=full", "strategy=seed_pool", "quantization=4bit"],
            ["parameters=full", "4bit"],
        ),
        (["parameters=full", "strategy=seed_pool", "ranks=[4,4]"], ["ranks", "parameters=full"]),
        (["queries=0"], ["queries", "1"]),
        (["eps=0"], ["eps", "greater than or equal to 0"]),
        (["eps=NaN"], ["eps"]),
        (["classes=3"], ["classes", "3"]),
        (["classes.phone=3"], ["classes.phone", "--set", "classes.NAME.KEY=value"]),
        (["classes.phone.lr=-1"], ["classes.phone.lr", "greater than 0", "-1"]),
        (["classes.phone.lr=NaN"], ["classes.phone.lr"]),
        (["classes.phone.share=0"], ["classes.phone.share", "0"]),
        (["classes.phone.eps=0"], ["classes.phone.eps"]),
        (["classes.phone.batch-size=0"], ["classes.phone.batch-size"]),
        (["classes.phone.local_step=1"], ["'local_step'", "did you mean 'local_steps'", "--set"]),
        (["classes.phone.cohort=4"], ["'cohort'", "--set"]),
        (["classes=3", "classes.phone.lr=1e-3"], ["classes.phone.lr", "classes.NAME.KEY=value"]),
        (["classes..lr=1"], ["classes..lr", "classes.NAME.KEY=value"]),
        (["classes.phone.trainer=fast"], ["classes.phone.trainer", "'zeroth_order'", "'fast'"]),
        (
            ["classes.phone.trainer=zeroth_order"],
            ["class phone has trainer zeroth_order", "strategy fedavg train with first_order"],
        ),
        (
            ["strategy=seed_pool", "classes.phone.trainer=first_order"],
            ["class phone has trainer first_order", "seed_pool train with zeroth_order"],
        ),
        (["strategy=seed_pool", "local_epochs=1"], ["local-epochs", "use local-steps"]),
        (
            ["strategy=mixed", "classes.a.trainer=zeroth_order", "local_epochs=1"],
            ["local-epochs", "use local-steps"],
        ),
        (["strategy=mixed"], ["mixed needs classes", "found first_order", "classes.NAME.trainer"]),
        (
            ["strategy=mixed", "classes.a.trainer=zeroth_order"],
            ["trainers first_order and zeroth_order", "found zeroth_order"],
        ),
        (
            ["strategy=seed_pool", "local_steps=32769", "queries=2"],
            ["local-steps 32769", "queries 2", "65536 scalars"],
        ),
        (
            ["strategy=seed_pool", "classes.a.queries=1400"],
            ["local-steps 50", "queries 1400", "65536 scalars"],
        ),
        (["strategy=seed_pool", "seed_pool.size=3"], ["size must be a power of two", "found 3"]),
        (["strategy=seed_pool", "seed_pool.scalars=fp8"], ["fp16 or fp32", "'fp8'"]),
        (["strategy=fedkseed", "strategy.directions=any"], ["gaussian or sign", "'any'"]),
        (
            ["strategy=mixed", "mixed.weights=none", f"classes={json.dumps(BOTH)}"],
            ["examples or inverse_variance", "'none'"],
        ),
    ],
)
def test_bad_settings_of_zeroth_order_are_refused_in_one_line(
    tmp_path: Path, settings: list[str], names: list[str]
) -> None:
    message = refused(tmp_path, None, settings)
    assert [name for name in names if name not in message] == []


def test_other_tensors_are_trained_by_strategies_that_can(tmp_path: Path) -> None:
    for name in ("seed_pool", "fedkseed", "fedkseed_pro", "fedavg", "fedmezo"):
        for role in ("ia3", "prompt", "bias", "head", "full"):
            assert load(tmp_path, None, [f"parameters={role}"], strategy=name).parameters == role


def test_a_prompt_goes_with_a_quantised_base(tmp_path: Path) -> None:
    settings = ["parameters=prompt", "quantization=4bit", "virtual-tokens=5"]
    assert load(tmp_path, None, settings).virtual_tokens == 5


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


def test_clients_take_classes_in_turn_by_their_shares() -> None:
    found = RunConfig(strategy="mixed", classes={"a": ClientClass(), "b": ClientClass(share=2)})
    assert [found.class_of(i) for i in range(7)] == ["a", "b", "b", "a", "b", "b", "a"]
    assert RunConfig().class_of(5) == ""


def test_a_class_has_its_own_settings_and_the_runs_for_the_rest() -> None:
    own = ClientClass(lr=0.5, local_steps=3, batch_size=4, queries=5, eps=0.25)
    run = RunConfig(strategy="mixed", classes={"a": own, "b": ClientClass()}, lr=0.125, queries=2)
    a = run.of_class("a")
    assert (a.lr, a.local_steps, a.batch_size, a.queries, a.eps) == (0.5, 3, 4, 5, 0.25)
    assert (a.rank, a.strategy, a.seed) == (run.rank, run.strategy, run.seed)
    assert run.of_class("b") == run
    assert run.of_class("") == run
    with pytest.raises(ConfigError, match="unknown class 'c': known are a, b"):
        run.of_class("c")


def test_a_smaller_batch_of_a_class_bounds_its_micro_batch() -> None:
    run = RunConfig(micro_batch_size=4, classes={"a": ClientClass(batch_size=2)})
    assert run.of_class("a").micro_batch_size == 2
    assert (
        RunConfig(classes={"a": ClientClass(batch_size=2)}).of_class("a").micro_batch_size is None
    )


def test_a_class_trains_as_it_says_or_as_the_strategy_does() -> None:
    classes = {"a": ClientClass(), "b": ClientClass(trainer="zeroth_order")}
    run = RunConfig(strategy="mixed", classes=classes)
    assert [run.trainer_of(n) for n in ("", "a", "b")] == [
        "first_order",
        "first_order",
        "zeroth_order",
    ]
    assert RunConfig(strategy="seed_pool").trainer_of("") == "zeroth_order"


@pytest.mark.parametrize(
    ("changes", "lr"),
    [
        ({}, 3e-3),
        ({"model": "some/model"}, 3e-4),
        ({"strategy": "ferret"}, 3e-3),
        ({"strategy": "mixed", "classes": BOTH}, 3e-3),
        ({"strategy": "seed_pool"}, LR_ZEROTH_ORDER["lora", True]),
        ({"strategy": "seed-pool"}, LR_ZEROTH_ORDER["lora", True]),
        ({"strategy": "fedmezo", "model": "some/model"}, LR_ZEROTH_ORDER["lora", False]),
        ({"strategy": "fedkseed", "parameters": "full"}, LR_ZEROTH_ORDER["full", True]),
        (
            {"strategy": "fedkseed", "parameters": "full", "model": "some/model"},
            LR_ZEROTH_ORDER["full", False],
        ),
        ({"strategy": "seed_pool", "lr": 0.5}, 0.5),
        ({"lr": 0.5}, 0.5),
    ],
)
def test_the_default_learning_rate_fits_trainer_and_model(
    tmp_path: Path, changes: dict[str, Any], lr: float
) -> None:
    assert load(tmp_path, None, **changes).lr == lr


def test_zeroth_order_clients_of_a_first_order_strategy_have_a_rate_of_their_own() -> None:
    """The run's rate is that of backpropagation."""
    classes = {
        "a": ClientClass(),
        "b": ClientClass(trainer="zeroth_order"),
        "c": ClientClass(trainer="zeroth_order", lr=0.25),
    }
    run = RunConfig(strategy="mixed", classes=classes, lr=0.5)
    found = [run.of_class(name).lr for name in "abc"]
    assert found == [0.5, LR_ZEROTH_ORDER["lora", True], 0.25]
    hub = RunConfig(strategy="mixed", classes=classes, model="some/model")
    assert hub.of_class("b").lr == LR_ZEROTH_ORDER["lora", False]


@pytest.mark.parametrize("embedded", [True, False])
def test_full_training_is_far_more_careful_than_that_of_adapters(embedded: bool) -> None:
    """A step is as noisy as there are parameters."""
    assert 10 * LR_ZEROTH_ORDER["full", embedded] <= LR_ZEROTH_ORDER["lora", embedded]


def test_a_zeroth_order_run_takes_more_steps_unless_told() -> None:
    """A step says little and its scalar is all that is sent: many of them make a round."""
    assert RunConfig().local_steps == RunConfig(strategy="mixed").local_steps == 10
    assert RunConfig(strategy="seed_pool").local_steps == 50
    assert RunConfig(strategy="seed_pool", local_steps=3).local_steps == 3


def test_a_config_with_classes_survives_json() -> None:
    classes = {"a": ClientClass(share=2), "b": ClientClass(trainer="zeroth_order", lr=0.5)}
    found = RunConfig(strategy="mixed", classes=classes, estimator="kerzoo")
    assert config.validate(json.loads(json.dumps(found.model_dump(mode="json")))) == found


def test_one_rank_for_all_is_the_rank_of_the_global_adapter() -> None:
    found = RunConfig(ranks=[4, 4], alpha=3.0, rslora=True)
    assert found.lora == found.client_lora(1) == LoraSpec(4, 3.0, rslora=True)


def test_scaling_is_alpha_over_rank_or_its_root() -> None:
    assert LoraSpec(4, 8.0).scaling == 2.0
    assert LoraSpec(16, 8.0, rslora=True).scaling == 2.0


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(RunConfig(), "rounds", 3)  # noqa: B010 - mypy knows better than to assign


def test_a_config_survives_json() -> None:
    found = RunConfig(strategy="flora", options={"max_rank": 3}, ranks=[1, 2], clip_norm=None)
    assert config.validate(json.loads(json.dumps(found.model_dump(mode="json")))) == found


@pytest.fixture
def stored(tmp_path: Path) -> RunConfig:
    made = RunConfig(strategy="flora", options={"max_rank": 3}, rounds=4, lr=0.5)
    (tmp_path / "run.json").write_text(json.dumps({"config": made.model_dump(mode="json")}))
    return made


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        ({}, []),
        ({"rounds": 4, "strategy": "flora"}, []),
        ({"lr": 0.5}, ["rounds=4"]),
        ({}, ["strategy.max_rank=3"]),
        ({}, ["flora.max_rank=3"]),
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
        ({"rounds": 5}, [], "rounds=4, found 5"),
        ({"lr": 0.25}, [], "lr=0.5"),
        ({}, ["batch-size=3"], "batch-size=8, found 3"),
        ({}, ["strategy.max_rank=5"], "max_rank"),
        ({"strategy": "fedavg"}, [], "max_rank"),
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


def test_every_key_is_written_as_json() -> None:
    """run.json and the wire hold the config: nothing in it is a number JSON does not have."""
    text = json.dumps(RunConfig().model_dump(mode="json"), allow_nan=False)
    assert not any(isinstance(v, float) and math.isinf(v) for v in json.loads(text).values())


# Policies: classes of devices, selection, asynchronous aggregation


def test_ranks_and_scalings_by_class() -> None:
    classes = {"a": {"share": 2, "rank": 4}, "b": {"alpha": 3.0}, "c": {"rank": 16, "alpha": 8.0}}
    found = RunConfig.model_validate({"strategy": "flora", "classes": classes})
    a, b, c = LoraSpec(4, 16.0), LoraSpec(8, 3.0), LoraSpec(16, 8.0)
    assert [found.client_lora(i) for i in range(5)] == [a, a, b, c, a]
    assert (found.loras, found.lora) == ([a, b, c], c)


def test_what_is_simulated_of_a_class_is_not_a_setting_of_its_clients() -> None:
    classes = {"a": {"lr": 0.5, "speed": 2.0, "upload": 3.0, "download": 4.0, "drop": 0.1}}
    found = RunConfig.model_validate({"classes": classes})
    assert found.of_class("a") == found.model_copy(update={"lr": 0.5})


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["classes.a.rank=4", "classes.b.rank=8"], ["fedavg", "ranks [4, 8]", "flora"]),
        (["classes.a.alpha=4", "classes.b.lr=1"], ["fedavg", "alphas [4.0, 16.0]"]),
        (["strategy=flora", "ranks=[4,8]", "classes.a.rank=4"], ["ranks", "classes.a"]),
        (["strategy=flora", "ranks=[4,8]", "classes.a.alpha=4"], ["ranks", "classes.a"]),
        (["parameters=bias", "classes.a.rank=4"], ["ranks are those of adapters", "bias"]),
        (["classes.a.speed=0"], ["classes.a.speed", "greater than 0", "found 0"]),
        (["classes.a.upload=-1"], ["classes.a.upload", "found -1"]),
        (["classes.a.download=0"], ["classes.a.download"]),
        (["classes.a.drop=1.5"], ["classes.a.drop", "less than or equal to 1"]),
        (["selection=best"], ["selection", "'uniform' or 'weighted'", "'best'"]),
        (["step-seconds=0"], ["step-seconds"]),
        (["deadline-simulated=0"], ["deadline-simulated"]),
        (["buffer=0"], ["buffer"]),
        (["staleness-power=-1"], ["staleness-power"]),
        (["buffer=5", "cohort=4"], ["buffer 5", "cohort 4"]),
        (["buffer=2", "deadline-simulated=3"], ["with buffer", "deadline-simulated"]),
        (["buffer=2", "strategy=rolora"], ["buffer", "rolora", "phase", "fedavg"]),
        (["buffer=2", "strategy=fedex_lora"], ["buffer", "fedex_lora", "base", "flora"]),
        (["buffer=2", "strategy=seed_pool"], ["buffer", "seed_pool", "directions"]),
    ],
)
def test_bad_policies_are_refused_in_one_line(
    tmp_path: Path, settings: list[str], names: list[str]
) -> None:
    message = refused(tmp_path, None, settings)
    assert all(name in message for name in names), message


def test_availability_is_the_same_file_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trace.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert RunConfig(availability="trace.jsonl").availability == str(tmp_path / "trace.jsonl")
    assert RunConfig().availability is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strategy": "scaffold", "optimizer": "sgd", "robust": "norm_clip"}, "would leave parts"),
        ({"strategy": "scaffold", "optimizer": "sgd", "codec": ["int8"]}, "nothing may be lost"),
        ({"strategy": "fedsvd", "codec": ["top_k:0.1"]}, "new coordinates in each round"),
        ({"strategy": "fedsa_lora", "eval_clients": 0}, "personal models"),
        ({"strategy": "hetlora", "options": {"normalise": "False"}}, "is true or false"),
        ({"strategy": "flora", "robust": "krum", "robust_space": "tensors"}, "random basis"),
    ],
)
def test_what_would_run_and_mean_nothing_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        RunConfig.model_validate(changes).build_strategy()


# Differential privacy


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["epsilon=8"], "epsilon=8.0 is for dp=example or dp=client, found dp=none: add it"),
        (["clip=2"], "clip=2.0 is for dp=example or dp=client"),
        (["delta=1e-6"], "delta=1e-06 is for dp=example or dp=client"),
        (["noise-multiplier=1"], "noise-multiplier=1.0 is for dp=example or dp=client"),
        (["participations=3"], "participations=3 is for dp=example or dp=client"),
        (["separation=3"], "separation=3 is for dp=client, found dp=none"),
        (["dp=client"], "dp=client needs epsilon"),
        (["dp=client", "noise-multiplier=1e-9"], "greater than or equal to 0.001"),
        (["dp=example"], "dp=example needs epsilon"),
        (["dp=client", "epsilon=8", "noise-multiplier=1"], "give one of them"),
        (
            ["dp=example", "epsilon=8", "dp-sampling=poisson"],
            "dp-sampling=poisson is for dp=client",
        ),
        (["dp=example", "epsilon=8", "dp-mechanism=banded"], "is for dp=client, found dp=example"),
        (["dp=example", "epsilon=8", "clip-quantile=0.5"], "clip-quantile=0.5 is for dp=client"),
        (["dp=example", "epsilon=8", "parameters=prompt"], "use parameters=lora"),
        (["dp=example", "epsilon=8", "parameters=ia3"], "use parameters=lora"),
        (
            ["dp=example", "epsilon=8", 'target-modules=["q_proj","model.embed_tokens"]'],
            "leave model.embed_tokens out of target-modules",
        ),
        (["dp=client", "epsilon=8", "robust=median"], "leave robust out"),
        (["dp=client", "epsilon=8", "buffer=2"], "leave buffer out"),
        (["dp=client", "epsilon=8", "max-norm=2"], "leave max-norm out"),
        (["dp=client", "epsilon=8", "selection=weighted"], "use selection=uniform"),
        (["dp=client", "epsilon=8", "dp-mechanism=banded"], "set separation to 2 or more"),
        (
            ["dp=client", "epsilon=8", "dp-sampling=poisson", "participations=2"],
            "use dp-sampling=fixed",
        ),
        (
            ["dp=client", "epsilon=8", "dp-mechanism=banded", "separation=2", "clip-quantile=0.5"],
            "leave clip-quantile out",
        ),
    ],
)
def test_settings_of_privacy_that_do_not_go_together_are_refused(
    tmp_path: Path, settings: list[str], why: str
) -> None:
    assert why in refused(tmp_path, settings=settings)


@pytest.mark.parametrize("strategy", ["seed_pool", "fedsvd", "ferret"])
def test_banded_noise_is_refused_where_it_could_not_be_taken_back(
    tmp_path: Path, strategy: str
) -> None:
    banded = ["dp=client", "epsilon=8", "dp-mechanism=banded", "separation=2"]
    assert "new in each round" in refused(tmp_path, settings=[*banded, f"strategy={strategy}"])


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        ("flora", "each is used by itself"),
        ("fedex_lora", "each is used by itself"),
        ("flexlora", "each is used by itself"),
        ("lora_fair", "each is used by itself"),
        ("hetlora", "each is used by itself"),
        ("scaffold", "sums up what its clients keep"),
        ("fedkseed_pro", "not one mean over all clients"),
        ("mixed", "not one mean over all clients"),
        ("fedsa_lora", "are personal"),
        ("feddpa", "are personal"),
    ],
)
def test_noise_on_a_sum_is_refused_where_a_sum_is_not_all(
    tmp_path: Path, strategy: str, why: str
) -> None:
    given = ["dp=client", "epsilon=8", f"strategy={strategy}", "optimizer=sgd"]
    given += ["classes.a.trainer=first_order", "classes.b.trainer=zeroth_order"] * (
        strategy == "mixed"
    )
    said = refused(tmp_path, settings=given)
    assert why in said and "use ffa_lora, fed_sb, fedsvd, rolora" in said


@pytest.mark.parametrize("strategy", ["fedsa_lora", "feddpa"])
def test_personal_models_are_measured_on_examples_that_are_protected(
    tmp_path: Path, strategy: str
) -> None:
    said = refused(tmp_path, settings=["dp=example", "epsilon=8", f"strategy={strategy}"])
    assert "forbids measuring models on clients' examples" in said


@pytest.mark.parametrize("strategy", ["flora", "hetlora", "scaffold", "fedkseed_pro", "seed_pool"])
def test_examples_are_protected_under_every_aggregation(tmp_path: Path, strategy: str) -> None:
    given = ["dp=example", "epsilon=8", f"strategy={strategy}", "optimizer=sgd"]
    assert (found := load(tmp_path, settings=given)).dp == "example"
    assert found.strategy == strategy


def test_noisy_gradients_are_not_clipped_again_unless_told(tmp_path: Path) -> None:
    assert load(tmp_path).clip_norm == 1.0
    assert load(tmp_path, settings=["dp=client", "epsilon=8"]).clip_norm == 1.0
    private = load(tmp_path, settings=["dp=example", "epsilon=8"])
    assert private.clip_norm is None
    assert config.validate(private.model_dump()) == private
    told = load(tmp_path, settings=["dp=example", "epsilon=8", "clip-norm=0.5"])
    assert told.clip_norm == 0.5


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("dp-sampling=poisson", "dp-sampling=poisson draws from all clients there are"),
        ("participations=1", "bar single clients for a while"),
        ("separation=2", "bar single clients for a while"),
    ],
)
def test_who_may_take_part_cannot_be_decided_for_a_gateway(
    tmp_path: Path, setting: str, why: str
) -> None:
    """Its devices come and go: nobody knows how many there are, or which it will ask."""
    given = load(tmp_path, settings=["dp=client", "epsilon=8", setting])
    with pytest.raises(ConfigError, match=why):
        rules.refuse_gateways(given, given.build_strategy())
