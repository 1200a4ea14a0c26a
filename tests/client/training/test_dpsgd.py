import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from corolla.client.training import dpsgd
from corolla.client.training.dpsgd import Clipper
from corolla.client.training.first_order import FirstOrder
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded
from corolla.errors import DataError, DivergedError, ModelError
from corolla.evaluation import scoring
from corolla.models import pretrained
from corolla.models.dense import DenseModel
from corolla.models.lora import LoraModel
from corolla.models.pretrained import Base
from corolla.privacy.example_level import ExampleLevel
from corolla.privacy.randomness import clip_factors
from corolla.strategies.listing import registry
from corolla.types import LoraSpec, Params
from tests.conftest import byte_tokenizer

Settings = Callable[..., RunConfig]
SPEC = LoraSpec(4, 8.0)
LENGTHS = (12, 10, 8, 5, 12, 3)

_LLAMA = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 1,
}
_GPT2 = {"vocab_size": 258, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_BERT = {**_LLAMA, "num_labels": 3}
FAMILIES: Mapping[str, Callable[[], transformers.PreTrainedModel]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**_GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**_BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**_LLAMA, tie_word_embeddings=True)
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**_LLAMA)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_LLAMA)),
}


def base(family: str, dtype: torch.dtype = torch.float32) -> Base:
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        model = FAMILIES[family]()
    task = "classify" if family == "bert" else "causal"
    model = model.to(dtype).eval().requires_grad_(False)
    return Base(model, byte_tokenizer(), task, family, "")


def sequences(family: str = "llama", lengths: Sequence[int] = LENGTHS) -> list[Encoded]:
    """Random ids of ragged lengths, half of them with a masked prompt; or one class each."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for i, length in enumerate(lengths):
        ids = torch.randint(2, 258, (length,), generator=draw).tolist()
        labels = [-100, -100, *ids[2:]] if i % 2 and length > 3 else ids
        found.append(Encoded(ids, i % 3 if family == "bert" else labels))
    return found


def alive(model: LoraModel | DenseModel, spec: LoraSpec = SPEC) -> Params:
    """A start without zeros: all tensors have gradients."""
    draw = torch.Generator().manual_seed(1)
    fresh = model.init(spec, 0)
    return {n: t + 0.05 * torch.randn(t.shape, generator=draw) for n, t in fresh.items()}


def written(model: LoraModel | DenseModel, start: Params) -> dict[str, nn.Parameter]:
    model.write(start, SPEC)
    model.model.train()
    trained = dict(model.parameters())
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def own_gradient(
    model: LoraModel | DenseModel, trained: Mapping[str, nn.Parameter], data: Sequence[Encoded]
) -> dict[str, Tensor]:
    """Of transformers' own loss of one example alone: the mean over its targets."""
    total: Tensor = torch.zeros(())
    for s in data:
        # The first token has no context; behind a prompt it would be a target to peft.
        labels = [s.labels] if isinstance(s.labels, int) else [[-100, *s.labels[1:]]]
        out = model.model(
            input_ids=torch.tensor([list(s.input_ids)]),
            attention_mask=torch.ones(1, len(s.input_ids), dtype=torch.long),
            labels=torch.tensor(labels),
        )
        total = total + out.loss * s.targets / sum(own.targets for own in data)
    found = torch.autograd.grad(total, list(trained.values()))
    return dict(zip(trained, found, strict=True))


def norm(params: Params) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in params.values()))


def apart(found: Params, wanted: Params) -> float:
    assert found.keys() == wanted.keys()
    return norm({n: found[n] - t for n, t in wanted.items()})


def clipped_by_hand(gradients: Sequence[Params], clip: float) -> dict[str, Tensor]:
    total = {n: torch.zeros_like(t) for n, t in gradients[0].items()}
    for own in gradients:
        factor = min(1.0, clip / norm(own))
        for name, tensor in own.items():
            total[name] += factor * tensor
    return total


def clipped(clipper: Clipper, batch: Sequence[dpsgd.Example], clip: float) -> dict[str, Tensor]:
    """The clipped sum itself: a clipper gives it in units of the clip."""
    return {name: clip * total for name, total in clipper(batch, clip).items()}


def generated(seed: int = 0) -> Callable[[Sequence[int]], Tensor]:
    """Noise that can be drawn again."""
    draw = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(tuple(shape), generator=draw, dtype=torch.float64)


def level(
    examples: int = 6,
    batch: int = 6,
    steps: int = 1,
    clip: float = 0.1,
    noise: float = 1.0,
    **other: Any,
) -> ExampleLevel:
    return ExampleLevel(
        examples=examples,
        batch=batch,
        steps=steps,
        clip=clip,
        noise_multiplier=noise,
        delta=1e-5,
        budget=None,
        **other,
    )


