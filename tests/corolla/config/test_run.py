import json
import math
from pathlib import Path
from typing import Any

import pytest

from corolla.config import load as config
from corolla.config.run import RunConfig
from corolla.config.sections.adapter import Adapter
from corolla.config.sections.compression import Compression
from corolla.config.sections.dataset import Dataset
from corolla.config.sections.defence import Defence
from corolla.config.sections.evaluation import Evaluation
from corolla.config.sections.groups import ClientClass
from corolla.config.sections.machine import Machine
from corolla.config.sections.population import Population
from corolla.config.sections.privacy import Privacy
from corolla.config.sections.secure_sums import SecureSums
from corolla.config.sections.sparse_set import SparseSet
from corolla.config.sections.subject import Subject
from corolla.config.sections.training import Training
from corolla.errors import ConfigError
from corolla.types import LoraSpec


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
    found = RunConfig(strategy="fedex_lora", options={"residual_rank": 3}, ranks=[], clip_norm=None)
    assert config.validate(json.loads(json.dumps(found.model_dump(mode="json")))) == found


def test_every_key_is_written_as_json() -> None:
    """run.json and the wire hold the config: nothing in it is a number JSON does not have."""
    text = json.dumps(RunConfig().model_dump(mode="json"), allow_nan=False)
    assert not any(isinstance(v, float) and math.isinf(v) for v in json.loads(text).values())


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


def test_availability_is_the_same_file_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trace.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert RunConfig(availability="trace.jsonl").availability == str(tmp_path / "trace.jsonl")
    assert RunConfig().availability is None


def test_keys_are_written_section_by_section() -> None:
    """run.json, a stored configuration and hashes of one hold them in this order."""
    sections = (
        Subject,
        Population,
        Dataset,
        SparseSet,
        Adapter,
        Training,
        Compression,
        Defence,
        Privacy,
        SecureSums,
        Evaluation,
        Machine,
    )
    own = [key for section in sections for key in vars(section)["__annotations__"]]
    assert list(RunConfig.model_fields) == own
    unsaid = {
        *("alpha_pattern", "dora"),
        *("budget", "scores"),
        "drift",
        "keep_hardest",
        *("select", "spectrum", "explored", "regrow"),
        "layers",
        "max_rank",
        "new_head",
        "new_tokens",
        "rank_pattern",
        *("secure_sum", "smallest_sum", "sum_corrupt"),
        "target_parameters",
        "template_date",
    }  # where they are as usual: what is stored stays as it was
    assert list(RunConfig().model_dump()) == [key for key in own if key not in unsaid]
    assert [own[0], own[-1]] == ["strategy", "threads"]


def test_the_first_of_several_mistakes_is_told() -> None:
    """However many sections they are in: mending one by one leads through all of them."""
    values: dict[str, Any] = {
        **{"clients": 3, "cohort": 4, "alphas": [1.0], "micro_batch_size": 9, "buffer": 5},
        **{"quantization": "4bit", "parameters": "bias", "target_modules": ["q"], "epsilon": 8.0},
        "public": "rows.jsonl",
    }
    steps: list[tuple[str, dict[str, Any]]] = [
        ("cohort 4 is larger than clients 3", {"clients": 9}),
        ("alphas has 1 entries, ranks 0", {"alphas": []}),
        ("micro_batch_size 9 is larger than batch_size 8", {"micro_batch_size": None}),
        ("buffer 5 is larger than cohort 4", {"buffer": None}),
        ("parameters=bias cannot train a base in 4bit", {"quantization": "none"}),
        ("target-modules are those of adapters", {"target_modules": None}),
        ("public=rows.jsonl is for start=gradient", {"public": None}),
        ("epsilon=8.0 is for dp=example or dp=client, found dp=none", {"epsilon": None}),
    ]
    for message, mend in steps:
        with pytest.raises(ConfigError, match=message):
            RunConfig.model_validate(values)
        values |= mend
    assert RunConfig.model_validate(values).parameters == "bias"
