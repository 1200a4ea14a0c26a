"""Each step of `corolla edit` against peft's `*_svd`, and dense arithmetic in fp64."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor

from corolla.artefacts.adapters import SavedLora
from corolla.edits import grammar, pipeline
from corolla.edits.dare import drop
from corolla.edits.job import Job
from corolla.edits.ranks import cut
from corolla.edits.safe import ENERGY, projector
from corolla.edits.ties import merge, trim
from corolla.edits.update import Full, Low, product
from corolla.errors import ArtefactError, ConfigError
from corolla.tensors import factors
from corolla.types import LoraSpec, Params
from tests.strategies import tiny

SHAPES = {
    **{f"model.layers.{i}.self_attn.q_proj": (8, 6) for i in range(3)},
    **{f"model.layers.{i}.mlp.down_proj": (6, 10) for i in range(3)},
    "extra.proj": (6, 6),
}
SPEC = LoraSpec(3, 6.0)
Dense = dict[str, Tensor]


def saved(seed: int, rank: int = 3, heads: Params | None = None) -> SavedLora:
    draw = torch.Generator().manual_seed(seed)
    update = {}
    for name, (out, into) in SHAPES.items():
        update[name + factors.B] = torch.randn(out, rank, generator=draw, dtype=torch.float64)
        update[name + factors.A] = torch.randn(rank, into, generator=draw, dtype=torch.float64)
    return SavedLora(update, LoraSpec(rank, 2.0 * rank), heads or {}, {})


def dense(adapter: SavedLora) -> Dense:
    return {
        name: adapter.spec.scaling
        * adapter.update[name + factors.B].double()
        @ adapter.update[name + factors.A].double()
        for name in SHAPES
    }


def edited(
    adapters: Sequence[SavedLora], steps: str, base: Path | str = "", labels: int = 0
) -> SavedLora:
    job = Job(str(base), SHAPES, max(own.spec.rank for own in adapters))
    return pipeline.edit(adapters, grammar.read(steps, len(adapters)), job, labels)


def result(adapters: Sequence[SavedLora], steps: str, base: Path | str = "") -> Dense:
    return dense(edited(adapters, steps, base))


def near(found: Dense, wanted: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    for name in SHAPES:
        scale = max(1.0, float(wanted[name].abs().max()))
        assert float((found[name] - wanted[name]).abs().max()) < tolerance * scale, name


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    found: Tensor = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of the modules, which differ most in few directions."""
    from safetensors.torch import save_file

    folder, draw = tmp_path_factory.mktemp("bases"), torch.Generator().manual_seed(9)
    before, after = {}, {}
    for name, (out, into) in SHAPES.items():
        weight = 0.5 * torch.randn(out, into, generator=draw)
        moved = torch.randn(out, 2, generator=draw) @ torch.randn(2, into, generator=draw)
        before[f"{name}.weight"] = weight
        after[f"{name}.weight"] = weight + moved + 0.02 * torch.randn(out, into, generator=draw)
    for name, tensors in (("before", before), ("after", after)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        save_file(tensors, folder / name / "model.safetensors")
    return folder / "before", folder / "after"


def weights(model: Path) -> Dense:
    from safetensors.torch import load_file

    found = load_file(model / "model.safetensors")
    return {name: found[f"{name}.weight"].double() for name in SHAPES}


def test_weights_are_the_sum_and_lose_nothing() -> None:
    one, two = saved(1), saved(2, rank=2)
    a, b = dense(one), dense(two)
    near(result([one, two], "weights:0.75,-2"), {n: 0.75 * a[n] - 2 * b[n] for n in SHAPES})
    near(result([one, two], "weights"), {n: (a[n] + b[n]) / 2 for n in SHAPES})
    assert edited([one, two], "weights").spec == LoraSpec(5, 5.0)
    near(result([one], "scale:-0.5"), {n: -0.5 * a[n] for n in SHAPES})


def test_a_module_that_an_adapter_lacks_counts_as_zero() -> None:
    one, two = saved(1), saved(2)
    lacking = {n: t for n, t in two.update.items() if not n.startswith("extra.")}
    a, b = dense(one), dense(two)
    found = result([one, replace(two, update=lacking)], "weights:1,1")
    near(found, {n: a[n] + (b[n] if n != "extra.proj" else 0) for n in SHAPES})


def test_ties_by_hand() -> None:
    parts = [[[2.0, -1.0]], [[1.0, 3.0]], [[-4.0, 1.0]]]
    found = merge([Full(torch.tensor(own).double()) for own in parts], 1.0, 1.0)
    assert found.matrix.tolist() == [[-4.0, 2.0]]
    assert trim(torch.tensor([[3.0, -3.0], [3.0, 1.0]]), 0.5).tolist() == [[3.0, -3.0], [0.0, 0.0]]


@pytest.fixture(scope="module")
def tuned() -> Any:
    """Two adapters of peft on a Llama with grouped queries; nothing in them is zero."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "down_proj"])
    model = get_peft_model(tiny.base("llama", blocks=2).model, config, "one")
    model.add_adapter("two", config)
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw)
    return model


def deltas(model: Any, name: str) -> Dense:
    return {
        own.removeprefix("base_model.model."): layer.get_delta_weight(name).detach().double()
        for own, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def of_peft(model: Any, name: str) -> SavedLora:
    update = {}
    for own, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            module = own.removeprefix("base_model.model.")
            update[module + factors.A] = layer.lora_A[name].weight.detach()
            update[module + factors.B] = layer.lora_B[name].weight.detach()
    return SavedLora(update, LoraSpec(3, 6.0), {}, {})


@pytest.mark.parametrize(
    "kind, steps",
    [
        ("ties_svd", "ties:0.3 rank:16"),
        ("svd", "weights:1,1 rank:16"),
        ("svd", "weights:1,1 rank:2"),
    ],
)
def test_combinations_are_those_of_peft_on_products(tuned: Any, kind: str, steps: str) -> None:
    rank = int(steps.rpartition(":")[2])
    tuned.add_weighted_adapter(
        ["one", "two"], [1.0, 1.0], "both", combination_type=kind, density=0.3, svd_rank=rank
    )
    wanted = deltas(tuned, "both")
    tuned.delete_adapter("both")
    adapters = [of_peft(tuned, "one"), of_peft(tuned, "two")]
    job = Job("", pipeline.shapes_of(adapters), 3)
    made = pipeline.edit(adapters, grammar.read(steps, 2), job, 0)
    for name, matrix in wanted.items():
        found = made.spec.scaling * factors.product(made.update, name)
        torch.testing.assert_close(found, matrix, rtol=1e-4, atol=1e-4)


def test_intruders_are_those_of_peft(tuned: Any, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tiny.base("llama", blocks=2).model.save_pretrained(folder)
    one = of_peft(tuned, "one")
    job = Job(str(folder), pipeline.shapes_of([one]), 3)
    made = pipeline.edit([one], grammar.read("intruders:4,0.9,0.25 rank:3", 1), job, 0)
    before = deltas(tuned, "one")
    reduce_intruder_dimension(tuned, "one", "less", 4, 0.9, 0.25, logging_sink=None)
    wanted = deltas(tuned, "less")
    tuned.set_adapter("one")
    tuned.delete_adapter("less")
    changed = 0
    for name, matrix in wanted.items():
        found = made.spec.scaling * factors.product(made.update, name)
        torch.testing.assert_close(found, matrix, rtol=1e-3, atol=1e-3)
        changed += not torch.allclose(matrix, before[name], atol=1e-2)
    assert changed, "no module had an intruder"


def test_layers_that_keep_in_and_out_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's Conv1D: intruders are those of the weight as (out, in)."""
    base = tiny.base("gpt2").model
    base.save_pretrained(tmp_path)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True)
    plain = {n: t.clone() for n, t in base.named_parameters()}
    model = get_peft_model(base, config, "one")
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw)
    one = of_peft(model, "one")
    job = Job(str(tmp_path), pipeline.shapes_of([one]), 3, transposed=True)
    made = pipeline.edit([one], grammar.read("intruders:3,0.9,0", 1), job, 0)
    for name, turned in deltas(model, "one").items():
        weight = plain[f"{name}.weight"].double().T
        u, s, vt = torch.linalg.svd(weight + turned.T, full_matrices=False)
        known = torch.linalg.svd(weight, full_matrices=False).U
        odd = [k for k in range(3) if float((u[:, k] @ known).abs().max()) < 0.9]
        assert odd
        wanted = turned.T - (u[:, odd] * s[odd]) @ vt[odd]
        found = made.spec.scaling * factors.product(made.update, name)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_dare_keeps_a_share_and_the_mean() -> None:
    matrix = torch.arange(1.0, 13.0).reshape(3, 4).double()
    drawn = [drop(Full(matrix), 0.25, seed, "m", 0).matrix for seed in range(1000)]
    assert all(bool(((own == 0) | (own == matrix / 0.25)).all()) for own in drawn)
    deviation = matrix * (0.75 / 0.25 / 1000) ** 0.5
    assert bool(((torch.stack(drawn).mean(0) - matrix).abs() < 4 * deviation).all())
    assert not torch.equal(drop(Full(matrix), 0.25, 0, "m", 1).matrix, drawn[0])
    assert torch.equal(drop(Full(matrix), 0.25, 0, "m", 0).matrix, drawn[0])


