"""What a budget leads to: the settings, what run.json says, and that the run follows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.budgets import costs, knapsack, scores, settle
from corolla.commands.simulate.in_process import simulate
from corolla.config.build import build_strategy
from corolla.config.load import resumed, validate
from corolla.config.run import RunConfig
from corolla.errors import ConfigError, DataError
from corolla.estimates.footprint import Batch
from corolla.models import anatomy, pretrained
from corolla.models.anatomy import Anatomy
from corolla.models.lora import LoraModel
from corolla.server.runs.folder import stored_run
from corolla.server.runs.setup import set_up

SMALL: dict[str, Any] = {
    **{"rounds": 1, "clients": 2, "cohort": 2, "local_steps": 1},
    **{"eval_examples": 8, "batch_size": 2, "max_length": 32},
}


@pytest.fixture(scope="module")
def sizes() -> Anatomy:
    return anatomy.read("embedded")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("public") / "public.jsonl"
    texts = [{"prompt": f"How many is {n}?", "response": f"It is {n}."} for n in range(8)]
    path.write_text("".join(json.dumps(own) + "\n" for own in texts))
    return path


def settings(**changes: Any) -> RunConfig:
    return validate({**SMALL, **changes})


def trained(config: RunConfig, sizes: Anatomy) -> list[str]:
    return list(sizes.linear(config.target_modules, config.layers))


@pytest.mark.parametrize("share", ["0.45", "0.6", "0.9"])
def test_a_share_of_operations_is_kept(sizes: Anatomy, share: str) -> None:
    config, told = settle.foreseen(settings(budget=f"flops:{share}"), sizes)
    batch, rank = Batch(2, 32, 62), config.rank
    whole = costs.backward(sizes, batch, dict.fromkeys(sizes.linear(), rank))
    taken = costs.backward(sizes, batch, dict.fromkeys(trained(config, sizes), rank))
    assert 0 < taken <= float(share) * whole
    assert (told["budget"]["run"]["taken"], told["budget"]["run"]["total"]) == (taken, whole)
    assert config.budget is None
    assert len(trained(config, sizes)) == len(told["budget"]["run"]["modules"])


def test_a_share_of_bytes_is_kept_and_the_last_blocks_come_first(sizes: Anatomy) -> None:
    config, told = settle.foreseen(settings(budget="bytes:0.5"), sizes)
    own = told["budget"]["run"]
    shapes = sizes.linear()
    size = {name: 4 * config.rank * sum(shape) for name, shape in shapes.items()}
    assert own["total"] == sum(size.values())
    assert own["taken"] == sum(size[name] for name in trained(config, sizes)) <= own["total"] / 2


def test_bytes_are_those_that_the_strategy_sends(sizes: Anatomy) -> None:
    """An update of fed_sb is one (rank, rank) matrix a module, so a half is half of the modules."""
    config, told = settle.foreseen(settings(budget="bytes:0.5", strategy="fed_sb"), sizes)
    assert told["budget"]["run"]["total"] == 4 * config.rank**2 * len(sizes.linear())
    assert len(trained(config, sizes)) == len(sizes.linear()) // 2


def test_all_of_a_budget_is_everything(sizes: Anatomy) -> None:
    for unit in ("flops", "bytes", "memory"):
        config, _ = settle.foreseen(settings(budget=f"{unit}:1"), sizes)
        assert trained(config, sizes) == list(sizes.linear())


def test_classes_train_their_last_blocks_under_their_own_budgets(sizes: Anatomy) -> None:
    classes = {"big": {"budget": "flops:1"}, "small": {"budget": "flops:0.6"}, "plain": {}}
    config, told = settle.foreseen(settings(classes=classes), sizes)
    last = sizes.layers - 1
    assert config.classes["big"].layers == f"0-{last}"
    small = config.classes["small"].layers
    assert small is not None and small.endswith(str(last)) and not small.startswith("0")
    assert config.classes["plain"].layers is None and not config.budgeted
    own = told["budget"]["classes"]["small"]
    assert own["taken"] <= 0.6 * own["total"]


def test_memory_is_that_of_the_estimate(sizes: Anatomy) -> None:
    """Half of what all blocks add: the peak of what is chosen lies within, one more does not."""
    config, told = settle.foreseen(settings(budget="memory:0.5"), sizes)
    own = told["budget"]["run"]
    assert own["taken"] <= own["total"] / 2
    assert config.layers is not None and config.layers.endswith(str(sizes.layers - 1))


def test_too_little_is_refused_in_one_line(sizes: Anatomy) -> None:
    for unit in ("flops", "bytes", "memory"):
        with pytest.raises(ConfigError, match=f"budget={unit}:0.001 is too little to train") as why:
            settle.foreseen(settings(budget=f"{unit}:0.001"), sizes)
        assert "\n" not in str(why.value)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"parameters": "bias", "budget": "flops:0.5"}, "budget chooses modules of LoRA adapters"),
        ({"budget": "flops:0.5", "ranks": [2, 4], "strategy": "flora"}, "for one rank of all"),
        ({"budget": "flops:0.5", "new_tokens": ["<a>"]}, "that of new-tokens and"),
        ({"budget": "flops:0.6", "scores": "sensitivity"}, "is for budget with public"),
        ({"budget": "half"}, "expected a share"),
        ({"budget": "flops:0"}, "expected a share"),
        ({"budget": "flops:1.5"}, "expected a share"),
        ({"public": "x.jsonl"}, "is for start=.*for budget"),
    ],
)
def test_settings_that_budgets_do_not_go_with(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"strategy": "seed_pool", "budget": "flops:0.5"}, "budget is a share of a backward pass"),
        (
            {"strategy": "hetlora", "classes": {"a": {"budget": "flops:0.5"}, "b": {}}},
            "in strategy hetlora a block that clients of a class do not train",
        ),
        (
            {
                "robust": "median",
                "cohort": 3,
                "clients": 3,
                "classes": {"a": {"budget": "flops:0.5"}, "b": {}},
            },
            "robust and dp=client are for updates of one form",
        ),
    ],
)
def test_strategies_that_budgets_do_not_go_with(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        build_strategy(settings(**changes))


def test_importance_of_a_quadratic_by_hand() -> None:
    """L = ½ h w², a step of -η h w: the gradient after it is h w (1 - η h)."""
    h, w, eta = 3.0, 2.0, 0.1
    place = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(0.5 * h * place**2, place)
    move = -eta * gradient
    moved = (place + move).detach().requires_grad_(True)
    (after,) = torch.autograd.grad(0.5 * h * moved**2, moved)
    assert scores.importance(after, move) == pytest.approx(eta * h**2 * w**2 * (1 - eta * h))


def test_sensitivity_by_hand() -> None:
    """w = 2, g = -3, twice: I = 6; Ī 0.9, 1.665; Ū 0.15·5.1 = 0.765, 0.85·0.765 + 0.15·4.335."""
    seen = scores.Sensitivity()
    value, gradient = torch.tensor([[2.0]]), torch.tensor([[-3.0]])
    for mean, spread in ((0.9, 0.765), (1.665, 1.3005)):
        seen.add({"w": value}, {"w": gradient})
        assert seen.values()["w"].item() == pytest.approx(mean * spread)


def test_a_module_is_worth_the_means_of_its_rows_and_columns() -> None:
    """One step: Ī Ū of a value of size x is 0.15·0.1275 x² = 0.019125 x²."""
    seen = scores.Sensitivity()
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [1.0], [2.0]])
    seen.add({"m.lora_A": a, "m.lora_B": b}, {"m.lora_A": a / a, "m.lora_B": b / b})
    expected = 0.15 * 0.15 * 0.85 * ((1 + 4) / 2 + (9 + 1 + 4) / 3)
    assert seen.module("m") == pytest.approx(expected, rel=1e-5)


def test_scores_become_whole_numbers_of_at_least_one() -> None:
    found = knapsack.whole({"a": 2.0, "b": -1.0, "c": 1.0})
    assert found == {"a": 1 + 2**20, "b": 1, "c": 1 + 2**19}
    assert knapsack.whole({"a": -1.0}) == {"a": 1}


def test_scoring_leaves_the_base_as_it_was_and_is_the_same_each_time(rows: Path) -> None:
    config = settings(budget="bytes:0.3", public=str(rows))
    base = pretrained.load(config, [])
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    first = settle.settled(config, base)
    assert base.model.state_dict().keys() == before.keys()
    assert all(torch.equal(base.model.state_dict()[n], t) for n, t in before.items())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert settle.settled(config, base) == first
    assert first[1]["budget"]["scores"] == "public"
    unscored, _ = settle.foreseen(config, anatomy.read("embedded"))
    assert first[0].target_modules != unscored.target_modules
    other, _ = settle.settled(config.model_copy(update={"scores": "sensitivity"}), base)
    assert other.target_modules not in (first[0].target_modules, unscored.target_modules)


def test_rows_of_a_client_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b", "client_id": "ada"}) + "\n")
    config = settings(budget="flops:0.5", public=str(path))
    with pytest.raises(DataError, match="rows for budget belong to no client"):
        settle.settled(config, pretrained.load(config, []))


def test_a_run_trains_what_was_chosen_and_says_so(tmp_path: Path, sizes: Anatomy) -> None:
    classes = {"small": {"budget": "flops:0.6"}, "big": {}}
    config = settings(budget="bytes:0.5", classes=classes)
    expected, told = settle.foreseen(config, sizes)
    loaded = set_up(config, None)
    assert loaded.config == expected and loaded.facts["budget"] == told["budget"]
    assert isinstance(loaded.model, LoraModel)
    assert [settle.short(name) for name in sorted(loaded.model.shapes)] == expected.target_modules
    (tmp_path / "run.json").write_text(json.dumps(dict(loaded.facts)))
    assert settle.recalled({"run_id": "a"}, tmp_path, True) == {"run_id": "a", **told}
    assert settle.recalled({"run_id": "a"}, tmp_path, False) == {"run_id": "a"}


def test_a_run_that_goes_on_trains_what_it_began_with(sizes: Anatomy) -> None:
    classes = {"small": {"budget": "flops:0.6"}, "big": {"layers": "last:1"}}
    config = settings(budget="bytes:0.5", classes=classes, public="rows.jsonl")
    begun, _ = settle.foreseen(config, sizes)
    later = config.model_copy(update={"rounds": 5})
    assert settle.resumed(later, begun) == begun.model_copy(update={"rounds": 5})
    assert settle.resumed(begun, begun) is begun


def test_a_run_with_public_rows_goes_on(rows: Path, tmp_path: Path) -> None:
    """With more rounds, and whether or not its settings are repeated."""
    small = {"eval_examples": 1, "eval_clients": 0, "max_length": 16}
    budgets: dict[str, Any] = {"public": str(rows), "public_examples": 2, "budget": "bytes:0.5"}
    file, folder = tmp_path / "run.toml", tmp_path / "run"
    lines = [f"{key} = {json.dumps(value)}" for key, value in budgets.items()]
    file.write_text("\n".join([*lines, "[classes.small]", 'budget = "flops:0.6"', "[classes.big]"]))
    classes: dict[str, Any] = {"small": {"budget": "flops:0.6"}, "big": {}}
    config = settings(**budgets, **small, classes=classes)
    simulate(config, folder)
    info = json.loads((folder / "run.json").read_text())
    assert info["warnings"] == []
    again = resumed(folder, file, {"rounds": 2})
    assert again == resumed(folder, None, {"rounds": 2})
    date = stored_run(folder)[0].template_date
    assert again == config.model_copy(update={"rounds": 2, "template_date": date})
    with pytest.raises(ConfigError, match=r"with budget='bytes:0\.5', found 'bytes:0\.6'"):
        resumed(folder, None, {"budget": "bytes:0.6"})
    assert simulate(again, folder, resume=True).rounds == 2
    after = json.loads((folder / "run.json").read_text())
    assert after["budget"] == info["budget"]
    assert after["config"] == {**info["config"], "rounds": 2}


def test_public_rows_are_no_setting_of_a_run_that_has_chosen(sizes: Anatomy, rows: Path) -> None:
    """Whichever keys were given: what run.json holds are settings that can be read again."""
    read: dict[str, Any] = {"public": str(rows), "public_examples": 2, "scores": "sensitivity"}
    for own in ({"budget": "flops:0.6"}, {"classes": {"small": {"budget": "flops:0.6"}}}):
        config, told = settle.foreseen(settings(**read, **own), sizes)
        assert validate(config.model_dump(mode="json")) == config and config.public is None
        back = {**config.model_dump(mode="json"), **told["budget"]["given"]}
        assert validate(back) == settings(**read, **own)
    config, _ = settle.foreseen(settings(**read, budget="flops:0.6", start="gradient"), sizes)
    assert validate(config.model_dump(mode="json")).public == str(rows)
