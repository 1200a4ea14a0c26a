"""Programs against plain transformers and peft; and exports that must leave nothing behind."""

import importlib.util
import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.config.run import RunConfig
from corolla.embedded.assets import asset
from corolla.errors import ConfigError, ModelError
from corolla.models import lora, pretrained
from corolla.models.files import adapter_files
from corolla.phones import bundle, export, lowering, selftest
from corolla.types import Adapter
from tests.bundles import LENGTH, RANK, needs_executorch, small_bundle

pytestmark = needs_executorch
Settings = Callable[..., RunConfig]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder() -> Path:
    return small_bundle().folder


@pytest.fixture(scope="module")
def manifest(folder: Path) -> bundle.Manifest:
    found = bundle.read(folder, small_bundle().publisher)
    bundle.verify(folder, found)
    return found


@pytest.fixture(scope="module")
def run(folder: Path) -> lowering.Run:
    return lowering.load(folder / "fp32.pte", folder / "base.ptd")


def plain(alpha: float, source: str | None = None, blocks: list[int] | None = None) -> Any:
    """The small model, or another, with an adapter that peft has made: nothing of it is ours."""
    source = source or small_bundle().model
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=alpha,
        target_modules=LINEAR if blocks else "all-linear",
        layers_to_transform=blocks,
        task_type="CAUSAL_LM",
    )
    with adapter_files.peft_speaks_to_transformers():
        return peft.get_peft_model(model, config).eval()


def factors(manifest: bundle.Manifest, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        tensor.name: torch.randn(tensor.shape, generator=generator) / (4 * tensor.shape[1] ** 0.5)
        for tensor in manifest.adapter
    }


def parameters(model: Any) -> dict[str, nn.Parameter]:
    own = dict(model.named_parameters())
    return {
        name.removeprefix(adapter_files.PREFIX).removesuffix(".default.weight"): tensor
        for name, tensor in own.items()
        if ".lora_" in name
    }