def test_lines_scales_blocks_and_leaves_the_last(tmp_path: Path) -> None:
    one = saved(1)
    a = dense(one)
    factor = {
        name: 0.25 + 0.75 * int(name.split(".")[2]) / 2 for name in SHAPES if "layers" in name
    }
    factor["extra.proj"] = 0.25
    near(result([one], "lines:0.25"), {n: factor[n] * a[n] for n in SHAPES})
    near(
        result([one], "lines:0.25,0.1"),
        {n: (0.25 + (factor[n] - 0.25) / 0.75 * 0.1) * a[n] for n in SHAPES},
    )
    found = result([one], "lines:0")
    assert not found["model.layers.0.mlp.down_proj"].any()
    near({**a, **{n: found[n] for n in SHAPES if "layers.2" in n}}, a)


@pytest.mark.parametrize("steps", ["lines:1", "scale:1", "reset:0", "weights:1", "rank:3"])
def test_steps_that_change_nothing_keep_every_bit(steps: str) -> None:
    one = saved(1)
    one = replace(one, update={n: t.float() for n, t in one.update.items()})
    made = edited([one], steps)
    assert made.spec == one.spec
    assert all(torch.equal(made.update[name], one.update[name]) for name in one.update)


def test_reset_sets_that_share_of_modules_to_zero() -> None:
    one = saved(1)
    a, found = dense(one), result([one], "reset:0.6,5")
    zero = [name for name in SHAPES if not found[name].any()]
    assert len(zero) == round(0.6 * len(SHAPES))
    near({**found, **{n: a[n] for n in zero}}, a)
    assert zero != [name for name in SHAPES if not result([one], "reset:0.6,6")[name].any()]


