"""DoRA: against peft's own layer, a dense computation with autograd, and as plain peft loads it."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from corolla import seeds
from corolla.client.training.dpsgd import Clipper
from corolla.client.training.worker import Worker
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded
from corolla.directions import seedlog
from corolla.errors import ConfigError
from corolla.estimates import footprint
from corolla.estimates.footprint import Batch
from corolla.models import anatomy, pretrained, trainable
from corolla.models.dora_model import DoraModel
from corolla.models.files import adapter_files
from corolla.models.lora import LoraModel
from corolla.models.patterns import Patterns
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.round import run_round
from corolla.starts import table
from corolla.storage.memory import Memory
from corolla.strategies.listing.registry import STRATEGIES
from corolla.types import Adapter, LoraSpec, Params
from tests.corolla.models.test_dense import Devices
from tests.corolla.starts.test_gradient import public
from tests.strategies import tiny

Settings = Callable[..., RunConfig]
SPEC = LoraSpec(4, 8.0)
MAGNITUDE = ".lora_magnitude_vector"


@cache
def dora(kind: str = "llama", blocks: int = 1) -> DoraModel:
    return DoraModel(tiny.base(kind, blocks))


def by_peft(kind: str, params: Params) -> Any:
    """The same adapter in a layer that peft has made."""
    names = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in params})
    config = LoraConfig(
        r=4, lora_alpha=8, use_dora=True, task_type="CAUSAL_LM", target_modules=names,
        fan_in_fan_out=kind == "gpt2",
    )  # fmt: skip
    model = get_peft_model(tiny.base(kind).model, config).eval()
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            module.lora_A["default"].weight.data = params[name + ".lora_A"].clone()
            module.lora_B["default"].weight.data = params[name + ".lora_B"].clone()
            layer: Any = module.lora_magnitude_vector["default"]
            layer.weight.data = params[name + MAGNITUDE].clone()
    return model


def dense(kind: str, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of equation 5, whose norm has no gradient (section 4.3), by module."""
    found: dict[str, Tensor] = {}
    for name, module in tiny.base(kind).model.named_modules():
        if name + MAGNITUDE in params:
            weight: Tensor = module.weight
            turned = isinstance(module, Conv1D)
            delta = SPEC.scaling * params[name + ".lora_B"] @ params[name + ".lora_A"]
            whole = (weight.T if turned else weight) + delta
            length = whole.detach().square().sum(dim=1).sqrt()
            weight = (params[name + MAGNITUDE] / length)[:, None] * whole
            found[f"{name}.weight"] = weight.T if turned else weight
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_model_is_that_of_peft_and_of_dense_weights_and_so_are_its_gradients(kind: str) -> None:
    model = dora(kind)
    params = tiny.adapter(model, SPEC, 1)
    model.write(params, SPEC)
    ours = tiny.logits(model.model)
    torch.testing.assert_close(ours, tiny.logits(by_peft(kind, params)), rtol=0, atol=1e-6)
    plain = tiny.base(kind).model
    leaves = {name: t.clone().requires_grad_(True) for name, t in params.items()}
    logits = functional_call(plain, dense(kind, leaves), (tiny.IDS,)).logits
    torch.testing.assert_close(ours, logits.detach(), rtol=0, atol=1e-5)
    of_weights = {n: w.detach() for n, w in dense(kind, params).items()}
    base = dict(plain.named_parameters())
    for name, delta in model.deltas().items():
        found = of_weights[f"{name}.weight"] - base[f"{name}.weight"]
        found = found.T if kind == "gpt2" else found
        torch.testing.assert_close(delta.float(), found, rtol=1e-4, atol=1e-6)
    trained = dict(model.parameters())
    for parameter in trained.values():
        parameter.requires_grad_(True)
    mine = torch.autograd.grad(
        model.model(input_ids=tiny.IDS).logits.square().mean(), list(trained.values())
    )
    wanted = torch.autograd.grad(logits.square().mean(), [leaves[name] for name in trained])
    for name, own, other in zip(trained, mine, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6, msg=name)
        assert float(other.abs().max()) > 0, name


@pytest.mark.parametrize("start", ["random", "orthogonal", "eva"])
def test_a_run_begins_at_the_base(start: str, tmp_path: Path) -> None:
    given = {"public": str(public("llama", tmp_path))} if start == "eva" else {}
    config = tiny.config("fedavg", dora=True, start=start, **given)
    model = dora()
    begun = table.begin(model, model.init(config.lora, 0), config).trained
    model.write(begun, config.lora)
    apart = tiny.logits(model.model) - tiny.logits(tiny.base("llama").model)
    assert float(apart.abs().max()) <= (0.0 if start == "random" else 1e-5)
    model.write({n: 1.1 * t if n.endswith(MAGNITUDE) else t for n, t in begun.items()}, config.lora)
    assert float((tiny.logits(model.model) - tiny.logits(tiny.base("llama").model)).abs().max()) > 0


