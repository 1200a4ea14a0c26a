"""Rounds of strategies with a sparse set, against dense weights."""

from pathlib import Path

import pytest
import torch

from corolla.commands.plan import plan
from corolla.config.run import RunConfig
from corolla.estimates import footprint
from corolla.models import anatomy, pretrained, trainable
from corolla.models.sparse import carried, places
from corolla.selection.choose import places_of
from corolla.server.runs import checkpoint
from corolla.types import Params
from corolla.wire.codec import content_bytes
from corolla.wire.messages import content, unpack_task
from tests.corolla.models.sparse.federations import (
    RANK,
    Run,
    scattered,
    settings,
    sparse,
    start,
    weights,
)
from tests.strategies import tiny


def mean(run: Run) -> dict[str, torch.Tensor]:
    """Σ p_m W_m of the clients' whole models after training, in fp64."""
    network, total = run.network, sum(run.network.examples.values())
    names = next(iter(network.weights.values()))
    return {
        n: torch.stack(
            [network.examples[c] / total * w[n].double() for c, w in network.weights.items()]
        ).sum(0)
        for n in names
    }


def untouched(kind: str, run: Run, found: Params) -> bool:
    """Returns whether everything outside of the set is the base, bit for bit."""
    base = {n: p.detach() for n, p in tiny.base(kind).model.named_parameters()}
    heads = set(run.model.init(run.federation.config.lora, 0)) & base.keys()
    for name, tensor in found.items():
        here, there = tensor.clone().view(-1), base[name].view(-1)
        module = name.removesuffix(".weight")
        if module in run.model.places:
            at = run.model.places[module]
            here[at] = there[at]
        if name not in heads and not torch.equal(here, there):
            return False
    return True


def chosen(kind: str, seed: int = 5) -> Params:
    model = sparse(kind)
    return places.packed(places.random(model.sizes, model.counts, seed), model.sizes)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_mean_of_changes_is_the_mean_of_whole_models(kind: str, tmp_path: Path) -> None:
    """B-T1 and B-T3."""
    run = start(settings(), kind, tmp_path, chosen(kind))
    for _ in range(2):
        run.step()
        wanted = mean(run)
        run.show()
        found = weights(run.model)
        moved = scattered(kind, run.model, run.state["adapter"])
        base = dict(tiny.base(kind).model.named_parameters())
        for name, tensor in found.items():
            assert torch.equal(tensor, moved[name])
            apart = float((tensor.double() - wanted[name]).norm())
            assert apart <= 1e-6 * float(wanted[name].norm()), name
        assert untouched(kind, run, found)
        assert all(untouched(kind, run, own) for own in run.network.weights.values())
        name = next(iter(run.model.sizes)) + ".weight"
        assert float((found[name] - base[name]).norm()) > 1e-2 * float(base[name].norm())


def test_places_are_sent_once_and_values_each_time(tmp_path: Path) -> None:
    """B-T5: 4 k bytes of values up and down; places of 4 bytes or a bit each, once."""
    support = chosen("llama")
    run = start(settings(cohort=4), "llama", tmp_path, support)
    values, modules = 4 * sum(run.model.counts.values()), tiny.lora_model("llama").shapes
    assert values == 4 * sum(RANK * (out + into) for out, into in modules.values())
    once = sum(
        min(4 * run.model.counts[n], -(-out * into // 8)) for n, (out, into) in modules.items()
    )
    result = run.step()
    assert result.traffic.up == 4 * values
    assert result.traffic.down == 4 * (values + once)
    assert carried.GROUP in content(unpack_task(run.network.tasks["a"]))
    opened = places.opened(support, run.model.sizes, run.model.counts)
    assert all(torch.equal(run.model.places[n], at) for n, at in opened.items())
    result = run.step()
    assert result.traffic.down == 4 * values
    assert run.network.cached("a").keys() == {carried.GROUP}
    assert carried.GROUP not in content(unpack_task(run.network.tasks["a"]))
    assert result.cost.up == 4 * values
    assert result.cost.down == 4 * values


def test_random_places_are_sent_to_nobody(tmp_path: Path) -> None:
    run = start(settings(seed=3), "llama", tmp_path)
    run.step()
    assert run.network.cached("a") == {}
    assert all(
        torch.equal(run.model.places[n], at) for n, at in sparse("llama", seed=3).places.items()
    )


def test_places_that_are_none_are_the_clients_error(tmp_path: Path) -> None:
    run = start(settings(), "llama", tmp_path)
    run.state = {**run.state, carried.GROUP: {"no.such": torch.zeros(1, dtype=torch.int32)}}
    with pytest.raises(Exception, match="places differ from the model in 8 modules"):
        run.step()


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("fedprox", {}),
        ("fedadam", {}),
        ("fedavgm", {}),
        ("scaffold", {}),
        ("seed_pool", {}),
        ("fedkseed", {}),
        ("fedmezo", {}),
        ("fedavg", {"codec": ["top_k:0.1", "int8", "zstd"], "codec_down": ["fp16"]}),
        ("fedavg", {"robust": "median", "cohort": 4}),
        ("fedavg", {"dp": "client", "epsilon": 8.0, "clip": 1.0, "cohort": 3}),
        ("fedavg", {"dp": "example", "epsilon": 8.0, "clip": 1.0}),
        ("seed_pool", {"dp": "example", "epsilon": 8.0, "clip": 1.0}),
        ("fedavg", {"micro_batch_size": 1, "gradient_checkpointing": True}),
        ("fedavg", {"target_modules": ["q_proj", "down_proj"]}),
    ],
)
def test_what_holds_of_other_tensors_holds_of_a_sparse_set(
    strategy: str, changes: dict[str, object], tmp_path: Path
) -> None:
    config = settings(strategy, **changes)
    names = config.target_modules
    support = None
    if names is None:
        support = chosen("llama")
    run = start(config, "llama", tmp_path, support)
    before = {n: t.clone() for n, t in run.model.read().items()}
    for _ in range(2):
        run.step()
    run.show()
    assert set(run.network.errors.values()) == {""}
    assert untouched("llama", run, weights(run.model))
    assert any(not torch.equal(t, before[n]) for n, t in run.model.read().items())