# The gradients of single examples


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_batch_are_those_of_its_examples_alone(family: str) -> None:
    model, data = LoraModel(base(family)), sequences(family)
    trained = written(model, alive(model))
    clipper = Clipper(model, trained, len(data))
    assert clipper.size == len(data)
    with clipper.attached():
        found = clipper.gradients(data, [1 / s.targets for s in data])
    for i, sequence in enumerate(data):
        wanted = own_gradient(model, trained, [sequence])
        assert apart({n: t[i] for n, t in found.items()}, wanted) <= 2e-6 * norm(wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_the_sum_is_clipped_jointly_whatever_goes_through_the_model_at_a_time(
    family: str, size: int
) -> None:
    model, data = LoraModel(base(family)), sequences(family)
    trained = written(model, alive(model))
    alone = [own_gradient(model, trained, [s]) for s in data]
    clip = sorted(norm(g) for g in alone)[2]  # shortens some
    clipper = Clipper(model, trained, size)
    with clipper.attached():
        found = clipped(clipper, [[s] for s in data], clip)
    wanted = clipped_by_hand(alone, clip)
    assert apart(found, wanted) <= 2e-6 * norm(wanted)


@pytest.mark.parametrize(
    ("role", "family", "batched"),
    [
        ("bias", "bert", True),
        ("bias", "qwen2", True),
        ("bias", "gpt2", False),  # Conv1D
        ("norm", "bert", True),
        ("norm", "gemma3", False),  # no LayerNorm
        ("head", "bert", True),
        ("head", "llama", False),  # it is shown positions with a target only
        ("full", "llama", False),
        ("full", "gpt2", False),  # one row of positions for all
        ("full", "gemma3", False),
        ("ia3", "llama", False),
        ("prompt", "llama", False),
    ],
)
def test_other_tensors_are_trained_in_batches_only_where_hooks_tell_them_apart(
    role: Any, family: str, batched: bool
) -> None:
    model, data = DenseModel(base(family), role, virtual_tokens=3), sequences(family)
    trained = written(model, model.init(SPEC, 0))
    alone = [own_gradient(model, trained, [s]) for s in data]
    clip = sorted(norm(g) for g in alone)[2]
    clipper = Clipper(model, trained, len(data))
    assert clipper.size == (len(data) if batched else 1)
    with clipper.attached():
        found = clipped(clipper, [[s] for s in data], clip)
    wanted = clipped_by_hand(alone, clip)
    assert apart(found, wanted) <= 2e-6 * norm(wanted)


@pytest.mark.parametrize("role", ["lora", "bias", "full"])
def test_a_base_in_half_precision(role: Any) -> None:
    """One sequence at a time: beside others it would round otherwise."""
    plain = base("qwen2", torch.bfloat16)
    model = LoraModel(plain) if role == "lora" else DenseModel(plain, role)
    trained = written(model, alive(model))
    data = sequences()
    alone = [own_gradient(model, trained, [s]) for s in data]
    clip = sorted(norm(g) for g in alone)[2]
    clipper = Clipper(model, trained, len(data))
    assert clipper.size == 1
    with clipper.attached():
        found = clipped(clipper, [[s] for s in data], clip)
    wanted = clipped_by_hand(alone, clip)
    assert apart(found, wanted) <= 3e-2 * norm(wanted)


def test_a_quantised_base_sees_one_sequence_at_a_time() -> None:
    """As bitsandbytes has it: a frozen layer whose weights are whole numbers."""
    model = LoraModel(base("llama"))
    trained = written(model, alive(model))
    assert Clipper(model, trained, 6).size == 6
    layer: Any = model.model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    plain = getattr(layer, "base_layer", layer)
    plain.weight = nn.Parameter(plain.weight.to(torch.int8), requires_grad=False)
    assert Clipper(model, trained, 6).size == 1


# An example of several sequences


def windows() -> list[Encoded]:
    """Three examples: of one, five and two sequences."""
    owners = (4, 7, 7, 7, 7, 7, 9, 9)
    plain = sequences(lengths=(9, 12, 12, 7, 12, 3, 6, 11))
    return [replace(s, example=k) for s, k in zip(plain, owners, strict=True)]


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_sequences_of_an_example_are_clipped_together(size: int) -> None:
    model, data = LoraModel(base("llama")), windows()
    trained = written(model, alive(model))
    known = dpsgd.examples(data, 3)
    assert known == [data[:1], data[1:6], data[6:]]
    alone = [own_gradient(model, trained, example) for example in known]
    clip = sorted(norm(g) for g in alone)[1]
    clipper = Clipper(model, trained, size)
    with clipper.attached():
        found = clipped(clipper, known, clip)
        again = clipped(clipper, [known[1], known[2]], clip)
    assert apart(found, clipped_by_hand(alone, clip)) <= 2e-6 * norm(found)
    assert apart(again, clipped_by_hand(alone[1:], clip)) <= 2e-6 * norm(again)


def test_an_example_without_sequences_does_not_part_those_of_others() -> None:
    model, data = LoraModel(base("llama")), windows()
    trained = written(model, alive(model))
    batch = [data[6:], [], data[:1]]
    alone = [own_gradient(model, trained, example) for example in batch if example]
    clip = 0.5 * min(norm(g) for g in alone)
    clipper = Clipper(model, trained, 8)
    with clipper.attached():
        found = clipped(clipper, batch, clip)
    assert apart(found, clipped_by_hand(alone, clip)) <= 2e-6 * norm(found)


def test_examples_without_a_target_are_counted_and_add_nothing() -> None:
    data = [Encoded([5, 6], [5, 6]), Encoded([5, 6, 7], [-100, -100, -100])]
    assert dpsgd.examples(data, 4) == [data[:1], [], [], []]
    assert dpsgd.examples([], 2) == [[], []]


def test_more_examples_than_were_accounted_for_are_refused() -> None:
    with pytest.raises(DataError, match="accounted for 5 examples, found 6"):
        dpsgd.examples(sequences(), 5)


# What one example can change: the same checks find sabotage


ADVERSARIAL = [*sequences(lengths=(12,)), *5 * sequences(lengths=(3,))]
"""A long example whose absence would make five short ones, which agree, count more."""


CROWD = [*sequences(lengths=(48,)), *63 * sequences(lengths=(4,))]
"""The padding that the long one brings makes all others round otherwise, in one direction."""


def sensitivity(
    data: Sequence[Encoded],
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    left_out: Sequence[int] | None = None,
) -> float:
    """The most that leaving one example out moves the clipped sum, in units of the clip.

    With clips that shorten all, half and none of the examples. `left_out`: which; any of them.
    """
    model = LoraModel(base(family, dtype))
    trained = written(model, alive(model))
    names = [i if s.example is None else s.example for i, s in enumerate(data)]
    pairs = list(zip(names, data, strict=True))
    groups = [[s for name, s in pairs if name == own] for own in sorted(set(names))]
    norms = sorted(norm(own_gradient(model, trained, group)) for group in groups)
    clipper = Clipper(model, trained, 64)

    def total(kept: Sequence[Sequence[Encoded]], clip: float) -> Params:
        flat = [replace(s, example=k) for k, group in enumerate(kept) for s in group]
        return clipped(clipper, dpsgd.examples(flat, len(flat)), clip)

    worst = 0.0
    with clipper.attached():
        for clip in (0.9 * norms[0], norms[len(norms) // 2], norms[-1]):
            whole = total(groups, clip)
            for i in range(len(groups)) if left_out is None else left_out:
                without = total(groups[:i] + groups[i + 1 :], clip)
                worst = max(worst, apart(without, whole) / clip)
    return worst


def check_sensitivity(data: Sequence[Encoded]) -> None:
    assert sensitivity(data) <= 1 + 1e-5


@pytest.mark.parametrize(
    "data",
    [sequences(), ADVERSARIAL, windows()],
    ids=["ragged", "adversarial", "windows"],
)
def test_leaving_an_example_out_moves_the_sum_by_at_most_the_clip(data: list[Encoded]) -> None:
    check_sensitivity(data)


def uneven() -> transformers.PreTrainedModel:
    """Qwen2 on kernels that are one place of bf16 higher where rows are longer than four.

    What those of a processor make of other shapes is theirs alone.
    """
    model = FAMILIES["qwen2"]()

    def higher(module: nn.Module, inputs: Any, found: Tensor) -> Tensor:
        return found * (1 + 2**-7) if found.dim() == 3 and found.shape[1] > 4 else found

    for name, module in model.named_modules():
        if not list(module.children()) and "rotary" not in name:
            module.register_forward_hook(higher)
    return model


def test_leaving_a_long_example_out_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "uneven", uneven)
    assert sensitivity(CROWD, "uneven", torch.bfloat16, [0]) <= 1 + 1e-5


def test_the_check_of_half_precision_finds_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "uneven", uneven)
    monkeypatch.setattr(dpsgd, "_in_fp32", lambda model: True)
    assert sensitivity(CROWD, "uneven", torch.bfloat16, [0]) > 1.05


def mean_of_the_batch(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The usual loss, which opacus multiplies by the size of the batch: others count."""
    own = scoring.sequence_losses(model, batch)
    targets = (batch["labels"][:, 1:] != -100).sum(1)
    return own * targets * len(own) / targets.sum()


def each_sequence(data: Sequence[Encoded], counted: int) -> list[list[Encoded]]:
    return [[s] for s in data]


def each_tensor(total: Params, gradients: Params, clip: float) -> None:
    for name, tensor in gradients.items():
        factors = clip_factors(tensor.flatten(1).norm(dim=1), clip) / clip
        total[name] += torch.tensordot(factors, tensor, 1)


SABOTAGE: Mapping[str, tuple[str, Callable[..., Any], list[Encoded]]] = {
    "the mean of the batch": ("sequence_losses", mean_of_the_batch, ADVERSARIAL),
    "no clip": ("clip_factors", lambda norms, clip: torch.ones_like(norms), sequences()),
    "weights": (
        "clip_factors",
        lambda norms, clip: clip_factors(norms, clip) * torch.arange(1, 1 + len(norms)),
        sequences(),
    ),
    "sequences apart": ("examples", each_sequence, windows()),
    "tensors apart": ("_add_clipped", each_tensor, sequences()),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_check_of_sensitivity_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, what, data = SABOTAGE[name]
    monkeypatch.setattr(dpsgd, where, what)
    with pytest.raises(AssertionError):
        check_sensitivity(data)
    assert sensitivity(data) > (2 if name == "the mean of the batch" else 1.5)


def local(
    model: LoraModel,
    data: Sequence[Encoded],
    private: ExampleLevel | None,
    settings: Settings,
    **changes: Any,
) -> FirstOrder:
    options = {"optimizer": "sgd", "lr": 1.0, "batch_size": 6, **changes}
    return FirstOrder(model, SPEC, data, settings(**options), 0, 1, private=private)


@pytest.fixture(scope="module")
def llama() -> LoraModel:
    return LoraModel(base("llama"))


def check_noise(model: LoraModel, settings: Settings, noised: Any = ExampleLevel) -> None:
    """A step without any example is noise of std z C / batch: mean and chi-square, at 6 sigma."""
    private = noised(**vars(level(clip=0.3, noise=2.0)))
    wide = LoraSpec(32, 8.0)
    start = alive(model, wide)
    fit = replace(local(model, [], private, settings), lora=wide).fit(start)
    unit = torch.cat([(start[n] - fit.params[n]).flatten() for n in start]).double() / 0.1
    values = unit.numel()
    assert abs(float(unit.mean())) <= 6 / math.sqrt(values)
    assert abs(float(unit.square().mean()) - 1) <= 6 * math.sqrt(2 / values)


class Silent(ExampleLevel):
    def noised(self, clipped_sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: (self.clip * t / self.batch).float() for n, t in clipped_sums.items()}


class Halved(ExampleLevel):
    def noised(self, clipped_sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        half = replace(ExampleLevel(**vars(self)), noise_multiplier=self.noise_multiplier / 2)
        return half.noised(clipped_sums)


def test_an_empty_step_is_noise_alone(llama: LoraModel, settings: Settings) -> None:
    check_noise(llama, settings)


@pytest.mark.parametrize("sabotaged", [Silent, Halved])
def test_the_check_of_noise_finds(
    llama: LoraModel, settings: Settings, sabotaged: type[ExampleLevel]
) -> None:
    with pytest.raises(AssertionError, match="square"):
        check_noise(llama, settings, sabotaged)


def check_sampling(
    model: LoraModel, settings: Settings, monkeypatch: pytest.MonkeyPatch, steps: int = 400
) -> None:
    """Each example is in a step by a coin of its own: sizes and shares at 6 sigma."""
    batches: list[set[int]] = []

    def record(clipper: Clipper, batch: Sequence[dpsgd.Example], clip: float) -> Params:
        batches.append({example[0].input_ids[0] for example in batch})
        return {name: torch.zeros_like(p) for name, p in clipper.trained.items()}

    monkeypatch.setattr(dpsgd, "self_test", lambda *_, **named: None)
    monkeypatch.setattr(Clipper, "__call__", record)
    data = [Encoded([k, 5], [k, 5]) for k in range(20)]
    private = level(examples=20, batch=5, steps=steps, normal=lambda shape: torch.zeros(*shape))
    local(model, data, private, settings).fit(alive(model))
    assert len(batches) == steps
    sizes = torch.tensor([float(len(batch)) for batch in batches])
    spread = 20 * 0.25 * 0.75
    assert abs(float(sizes.mean()) - 5) <= 6 * math.sqrt(spread / steps)
    assert abs(float(sizes.var()) - spread) <= 6 * spread * math.sqrt(2 / steps)
    for k in range(20):
        share = sum(k in batch for batch in batches) / steps
        assert abs(share - 0.25) <= 6 * math.sqrt(0.25 * 0.75 / steps)


def in_turn(private: ExampleLevel, known: Sequence[dpsgd.Example]) -> Iterator[Any]:
    """Batches of one size, as without privacy."""
    for step in range(private.steps):
        yield [known[(5 * step + i) % len(known)] for i in range(private.batch)]


def test_batches_are_poisson_samples(
    llama: LoraModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_sampling(llama, settings, monkeypatch)


def test_the_check_of_sampling_finds_batches_in_turn(
    llama: LoraModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpsgd, "batches", in_turn)
    with pytest.raises(AssertionError):
        check_sampling(llama, settings, monkeypatch)


# Whole rounds


def coins(seed: int = 5) -> Callable[[int], Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return lambda n: torch.rand(n, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("size", [2, None])
def test_five_noisy_steps_are_those_of_dp_sgd_by_hand(
    family: str, size: int | None, settings: Settings
) -> None:
    model, data = LoraModel(base(family)), sequences(family)
    start = alive(model)
    private = level(batch=3, steps=5, clip=0.5, normal=generated(), uniform=coins())
    changes = {"optimizer": "adamw", "lr": 0.01, "batch_size": 3, "weight_decay": 0.1}
    trainer = local(model, data, private, settings, micro_batch_size=size, **changes)
    found = trainer.fit(start)

    trained = written(model, start)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.1)
    normal, uniform = generated(), coins()
    sizes = []
    for _ in range(5):
        drawn = (uniform(6) < 0.5).nonzero().flatten().tolist()
        alone = [own_gradient(model, trained, [data[i]]) for i in drawn]
        none = [{n: torch.zeros_like(p) for n, p in trained.items()}]
        total = clipped_by_hand(alone or none, 0.5) if alone else none[0]
        for name, p in sorted(trained.items()):
            p.grad = ((total[name].double() + 0.5 * normal(p.shape)) / 3).float()
        optimizer.step()
        sizes.append(len(drawn))
    assert len(set(sizes)) > 1
    for name, p in trained.items():
        assert float((found.params[name] - p.detach()).abs().max()) <= 1e-7
    assert found.metrics == {"local_steps": 5.0}
    assert found.num_examples == 6


def test_five_noisy_steps_are_those_of_opacus(settings: Settings) -> None:
    """Its hooks, its clipping and noise of the same generator, on batches of all examples."""
    model, data = LoraModel(base("llama")), sequences()
    start = alive(model)

    def same(seed: int) -> Callable[[Sequence[int]], Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return lambda shape: torch.normal(0.0, 1.0, tuple(shape), generator=draw).double()

    private = level(steps=5, clip=0.5, normal=same(11))
    trainer = local(model, data, private, settings, optimizer="adamw", lr=0.01)
    found = trainer.fit(start).params

    trained = written(model, start)
    hooks = GradSampleHooks(model.model, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.0),
        noise_multiplier=1.0,
        max_grad_norm=0.5,
        expected_batch_size=6,
        generator=torch.Generator().manual_seed(11),
    )
    longest = max(LENGTHS)
    ids = torch.tensor([[*s.input_ids, *[1] * (longest - len(s.input_ids))] for s in data])
    mask = torch.tensor([[float(i < len(s.input_ids)) for i in range(longest)] for s in data])
    labels = torch.tensor(
        [[*s.labels, *[-100] * (longest - len(s.input_ids))] for s in data]  # type: ignore[misc]
    )
    for _ in range(5):
        logits = model.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        own = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
        )
        with pytest.warns(UserWarning, match="Full backward hook"):
            loss = (own.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    hooks.cleanup()
    for name, p in trained.items():
        assert float((found[name] - p.detach()).abs().max()) <= 1e-6


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_step_does_not_depend_on_what_goes_through_the_model_at_a_time(
    size: int, settings: Settings
) -> None:
    model, data = LoraModel(base("llama")), sequences()
    results = []
    for own in (size, None):
        private = level(normal=generated())
        trainer = local(model, data, private, settings, micro_batch_size=own)
        results.append(trainer.fit(alive(model)).params)
    assert apart(*results) <= 1e-7 * norm(results[0])


@pytest.mark.parametrize("size", [1, 2, 6])
def test_an_example_that_is_not_finite_adds_nothing(size: int, settings: Settings) -> None:
    model, data = LoraModel(base("llama")), sequences()
    poisoned = [*data[:2], Encoded([9, 257, 12], [9, 257, 12]), *data[3:]]
    assert sum(257 in s.input_ids for s in poisoned) == 1
    start = alive(model)
    options = {"micro_batch_size": size}
    clean = [*data[:2], Encoded([9], [9]), *data[3:]]  # one without a target
    wanted = local(model, clean, level(normal=generated()), settings, **options).fit(start)
    embedding = model.model.get_input_embeddings().weight
    embedding.data[257] = math.nan
    found = local(model, poisoned, level(normal=generated()), settings, **options).fit(start)
    assert apart(found.params, wanted.params) <= 1e-6 * norm(wanted.params)


def test_gradients_that_are_not_finite_add_nothing() -> None:
    total = {"a": torch.zeros(2).double(), "b": torch.zeros(()).double()}
    gradients = {
        "a": torch.tensor([[3.0, 0.0], [1e30, 0.0], [0.0, 0.0], [math.inf, 0.0], [0.0, 0.0]]),
        "b": torch.tensor([4.0, 1e30, 0.0, 0.0, math.nan]),
    }
    dpsgd._add_clipped(total, gradients, 1.0)
    root = 0.5**0.5  # the second is finite, though its square is not in fp32
    wanted = {"a": torch.tensor([0.6 + root, 0.0]), "b": torch.tensor(0.8 + root)}
    torch.testing.assert_close(total, wanted, check_dtype=False, rtol=1e-6, atol=0)


@pytest.mark.parametrize("peak", [1e-45, 1e-40, 1e-30, 1.0, 1e37, 3e38])
@pytest.mark.parametrize("clip", [1e-45, 1e-30, 1e-10, 1e-6, 1.0, 1e10, 1e37, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_and_no_clip_is_too_large_or_small(
    peak: float, clip: float, dtype: torch.dtype
) -> None:
    """A thousand of them, also where their sum in their own type overflows or vanishes."""
    row = torch.tensor([peak, -peak, 0.5 * peak], dtype=dtype)
    total = {"a": torch.zeros(3, dtype=torch.float64)}
    for _ in range(10):
        dpsgd._add_clipped(total, {"a": row.expand(100, 3)}, clip)
    alone = row.double() / max(clip, float(row.double().norm()))
    torch.testing.assert_close(total["a"], 1000 * alone, rtol=1e-12, atol=0)
    assert norm(total) <= 1000 * (1 + 1e-12)


def test_the_norm_of_many_values_is_right() -> None:
    """The sum of their squares in fp32 loses percents."""
    values = torch.full((1, 3_000_000), 1e-4)
    total = {"a": torch.zeros(3_000_000).double()}
    dpsgd._add_clipped(total, {"a": values}, 0.1)
    assert norm(total) == pytest.approx(1.0, rel=1e-10)
    rows = torch.randn(2, 1_500_000, generator=torch.Generator().manual_seed(0))
    wanted = [math.sqrt(math.fsum((row.double() ** 2).tolist())) for row in rows]
    assert dpsgd._norms(rows).tolist() == pytest.approx(wanted, rel=1e-12)


def test_the_hook_of_a_strategy_comes_after_the_noise(llama: LoraModel, settings: Settings) -> None:
    """With SGD: start - lr (noisy + correction), not clipped again."""
    start, data = alive(llama), sequences()
    plain = local(llama, data, level(normal=generated()), settings).fit(start).params
    seen: list[Params] = []

    def correct(gradients: Params, weights: Params) -> Params:
        seen.append({n: g.clone() for n, g in gradients.items()})
        return {n: g + 100.0 for n, g in gradients.items()}

    trainer = local(llama, data, level(normal=generated()), settings, clip_norm=1e-3)
    found = trainer.fit(start, correct=correct).params
    for name, tensor in start.items():
        torch.testing.assert_close(tensor - seen[0][name], plain[name], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(plain[name] - 100.0, found[name], rtol=1e-5, atol=1e-5)


def test_cores_are_clipped_by_their_own_norm(settings: Settings) -> None:
    """What is private is R of B R A: its gradient by autograd through the product."""
    model, data = LoraModel(base("llama")), sequences()
    start = alive(model)
    draw = torch.Generator().manual_seed(2)
    cores = {
        n.replace("lora_A", "lora_R"): torch.randn(4, 4, generator=draw)
        for n in start
        if n.endswith("lora_A")
    }
    private = level(clip=0.05, noise=1e-12)
    found = local(model, data, private, settings).fit(
        {**start, **cores}, train=lambda n: not n.endswith("lora_B")
    )
    owners = {id(p): name for name, p in written(model, start).items()}
    places = {owners[id(p)]: name for name, p in model.model.named_parameters() if id(p) in owners}
    alone = []
    for s in data:
        leaves = {n: t.clone().requires_grad_() for n, t in cores.items()}
        products = {
            places[n.replace("lora_R", "lora_A")]: r @ start[n.replace("lora_R", "lora_A")]
            for n, r in leaves.items()
        }
        ids = torch.tensor([list(s.input_ids)])
        labels = torch.tensor([list(s.labels)])  # type: ignore[arg-type]
        out = torch.func.functional_call(
            model.model, products, (), {"input_ids": ids, "labels": labels}
        )
        gradients = torch.autograd.grad(out.loss, list(leaves.values()))
        alone.append(dict(zip(leaves, gradients, strict=True)))
    assert all(norm(g) > 0.05 for g in alone)
    wanted = clipped_by_hand(alone, 0.05)
    for name, tensor in cores.items():
        moved = (tensor - found.params[name]) * 6
        assert float((moved - wanted[name]).abs().max()) <= 1e-5
    assert all(torch.equal(found.params[n], t) for n, t in start.items())


FIRST_ORDER = [n for n, c in registry.STRATEGIES.items() if c.trainers[0] == "first_order"]


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_every_strategy_sends_what_it_always_sends(name: str, settings: Settings) -> None:
    """Two rounds by its own halves: nothing measured, frozen tensors frozen, all finite."""
    model, data = LoraModel(base("llama")), sequences()
    strategy = registry.create(name, {})
    state = strategy.init(alive(model), 0)
    kept: Mapping[str, Params] = {}
    for round in (1, 2):
        private = level(steps=2)
        config = settings(strategy=name, optimizer="sgd", lr=0.01, batch_size=6)
        trainer = FirstOrder(model, SPEC, data, config, 0, round, private=private)
        client = SimpleNamespace(
            trainer=trainer, lora=SPEC, seed=round, kept=kept, population=3, kind="first_order",
        )  # fmt: skip
        sent = strategy.broadcast(state)
        received = {**sent.payload, **sent.cached}
        if sent.fitted:
            received |= sent.fitted(SPEC)
        if sent.log is not None:
            received |= state
        update = strategy.local(client, received)
        kept = update.keep
        assert update.num_examples == 6
        assert set(update.metrics) <= {"local_steps", "own_rank"}
        flat = [t for group in update.payload.values() for t in group.values()]
        assert flat
        assert all(bool(t.isfinite().all()) for t in flat)
        aggregator = strategy.aggregator()
        aggregator.add(update.payload, 1.0)
        state, _ = strategy.apply(state, aggregator.finalise())


def traces(model: nn.Module) -> list[str]:
    """Whatever a private step may leave on a model."""
    found = []
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        found += [f"{name}: {hooks} {len(module._backward_hooks)} {sorted(vars(module))}"]
    for name, p in model.named_parameters():
        found.append(f"{name}: {sorted(vars(p))} {p.requires_grad} {p.grad}")
    return found


@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_of_a_private_round_is_left_on_the_model(settings: Settings, stopped: bool) -> None:
    model, data = LoraModel(base("bert")), sequences("bert")
    start = alive(model)
    plain = local(model, data, None, settings).fit(start)
    before = traces(model.model)

    def correct(gradients: Params, weights: Params) -> Params:
        if stopped:
            raise KeyboardInterrupt
        return gradients

    with pytest.raises(KeyboardInterrupt) if stopped else nullcontext():
        local(model, data, level(steps=2), settings).fit(start, correct=correct)
    if stopped:
        model.write(start, SPEC)
    assert traces(model.model) == before
    assert not model.model.training
    again = local(model, data, None, settings).fit(start)
    assert apart(again.params, plain.params) == 0
    assert again.metrics == plain.metrics


def test_a_step_that_breaks_off_leaves_nothing(llama: LoraModel) -> None:
    trained = written(llama, alive(llama))
    before = traces(llama.model)
    clipper = Clipper(llama, trained, 6)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    layer = llama.model.get_submodule("base_model.model.model.layers.0.mlp")
    hook = layer.register_full_backward_hook(stop)
    with pytest.raises(KeyboardInterrupt), clipper.attached():
        clipper([[s] for s in sequences()], 1.0)
    hook.remove()
    llama.model.zero_grad(set_to_none=True)
    assert traces(llama.model) == before


def test_weights_that_are_not_finite_are_an_error_without_privacy_alone(
    llama: LoraModel, settings: Settings
) -> None:
    """With it they would tell of the rows, or of the noise: the round then moves nothing."""
    start = alive(llama)

    def correct(gradients: Params, weights: Params) -> Params:
        return {name: torch.full_like(tensor, 1e38) for name, tensor in gradients.items()}

    for private, error in ((None, pytest.raises(DivergedError, match="lower lr")), (level(), None)):
        trainer = local(llama, sequences(), private, settings, lr=1e6, clip_norm=None)
        with error or nullcontext():
            assert apart(trainer.fit(start, correct=correct).params, start) == 0


def test_the_rate_runs_over_the_steps_of_the_private_round(
    llama: LoraModel, settings: Settings
) -> None:
    private = level(steps=2)
    trainer = local(llama, [], private, settings, schedule="linear", rounds=2, local_steps=9)
    fit = trainer.fit(alive(llama))
    assert fit.distance == pytest.approx(1 + 3 / 4)
    assert fit.metrics == {"local_steps": 2.0}


def test_the_count_that_is_told_is_public(llama: LoraModel, settings: Settings) -> None:
    for steps, wanted in ((1, 2), (2, 4), (4, 6)):
        private = level(batch=2, steps=steps)
        assert local(llama, [], private, settings).fit(alive(llama)).num_examples == wanted


def test_dropout_is_at_work(settings: Settings) -> None:
    results = []
    for dropout in (0.0, 0.5):
        model = LoraModel(base("llama"), dropout=dropout)
        private = level(normal=generated())
        results.append(local(model, sequences(), private, settings).fit(alive(model)).params)
    assert apart(*results) > 0


def test_nobody_knows_the_masks_of_dropout(settings: Settings) -> None:
    """All else is as before, the seed of the client too."""
    model, start = LoraModel(base("llama"), dropout=0.5), alive(LoraModel(base("llama")))
    results = [
        local(model, sequences(), level(normal=generated(), uniform=coins()), settings).fit(start)
        for _ in range(2)
    ]
    assert apart(results[0].params, results[1].params) > 1e-3


def test_gradient_checkpointing_gives_the_same_step(settings: Settings) -> None:
    results = []
    for checkpointing in (False, True):
        config = settings(
            gradient_checkpointing=checkpointing, dp="example", noise_multiplier=1.0, clip_norm=None
        )
        model = LoraModel(pretrained.load(config))
        private = level(normal=generated())
        trainer = FirstOrder(model, SPEC, sequences(), config, 0, 1, private=private)
        assert Clipper(model, dict(model.parameters()), 6).size == 6  # by hooks
        assert model.base.model.is_gradient_checkpointing == checkpointing
        results.append(trainer.fit(alive(model)).params)
    assert apart(*results) <= 1e-6 * norm(results[0])


class Routed(nn.Module):
    """An expert that not every sequence is sent to."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x) if bool(x[0, -1, 0] > 0) else torch.zeros_like(x)
        return found


def test_an_expert_that_an_example_was_not_sent_to(settings: Settings) -> None:
    """Its gradient is zero there: autograd says so too."""
    plain = base("llama")
    layer: Any = plain.model.model.layers[1]
    layer.mlp = Routed(layer.mlp)
    model, data = LoraModel(plain, ["gate_proj", "q_proj"]), sequences()
    trained = written(model, alive(model))
    alone = []
    for s in data:
        batch = {"input_ids": torch.tensor([list(s.input_ids)])}
        labels = torch.tensor([list(s.labels)])  # type: ignore[arg-type]
        loss = model.model(**batch, labels=labels).loss
        own = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
        alone.append(dict(zip(trained, own, strict=True)))
    reached = [bool(g["model.layers.1.mlp.inner.gate_proj.lora_A"].any()) for g in alone]
    assert any(reached)
    assert not all(reached)
    clip = sorted(norm(g) for g in alone)[2]
    wanted = clipped_by_hand(alone, clip)
    found = clipped(Clipper(model, trained, 1), [[s] for s in data], clip)
    assert apart(found, wanted) <= 2e-6 * norm(wanted)
    model.model.zero_grad(set_to_none=True)
    fit = local(model, data, level(), settings, micro_batch_size=1).fit(alive(model))
    assert fit.num_examples == 6


# The comparison before the first private step


class Mixing(nn.Module):
    """Like batch normalisation: what comes out depends on the rest of the batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x) + 0.1 * x.mean(dim=(0, 1))
        return found


def test_a_model_that_mixes_examples_is_refused(settings: Settings) -> None:
    model = mixing()
    with pytest.raises(ModelError, match="micro_batch_size=1"):
        local(model, sequences(), level(), settings).fit(alive(model))
    alone = local(model, sequences(), level(), settings, micro_batch_size=1)
    assert alone.fit(alive(model)).num_examples == 6
    assert not any("grad_sample" in trace for trace in traces(model.model))


def test_batch_normalisation_is_refused(settings: Settings) -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(64)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
            return found

    plain = base("llama")
    layer: Any = plain.model.model.layers[0]
    layer.input_layernorm = Normalised()
    model = LoraModel(plain)
    with pytest.raises(ModelError, match="mixes them"):
        local(model, sequences(), level(), settings).fit(alive(model))


def test_a_layer_that_hooks_do_not_see_is_refused(settings: Settings) -> None:
    """The checkpointing that is not reentrant, as without privacy."""
    plain = base("llama")
    plain.model.activation_checkpointing_enable({"use_reentrant": False})
    plain.model.enable_input_require_grads()
    model = LoraModel(plain)
    with pytest.raises(ModelError, match="does not tell them apart"):
        local(model, sequences(), level(), settings).fit(alive(model))


def test_a_layer_that_computes_with_more_than_its_weight_is_refused(settings: Settings) -> None:
    plain = base("llama")
    model = LoraModel(plain)
    name = "model.layers.0.self_attn.q_proj.lora_B"
    weight = dict(model.parameters())
    layer = model.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")

    def twice(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        b = module.lora_B["default"].weight
        found: Tensor = output + 0.5 * inputs[0][..., :4] @ b.T
        return found

    layer.register_forward_hook(twice)
    assert name in weight
    with pytest.raises(ModelError, match="not what they are alone"):
        local(model, sequences(), level(), settings).fit(alive(model))


def test_it_is_made_once_for_a_model_and_what_is_trained(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = LoraModel(base("llama"), dropout=0.3), sequences()
    made: list[int] = []
    by_hand = dpsgd._by_hand

    def counted(*arguments: Any) -> Any:
        made.append(1)
        return by_hand(*arguments)

    monkeypatch.setattr(dpsgd, "_by_hand", counted)
    fresh = model.init(SPEC, 0)  # B is zero: the comparison is made elsewhere
    for train, wanted in ((lambda n: True, 4), (lambda n: True, 4), (lambda n: "A" in n, 8)):
        local(model, data, level(), settings).fit(fresh, train=train)
        assert len(made) == wanted


def mixing() -> LoraModel:
    plain = base("llama")
    layer: Any = plain.model.model.layers[1]
    layer.post_attention_layernorm = Mixing(layer.post_attention_layernorm)
    return LoraModel(plain)


def test_it_moves_no_weight_and_no_random_state(settings: Settings) -> None:
    model, data = LoraModel(base("bert")), sequences("bert")
    start = alive(model)
    results = []
    for _ in range(2):  # the second without the comparison
        before = torch.get_rng_state()
        private = level(normal=generated())
        results.append(local(model, data, private, settings).fit(start).params)
        assert torch.equal(torch.get_rng_state(), before)
    assert apart(*results) == 0


@pytest.mark.parametrize(
    "data", [sequences(), sequences()[:1], [Encoded([5], [5])], []],
    ids=["many", "one", "no target", "none"],
)  # fmt: skip
def test_a_refusal_tells_nothing_of_the_data(settings: Settings, data: list[Encoded]) -> None:
    """Whoever is there, also where nobody could be mixed with anybody."""
    with pytest.raises(dpsgd.SelfTestError) as refused:
        local(mixing(), data, level(), settings).fit(alive(mixing()))
    assert str(refused.value).startswith("dp=example: in a batch, the gradients of examples are")


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("label", [0, 2])
def test_no_label_decides_what_the_server_hears(
    settings: Settings, scale: float, label: int
) -> None:
    """A head that makes the loss of one class underflow: neither an oracle nor a refusal."""
    model = LoraModel(base("bert"))
    start = {n: scale * t if "classifier" in n else t for n, t in alive(model).items()}
    start["classifier.bias"] = torch.tensor([0.0, 0.0, 60.0])
    data = [Encoded(s.input_ids, label) for s in sequences("bert")]
    assert local(model, data, level(), settings).fit(start).num_examples == 6


def test_no_example_is_compared(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model sees each of ours once, in the step itself."""
    model, data, seen = LoraModel(base("llama")), sequences(), []
    model.model.register_forward_pre_hook(
        lambda _, args, named: seen.extend(named["input_ids"].tolist()), with_kwargs=True
    )
    local(model, data, level(), settings).fit(alive(model))
    for s in data:
        assert sum(row[: len(s.input_ids)] == list(s.input_ids) for row in seen) == 1


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_synthetic_examples_are_as_encoding_makes_them(family: str) -> None:
    model = LoraModel(base(family))
    found = dpsgd.synthetic(model)
    assert found == dpsgd.synthetic(LoraModel(base(family)))
    assert [len(example) for example in found] == [1, 2, 1, 1]
    flat = [s for example in found for s in example]
    assert len({len(s.input_ids) for s in flat}) == 5
    assert all(0 <= k < 258 for s in flat for k in s.input_ids)
    assert all(s.targets for s in flat)
    if family == "bert":
        assert {s.labels for s in flat} == {0, 1, 2}
    else:
        labels = [s.labels for s in flat if not isinstance(s.labels, int)]
        assert [row.count(-100) for row in labels] == [0, 0, 0, 2, 0]
        for s, row in zip(flat, labels, strict=True):
            assert all(k in (-100, own) for k, own in zip(row, s.input_ids, strict=True))
