import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from corolla.config.run import RunConfig
from corolla.directions.pools import GaussianPool, SignPool
from corolla.directions.space import InPlace
from corolla.errors import ArtefactError, CorollaError, ModelError
from corolla.models import pretrained, trainable
from corolla.models.full import FullModel, digest
from corolla.models.lora import LoraModel
from corolla.models.pretrained import Base
from corolla.types import Adapter, LoraSpec, Move, Pool

Settings = Callable[..., RunConfig]
SPEC = LoraSpec(2, 4.0)
POOL = SignPool(64, (5, 1))
EPS = 1e-3
IDS = torch.arange(40, 64).reshape(2, 12)


def moves(*seeds: int, scale: float = 1e-2, pool: Pool = POOL) -> tuple[Move, ...]:
    count = 64 if pool is POOL else 8
    drawn = (torch.randn(count, generator=torch.Generator().manual_seed(s)) for s in seeds)
    return tuple(Move(pool, g * scale) for g in drawn)


def weights(model: FullModel) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.model.named_parameters()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().reshape(-1) for name in sorted(tensors)])


def dense(start: Tensor, moves: tuple[Move, ...]) -> Tensor:
    """Moved one direction at a time, in fp64."""
    end = start.clone()
    for move in moves:
        for k, g in enumerate(move.scalars.tolist()):
            z = torch.zeros(len(start))
            move.pool.add(z, 0, [(k, 1.0)])
            end += move.step * g * z.double()
    return end


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.fixture
def full(settings: Settings) -> Callable[..., FullModel]:
    def make(labels: tuple[str, ...] = (), **changes: Any) -> FullModel:
        config = settings(strategy="seed_pool", parameters="full", **changes)
        found = trainable.build(config, pretrained.load(config, labels))
        assert isinstance(found, FullModel)
        return found

    return make


def test_the_config_decides_what_is_trained(
    settings: Settings, full: Callable[..., FullModel]
) -> None:
    assert full().artefact == "model"
    config = settings(strategy="seed_pool")
    assert isinstance(trainable.build(config, pretrained.load(config)), LoraModel)


def test_the_vector_is_all_parameters_by_name_and_tied_ones_once(
    full: Callable[..., FullModel], tiny_model: Path
) -> None:
    model = full()
    stored = load_file(tiny_model / "model.safetensors")
    assert "lm_head.weight" not in stored  # tied to the embeddings
    assert model.size == sum(t.numel() for t in stored.values())
    before = weights(model)
    assert before.keys() == stored.keys()
    space = model.enter({}, SPEC, ())
    for k in (0, 3):
        space.look(POOL, {k: 1.0})
        z = torch.zeros(model.size)
        POOL.add(z, 0, [(k, 1.0)])
        moved = flat(weights(model)) - flat(before)
        assert float((moved - z).abs().max()) < 1e-6
    head = model.model.get_output_embeddings().weight
    assert torch.equal(head, model.model.get_input_embeddings().weight)


def test_there_is_no_adapter(full: Callable[..., FullModel]) -> None:
    model = full()
    assert model.init(SPEC, 0) == {}
    assert model.read() == {}
    model.check_rank(LoraSpec(10_000, 1.0))


# The base weights


def test_base_weights_are_never_held_twice(full: Callable[..., FullModel]) -> None:
    assert full().kept_bytes == 0
    assert full(dtype="bfloat16").kept_bytes == 0
    assert full(dtype="float16").kept_bytes == 0