def test_a_replay_of_scalars_is_the_model_of_the_client(tmp_path: Path) -> None:
    """B-T13: one client, scalars in fp32; a model that was never trained repeats the moves."""
    config = settings("seed_pool", cohort=1, options={"scalars": "fp32"})
    run = start(config, "llama", tmp_path, chosen("llama"))
    for _ in range(2):
        run.step()
        (trained,) = run.network.trained.values()
        run.show()
        for name, tensor in run.model.read().items():
            assert float((tensor - trained[name]).norm()) <= 1e-5 * float(trained[name].norm())
    shown = run.model.read()
    other = sparse("llama")
    carried.hold(other, run.state)
    other.show(run.federation.strategy.adapter(run.state), config.lora)
    assert all(torch.equal(shown[n], tensor) for n, tensor in other.read().items())
    assert torch.equal(tiny.logits(other.model), tiny.logits(run.model.model))


@pytest.fixture(scope="module")
def folder(tiny_model: Path) -> RunConfig:
    """Settings of a model in a folder, with places that travel."""
    return RunConfig(
        model=str(tiny_model),
        parameters="sparse",
        select="magnitude",
        rank=2,
        max_length=16,
        device="cpu",
    )


def test_the_plan_tells_the_bytes_that_travel(folder: RunConfig) -> None:
    model = trainable.build(folder, pretrained.load(folder))
    sent = content_bytes(places_of(model, folder))
    none = plan.Traffic((4, 4), (8, 8), 1, False, 100, 200, 16, 12)
    told = plan._with_places(none, folder, anatomy.read(folder.model), 3)
    assert (told.once, told.total_down, told.exchange) == (1 + sent, 200 + 3 * sent, 16 + sent)
    random = folder.model_copy(update={"select": "random"})
    assert plan._with_places(none, random, anatomy.read(folder.model), 3) == none


def test_the_estimate_counts_places_and_one_whole_gradient(folder: RunConfig) -> None:
    """8 bytes a place, 4 of the base's value there; the largest matrix where one backpropagates."""
    known = anatomy.read(folder.model)
    values = footprint.trained(known, folder)
    largest = max(out * into for out, into in known.linear().values())
    work = footprint.Workload(known, footprint.Batch(2, 16, 20))
    of = {
        trainer: footprint.client(work, folder, trainer).terms["sparse set"]
        for trainer in ("first_order", "zeroth_order")
    }
    assert of == {"first_order": 12 * values + 4 * largest, "zeroth_order": 12 * values}
    lora = folder.model_copy(update={"parameters": "lora", "select": "random"})
    assert "sparse set" not in footprint.client(work, lora, "first_order").terms


def test_places_survive_a_checkpoint(tmp_path: Path) -> None:
    run = start(settings(), "llama", tmp_path / "clients", chosen("llama"))
    run.step()
    sha256 = checkpoint.save(tmp_path, checkpoint.Checkpoint("0" * 32, 1, run.state, {}))
    found = checkpoint.load(tmp_path, {1: sha256})
    assert found
    assert found.state.keys() == {"adapter", carried.GROUP}
    other = sparse("llama")
    carried.hold(other, found.state)
    assert all(torch.equal(other.places[n], at) for n, at in run.model.places.items())
