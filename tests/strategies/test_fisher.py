from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from corolla.client.training.worker import LocalClient
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.strategies.fisher import FisherMerge
from corolla.types import Cost, Params, Size
from tests.client.training.dense import DATA, SPEC, plain_loss
from tests.strategies import tiny


def BYTES(size: Size) -> tuple[set[int], set[int]]:  # noqa: N802 - see formula_of
    """What a client moves times its Fisher information, and that; the adapter."""
    return {8 * (size.A + size.B)}, {4 * (size.A + size.B)}


def vector(*values: float) -> Params:
    return {"x": torch.tensor(values)}


def merged(start: Params, clients: Sequence[tuple[Params, Params, float]]) -> Tensor:
    """The global model after clients of (Fisher information, trained, examples)."""
    strategy, aggregator = FisherMerge(), FisherMerge().aggregator()
    for fisher, trained, examples in clients:
        weighted = {n: fisher[n] * (trained[n] - start[n]) for n in start}
        aggregator.add({"weighted": weighted, "fisher": fisher}, examples)
    state, metrics = strategy.apply({"adapter": start}, aggregator.finalise())
    assert metrics == {}
    return state["adapter"]["x"]


def test_two_clients_by_hand() -> None:
    """F = (3, 1), (1, 1): (3 · 1 + 1 · 5) / 4 = 2 and (1 + 3) / 2 = 2, from any start."""
    for start in (vector(0.0, 0.0), vector(7.0, -3.0)):
        clients = [
            (vector(3.0, 1.0), vector(1.0, 1.0), 4.0),
            (vector(1.0, 1.0), vector(5.0, 3.0), 4.0),
        ]
        torch.testing.assert_close(merged(start, clients), torch.tensor([2.0, 2.0]))


def test_examples_weigh_beside_the_fisher_information() -> None:
    """p F = 1 · 3 and 3 · 1, so that both count alike: (1 + 5) / 2."""
    clients = [(vector(3.0), vector(1.0), 1.0), (vector(1.0), vector(5.0), 3.0)]
    torch.testing.assert_close(merged(vector(0.0), clients), torch.tensor([3.0]))


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_of_equal_fisher_information_it_is_the_weighted_mean(size: float) -> None:
    draw = torch.Generator().manual_seed(0)
    start, *ends = torch.randn(4, 50, generator=draw, dtype=torch.float64)
    same = torch.full((50,), size, dtype=torch.float64)
    clients = [({"x": same}, {"x": end}, n) for end, n in zip(ends, (1.0, 5.0, 2.0), strict=True)]
    wanted = (ends[0] + 5 * ends[1] + 2 * ends[2]) / 8
    found = merged({"x": start}, clients)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-7


def test_a_client_that_depends_on_nothing_is_as_if_it_were_not_there() -> None:
    """Coordinates that nobody depends on stay, and none has a negative weight."""
    start = vector(4.0, 2.0, -1.0)
    rest = [
        (vector(2.0, 0.0, 1.0), vector(1.0, 9.0, 1.0), 3.0),
        (vector(1.0, 0.0, 1e-12), vector(2.0, 9.0, 9.0), 2.0),
    ]
    idle = (vector(0.0, 0.0, 0.0), vector(-50.0, 70.0, 9.0), 40.0)
    torch.testing.assert_close(merged(start, [*rest, idle]), merged(start, rest))
    assert float(merged(start, rest)[1]) == 2.0
    assert torch.equal(merged(start, [idle]), start["x"])
    assert torch.equal(merged(start, [(vector(-1.0, -1.0, -1.0), start, 1.0)]), start["x"])


def test_of_quadratic_losses_it_is_the_minimiser_of_their_sum() -> None:
    """loss_m = h_m / 2 |x - c_m|² with F_m = h_m, from their own optima; the mean is not it."""
    draw = np.random.default_rng(0)
    h, c = draw.uniform(0.1, 10, (3, 8)), draw.normal(size=(3, 8))
    counts = np.array([4.0, 1.0, 11.0])
    rows = np.sqrt(counts[:, None] * h)
    wanted = [
        np.linalg.lstsq(rows[:, [j]], rows[:, j] * c[:, j], rcond=None)[0][0] for j in range(8)
    ]
    clients = [
        ({"x": torch.tensor(h[m])}, {"x": torch.tensor(c[m])}, float(counts[m])) for m in range(3)
    ]
    found = merged({"x": torch.zeros(8, dtype=torch.float64)}, clients).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert np.abs((counts[:, None] * c).sum(0) / counts.sum() - wanted).max() > 0.1


def squares_by_autograd(
    plain: transformers.PreTrainedModel, start: Params, lr: float, clip: float, steps: int
) -> dict[str, Tensor]:
    """The mean of g² over steps of SGD on all of DATA, by transformers; the steps are clipped."""
    params, total = {n: t.clone() for n, t in start.items()}, {n: 0.0 * t for n, t in start.items()}
    for _ in range(steps):
        leaves = {n: t.clone().requires_grad_() for n, t in params.items()}
        loss = plain_loss(plain, leaves, DATA)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
        assert norm > 2 * clip  # else it would not matter when they are clipped
        total = {n: t + gradients[n] ** 2 / steps for n, t in total.items()}
        params = {n: t - lr * clip / norm * gradients[n] for n, t in params.items()}
    return total