def test_sharded_checkpoints_are_read_from_their_files(
    full: Callable[..., FullModel], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    whole.save_pretrained(folder, max_shard_size="6KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = full(model=str(folder))
    assert model.kept_bytes == 0
    model.show(Adapter({}, moves=moves(1)), SPEC)
    other = full()
    other.show(Adapter({}, moves=moves(1)), SPEC)
    assert same(weights(model), weights(other))


def test_a_new_classifier_head_is_kept(full: Callable[..., FullModel]) -> None:
    model = full(("no", "perhaps", "yes"))
    assert model.kept_bytes == 4 * 3 * 16  # score.weight in fp32; it is in no file
    before = weights(model)
    model.show(Adapter({}, moves=moves(1)), SPEC)
    assert not torch.equal(weights(model)["score.weight"], before["score.weight"])
    model.show(Adapter({}), SPEC)
    assert same(weights(model), before)


def test_untied_embeddings_are_two_tensors(
    full: Callable[..., FullModel], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "untied"
    shutil.copytree(tiny_model, folder)
    tied = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    config = tied.config
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    model = full(model=str(folder))
    assert model.kept_bytes == 0
    assert model.size == full().size + 258 * 16


def test_files_with_other_weights_are_not_trusted(
    settings: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    """A tensor of the right name and shape whose values are not those of the model is kept."""
    config = settings(strategy="seed_pool", parameters="full")
    base = pretrained.load(config)
    folder = tmp_path / "other"
    shutil.copytree(tiny_model, folder)
    stored = load_file(folder / "model.safetensors")
    stored["model.norm.weight"] = stored["model.norm.weight"] + 1
    stored["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(4, 64)  # another shape
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    model = FullModel(Base(base.model, base.tokenizer, base.task, "other", str(folder)))
    assert model.kept_bytes == 4 * (16 + 16 * 16)
    before = weights(model)
    model.show(Adapter({}, moves=moves(1)), SPEC)
    model.show(Adapter({}), SPEC)
    assert same(weights(model), before)


def test_without_files_everything_is_kept(settings: Settings, tmp_path: Path) -> None:
    base = pretrained.load(settings(strategy="seed_pool", parameters="full"))
    for path in (str(tmp_path), "no-such/model"):
        model = FullModel(Base(base.model, base.tokenizer, base.task, "x", path))
        assert model.kept_bytes == 4 * model.size


@pytest.mark.parametrize(
    "damage",
    ["cut", "garbage", "length", "empty"],
)
def test_damaged_files_beside_the_model_are_not_used(
    settings: Settings, tiny_model: Path, tmp_path: Path, damage: str
) -> None:
    """A folder may hold files that the model was not loaded from."""
    base = pretrained.load(settings(strategy="seed_pool", parameters="full"))
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "garbage": b"\x10" + bytes(7) + b"\xff" * 40,
            "length": b"\xff" * 8 + content[8:],
            "empty": b"",
        }[damage]
    )
    model = FullModel(Base(base.model, base.tokenizer, base.task, "x", str(folder)))
    before = weights(model)
    model.show(Adapter({}, moves=moves(1)), SPEC)
    model.show(Adapter({}), SPEC)
    assert same(weights(model), before)
    assert 0 < model.kept_bytes <= 4 * model.size
    assert damage == "cut" or model.kept_bytes == 4 * model.size


def test_a_damaged_file_does_not_hide_the_others(
    full: Callable[..., FullModel], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "adapter.safetensors").write_bytes(b"\xff" * 100)
    (folder / "z.safetensors").write_bytes(b"")
    assert full(model=str(folder)).kept_bytes == 0


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_files_that_vanish_during_a_run_are_said(
    full: Callable[..., FullModel], tiny_model: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    model = full(model=str(folder))
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.unlink()  # a new file below: the model's own memory may be mapped from this one
    if damage == "cut":
        path.write_bytes(content[:3000])
    says = {"gone": "model.safetensors", "cut": "not the file any more"}[damage]
    kind = {"gone": (CorollaError, OSError), "cut": (ModelError,)}[damage]
    for _ in range(2):  # and again: a half-set model is not taken for a right one
        with pytest.raises(kind, match=says):
            model.show(Adapter({}, moves=moves(1)), SPEC)
    shutil.copy(tiny_model / "model.safetensors", path)
    model.show(Adapter({}, moves=moves(1)), SPEC)
    other = full()
    other.show(Adapter({}, moves=moves(1)), SPEC)
    assert same(weights(model), weights(other))


def test_a_quantised_base_is_refused(settings: Settings) -> None:
    base = pretrained.load(settings(strategy="seed_pool", parameters="full"))
    layer = base.model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"not quantised: see \S+up_proj"):
        FullModel(base)


# Moves


@pytest.mark.parametrize("pool", [POOL, GaussianPool(5)], ids=["sign", "gaussian"])
def test_what_is_shown_is_the_dense_sum(full: Callable[..., FullModel], pool: Pool) -> None:
    model = full()
    start = flat(weights(model))
    made = moves(1, 2, pool=pool)
    model.show(Adapter({}, moves=made), SPEC)
    wanted = dense(start, made)
    assert float((flat(weights(model)) - wanted).norm() / (wanted - start).norm()) < 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_rounded_once(
    full: Callable[..., FullModel], dtype: str
) -> None:
    """All rounds accumulate in fp32 from the base weights: small steps are kept."""
    model = full(dtype=dtype)
    base = weights(model)
    start = flat(base)
    made = moves(*range(30), scale=1e-5)
    model.show(Adapter({}, moves=made), SPEC)
    wanted = dense(start, made)
    kind = getattr(torch, dtype)
    lost = (flat(weights(model)) - wanted).abs()
    least = (wanted.to(kind).double() - wanted).abs()
    assert bool((lost <= least + 1e-7 * wanted.abs() + 1e-9).all())
    rounded = flat(base)
    for move in made:
        rounded = dense(rounded, (move,)).to(kind).double()
    assert float((rounded - wanted).norm()) > 1.5 * float((flat(weights(model)) - wanted).norm())


def test_showing_depends_on_nothing_that_was_shown_before(full: Callable[..., FullModel]) -> None:
    model = full()
    base = weights(model)
    model.show(Adapter({}, moves=moves(1)), SPEC)
    first = weights(model)
    model.show(Adapter({}, moves=moves(1, 2)), SPEC)
    space = model.enter({}, SPEC, moves(3))
    space.look(POOL, {4: 0.5})
    model.show(Adapter({}, moves=moves(1)), SPEC)
    assert same(weights(model), first)
    model.show(Adapter({}), SPEC)
    assert same(weights(model), base)


def test_an_adapter_that_is_shown_is_not_read_again(
    full: Callable[..., FullModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = full()
    model.show(Adapter({}, moves=moves(1)), SPEC)
    shown = weights(model)

    def fail(*_: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(FullModel, "_settle", fail)
    model.show(Adapter({}, moves=moves(1)), SPEC)
    assert same(weights(model), shown)
    with pytest.raises(AssertionError, match="read again"):
        model.show(Adapter({}, moves=moves(2)), SPEC)


def test_an_interrupted_move_is_not_taken_for_a_finished_one(
    full: Callable[..., FullModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = full(), full()
    other.show(Adapter({}, moves=moves(1)), SPEC)
    read, calls = type(model._origin).read, []

    def interrupted(self: Any, name: str, start: int, stop: int) -> Tensor:
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(self, name, start, stop)

    monkeypatch.setattr(type(model._origin), "read", interrupted)
    for wanted in (moves(1), ()):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            model.show(Adapter({}, moves=wanted), SPEC)
    monkeypatch.undo()
    model.show(Adapter({}, moves=moves(1)), SPEC)
    assert same(weights(model), weights(other))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drift_of_training_in_place_is_gone_in_the_next_round(
    full: Callable[..., FullModel], dtype: str
) -> None:
    model = full(dtype=dtype)
    model.show(Adapter({}, moves=moves(1)), SPEC)
    before = weights(model)
    space = model.enter({}, SPEC, moves(1))
    assert isinstance(space, InPlace)
    assert same(weights(model), before)
    for k in range(200):
        space.look(POOL, {k % 64: EPS})
        space.look(POOL, {k % 64: -EPS})
    space.look(POOL, {})
    drifted = weights(model)
    assert not same(drifted, before)
    relative = float((flat(drifted) - flat(before)).norm() / flat(before).norm())
    assert relative < (3e-6 if dtype == "float32" else 2e-2)
    model.enter({}, SPEC, moves(1))
    assert same(weights(model), before)


def test_buffers_and_the_mode_are_those_of_the_base(full: Callable[..., FullModel]) -> None:
    model = full()
    assert not model.model.training
    assert not any(p.requires_grad for p in model.model.parameters())


# Files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_the_saved_model(
    full: Callable[..., FullModel], tmp_path: Path, dtype: str
) -> None:
    model = full(dtype=dtype)
    base = logits(model.model)
    adapter = Adapter({}, moves=moves(1, 2))
    model.save(tmp_path / "model", adapter, SPEC)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    shown = weights(model)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert plain.dtype == getattr(torch, dtype)
    assert same({n: p.detach() for n, p in plain.named_parameters()}, shown)
    after = logits(model.model)
    assert torch.equal(logits(plain.eval()), after)
    assert not torch.equal(base, after)
    assert model.distance_to(tmp_path / "model", SPEC) == 0.0
    model.release()
    assert sum(p.numel() for p in model.model.parameters()) == 0


def test_a_classifier_is_saved_with_its_head(
    full: Callable[..., FullModel], tmp_path: Path
) -> None:
    model = full(("no", "perhaps", "yes"))
    model.save(tmp_path / "model", Adapter({}, moves=moves(1)), SPEC)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    after = logits(model.model)
    assert torch.equal(logits(plain.eval()), after)
    assert plain.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}


def test_the_distance_to_a_saved_model_is_relative(
    full: Callable[..., FullModel], tmp_path: Path
) -> None:
    """Parameters that are saved under other names say nothing."""
    model = full()
    start = weights(model)
    model.save(tmp_path / "model", Adapter({}, moves=moves(1)), SPEC)
    moved = weights(model)
    model.show(Adapter({}), SPEC)

    def wanted() -> float:
        return float((flat(moved) - flat(start)).norm() / flat(start).norm())

    whole = wanted()
    assert model.distance_to(tmp_path / "model", SPEC) == pytest.approx(whole, rel=1e-12)
    path = tmp_path / "model" / "model.safetensors"
    stored = load_file(path)
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        stored["another." + name] = stored.pop(name)
        del start[name], moved[name]
    save_file(stored, path, {"format": "pt"})
    assert model.distance_to(tmp_path / "model", SPEC) == pytest.approx(wanted(), rel=1e-12)
    assert wanted() != pytest.approx(whole, rel=1e-3)
    save_file({"another." + n: t for n, t in stored.items()}, path, {"format": "pt"})
    assert model.distance_to(tmp_path / "model", SPEC) == math.inf


def test_saving_again_replaces_the_folder(full: Callable[..., FullModel], tmp_path: Path) -> None:
    model = full()
    folder = tmp_path / "model"
    found = []
    for made in (moves(1), moves(2), moves(1)):
        model.save(folder, Adapter({}, moves=made), SPEC)
        found.append(model.digest(folder))
        (folder / "rest.safetensors.part").write_text("left over")
    assert found[0] == found[2] != found[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_digest_is_over_all_weight_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    one = digest(tmp_path)
    save_file({"b": torch.ones(3)}, tmp_path / "b.safetensors")
    both = digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert digest(tmp_path) == both != one
    with pytest.raises(ArtefactError, match="no saved model"):
        digest(tmp_path / "none")


# What a perturbation leaves


def test_perturbations_below_half_a_unit_are_counted(full: Callable[..., FullModel]) -> None:
    model = full(dtype="bfloat16")
    everything = flat(weights(model)).bfloat16()
    for eps in (1e-5, 1e-3, 1e-1):
        wanted = float(((everything.float() + eps).bfloat16() == everything).double().mean())
        assert model.unmoved(eps) == pytest.approx(wanted)
    assert model.unmoved(1e-5) > 0.5 > model.unmoved(1e-1)
    assert full().unmoved(1e-3) == 0.0
