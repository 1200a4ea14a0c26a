"""The start from gradients against torch's own gradients of the plain base model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from corolla.commands.simulate.in_process import simulate
from corolla.config.load import validate
from corolla.config.run import RunConfig
from corolla.data import public as public_rows
from corolla.errors import ConfigError, DataError, ModelError
from corolla.evaluation import weight_gradients
from corolla.models.files.adapter_files import read_adapter
from corolla.models.lora import LoraModel
from corolla.models.pretrained import Base
from corolla.starts import gradient as gradients_of
from corolla.starts import table
from corolla.strategies.listing.registry import STRATEGIES, create
from corolla.tensors import tree
from corolla.types import Params
from tests.conftest import Settings
from tests.strategies import tiny

LR = 0.01


def public(kind: str, folder: Path, **changes: Any) -> Path:
    """Five rows of different lengths."""
    path = folder / "public.jsonl"
    rows = [
        {"text": " ".join(f"w{3 * i + j}" for j in range(3 + 2 * i)), "label": tiny.LABELS[i % 3]}
        for i in range(5)
    ]
    if kind != "bert":
        rows = [{"text": row["text"]} for row in rows]
    path.write_text("".join(json.dumps({**row, **changes}) + "\n" for row in rows))
    return path


def config(kind: str, folder: Path, **changes: Any) -> RunConfig:
    given = {"start": "gradient", "public": str(public(kind, folder)), "lr": LR}
    return tiny.config("fed_sb", **{"micro_batch_size": 2, **given, **changes})


def labels(kind: str) -> list[str]:
    return list(tiny.LABELS) if kind == "bert" else []


def made(kind: str, settings: RunConfig, model: LoraModel | None = None) -> tuple[Params, Params]:
    """(a fresh adapter, the start made of it)."""
    model = model or tiny.lora_model(kind)
    fresh = model.init(settings.lora, 0)
    return fresh, table.begin(model, fresh, settings, labels(kind)).trained


def sequences(kind: str, base: Base, settings: RunConfig) -> list[tuple[Tensor, Tensor]]:
    """(ids, target) of each public row, unpadded."""
    found = []
    for line in Path(str(settings.public)).read_text().splitlines():
        row = json.loads(line)
        ids = list(base.tokenizer(row["text"])["input_ids"])
        if kind != "bert":
            ids.append(0)  # <eos>
        target = torch.tensor([tiny.LABELS.index(row["label"])] if kind == "bert" else ids[1:])
        found.append((torch.tensor([ids]), target))
    return found


def mean_loss(kind: str, model: Any, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Over all targets."""
    total, count = torch.zeros(()), 0
    for ids, target in rows:
        logits = model(input_ids=ids).logits
        logits = logits if kind == "bert" else logits[0, :-1]
        total = total + F.cross_entropy(logits, target, reduction="sum")
        count += len(target)
    return total / count


