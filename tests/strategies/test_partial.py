"""Classes of clients that train some blocks alone: what is left out counts as no change."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from corolla.config.asked import takes_parts
from corolla.config.load import validate
from corolla.errors import ConfigError
from corolla.interfaces import Observed
from corolla.strategies.listing import registry
from corolla.strategies.listing.registry import STRATEGIES, create
from corolla.tensors import factors
from corolla.types import LoraSpec, Params
from corolla.wire import messages
from tests.strategies import tiny
from tests.strategies.tiny import Run

ABLE = [name for name, cls in STRATEGIES.items() if takes_parts(cls)]
CLASSES = {"whole": {}, "top": {"layers": "last:1"}, "bottom": {"layers": "first:1"}}
SPEC = LoraSpec(4, 8.0)


@pytest.fixture(scope="module", params=ABLE)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Before its first round, on a model of two blocks with a classifier's head."""
    folder = tmp_path_factory.mktemp("partial")
    yield tiny.start(tiny.config(request.param, classes=CLASSES), "bert", folder, blocks=2)


def said(run: Run, rounds: list[Observed]) -> Params:
    """The effective weights that a strategy promises, from what clients' models held."""
    strategy, last = create(run.federation.config.strategy), rounds[-1]
    expected = getattr(strategy, "expected", None)
    if expected is None and strategy.aggregates == "weights":
        return run.network.mean()
    found = expected(rounds) if expected else factors.mean(last.trained, last.weights)
    base = run.model.init(SPEC, 0)
    wanted = {n: t - base[n] for n, t in factors.select(found, factors.is_head).items()}
    products = {m: last.spec.scaling * tiny.dense(found, m) for m in factors.modules(found)}
    return {**wanted, **products}


def test_the_aggregate_is_that_of_what_the_clients_models_held(run: Run) -> None:
    """Three rounds against dense sums in fp64: who did not train a block held it as it was."""
    observed: list[Observed] = []
    kinds: set[str] = set()
    for _ in range(3):
        before = run.state
        result = run.step()
        observed.append(tiny.observed(run, before))
        wanted = said(run, observed)
        run.model.show(run.federation.strategy.adapter(run.state), run.federation.config.lora)
        found = tiny.effective(run.model)
        assert found.keys() == wanted.keys()
        assert tiny.relative(found, wanted) <= 1e-6
        assert result.traffic.up == result.cost.up
        assert result.dropped == {}
        kinds |= {run.federation.class_of(client) for client in run.network.sent}
    assert kinds == CLASSES.keys()


def test_a_client_sends_the_blocks_that_it_trains_and_no_others(run: Run) -> None:
    if not run.done:
        run.step()
    whole = run.federation.strategy.update_like(run.model.init(SPEC, 0), run.federation.size("a"))
    names = {n for params in whole.values() for n in params}
    for client in run.network.sent:
        kind = run.federation.class_of(client)
        sent = {n for params in run.network.update(client).values() for n in params}
        hidden = {"top": (".layer.0.", "pooler"), "bottom": (".layer.1.", "pooler")}.get(kind, ())
        if registry.traits(run.federation.strategy).partial == "sent":
            hidden = ()
        assert sent == {n for n in names if not any(part in n for part in hidden)}
        cost = run.federation.strategy.cost([run.federation.size(client, len(run.done))])[0]
        assert messages.content_bytes(run.network.update(client)) == cost.up


@pytest.mark.parametrize("name", ABLE)
def test_a_block_that_nobody_trained_stays(name: str, tmp_path: Path) -> None:
    classes = {"top": {"layers": "last:1"}}
    run = tiny.start(tiny.config(name, classes=classes, cohort=4), "llama", tmp_path, blocks=2)
    for _ in range(3):
        result = run.step()
    assert result.traffic.down == result.cost.down
    found = tiny.saved(run, tmp_path / "adapter", blocks=2)
    moved = {n for n, delta in found.items() if bool(delta.abs().max() > 1e-9)}
    assert moved and all(".layers.1." in n for n in moved)


def test_by_hand_the_mean_counts_who_did_not_train_a_module_as_no_change() -> None:
    """Two clients with 1 and 3 examples; only the second has module m: 3 / 4 of its change."""
    change = {"h.0.m": torch.ones(2), "h.1.m": torch.full((2,), 4.0)}
    aggregator = create("fedavg").aggregator()
    aggregator.add({"adapter": {"h.0.m": change["h.0.m"]}}, 1.0)
    aggregator.add({"adapter": change}, 3.0)
    found = aggregator.finalise()["adapter"]
    assert torch.equal(found["h.0.m"], torch.ones(2))
    assert torch.equal(found["h.1.m"], torch.full((2,), 3.0))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        *(({"strategy": name}, "is not the same as no change") for name in STRATEGIES),
        ({"robust": "median", "cohort": 5}, "are for updates of one form"),
        ({"dp": "client", "noise_multiplier": 1.0}, "are for updates of one form"),
        ({"parameters": "bias"}, "classes.NAME.layers are those of LoRA adapters"),
        ({"strategy": "flexlora", "ranks": [4, 8]}, "with a smaller rank hold a cut model"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings: dict[str, object], why: str) -> None:
    asked = {**settings, "classes": {"top": {"layers": "last:1"}}}
    if asked.get("strategy") in ABLE and "ranks" not in asked:
        assert validate(asked).partial
        return
    with pytest.raises(ConfigError) as caught:
        validate(asked)
    other = str(asked.get("strategy")) if len(settings) == 1 else "no strategy"
    assert why in str(caught.value) or other in str(caught.value)
    assert "\n" not in str(caught.value)