@pytest.mark.parametrize("patterns", [None, Patterns({"q_proj": 2}, {"v_proj": 2.0})])
def test_what_is_saved_is_the_same_model_to_plain_peft(
    tmp_path: Path, patterns: Patterns | None
) -> None:
    model = DoraModel(tiny.base("llama"), patterns=patterns)
    spec = dataclasses.replace(SPEC, rslora=patterns is None)
    params = tiny.adapter(model, spec, 1)
    model.save(tmp_path / "adapter", Adapter(params), spec)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    model.write(params, spec)
    assert model.distance_to(tmp_path / "adapter", spec) < 1e-6
    loaded = adapter_files.load_adapter(tiny.base("llama").model, tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model.model), rtol=0, atol=1e-5)
    other = {n: t + 0.01 if n.endswith(MAGNITUDE) else t for n, t in params.items()}
    model.write(other, spec)
    assert model.distance_to(tmp_path / "adapter", spec) == float("inf")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_in_half_precision_and_beside_rows_of_tokens_it_begins_at_the_base(
    kind: str, tmp_path: Path
) -> None:
    """Norms in fp32: rounded to bfloat16 they would be another model from the start."""
    base = tiny.base(kind)
    base.model.to(torch.bfloat16)
    model = DoraModel(base, tokens=(3, 5))
    plain = tiny.base(kind).model.to(torch.bfloat16)
    model.write(model.init(SPEC, 0), SPEC)
    assert torch.equal(tiny.logits(model.model), tiny.logits(plain))
    params = tiny.adapter(model, SPEC, 1)
    model.save(tmp_path / "adapter", Adapter(params), SPEC)
    model.write(params, SPEC)
    loaded = adapter_files.load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model.model), rtol=0, atol=0.02)