def test_rank_and_energy_are_the_best_of_their_rank() -> None:
    one, two = saved(1), saved(2)
    exact = {n: dense(one)[n] + dense(two)[n] for n in SHAPES}
    near(result([one, two], "weights:1,1 rank:2"), {n: best(exact[n], 2) for n in SHAPES})
    near(result([one, two], "weights:1,1 rank"), {n: best(exact[n], 3) for n in SHAPES})
    assert edited([one, two], "weights:1,1 energy:0.8 rank:1").spec.rank == 1
    made = edited([one, two], "weights:1,1 energy:0.8")
    for name in SHAPES:
        s = torch.linalg.svdvals(exact[name])
        rank = int((s.square().cumsum(0) / s.square().sum() < 0.8).sum()) + 1
        near({**exact, name: dense(made)[name]}, {**exact, name: best(exact[name], rank)})
    once = edited([one, two], "weights:1,1 rank:2")
    twice = edited([once], "rank:2")
    assert all(torch.equal(twice.update[n], once.update[n]) for n in once.update)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (9, 12), (12, 9)])
def test_a_matrix_is_cut_as_its_svd_says(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    made = cut(Full(matrix), 2)
    assert torch.allclose(product(made.update), best(matrix, 2), atol=1e-12)
    s = torch.linalg.svdvals(matrix).square()
    assert made.lost == pytest.approx(float(s[2:].sum()))
    assert made.total == pytest.approx(float(s.sum()))


def test_errors_are_told(tmp_path: Path) -> None:
    one, two = saved(1), saved(2)
    job = Job("", SHAPES, 3)
    pipeline.edit([one, two], grammar.read("weights:1,1 rank:2", 2), job, 0)
    exact = {n: dense(one)[n] + dense(two)[n] for n in SHAPES}
    lost = sum(float((exact[n] - best(exact[n], 2)).square().sum()) for n in SHAPES)
    whole = sum(float(own.square().sum()) for own in exact.values())
    assert job.error == pytest.approx((lost / whole) ** 0.5)
    (cut,) = [own.to_json() for own in job.cuts]
    assert (cut["step"], cut["error_of_modules"].keys()) == ("rank:2", SHAPES.keys())


def test_safe_projects_onto_what_alignment_moved(models: tuple[Path, Path]) -> None:
    before, after = models
    one = saved(1)
    a, moved = dense(one), {n: weights(after)[n] - weights(before)[n] for n in SHAPES}
    wanted = {}
    for name in SHAPES:
        u, s, _ = torch.linalg.svd(moved[name], full_matrices=False)
        count = int((s.square().cumsum(0) / s.square().sum() < ENERGY).sum()) + 1
        wanted[name] = u[:, :count] @ u[:, :count].T @ a[name]
    near(result([one], f"safe:{before},{after},1"), wanted)
    paper = {n: moved[n] @ moved[n].T / moved[n].norm() @ a[n] for n in SHAPES}
    near(result([one], f"safe:{before},{after},1,published"), paper, 1e-5)
    near(result([one], f"safe:{before},{after},-1"), a)
    some = result([one], f"safe:{before},{after},0.6")
    for name in SHAPES:
        cosine = float((wanted[name] * a[name]).sum() / wanted[name].norm() / a[name].norm())
        near({**a, name: some[name]}, {**a, name: wanted[name] if cosine < 0.6 else a[name]})


def test_the_projector_is_one() -> None:
    draw = torch.Generator().manual_seed(2)
    moved = torch.randn(6, 9, generator=draw, dtype=torch.float64)
    p = projector(moved)
    assert p is not None
    assert torch.allclose(p @ p, p) and torch.allclose(p, p.T)
    own = Low(moved[:, :2].clone(), torch.randn(2, 4, generator=draw, dtype=torch.float64))
    kept = projector(product(own))
    assert kept is not None
    assert projector(torch.zeros(3, 3)) is None


INVARIANT = [
    *("weights:0.5,2", "ties:0.4 rank:4", "dare:0.5,1 weights rank:4", "scale:0.3 weights:1,1"),
    *("lines:0.3 weights", "reset:0.5 weights", "weights rank:2", "weights energy:0.7"),
    *("safe:{before},{after},0.6 weights", "intruders:4,0.9,0.2 weights", "balance-head weights"),
]


@pytest.mark.parametrize("steps", INVARIANT)
def test_no_step_depends_on_the_gauge(steps: str, models: tuple[Path, Path]) -> None:
    """(B Q, Q⁻¹ A) is the same adapter: every step makes the same of it."""
    before, after = models
    steps = steps.format(before=before, after=after)
    head = {"score.weight": torch.ones(2, 4)} if "balance" in steps else {}
    adapters = [replace(saved(seed), heads=head) for seed in (1, 2)]
    turned = [replace(own, update=_turned(own.update, 3)) for own in adapters]
    found, wanted = (dense(edited(own, steps, before, 2)) for own in (turned, adapters))
    for name in SHAPES:
        scale = max(1e-3, float(wanted[name].norm()))
        assert float((found[name] - wanted[name]).norm()) < 1e-7 * scale, name


def _turned(update: Params, rank: int) -> Params:
    draw = torch.Generator().manual_seed(7)
    found = dict(update)
    for name in factors.modules(update):
        q = torch.randn(rank, rank, generator=draw, dtype=torch.float64)
        q += 3 * torch.eye(rank, dtype=torch.float64)
        found[name + factors.B] = update[name + factors.B] @ q
        found[name + factors.A] = torch.linalg.solve(q, update[name + factors.A])
    return found


def test_heads_are_combined_and_balanced() -> None:
    one = {"score.weight": torch.tensor([[3.0, 4.0], [0.0, 1.0]])}
    two = {"score.weight": torch.tensor([[1.0, 0.0], [0.0, 3.0]])}
    adapters = [saved(1, heads=one), saved(2, heads=two)]
    made = edited(adapters, "weights:0.5,0.5", labels=2).heads["score.weight"]
    assert made.tolist() == [[2.0, 2.0], [0.0, 2.0]]
    made = edited(adapters[:1], "balance-head", labels=2).heads["score.weight"]
    assert torch.allclose(made, torch.tensor([[1.8, 2.4], [0.0, 3.0]]))
    with pytest.raises(ConfigError, match="weights of sum 1, found 3"):
        edited(adapters, "weights:1,2", labels=2)
    with pytest.raises(ArtefactError, match="found no head"):
        edited([saved(1)], "balance-head")


def test_every_form_is_carried_out() -> None:
    from corolla.edits import table

    assert table._STEPS.keys() == grammar.FORMS.keys()
    assert all(form.written.startswith(name) for name, form in grammar.FORMS.items())


MISTAKES: Mapping[str, tuple[int, str]] = {
    "": (1, "is empty"),
    "melt": (1, "no such step, there are weights, ties"),
    "weights:1": (2, "1 weights for 2 adapters"),
    "scale": (1, "expected scale:X"),
    "scale:1,2": (1, "expected scale:X"),
    "scale:much": (1, "x is a number, found 'much'"),
    "ties:0": (2, "density is a number above 0 and at most 1, found '0'"),
    "rank:0": (1, "a whole number at least 1"),
    "dare:0.5": (1, "dare makes matrices of full rank"),
    "rank:2": (2, "leaves 2 adapters apart"),
    "safe:a": (1, re.escape("expected safe:UNALIGNED,ALIGNED[,TAU[,published]]")),
    "safe:a,b,0,loose": (1, "is published, found 'loose'"),
    "[3]": (1, "expected a list of texts"),
    "no.toml": (1, "cannot be read"),
}


@pytest.mark.parametrize("steps", MISTAKES)
def test_a_mistake_is_named(steps: str) -> None:
    adapters, message = MISTAKES[steps]
    with pytest.raises(ConfigError, match=message):
        grammar.read(steps, adapters)


def test_steps_come_from_lines_lists_and_files(tmp_path: Path) -> None:
    wanted = grammar.read("ties:0.2,1.5 rank:4", 2)
    (tmp_path / "a.toml").write_text('steps = ["ties:0.2,1.5", "rank:4"]')
    (tmp_path / "a.json").write_text('["ties:0.2,1.5", "rank:4"]')
    forms: Sequence[Callable[[], str]] = [
        lambda: '["ties:0.2,1.5", "rank:4"]',
        lambda: str(tmp_path / "a.toml"),
        lambda: str(tmp_path / "a.json"),
    ]
    assert [grammar.read(form(), 2) for form in forms] == [wanted] * 3
    (tmp_path / "b.toml").write_text("step = []")
    with pytest.raises(ConfigError, match="expected a list `steps`"):
        grammar.read(str(tmp_path / "b.toml"), 2)
