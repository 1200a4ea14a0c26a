"""The formulas against counts made by hand and by autograd, on real modules."""

import pytest
import torch

from corolla import seeds
from corolla.config.load import validate
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, collate
from corolla.estimates import footprint
from corolla.estimates.footprint import HEAP, MAPPED, Batch, Workload
from corolla.evaluation.scoring import loss_sum
from corolla.models import anatomy, pretrained
from corolla.models.dense import DenseModel
from corolla.models.lora import LoraModel


def config(**changes: object) -> RunConfig:
    return validate({"device": "cpu", "max_length": 64, **changes})


@pytest.mark.parametrize(
    ("rank", "layers"), [(4, None), (16, None), (4, "last:1"), (4, "1,3"), (4, "first:1")]
)
def test_what_autograd_keeps(rank: int, layers: str | None) -> None:
    """The sum of all tensors that a real backward pass needs and the model does not own."""
    own = config(rank=rank, alpha=2.0 * rank, layers=layers)
    model = LoraModel(pretrained.load(own), blocks=layers)
    model.write(model.init(own.lora, 0), own.lora)
    for _, parameter in model.parameters():
        parameter.requires_grad_(True)
    known = anatomy.read("embedded")
    counted = Batch(4, 64, 4 * 63, padded=False)
    formula = sum(n * size for n, size in footprint._kept(known, own, counted))
    formula += 4 * counted.targets * known.vocabulary  # one of the three copies: the log-softmax
    assert _kept_by_autograd(model) == pytest.approx(formula, rel=0.02)


def _kept_by_autograd(model: LoraModel | DenseModel) -> int:
    """Bytes of the tensors that a backward pass of 4 sequences needs and the model does not own."""
    drawn = torch.randint(2048, (4, 64), generator=seeds.generator(0, "tokens")).tolist()
    batch = collate([Encoded(row, row) for row in drawn], 0, model.device)
    tensors = [*model.model.parameters(), *model.model.buffers()]
    owned = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_sum(model.model, batch)
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("fedavg", {}),
        ("lisa", {"layers": 2, "choose": "suffix", "always": ["norm"]}),
        ("lisa", {"layers": 1}),
    ],
)
def test_what_autograd_keeps_of_all_parameters(strategy: str, options: dict[str, object]) -> None:
    """The last blocks keep what is above them; with embeddings the pass goes through all blocks."""
    own = config(parameters="full", strategy=strategy, options=options)
    model, known = DenseModel(pretrained.load(own), "full"), anatomy.read("embedded")
    trained = footprint._stepped(known, own, model.read().keys())
    for name, parameter in model.parameters():
        parameter.requires_grad_(name in trained)
    counted = Batch(4, 64, 4 * 63, padded=False)
    formula = sum(n * size for n, size in footprint._kept(known, own, counted))
    formula += 4 * counted.targets * known.vocabulary
    assert _kept_by_autograd(model) == pytest.approx(formula, rel=0.05)


def test_terms_of_the_embedded_model_by_hand() -> None:
    known, own = anatomy.read("embedded"), config(batch_size=2)
    found = footprint.client(Workload(known, Batch(2, 10, 18)), own, "first_order").terms
    assert found["weights"] == 4 * 1_000_576
    assert found["trained values, at the start and now"] == 8 * 74_752
    assert found["gradients and optimiser"] == 12 * 74_752
    assert found["logits"] == round(HEAP * 3 * 4 * 18 * 2048)
    sgd = footprint.client(
        Workload(known, Batch(2, 10, 18)), config(batch_size=2, optimizer="sgd"), "first_order"
    )
    assert sgd.terms["gradients and optimiser"] == 4 * 74_752


def test_zeroth_order_keeps_nothing_for_a_backward_pass() -> None:
    known, batch = anatomy.read("embedded"), Batch(8, 64, 8 * 63)
    first = footprint.client(Workload(known, batch), config(), "first_order").terms
    zeroth = config(strategy="seed_pool")
    forward = footprint.client(Workload(known, batch), zeroth, "zeroth_order").terms
    assert forward["activations"] == round(HEAP * 5 * 4 * 8 * 64 * 352)
    assert forward["activations"] < first["activations"] / 4
    assert forward["logits"] == pytest.approx(first["logits"] * 2 / 3, abs=1)
    full = config(strategy="seed_pool", parameters="full")
    in_place = footprint.client(Workload(known, batch), full, "zeroth_order").terms
    assert not {"gradients and optimiser", "trained values, at the start and now"} & in_place.keys()


def test_blocks_that_are_mapped_count_once() -> None:
    blocks = [(2, MAPPED - 1.0), (3, float(MAPPED))]
    assert footprint._resident(blocks, sparing=False) == HEAP * 2 * (MAPPED - 1) + 3 * MAPPED
    assert footprint._resident(blocks, sparing=True) == 2 * (MAPPED - 1) + 3 * MAPPED


def test_more_of_anything_takes_more() -> None:
    known = anatomy.read("embedded")

    def total(batch: Batch, **changes: object) -> int:
        return footprint.client(Workload(known, batch), config(**changes), "first_order").total

    usual = total(Batch(8, 64, 504))
    assert total(Batch(8, 128, 1016)) > usual
    assert total(Batch(8, 64, 504), rank=16, alpha=32.0) > usual
    assert total(Batch(8, 64, 504), micro_batch_size=2) < usual
    assert total(Batch(8, 64, 504), gradient_checkpointing=True) < usual
    quantised = config(quantization="8bit")
    assert footprint.weights(known, quantised) < footprint.weights(known, config()) / 2


def test_operations_by_hand() -> None:
    known, batch = anatomy.read("embedded"), Batch(1, 10, 9)
    linear = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 352 * 128)
    forward = 2 * (linear * 10 + 2048 * 128 * 9)
    assert footprint.operations(known, config(), "first_order", batch) == 2 * forward
    zeroth = config(strategy="seed_pool", queries=3)
    assert footprint.operations(known, zeroth, "zeroth_order", batch) == 6 * forward


def test_scoring_and_verifying_add_to_a_simulation() -> None:
    known, own = anatomy.read("embedded"), config(batch_size=1)
    small, large = Batch(1, 8, 7), Batch(8, 500, 8 * 499)
    alone = footprint.client(Workload(known, small), own, "first_order").total
    scored = footprint.client(Workload(known, small, large), own, "first_order").total
    whole = footprint.client(Workload(known, small, large), own, "first_order", kept=1000).total
    assert alone < scored < whole
    served = footprint.server(known, own, large, 1000)
    assert served.terms["state and updates"] == 1000
    assert served.total < whole