def test_without_magnitudes_nothing_of_an_adapter_is_another(tmp_path: Path) -> None:
    plain, own = tiny.lora_model("llama").init(SPEC, 3), dora().init(SPEC, 3)
    more = own.keys() - plain.keys()
    assert more == {n.removesuffix(".lora_A") + MAGNITUDE for n in plain if n.endswith(".lora_A")}
    assert all(torch.equal(own[name], tensor) for name, tensor in plain.items())
    assert "dora" not in RunConfig().model_dump()


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("fedavg", {}),
        ("fedavg", {"codec": ["top_k:0.5"], "codec_down": ["fp16"]}),
        ("fedavg", {"classes": {"top": {"layers": "last:1"}, "whole": {}}}),
        ("fedavg", {"robust": "median"}),
        ("fedavg", {"dp": "client", "epsilon": 8.0}),
        ("fedavg", {"dp": "example", "epsilon": 8.0}),
        ("lisa", {"options": {"layers": 1}}),
        ("fedadam", {}),
        ("seed_pool", {"eps": 0.01}),
    ],
)
def test_a_round_moves_factors_and_magnitudes(
    strategy: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny.config(strategy, cohort=4, dora=True, **changes)
    model = dora(blocks=2)
    network = Devices(Worker(config, model, tiny.data("llama"), Memory(tmp_path)), False)
    built = build_strategy(config)
    first = model.init(config.lora, seeds.derive(config.seed, "init"))
    state = built.init(first, config.seed)
    fresh = cache(lambda spec: model.init(spec, 0))
    origin = seedlog.origin(model.base.fingerprint, state)
    federation = Federation("0" * 32, config, built, tiny.CLIENTS, fresh, origin)
    result = run_round(RoundCall(federation, state, {}, 1), network)
    assert not result.dropped
    assert result.traffic.up <= result.cost.up
    after = built.adapter(result.state)
    model.show(after, config.lora)
    read = model.read()
    moved = {n for n, t in read.items() if n.endswith(MAGNITUDE) and not torch.equal(t, first[n])}
    assert len(moved) == (7 if strategy == "lisa" else 14)
    if (strategy, changes) == ("fedavg", {}):
        outs = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
        ins = 2 * (32 + 32 + 32 + 32 + 32 + 32 + 48)
        assert result.traffic.up == 4 * 4 * (4 * (outs + ins) + outs)
        total = sum(result.num_examples.values())
        for name in moved:
            own = [n / total * network.trained[c][name] for c, n in result.num_examples.items()]
            torch.testing.assert_close(read[name], torch.stack(own).sum(0), rtol=0, atol=1e-6)


def test_clipped_gradients_of_examples_have_those_of_magnitudes() -> None:
    """Against autograd of one row at a time."""
    model = dora()
    model.write(tiny.adapter(model, SPEC, 1), SPEC)
    trained = dict(model.parameters())
    for parameter in trained.values():
        parameter.requires_grad_(True)
    rows = [Encoded(ids, ids) for ids in ([3, 9, 4, 17, 30], [8, 2, 11], [5, 40, 21, 7])]
    single = []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        loss = model.model(input_ids=ids, labels=ids).loss
        found = torch.autograd.grad(loss, list(trained.values()))
        single.append(dict(zip(trained, found, strict=True)))
    norms = [sum(float(g.square().sum()) for g in own.values()) ** 0.5 for own in single]
    bound = sorted(norms)[1]
    clipper = Clipper(model, trained, len(rows))
    assert clipper.size == 1
    with clipper.attached():
        sums = {n: bound * t for n, t in clipper([[row] for row in rows], bound).items()}
    for name in trained:
        wanted = sum(g[name] * min(1.0, bound / n) for g, n in zip(single, norms, strict=True))
        torch.testing.assert_close(sums[name].float(), wanted, rtol=1e-4, atol=1e-6)
        assert not name.endswith(MAGNITUDE) or float(sums[name].abs().max()) > 0


def test_formulas_count_what_is_built_and_what_autograd_keeps(
    tiny_model: Path, settings: Settings
) -> None:
    config, usual = settings(rank=2, dora=True), settings(rank=2)
    model = trainable.build(config, pretrained.load(config))
    assert isinstance(model, DoraModel)
    shapes = footprint.trained_shapes(anatomy.read(str(tiny_model)), config)
    assert {n: tuple(s) for n, s in shapes.items()} == {
        n: tuple(t.shape) for n, t in model.init(config.lora, 0).items()
    }
    own = kept(model)
    plain = trainable.build(usual, pretrained.load(usual))
    assert isinstance(plain, LoraModel)
    batch, of = Batch(2, 12, 22), anatomy.read(str(tiny_model))
    blocks = [
        sum(n * size for n, size in footprint._kept(of, given, batch)) for given in (config, usual)
    ]
    outs = sum(shape[0] for name, shape in shapes.items() if name.endswith(MAGNITUDE))
    assert blocks[0] - blocks[1] == 8 * 24 * outs
    measured = own - kept(plain)
    assert measured == pytest.approx(8 * 24 * outs, rel=0.1)
    terms = footprint.client(footprint.Workload(of, batch), config, "first_order").terms
    assert terms["weights with their update"] > 0


def kept(model: LoraModel) -> int:
    """Bytes, of all positions, that a forward pass keeps for the backward pass."""
    model.write(model.init(LoraSpec(2, 4.0), 0), LoraSpec(2, 4.0))
    for _, parameter in model.parameters():
        parameter.requires_grad_(True)
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[:2] == tiny.IDS.shape:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=tiny.IDS % 16)
    return sum(seen.values())


REFUSED = {
    **dict.fromkeys(("flora", "fedex_lora", "ffa_lora", "rolora"), "reckons with B A alone"),
    **dict.fromkeys(("fed_sb", "fedsvd", "flexlora", "hetlora", "ferret"), "reckons with B A"),
    **dict.fromkeys(("lora_fair", "feddpa", "fedsa_lora", "mixed"), "reckons with B A alone"),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_trains_magnitudes_or_refuses_in_one_line(name: str) -> None:
    changes = {**tiny.classes(name), "dora": True}
    if name not in REFUSED:
        assert build_strategy(tiny.config(name, **changes)).name == name
        return
    with pytest.raises(ConfigError, match=f"dora .* strategy {name} {REFUSED[name]}.*: use fedavg"):
        build_strategy(tiny.config(name, **changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parameters": "bias"}, "beside LoRA factors: parameters=bias has none"),
        ({"parameters": "sparse"}, "beside LoRA factors: parameters=sparse has none"),
        ({"start": "pissa"}, "start=pissa leaves or moves: use start=random or orthogonal or eva"),
        ({"start": "gradient", "public": "x.jsonl"}, "start=gradient leaves or moves"),
        ({"quantization": "4bit"}, "a base in full, found 4bit"),
        ({"quantization": "8bit"}, "a base in full, found 8bit"),
        ({"codec_down": ["top_k:0.25"]}, "magnitude of dora that is 0 silences a row"),
        ({"budget": "flops:0.5"}, "dora takes more: set layers or target-modules"),
        ({"target_parameters": ["experts.down_proj"]}, "experts of target-parameters have none"),
    ],
)
def test_other_settings_are_refused_in_one_line(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        build_strategy(RunConfig(dora=True, **changes))
    assert "\n" not in str(error.value)
