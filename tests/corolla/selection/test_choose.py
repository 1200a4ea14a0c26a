import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, Encoder
from corolla.errors import ArtefactError, ConfigError, DataError
from corolla.models.sparse import carried, places
from corolla.models.sparse_model import SparseModel
from corolla.selection import rows, weights
from corolla.selection.choose import places_of
from corolla.types import Adapter, LoraSpec
from tests.corolla.models import test_dense
from tests.corolla.models.sparse.federations import RANK, moved, settings, sparse
from tests.strategies import tiny

MODULE = "model.layers.0.mlp.down_proj"


@pytest.fixture
def public(tmp_path: Path) -> Path:
    words = torch.randint(0, 60, (5, 7), generator=torch.Generator().manual_seed(3)).tolist()
    path = tmp_path / "public.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(f"w{w}" for w in r)}) for r in words))
    return path


def selected(model: SparseModel, **changes: Any) -> dict[str, list[int]]:
    group = places_of(model, settings(**changes))[carried.GROUP]
    opened = places.opened(group, model.sizes, model.counts)
    return {name: at.tolist() for name, at in opened.items()}


def best(scores: torch.Tensor, k: int) -> list[int]:
    """The k largest, by sorting pairs of plain numbers."""
    ranked = sorted(range(scores.numel()), key=lambda i: (-float(scores.reshape(-1)[i]), i))
    return sorted(ranked[:k])


def encoded(config: RunConfig, public: Path) -> list[Encoded]:
    texts = [json.loads(line)["text"] for line in public.read_text().splitlines()]
    encoder = Encoder(tiny.base("llama").tokenizer, [], config.max_length)
    from corolla.data.rows import Example

    return [s for text in texts for s in encoder(Example(text))]


def test_random_places_are_drawn_by_everybody() -> None:
    assert places_of(sparse("llama"), settings()) == {}
    assert places_of(tiny.lora_model("llama"), tiny.config("fedavg")) == {}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_largest_weights(kind: str) -> None:
    model, base = sparse(kind), dict(tiny.base(kind).model.named_parameters())
    model.write(moved(model), LoraSpec(RANK, 1.0))
    tiny.logits(model.model)  # what was trained before is not looked at
    for name, found in selected(model, select="magnitude").items():
        assert found == best(base[f"{name}.weight"].detach().abs(), model.counts[name])


def test_the_principal_part_of_full_rank_is_the_matrix() -> None:
    """B-T9."""
    model = sparse("llama")
    whole = selected(model, select="magnitude")
    assert selected(model, select="principal", spectrum=16) != whole
    assert selected(model, select="principal", spectrum=48) == whole
    base = tiny.base("llama").model.get_parameter(f"{MODULE}.weight").detach().double()
    u, s, vt = torch.linalg.svd(base)
    low = (u[:, :16] * s[:16]) @ vt[:16]
    found = selected(model, select="principal", spectrum=16)[MODULE]
    assert found == best(low.abs(), model.counts[MODULE])


def test_the_principal_part_by_hand() -> None:
    """B-T9: W = [[3, 0], [0, 1]] has the part [[3, 0], [0, 0]] of rank 1."""
    own: Any = SimpleNamespace(originals={"m": torch.tensor([[3.0, 0.0], [0.0, 1.0]])})
    ((name, scores),) = weights.principal(own, 1)
    assert name == "m"
    assert torch.allclose(scores, torch.tensor([[3.0, 0.0], [0.0, 0.0]]), atol=1e-6)


def test_gradients_of_public_rows(public: Path) -> None:
    """The mean loss of all targets, and squares row by row: by autograd on the plain base."""
    model, config = sparse("llama"), settings(public=str(public), select="gradient")
    plain = tiny.base("llama").model.requires_grad_(True)
    batch = encoded(config, public)
    weight = plain.get_parameter(f"{MODULE}.weight")
    plain(**test_dense.padded(batch)).loss.backward()
    assert weight.grad is not None
    k = model.counts[MODULE]
    assert selected(model, public=str(public), select="gradient")[MODULE] == best(
        weight.grad.abs(), k
    )
    squares = torch.zeros_like(weight)
    for row in batch:
        loss = plain(**test_dense.padded([row])).loss * (len(row.input_ids) - 1)
        squares += torch.autograd.grad(loss, weight)[0].square()
    found = selected(model, public=str(public), select="fisher")[MODULE]
    assert found == best(squares, k)
    assert found == selected(model, public=str(public), select="fisher", batch_size=1)[MODULE]
    assert not any(own.requires_grad for own in model.originals.values())