def dense_gradients(kind: str, settings: RunConfig) -> Params:
    """The (out, in) gradient of every linear weight of the plain base model, by autograd."""
    base = tiny.base(kind)
    base.model.requires_grad_(True)
    mean_loss(kind, base.model, sequences(kind, base, settings)).backward()  # type: ignore[no-untyped-call]
    found = {}
    for name in tiny.lora_model(kind).shapes:
        gradient = base.model.get_submodule(name).weight.grad
        assert isinstance(gradient, Tensor)
        found[name] = gradient.T if kind == "gpt2" else gradient
    return found


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("at_once", [1, 1 << 26])
def test_gradients_are_those_of_the_whole_weights(
    kind: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One module at a time, or all: the mean over all targets, two sequences at a time."""
    monkeypatch.setattr(weight_gradients, "AT_ONCE", at_once)
    settings, model = config(kind, tmp_path), tiny.lora_model(kind)
    rows = public_rows.sequences(settings, model.base.tokenizer, labels(kind), "start=gradient")
    fresh = model.init(settings.lora, 0)
    found = dict(gradients_of.gradients(model, fresh, settings.lora, rows, 2))
    wanted = dense_gradients(kind, settings)
    assert found.keys() == wanted.keys() == model.shapes.keys()
    for name, gradient in wanted.items():
        assert found[name].shape == gradient.shape
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-5, name


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_start_is_the_truncated_step(kind: str, tmp_path: Path) -> None:
    """s B R A = s B A = the best approximation of rank 4 of -lr · sign(gradient)."""
    settings, model = config(kind, tmp_path), tiny.lora_model(kind)
    rows = public_rows.sequences(settings, model.base.tokenizer, labels(kind), "start=gradient")
    fresh = model.init(settings.lora, 0)
    steps = {
        name: -LR * np.sign(gradient.double().numpy())
        for name, gradient in gradients_of.gradients(model, fresh, settings.lora, rows, 2)
    }
    _, start = made(kind, settings, model)
    state = create("fed_sb").init(start, 0)
    scaling = settings.alpha / settings.rank
    for name, step in steps.items():
        u, s, vt = np.linalg.svd(step, full_matrices=False)
        best = (u[:, :4] * s[:4]) @ vt[:4]
        a, b = (start[name + role].double().numpy() for role in (".lora_A", ".lora_B"))
        assert np.linalg.norm(scaling * b @ a - best) < 1e-5 * np.linalg.norm(best), name
        assert np.allclose(b.T @ b, np.eye(4), atol=1e-5)
        basis, core = state["basis"], state["adapter"][name + ".lora_R"].double().numpy()
        b, a = (basis[name + role].double().numpy() for role in (".lora_B", ".lora_A"))
        assert np.linalg.norm(scaling * b @ core @ a - best) < 1e-5 * np.linalg.norm(best), name
        assert np.allclose(np.diag(core), s[:4] / scaling, rtol=1e-4)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_start_of_full_rank_is_adamws_first_step(kind: str, tmp_path: Path) -> None:
    """But where a gradient is nearly 0: rounding may give it either sign."""
    settings = config(kind, tmp_path, rank=32, alpha=32.0)
    _, start = made(kind, settings)
    base = tiny.base(kind)
    names = list(tiny.lora_model(kind).shapes)
    weights = [base.model.get_submodule(name).weight for name in names]
    before = [weight.detach().clone() for weight in weights]
    trained = [weight.requires_grad_(True) for weight in weights]
    optimizer = torch.optim.AdamW(trained, lr=LR, eps=1e-30, weight_decay=0)
    mean_loss(kind, base.model, sequences(kind, base, settings)).backward()  # type: ignore[no-untyped-call]
    gradients = [weight.grad for weight in weights]
    optimizer.step()
    for name, weight, old, gradient in zip(names, weights, before, gradients, strict=True):
        moved = start[name + ".lora_B"] @ start[name + ".lora_A"]
        moved = moved.T if kind == "gpt2" else moved
        clear = gradient.abs() > 0.01 * gradient.abs().mean()
        assert float(clear.float().mean()) > 0.7, name
        assert torch.allclose(moved[clear], (weight.detach() - old)[clear], atol=3e-3 * LR), name


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_start_goes_downhill_and_leaves_the_base_alone(kind: str, tmp_path: Path) -> None:
    settings, model = config(kind, tmp_path, lr=1e-3), tiny.lora_model(kind)
    untouched = tree.digest(dict(model.model.named_parameters()))
    fresh, start = made(kind, settings, model)
    rows = sequences(kind, model.base, settings)
    model.write(start, settings.lora)
    with torch.no_grad():
        after = float(mean_loss(kind, model.model, rows))
        model.write(fresh, settings.lora)
        before = float(mean_loss(kind, model.model, rows))
    assert after < before - 1e-4
    assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())
    weights = dict(model.model.named_parameters())
    adapters = [name for name in weights if "lora_" in name]
    plain = {n: t for n, t in tiny.lora_model(kind).model.named_parameters() if n not in adapters}
    assert adapters
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.items())
    assert untouched
    assert {n for n in start if ".lora_" not in n} == {n for n in fresh if ".lora_" not in n}


def test_the_same_each_time(tmp_path: Path) -> None:
    settings = config("llama", tmp_path)
    first, second = (made("llama", settings)[1] for _ in range(2))
    assert tree.digest(first) == tree.digest(second)
    other = made("llama", config("llama", tmp_path, public_examples=2))[1]
    assert tree.digest(other) != tree.digest(first)


def test_a_gradient_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = tiny.lora_model("llama")
    layer = model.model.base_model.model.get_submodule(next(iter(model.shapes)))
    with torch.no_grad():
        layer.get_base_layer().weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="is not finite: use dtype=float32"):
        made("llama", config("llama", tmp_path), model)


def test_rows_of_a_client_are_refused(tmp_path: Path) -> None:
    settings = config("llama", tmp_path)
    public("llama", tmp_path, client_id="ada")
    with pytest.raises(DataError, match="belong to no client, found client_id 'ada'"):
        made("llama", settings)


def test_rows_without_a_target_are_refused(tmp_path: Path) -> None:
    settings = config("llama", tmp_path, max_length=8)
    row = {"prompt": " ".join(["w1"] * 9), "response": "w2"}
    Path(str(settings.public)).write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="no row has a target left within max_length=8"):
        made("llama", settings)


def test_rows_with_another_label_are_refused(tmp_path: Path) -> None:
    settings = config("bert", tmp_path)
    public("bert", tmp_path, label="never")
    with pytest.raises(DataError, match="label"):
        made("bert", settings)


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    settings = config("llama", tmp_path, public=str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"none\.jsonl"):
        made("llama", settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "gradient"}, "start=gradient needs public=FILE.jsonl"),
        (
            {"public": "x.jsonl"},
            "public=x.jsonl is for start=gradient, lora_ga, corda_ipm, corda_kpm, eva, for budget",
        ),
        (
            {"start": "gradient", "public": "x.jsonl", "data": "x.jsonl"},
            "found the file of the clients' data",
        ),
        (
            {"start": "gradient", "public": "x.jsonl", "quantization": "4bit"},
            "found parameters=lora, quantization=4bit",
        ),
        (
            {"start": "gradient", "public": "x.jsonl", "parameters": "bias"},
            "found parameters=bias, quantization=none",
        ),
        ({"start": "zero", "public": "x.jsonl"}, "one of random, gradient, pissa"),
        ({"start": "gradient", "public": "x.jsonl", "public_examples": 0}, "public-examples"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate({"strategy": "fedavg", **changes})
    assert message in str(raised.value)


FOLLOW = ("fedavg", "ffa_lora", "fedex_lora", "lora_fair", "rolora", "fedsvd", "fed_sb", "feddpa")
REFUSE = ("flora", "flexlora", "hetlora", "fedsa_lora", "fedmezo", "ferret", "seed_pool")


@pytest.mark.parametrize("strategy", [*FOLLOW, *REFUSE, "fedkseed", "fedkseed_pro"])
def test_strategies_that_begin_from_another_adapter_refuse(strategy: str) -> None:
    given = {"strategy": strategy, "start": "gradient", "public": "x.jsonl"}
    if strategy in FOLLOW:
        assert validate(given).start == "gradient"
        return
    with pytest.raises(ConfigError, match=f"clients of strategy {strategy} begin from another"):
        validate(given)


@pytest.mark.parametrize("strategy", ["fed_sb", "fedavg"])
def test_a_run_starts_there_and_compares_with_the_untouched_base(
    strategy: str, settings: Settings, federation_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "public.jsonl"
    rows = [{"prompt": f"eve {i}?", "response": "eve " + "ab" * (i % 4)} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    usual = simulate(settings(strategy=strategy, rounds=1), tmp_path / "usual")
    wanted = settings(strategy=strategy, rounds=1, start="gradient", public=str(path))
    found = simulate(wanted, tmp_path / "found", keep_updates=True)
    again = simulate(wanted, tmp_path / "again")
    assert found.base == usual.base
    assert found.final != usual.final
    assert found.adapter_hash == again.adapter_hash != usual.adapter_hash
    began, _ = read_adapter(tmp_path / "found" / "global" / "round-000")
    modules = [name.removesuffix(".lora_A") for name in began if name.endswith(".lora_A")]
    assert modules
    for name in modules:
        update = began[name + ".lora_B"] @ began[name + ".lora_A"]
        assert torch.linalg.matrix_rank(update) == wanted.rank
        assert float(update.norm()) <= wanted.lr * update.numel() ** 0.5


def test_a_run_that_is_resumed_goes_on_from_its_checkpoint(
    settings: Settings, tmp_path: Path
) -> None:
    """Its public rows may be gone."""
    path = tmp_path / "public.jsonl"
    path.write_text('{"prompt": "eve?", "response": "ab"}\n')
    wanted = settings(strategy="fed_sb", rounds=2, start="gradient", public=str(path))
    whole = simulate(wanted, tmp_path / "whole")
    path.unlink()
    resumed = simulate(wanted, tmp_path / "whole", resume=True)
    assert resumed.adapter_hash == whole.adapter_hash


def test_all_strategies_say_whether_they_follow() -> None:
    from corolla.config.asked import takes_start

    follow = {name for name, cls in STRATEGIES.items() if takes_start(cls())}
    assert follow >= set(FOLLOW)
    assert not follow & {*REFUSE, "fedkseed", "fedkseed_pro"}
