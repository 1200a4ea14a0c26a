"""Places that are exchanged between rounds: against a dense model and lists of numbers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.commands.simulate.in_process import simulate
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoder
from corolla.data.rows import Example
from corolla.errors import ConfigError, DataError, StoppedError
from corolla.models.sparse import carried, places
from corolla.selection import exchange
from corolla.server.runs.observer import Silent
from tests.corolla.models.sparse.federations import moved, scattered, sparse, start
from tests.corolla.models.sparse.federations import settings as sparse_settings
from tests.corolla.starts.test_gradient import public
from tests.strategies import tiny


def test_it_is_due_after_some_rounds_and_not_after_the_last_one() -> None:
    config = sparse_settings(regrow=2, rounds=6, public="x.jsonl")
    assert [round for round in range(1, 7) if exchange.due(config, round)] == [2, 4]
    assert not any(exchange.due(sparse_settings(rounds=6), round) for round in range(1, 7))
    assert exchange.share(config, 3) == pytest.approx(0.1)


def test_no_more_places_are_exchanged_than_there_are_others() -> None:
    at, delta = torch.tensor([0, 1, 2, 3, 4, 6, 7]), torch.arange(7) + 1.0
    found, values = exchange._moved(at, delta, torch.ones(8), 3)
    assert found.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert values.tolist() == [2, 3, 4, 5, 0, 6, 7]
    whole, kept = exchange._moved(torch.arange(8), torch.ones(8), torch.ones(8), 3)
    assert (whole.tolist(), kept.tolist()) == ([*range(8)], [1.0] * 8)


def test_a_share_of_less_than_one_place_leaves_them() -> None:
    at, delta = torch.tensor([0, 5]), torch.tensor([1.0, 2.0])
    assert exchange._moved(at, delta, torch.ones(8), 0) == (at, delta)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_least_moved_go_and_the_largest_gradients_of_a_dense_model_come(
    kind: str, tmp_path: Path
) -> None:
    path = public(kind, tmp_path)
    config = sparse_settings(regrow=1, rounds=4, public=str(path), batch_size=2)
    model = sparse(kind, seed=config.seed)
    trained = moved(model)
    before = {name: at.tolist() for name, at in model.places.items()}
    weights = scattered(kind, model, trained)
    state = {"adapter": trained}
    after = exchange.exchanged(model, config, state, 1)
    now = places.opened(after[carried.GROUP], model.sizes, model.counts)
    dense = tiny.base(kind).model
    dense.load_state_dict({n: t for n, t in weights.items() if n in dense.state_dict()}, False)
    dense.requires_grad_(True)
    encoder = Encoder(tiny.base(kind).tokenizer, [], config.max_length)
    for line in path.read_text().splitlines():  # the sum of all losses: its order is the mean's
        for row in encoder(Example(json.loads(line)["text"])):
            ids = torch.tensor([row.input_ids])
            loss = dense(input_ids=ids, labels=torch.tensor([row.labels])).loss
            loss.mul(ids.shape[1] - 1).backward()
    gradients = {n: p.grad for n, p in dense.named_parameters()}
    for name, own in before.items():
        values = trained[f"{name}.delta"].tolist()
        number = int(0.2 * 0.75 * len(own))
        assert number > 0
        least = sorted(range(len(own)), key=lambda i: (abs(values[i]), i))[:number]
        stay = {own[i]: values[i] for i in range(len(own)) if i not in set(least)}
        gradient = gradients[f"{name}.weight"]
        assert gradient is not None
        scores = gradient.abs().flatten().tolist()
        free = sorted(set(range(len(scores))) - set(own), key=lambda i: (-scores[i], i))
        grown = free[:number]
        close = abs(scores[free[number - 1]] - scores[free[number]]) < 1e-6 * scores[free[0]]
        expected = {**stay, **dict.fromkeys(grown, 0.0)}
        found = dict(
            zip(now[name].tolist(), after["adapter"][f"{name}.delta"].tolist(), strict=True)
        )
        assert len(found) == len(own)
        assert found.keys() == expected.keys() or close
        assert all(found[at] == value for at, value in stay.items())
        assert sum(found.values()) == pytest.approx(sum(stay.values()))
    assert {n: at.tolist() for n, at in model.places.items()} == {
        n: at.tolist() for n, at in now.items()
    }


def test_clients_are_sent_other_places_and_train_them(tmp_path: Path) -> None:
    config = sparse_settings(regrow=1, rounds=3, cohort=4, public=str(public("llama", tmp_path)))
    run = start(config, "llama", tmp_path)
    run.step()
    assert carried.GROUP not in run.state
    run.state = exchange.exchanged(run.model, config, run.state, 1)
    values = {n: t.clone() for n, t in run.state["adapter"].items()}
    result = run.step()
    assert not result.dropped
    assert all(carried.GROUP in run.network.cached(client) for client in result.num_examples)
    grown = {n: values[n] == 0 for n in values}
    assert all(bool(run.state["adapter"][n][at].any()) for n, at in grown.items())
    run.show()
    wanted = scattered("llama", run.model, run.state["adapter"])
    for name in run.model.sizes:
        shown = run.model.base.model.get_submodule(name).weight
        torch.testing.assert_close(shown, wanted[f"{name}.weight"], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parameters": "lora"}, "regrow=1 is for parameters=sparse"),
        ({"public": None}, "regrow=1 needs public=FILE.jsonl"),
        ({"strategy": "fedavgm"}, "keeps more of each place than its value"),
        ({"strategy": "fedadam"}, "keeps more of each place than its value"),
        ({"strategy": "lisa"}, "keeps more of each place than its value"),
        ({"strategy": "scaffold", "optimizer": "sgd"}, "keep"),
        ({"strategy": "seed_pool"}, "keeps more of each place than its value"),
        ({"buffer": 2, "cohort": 2}, "updates of places that are no more"),
        ({"codec": ["top_k:0.5"]}, "sends later what it leaves out, of places that are no more"),
    ],
)
def test_where_more_than_values_belongs_to_places_it_is_refused(
    changes: dict[str, Any], told: str
) -> None:
    given = {"parameters": "sparse", "regrow": 1, "public": "x.jsonl", **changes}
    with pytest.raises(ConfigError, match=told) as error:
        build_strategy(RunConfig(**given))
    assert "\n" not in str(error.value)


def test_strategies_of_values_alone_take_other_places() -> None:
    for name in ("fedavg", "fedprox"):
        settings = {"parameters": "sparse", "regrow": 1, "public": "x.jsonl"}
        assert build_strategy(RunConfig(strategy=name, **settings)).name == name


class Stop(Silent):
    """Ends a run after its first exchange."""

    def round_ended(self, line: Mapping[str, Any]) -> None:
        if line["round"] == 1:
            raise KeyboardInterrupt


def test_a_run_that_is_resumed_ends_in_the_places_of_an_undisturbed_one(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    words = tmp_path / "public.jsonl"
    words.write_text('{"text": "two birds sing"}\n{"text": "a stone falls down"}\n')
    changes = {"parameters": "sparse", "regrow": 1, "public": str(words), "eval_clients": 0}
    config = settings(**changes)
    whole = simulate(config, tmp_path / "whole")
    with pytest.raises(StoppedError):
        simulate(config, tmp_path / "parts", observer=Stop())
    resumed = simulate(config, tmp_path / "parts", resume=True)
    assert resumed.state_hash == whole.state_hash
    assert resumed.adapter_hash == whole.adapter_hash
    told = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "parts")]
    assert told[0]["support_sha256"] == told[1]["support_sha256"]
    once = simulate(settings(**{**changes, "regrow": None, "public": None}), tmp_path / "once")
    assert once.adapter_hash != whole.adapter_hash


def test_rows_that_cannot_be_read_are_refused_before_any_round(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = settings(parameters="sparse", regrow=1, public=str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"public rows for regrow: .*none"):
        simulate(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