class _Logistic(nn.Module):
    """P(label 1 | x) = σ(w x), x the first token's number."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.5]]), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, **more: torch.Tensor) -> Any:
        score = input_ids[:, :1].float() @ self.w
        return SimpleNamespace(logits=torch.cat([torch.zeros_like(score), score], dim=1))


def test_fisher_of_one_parameter_by_hand() -> None:
    """B-T10: d log p(y) / dw = (y - σ(w x)) x."""
    logistic = _Logistic()
    own: Any = SimpleNamespace(
        originals={"m": logistic.w},
        sizes={"m": 1},
        model=logistic,
        device=torch.device("cpu"),
        base=SimpleNamespace(pad_id=0),
    )
    data = [Encoded([2], 1), Encoded([1], 0), Encoded([3], 1)]
    ((_, found),) = rows.fisher(cast(SparseModel, own), settings(), data)
    by_hand = [
        (y - 1 / (1 + 2.718281828459045 ** (-0.5 * x))) * x for x, y in [(2, 1), (1, 0), (3, 1)]
    ]
    assert float(found) == pytest.approx(sum(g * g for g in by_hand), rel=1e-5)
    ((_, whole),) = rows.gradient(cast(SparseModel, own), settings(), data)
    assert float(whole) == pytest.approx(abs(sum(by_hand)) / 3, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_an_exploration_has_moved(kind: str, tmp_path: Path) -> None:
    explored = tiny.lora_model(kind)
    spec = LoraSpec(3, 6.0)
    explored.save(tmp_path / "adapter", Adapter(tiny.adapter(explored, spec, 4)), spec)
    explored.show(Adapter(tiny.adapter(explored, spec, 4)), spec)
    model = sparse(kind)
    found = selected(model, select="movement", explored=str(tmp_path / "adapter"))
    for name, delta in explored.deltas().items():
        stored = delta.T if kind == "gpt2" else delta
        assert found[name] == best(stored.abs(), model.counts[name])


def test_an_exploration_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = sparse("llama")
    with pytest.raises(ArtefactError, match="is no adapter"):
        selected(model, select="movement", explored=str(tmp_path / "none"))
    model.save(tmp_path / "sparse", Adapter(moved(model)), LoraSpec(RANK, 1.0))
    with pytest.raises(ArtefactError, match="is of type SHIRA"):
        selected(model, select="movement", explored=str(tmp_path / "sparse"))
    other = tiny.lora_model("gpt2")
    other.save(tmp_path / "other", Adapter(other.init(LoraSpec(2, 2.0), 0)), LoraSpec(2, 2.0))
    with pytest.raises(ConfigError, match=r"has no change of model\.layers\.0\.self_attn\.q_proj"):
        selected(model, select="movement", explored=str(tmp_path / "other"))


def test_rows_of_a_client_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "w1 w2 w3", "client_id": "a"}))
    with pytest.raises(DataError, match=r"rows for select=fisher belong to no client"):
        selected(sparse("llama"), select="fisher", public=str(path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"parameters": "lora", "select": "magnitude"},
            "select=magnitude is for parameters=sparse",
        ),
        ({"select": "fisher"}, "select=fisher needs public=FILE.jsonl"),
        ({"select": "movement"}, "select=movement needs explored=FOLDER"),
        ({"explored": "x"}, "explored=x is for select=movement"),
        (
            {"public": "x.jsonl"},
            "public=x.jsonl is for start=gradient.* and for select=fisher or gradient",
        ),
        ({"select": "fisher", "public": "x", "data": "x"}, "public rows belong to no client"),
        ({"dtype": "bfloat16"}, "bfloat16 would round small changes away, use dtype=float32"),
        ({"quantization": "4bit"}, "parameters=sparse cannot train a base in 4bit"),
        ({"ranks": [2, 4]}, "ranks are those of adapters"),
        ({"strategy": "flora"}, "flora trains LoRA factors, found parameters=sparse"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], says: str) -> None:
    from corolla.config.build import build_strategy

    with pytest.raises(ConfigError, match=says) as caught:
        build_strategy(settings(changes.pop("strategy", "fedavg"), **changes))
    assert "\n" not in str(caught.value)