def test_fisher_information_is_the_mean_of_squared_gradients_before_they_are_clipped(
    settings: Callable[..., RunConfig], tiny_model: Path
) -> None:
    config = settings(
        strategy="fisher", optimizer="sgd", lr=0.5, local_steps=2, batch_size=4, clip_norm=0.05,
        schedule="constant", micro_batch_size=3,
    )  # fmt: skip
    model = LoraModel(pretrained.load(config))
    draw = torch.Generator().manual_seed(1)
    fresh = model.init(SPEC, 0)
    start = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in fresh.items()}
    client = LocalClient(model, SPEC, DATA, config, 0, 1, "first_order")
    update = FisherMerge().local(client, {"adapter": start})
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).requires_grad_(False)
    wanted = squares_by_autograd(plain, start, 0.5, 0.05, 2)
    assert update.payload.keys() == {"weighted", "fisher"}
    trained = client.trainer.fit(start).params
    for name, fisher in update.payload["fisher"].items():
        torch.testing.assert_close(fisher, wanted[name], rtol=1e-4, atol=1e-9)
        moved = wanted[name] * (trained[name] - start[name])
        torch.testing.assert_close(update.payload["weighted"][name], moved, rtol=1e-3, atol=1e-10)


def test_the_first_step_leaves_a_where_b_is_zero(tmp_path: Path) -> None:
    """Where B is 0, A has no gradient: no coordinate of it moves, and none becomes NaN."""
    run = tiny.start(tiny.config("fisher", local_steps=1), "llama", tmp_path)
    before = run.state["adapter"]
    run.step()
    after = run.state["adapter"]
    for name in before:
        assert torch.equal(after[name], before[name]) == name.endswith("lora_A")
        assert bool(torch.isfinite(after[name]).all())


def test_blocks_that_a_class_does_not_train_count_for_nothing(tmp_path: Path) -> None:
    """Its update has no tensor of them, and the others decide alone."""
    classes = {"whole": {}, "top": {"layers": "last:1"}}
    run = tiny.start(tiny.config("fisher", classes=classes, cohort=4), "llama", tmp_path, blocks=2)
    before = run.state["adapter"]
    run.step()
    sent = {client: run.network.update(client) for client in run.network.sent}
    whole = [own for own in sent.values() if len(own["fisher"]) == len(before)]
    assert 0 < len(whole) < len(sent)
    counts = [run.network.examples[c] for c in sent if len(sent[c]["fisher"]) == len(before)]
    name = next(n for n in before if ".layers.0." in n and n.endswith("lora_B"))
    pairs = list(zip(counts, whole, strict=True))
    below = torch.stack([n * own["fisher"][name].double() for n, own in pairs]).sum(0)
    above = torch.stack([n * own["weighted"][name].double() for n, own in pairs]).sum(0)
    wanted = before[name].double() + above / (below + 1e-8 * below.mean())
    torch.testing.assert_close(run.state["adapter"][name].double(), wanted, rtol=1e-5, atol=1e-8)


def test_twice_the_adapter_goes_up_and_once_down() -> None:
    size = Size(A=3, B=5, head=2)
    assert FisherMerge().cost([size]) == [Cost(up=80, down=40)]


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "unlike batches": ({"classes": {"a": {}, "b": {"batch_size": 2}}}, "found batch_size 2 and 8"),
    "int8": ({"codec": ["int8"]}, "many orders of magnitude: codec int8 .* use bf16"),
    "int4": ({"codec": ["int4", "zstd"]}, "codec int4, zstd would make most of them 0"),
    "fp16": ({"codec": ["fp16"]}, "use bf16, and zstd"),
    "top_k": ({"codec": ["top_k:0.1"]}, "use bf16, and zstd"),
    "rank": ({"codec": ["rank:2"]}, "codec rank keeps the products of factors"),
    "a norm": ({"max_norm": 1.0}, "leave max-norm out"),
    "median": ({"robust": "median"}, "use fedavg, or leave robust out"),
    "krum": ({"robust": "krum", "cohort": 8}, "use fedavg, or leave robust out"),
    "late": ({"buffer": 2}, "buffer applies updates made from older states"),
    "client": ({"dp": "client", "epsilon": 8.0}, "may still move the model by any amount"),
    "ranks": ({"ranks": [4, 8]}, "needs one rank and alpha"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_go_with_is_refused_in_one_line(case: str) -> None:
    changes, told = REFUSED[case]
    with pytest.raises(ConfigError, match=told) as error:
        build_strategy(RunConfig(strategy="fisher", **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": ["bf16", "zstd"], "codec_down": ["int8"]},
        {"classes": {"a": {"batch_size": 3}, "b": {"batch_size": 3, "lr": 1e-3}}},
        {"parameters": "ia3"},
        {"parameters": "bias"},
        {"dp": "example", "epsilon": 8.0},
        {"local_epochs": 1},
        {"max_examples": 9},
    ],
)
def test_the_rest_goes_with_it(changes: dict[str, Any]) -> None:
    assert build_strategy(RunConfig(strategy="fisher", **changes)) == FisherMerge()


def test_a_codec_of_16_bits_that_is_refused_would_lose_what_bf16_keeps() -> None:
    """Products of a gradient of 1e-4 with itself and a move of 1e-4: 0 in fp16."""
    product = torch.tensor(1e-12)
    assert float(product.half()) == 0.0
    assert float(product.bfloat16()) == pytest.approx(1e-12, rel=2**-8)