def batch(tokens: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Ids, and labels of which the first third and some in the middle do not count."""
    ids = torch.randint(0, 2048, (1, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : tokens // 3] = -100
    labels[:, tokens // 2 : tokens // 2 + 2] = -100
    labels[:, -1] = ids[:, -1]
    return ids, labels


def torch_says(model: Any, ids: Tensor, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The loss that transformers computes, times its number of targets, and its gradients."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=labels).loss * (labels[:, 1:] != -100).sum()
    loss.backward()
    grads = {name: tensor.grad.clone() for name, tensor in parameters(model).items()}  # type: ignore[union-attr]
    return loss.item(), grads


def test_the_adapter_is_listed_as_it_travels(manifest: bundle.Manifest) -> None:
    own = parameters(plain(RANK))
    assert [tensor.name for tensor in manifest.adapter] == sorted(own)
    assert all(tuple(own[t.name].shape) == t.shape for t in manifest.adapter)
    assert manifest.rank == RANK
    assert manifest.vocab == 2048
    assert manifest.tokenizer.eos == 1


def test_the_fingerprint_is_that_of_runs(manifest: bundle.Manifest) -> None:
    base = pretrained.load(RunConfig(model=small_bundle().model, task="causal", device="cpu"))
    assert manifest.model_sha256 == base.fingerprint


@pytest.mark.parametrize("tokens", [2, 3, 17, LENGTH])
def test_fp32_is_torch(manifest: bundle.Manifest, run: lowering.Run, tokens: int) -> None:
    model, values = plain(RANK), factors(manifest)
    for name, tensor in parameters(model).items():
        tensor.data.copy_(values[name])
    ids, labels = batch(tokens)
    wanted, gradients = torch_says(model, ids, labels)
    inputs = (ids, labels, *values.values())
    loss, *found = run("grad", inputs)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert float(run("loss", inputs)[0]) == pytest.approx(wanted, rel=1e-5)
    largest = max(float(g.abs().max()) for g in gradients.values())
    assert largest > 0
    for listed, gradient in zip(manifest.adapter, found, strict=True):
        assert gradient.shape == listed.shape
        assert torch.allclose(gradient, gradients[listed.name], rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("blocks", [None, [2, 3], [0, 2]])
def test_the_graph_of_several_layers_is_torch(blocks: list[int] | None) -> None:
    """Programs are of one layer here: that those of all layers, or of some, would be given their
    factors in the order of names, and compute what the model does, is seen before they are
    compiled."""
    base = pretrained.load(RunConfig(model="embedded", task="causal", device="cpu"))
    graph = lowering.Graph(
        lora.LoraModel(base, blocks=",".join(map(str, blocks)) if blocks else None)
    )
    model = plain(RANK, str(asset("model")), blocks)
    assert len(model.base_model.model.model.layers) > 1
    generator = torch.Generator().manual_seed(0)
    for tensor in parameters(model).values():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) / 4 / len(tensor) ** 0.5)
    ids, labels = batch(17)
    wanted, gradients = torch_says(model, ids, labels)
    own = {name: t.detach().requires_grad_() for name, t in sorted(parameters(model).items())}
    loss = graph(ids, labels, *own.values())
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    largest = max(float(g.abs().max()) for g in gradients.values())
    assert largest > 0
    for name, factor in own.items():
        assert factor.grad is not None
        assert torch.allclose(factor.grad, gradients[name], rtol=0, atol=1e-5 * largest)


def test_the_client_does_the_scaling(manifest: bundle.Manifest, run: lowering.Run) -> None:
    """With alpha = 3 r it gives 3 B and multiplies the gradients of 3 B by 3."""
    model, values = plain(3 * RANK), factors(manifest)
    for name, tensor in parameters(model).items():
        tensor.data.copy_(values[name])
    ids, labels = batch(20)
    wanted, gradients = torch_says(model, ids, labels)
    scale = {name: 3.0 if name.endswith("lora_B") else 1.0 for name in values}
    loss, *found = run("grad", (ids, labels, *(scale[n] * t for n, t in values.items())))
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    largest = max(float(g.abs().max()) for g in gradients.values())
    for (name, gradient), own in zip(sorted(gradients.items()), found, strict=True):
        assert torch.allclose(scale[name] * own, gradient, rtol=0, atol=1e-5 * largest)


def test_without_targets_the_loss_is_zero(manifest: bundle.Manifest, run: lowering.Run) -> None:
    ids, _ = batch(9)
    loss, *gradients = run("grad", (ids, torch.full_like(ids, -100), *factors(manifest).values()))
    assert float(loss) == 0
    assert all(not gradient.any() for gradient in gradients)


def test_the_first_label_is_no_target(manifest: bundle.Manifest, run: lowering.Run) -> None:
    ids, labels = batch(2)
    values = tuple(factors(manifest).values())
    with_first, without = labels.clone(), labels.clone()
    with_first[0, 0], without[0, 0] = 7, -100
    first, second = (run("loss", (ids, x, *values))[0] for x in (with_first, without))
    assert float(first) == float(second)


def test_4_bits_are_small_and_near(manifest: bundle.Manifest, folder: Path) -> None:
    """A quarter of fp32 in bytes (weights an eighth, then scales and the graph), its loss within
    15 % and its projected gradients correlated with the true ones."""
    sizes = {name: file.bytes for name, file in manifest.files.items()}
    assert sizes["q4.pte"] < (sizes["fp32.pte"] + sizes["base.ptd"]) / 4
    model, values = plain(RANK), factors(manifest)
    for name, tensor in parameters(model).items():
        tensor.data.copy_(values[name])
    ids, labels = batch(LENGTH)
    wanted, gradients = torch_says(model, ids, labels)
    run = lowering.load(folder / "q4.pte")
    inputs = (ids, labels, *values.values())
    assert float(run("loss", inputs)[0]) == pytest.approx(wanted, rel=0.15)
    case = selftest.Case(inputs, wanted, tuple(g for _, g in sorted(gradients.items())))
    assert selftest.correlation(run, case, 1e-2) > 0.8
    assert set(manifest.program("q4").methods) == {"loss"}


def test_planned_memory_grows_with_the_length(manifest: bundle.Manifest) -> None:
    for program in manifest.programs:
        assert program.eps[0] <= 1e-2 <= program.eps[1]
        weights = sum(manifest.files[name].bytes for name in program.files)
        for method in program.methods.values():
            planned = list(method.planned.values())
            assert list(method.planned) == [16, 32, 64, 128]
            assert weights < planned[0] and planned == sorted(set(planned))
    grad, loss = (manifest.program("fp32").methods[m].planned[LENGTH] for m in ("grad", "loss"))
    assert grad > loss > manifest.program("q4").methods["loss"].planned[LENGTH]


class Line(nn.Module):
    """A stand-in for a graph: what a program that computes w·(sum of ids) would say."""

    def forward(self, ids: Tensor, labels: Tensor, *factors: Tensor) -> Tensor:
        return torch.sum(factors[0]) * ids.sum()


def line(loss: float, gradient: float) -> list[selftest.Case]:
    ids = torch.ones(1, 4, dtype=torch.int64)
    return [selftest.Case((ids, ids, torch.ones(1, 1)), loss, (torch.full((1, 1), gradient),))]


def silent(text: str) -> None:
    pass


@pytest.mark.parametrize(
    ("loss", "gradient", "said"),
    [
        (4.0, 4.0, None),
        (4.0 * (1 + 2e-5), 4.0, "fp32 loss of 4 tokens is 4.000000, torch says 4.000080"),
        (4.0, 4.0 * (1 + 2e-5), "gradients of 4 tokens are 2.0e-05 of the largest"),
        (4.0, float("nan"), "gradients"),
        (float("nan"), 4.0, "torch says nan"),
    ],
)
def test_an_engine_that_computes_something_else(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    loss: float,
    gradient: float,
    said: str | None,
) -> None:
    answers = [torch.tensor(4.0), torch.tensor([[4.0]])]
    monkeypatch.setattr(lowering, "load", lambda *files: lambda method, inputs: answers)
    if said is None:
        selftest.check_fp32(tmp_path, line(loss, gradient), silent)
    else:
        with pytest.raises(ModelError, match=said):
            selftest.check_fp32(tmp_path, line(loss, gradient), silent)


def test_steps_are_sound_between_rounding_and_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 Σw with noise of 0.01: at a step of 1e-4 the noise wins, at 1e-2 the slope."""
    monkeypatch.setattr(selftest, "STEPS", (1e-4, 1e-2))
    noise = torch.Generator().manual_seed(0)

    def run(method: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [4.0 * inputs[2].sum() + 0.01 * torch.randn((), generator=noise)]

    ids = torch.ones(1, 4, dtype=torch.int64)
    case = selftest.Case((ids, ids, torch.zeros(4, 4)), 0.0, (torch.full((4, 4), 4.0),))
    assert selftest.sound_steps("q4", run, case, silent) == (1e-2, 1e-2)
    monkeypatch.setattr(selftest, "STEPS", (1e-5, 1e-4))
    with pytest.raises(ModelError, match=r"of q4 correlate at most -?0\.\d\d with the true ones"):
        selftest.sound_steps("q4", run, case, silent)


class Exotic(nn.Module):
    """Its forward pass has an operator for which ExecuTorch has no kernel."""

    def forward(self, ids: Tensor, labels: Tensor, *factors: Tensor) -> Tensor:
        values: Tensor = torch.linalg.eigvalsh(factors[0] @ factors[0].T)
        return values.sum() * ids.sum()


class Branching(nn.Module):
    """Its forward pass depends on a value, which no exporter captures."""

    def forward(self, ids: Tensor, labels: Tensor, *factors: Tensor) -> Tensor:
        return factors[0].sum() if ids.sum() > 0 else factors[0].prod()


@pytest.mark.parametrize("graph", [Exotic(), Branching()])
def test_a_model_that_does_not_compile(
    graph: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ids = torch.ones(1, 4, dtype=torch.int64)
    case = selftest.Case((ids, ids, torch.eye(2)), 8.0, (torch.eye(2),))
    with pytest.raises(ModelError, match="cannot run this model") as caught:
        lowering.lower_q4(graph, 8, case.inputs, tmp_path, silent)  # type: ignore[arg-type]
        selftest.check_q4(tmp_path, graph, [case], silent)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_widths_that_4_bits_cannot_have(settings: Settings) -> None:
    adapter = lora.LoraModel(pretrained.load(settings()))
    with pytest.raises(ModelError, match=r"multiples of 32, .* has 16: use --base fp32"):
        lowering.quantize(lowering.Graph(adapter))


def test_a_failed_export_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    def half(graph: Any, length: int, case: Any, folder: Path, say: Any) -> lowering.Lowered:
        (folder / "fp32.pte").write_text("half")
        return lowering.Lowered(("fp32.pte",), {"loss": {length: 1}})

    def fail(*_: Any) -> None:
        raise ModelError("self-test failed")

    def end(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").touch()  # of somebody else
    monkeypatch.setattr(lowering, "lower_fp32", half)
    monkeypatch.setattr(lowering, "load", lambda *_: {})
    for check, error in ((fail, ModelError), (end, KeyboardInterrupt)):
        monkeypatch.setattr(selftest, "check_fp32", check)
        with pytest.raises(error):
            export.make(
                export.ExportRequest(
                    source=str(tiny_model),
                    out=tmp_path / "out",
                    key=tmp_path / "k.key",
                    rank=2,
                    length=64,
                    bases="fp32",
                )
            )
        assert sorted(path.name for path in tmp_path.iterdir()) == ["k.key", "k.pub", "out.part"]
        assert [path.name for path in (tmp_path / "out.part").iterdir()] == ["mine"]


def test_an_adapter_brings_its_base_rank_and_targets(settings: Settings, tmp_path: Path) -> None:
    model = lora.LoraModel(pretrained.load(settings()), ["q_proj", "v_proj"])
    spec = settings().lora
    model.save(tmp_path / "adapter", Adapter(model.init(spec, 0)), spec)
    found = export.wanted(str(tmp_path / "adapter"), None, None, None)
    assert found.model == settings().model
    assert found.rank == spec.rank
    assert found.targets == ("q_proj", "v_proj")
    assert export.wanted(str(tmp_path / "adapter"), 7, ["k_proj"], None)[1:3] == (7, ("k_proj",))
    assert export.wanted("embedded", None, None, None) == ("embedded", 8, None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task_type": "SEQ_CLS"}, "is LORA of SEQ_CLS"),
        ({"peft_type": "IA3"}, "is IA3 of CAUSAL_LM"),
        ({"rank_pattern": {"q_proj": 2}}, "has ranks by module"),
    ],
)
def test_adapters_that_no_phone_trains(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
    config["base_model_name_or_path"] = "embedded"
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=said):
        export.wanted(str(tmp_path), None, None, None)


def command(*more: str) -> Any:
    return CliRunner().invoke(app, ["export", *more])


def test_the_command(manifest: bundle.Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[export.ExportRequest] = []

    def make(request: export.ExportRequest, say: Callable[[str], None]) -> bundle.Manifest:
        say("compiling")
        asked.append(request)
        return manifest

    monkeypatch.setattr(export, "make", make)
    options = "--to executorch --out o --key k --rank 4 --target-modules q,v --length 32 --base q4"
    result = command("org/name", *options.split())
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("o: fp32 (grad, loss; 2.0 MB), q4 (loss; 0.5 MB); every")
    assert asked == [
        export.ExportRequest(
            source="org/name",
            out=Path("o"),
            key=Path("k"),
            rank=4,
            targets=["q", "v"],
            length=32,
            bases="q4",
        )
    ]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ("--key K", 2, "needs --out, a new folder, and --key, a file"),
        ("--out {out}", 2, "needs --out, a new folder, and --key, a file"),
        ("--out {out} --key {key} --base fp16", 2, "--base 'fp16' is unknown: use fp32, q4"),
        ("--out {out} --key {key} --length 7", 2, "--length 7: at least 8 tokens"),
        ("--out {out} --key {key} --length 129", 2, "more than the 128 positions of"),
        ("--out {out} --key {key} --length 64 --rank 99", 1, "rank 99 is larger than module"),
        (
            "--out {out} --key {key} --length 64 --target-modules q",
            1,
            "target modules q match nothing",
        ),
        ("--out {full} --key {key}", 2, "is not empty: name a new folder"),
    ],
)
def test_mistakes_are_one_line(
    tiny_model: Path, tmp_path: Path, options: str, code: int, said: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    where = {"out": tmp_path / "out", "key": tmp_path / "k.key", "full": tmp_path / "full"}
    result = command(str(tiny_model), "--to", "executorch", *options.format(**where).split())
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_classifier_is_no_language_model(tmp_path: Path) -> None:
    transformers.T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2).save_pretrained(
        tmp_path / "t5"
    )
    key = ("--out", str(tmp_path / "out"), "--key", str(tmp_path / "k.key"))
    result = command(str(tmp_path / "t5"), "--to", "executorch", *key)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot load model")
    assert result.stderr.count("\n") == 1


def test_a_classifier_of_a_decoder_is_no_language_model(tiny_model: Path, tmp_path: Path) -> None:
    """It would load, with the head of a language model drawn at random."""
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    changed = {**json.loads(path.read_text()), "architectures": ["LlamaForSequenceClassification"]}
    path.write_text(json.dumps(changed))
    key = ("--out", str(tmp_path / "out"), "--key", str(tmp_path / "k.key"), "--length", "64")
    result = command(str(tmp_path / "model"), "--to", "executorch", *key)
    assert result.exit_code == 1
    assert "is LlamaForSequenceClassification, not LlamaForCausalLM" in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("option", ["--key k", "--length 256", "--base fp32,q4"])
def test_options_of_programs_are_not_for_a_merged_model(option: str) -> None:
    result = command("adapter", "--to", "merged", *option.split())
    assert result.exit_code == 2
    assert "are for --to executorch: leave them out" in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_executorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "executorch" else found(n, *a)
    )
    with pytest.raises(ConfigError, match=r"pip install 'corolla\[phones\]'"):
        export.make(
            export.ExportRequest(source="embedded", out=tmp_path / "out", key=tmp_path / "k.key")
        )
