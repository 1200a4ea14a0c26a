import json
from pathlib import Path
from typing import Any

import pytest

from corolla.config import rules
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from tests.corolla.config.configs import BOTH, load, refused


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


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["parameters=all"], ["parameters", "head, embeddings, full", "'all'"]),
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
        (["eps=0"], ["eps", "a number from 1e-20 to 1000, found 0"]),
        (["eps=NaN"], ["eps"]),
        (["classes=3"], ["classes", "3"]),
        (["classes.phone=3"], ["classes.phone", "--set", "classes.NAME.KEY=value"]),
        (["classes.phone.lr=-1"], ["classes.phone.lr", "a number from 1e-30 to 1e+06", "-1"]),
        (["classes.phone.lr=NaN"], ["classes.phone.lr"]),
        (["classes.phone.share=0"], ["classes.phone.share", "0"]),
        (["classes.phone.eps=0"], ["classes.phone.eps"]),
        (["classes.phone.batch-size=0"], ["classes.phone.batch-size"]),
        (["classes.phone.local_step=1"], ["'local_step'", "did you mean 'local_steps'", "--set"]),
        (["classes.phone.cohort=4"], ["'cohort'", "--set"]),
        (["classes=3", "classes.phone.lr=1e-3"], ["classes.phone.lr", "classes.NAME.KEY=value"]),
        (["classes..lr=1"], ["classes..lr", "classes.NAME.KEY=value"]),
        (
            ["classes.phone.trainer=fast"],
            ["classes.phone.trainer", "first_order, zeroth_order, or null", "'fast'"],
        ),
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
        for role in ("ia3", "prompt", "bias", "head", "embeddings", "full"):
            assert load(tmp_path, None, [f"parameters={role}"], strategy=name).parameters == role


def test_a_prompt_goes_with_a_quantised_base(tmp_path: Path) -> None:
    settings = ["parameters=prompt", "quantization=4bit", "virtual-tokens=5"]
    assert load(tmp_path, None, settings).virtual_tokens == 5


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["classes.a.rank=4", "classes.b.rank=8"], ["fedavg", "ranks [4, 8]", "flora"]),
        (["classes.a.alpha=4", "classes.b.lr=1"], ["fedavg", "alphas [4.0, 16.0]"]),
        (["strategy=flora", "ranks=[4,8]", "classes.a.rank=4"], ["ranks", "classes.a"]),
        (["strategy=flora", "ranks=[4,8]", "classes.a.alpha=4"], ["ranks", "classes.a"]),
        (["parameters=bias", "classes.a.rank=4"], ["ranks are those of adapters", "bias"]),
        (["classes.a.speed=0"], ["classes.a.speed", "a number above 0", "found 0"]),
        (["classes.a.upload=-1"], ["classes.a.upload", "found -1"]),
        (["classes.a.download=0"], ["classes.a.download"]),
        (["classes.a.drop=1.5"], ["classes.a.drop", "a number from 0 to 1"]),
        (["selection=best"], ["selection", "one of uniform, weighted", "'best'"]),
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


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strategy": "scaffold", "optimizer": "sgd", "robust": "norm_clip"}, "would leave parts"),
        ({"strategy": "scaffold", "optimizer": "sgd", "codec": ["int8"]}, "nothing may be lost"),
        ({"strategy": "fedsvd", "codec": ["top_k:0.1"]}, "new coordinates in each round"),
        ({"strategy": "lisa", "codec": ["top_k:0.1"]}, "new coordinates in each round"),
        ({"strategy": "lisa", "buffer": 2}, "count only for the state they were made from"),
        ({"strategy": "lisa", "classes": {"a": {"layers": "last:1"}}}, "says by itself which"),
        ({"strategy": "fedsa_lora", "eval_clients": 0}, "personal models"),
        ({"strategy": "hetlora", "options": {"normalise": "False"}}, "is true or false"),
        ({"strategy": "flora", "robust": "krum", "robust_space": "tensors"}, "random basis"),
        ({"keep_hardest": 0.5, "dp": "example", "epsilon": 8.0}, "no epsilon of dp=example covers"),
        ({"keep_hardest": 0.5, "dp": "client", "epsilon": 8.0}, "no epsilon of dp=client covers"),
        ({"keep_hardest": 0.5, "strategy": "seed_pool"}, "keep-hardest is for first-order clients"),
    ],
)
def test_what_would_run_and_mean_nothing_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_strategy(RunConfig.model_validate(changes))


@pytest.mark.parametrize("strategy", ["seed_pool", "fedsvd", "ferret", "lisa"])
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
        rules.refuse_gateways(given, build_strategy(given))
