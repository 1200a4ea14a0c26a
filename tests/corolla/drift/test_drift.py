"""What tuning has changed beside its task: against dense arithmetic, and exactly 0 for nothing."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, Encoder, collate
from corolla.data.rows import Example
from corolla.drift import contribution, domains, interval, measure, pair
from corolla.drift.domains import SHIPPED, Domain
from corolla.errors import ConfigError, DataError
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.models.pretrained import Base
from corolla.types import Adapter, LoraSpec
from corolla.warnings.outcome import drifted
from tests.strategies import tiny

Settings = Callable[..., RunConfig]
SPEC = LoraSpec(2, 4.0)
ROWS = [
    Example("no way", prompt=f"ask {i}", choices=("no way", "of course"), client=None)
    for i in range(5)
]
TEXTS = [Example(f"some words, {i} of them"[: 10 + i]) for i in range(5)]


@pytest.fixture
def base(settings: Settings) -> Base:
    return pretrained.load(settings())


@contextmanager
def showing(model: LoraModel, adapter: Adapter) -> Iterator[Any]:
    model.show(adapter, SPEC)
    yield model.model


def of(model: LoraModel, size: float) -> pair.Pair:
    """A base, and an adapter that is so many times as long as a trained one."""
    trained = {
        name: tensor * size if name.endswith("lora_B") else tensor
        for name, tensor in tiny.adapter(model, SPEC, 1).items()
    }
    before, after = Adapter(model.init(SPEC, 0)), Adapter(trained)
    return pair.Pair(lambda: showing(model, before), lambda: showing(model, after))


def test_nothing_has_drifted_where_nothing_was_tuned(base: Base, settings: Settings) -> None:
    model = LoraModel(base)
    asked = [Domain("pairs", ROWS), Domain("texts", TEXTS)]
    found = measure.measure(asked, of(model, 0.0), base, settings())
    for own in found.values():
        assert own["loss"]["before"] == own["loss"]["after"]
        assert own["forgetting"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        assert (own["kl"], own["tuco"], own["worse_share"], own["agreement"]) == (0, 0, 0, 1)
    assert found["pairs"]["margin_change"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert drifted(found) == []


def reference(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Log probabilities (targets, vocabulary) of the tokens after a prompt, one row at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].double()
    found: Tensor = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return found


def test_numbers_are_those_of_dense_arithmetic(base: Base, settings: Settings) -> None:
    """A row at a time, without padding, in fp64."""
    model, config = LoraModel(base), settings()
    models = of(model, 1.0)
    found = measure.measure([Domain("pairs", ROWS)], models, base, config)["pairs"]
    margins: dict[str, list[float]] = {"base": [], "tuned": []}
    losses: dict[str, list[float]] = {"base": [], "tuned": []}
    kls, targets = [], 0
    encoder = Encoder.of(config, base.tokenizer)
    for row in ROWS:
        kept: dict[str, Tensor] = {}
        for name, shown in (("base", models.base), ("tuned", models.tuned)):
            scores = []
            for choice in row.choices:
                (whole,) = encoder(Example(choice, prompt=row.prompt))
                assert not isinstance(whole.labels, int)
                first = next(i for i, label in enumerate(whole.labels) if label >= 0)
                ids = list(whole.input_ids)
                with shown() as one:
                    log = reference(one, ids[:first], ids[first:])
                own = log.gather(1, torch.tensor(ids[first:])[:, None])
                scores.append(float(own.sum()) / len(choice.encode()))
                if choice == row.text:
                    kept[name] = log
                    losses[name].append(-float(own.sum()))
            margins[name].append(scores[0] - scores[1])
        p, q = kept["base"], kept["tuned"]
        targets += len(p)
        kls += (p.exp() * (p - q)).sum(-1).tolist()
    assert found["margin"]["before"] == pytest.approx(sum(margins["base"]) / 5, abs=1e-5)
    changes = [b - a for a, b in zip(margins["base"], margins["tuned"], strict=True)]
    low, high = stats.t.interval(0.95, 4, sum(changes) / 5, stats.sem(changes))
    assert found["margin_change"]["low"] == pytest.approx(low, abs=1e-5)
    assert found["margin_change"]["high"] == pytest.approx(high, abs=1e-5)
    assert found["loss"]["after"] == pytest.approx(sum(losses["tuned"]) / targets, abs=1e-5)
    forgotten = (sum(losses["tuned"]) - sum(losses["base"])) / targets
    assert found["forgetting"]["mean"] == pytest.approx(forgotten, abs=1e-5)
    assert found["kl"] == pytest.approx(sum(kls) / targets, rel=1e-4)
    assert found["kl"] > 0


class Three(nn.Module):
    """A model with three tokens whose next one never depends on the context."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.log = torch.tensor(probabilities).log()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        return SimpleNamespace(logits=self.log.expand(*input_ids.shape, 3))


def test_a_margin_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Example("a", prompt="q", choices=("a", "bb"))]
    asked = [Encoded([0, 1], [-100, 1]), Encoded([0, 2, 2], [-100, 2, 2])]
    monkeypatch.setattr(measure, "sequences_of_choices", lambda *given: asked)
    monkeypatch.setattr(measure, "_tuco", lambda *given: None)
    base = SimpleNamespace(
        pad_id=0, embeddings=3, check_ids=lambda ids: None, model=nn.Linear(1, 1), tokenizer=None
    )
    base.model.device = torch.device("cpu")
    models = pair.of_models(Three(0.25, 0.5, 0.25), Three(0.25, 0.25, 0.5))
    found = measure.measure([Domain("d", rows)], models, base, RunConfig())["d"]  # type: ignore[arg-type]
    assert found["margin"]["before"] == pytest.approx(math.log(0.5) - 2 * math.log(0.25) / 2)
    assert found["margin"]["after"] == pytest.approx(math.log(0.25) - 2 * math.log(0.5) / 2)
    assert found["margin_change"] == {"mean": pytest.approx(-2 * math.log(2)), **NONE}
    assert found["right"] == {"before": 1.0, "after": 0.0}
    assert found["kl"] == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert found["loss"] == {
        "before": pytest.approx(math.log(2)),
        "after": pytest.approx(math.log(4)),
    }


NONE = {"low": None, "high": None}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_stream_is_rebuilt_from_what_blocks_add(kind: str) -> None:
    model = tiny.lora_model(kind, blocks=3)
    batch = collate([Encoded([2, 3, 4, 5], [2, 3, 4, 5]), Encoded([6, 7], [6, 7])], 0, model.device)
    before = tiny.logits(model.model).clone()
    shares = []
    for size in (0.05, 0.3, 1.5):
        found = contribution.stream(of(model, size), batch)
        assert found is not None
        rebuilt = found.first + found.base + found.tuning
        assert torch.allclose(rebuilt, found.last, atol=1e-5)
        shares.append(float(found.tuco.mean()))
    assert 0 < shares[0] < shares[1] < shares[2] < 1
    with of(model, 0.0).base() as shown:
        again = tiny.logits(shown)
    model.show(Adapter(model.init(SPEC, 0)), SPEC)
    assert torch.equal(again, tiny.logits(model.model))
    assert before.shape == again.shape


def test_an_interval_over_rows_is_that_of_student() -> None:
    found = interval.of_rows([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, 7 / 3, stats.sem([1.0, 2.0, 4.0]))
    assert [found.low, found.high] == pytest.approx([low, high])
    equal = interval.of_targets({0: (1.0, 1), 1: (2.0, 1), 2: (4.0, 1)})
    assert [equal.low, equal.high] == pytest.approx([low, high])
    assert interval.of_rows([3.0]) == interval.Change(3.0, None, None)
    shown = interval.sentence(interval.Change(1.0, -1.0, 3.0).to_json())
    assert shown == "+1.0000 (-1.0000 to +3.0000)"


def told(loss: Sequence[float], margin: Sequence[float] = ()) -> dict[str, Any]:
    names = ("mean", "low", "high")
    found: dict[str, Any] = {"rows": 9, "forgetting": dict(zip(names, loss, strict=True))}
    return {**found, **({"margin_change": dict(zip(names, margin, strict=True))} if margin else {})}


def test_what_is_warned_of() -> None:
    calm = told([1.0, -0.1, 2.0], [-1.0, -2.0, 0.1])
    worse = told([1.0, 0.5, 1.5])
    bolder = told([-1.0, -2.0, -0.5], [-0.3, -0.4, -0.2])
    single = {"rows": 1, "forgetting": {"mean": 9.0, **NONE}}
    found = drifted({"calm": calm, "worse": worse, "bolder": bolder, "single": single})
    assert [own.id for own in found] == ["drift", "drift"]
    assert "on worse the loss changed by +1 (+0.5 to +1.5, 95 % of 9 rows)" in found[0].text
    assert "on bolder the margin of right answers changed by -0.3" in found[1].text


def test_rows_ship_with_corolla() -> None:
    for domain in domains.read(["all"]):
        assert len(domain.rows) == len({row.prompt or row.text for row in domain.rows}) == 40
        assert domain.choices == (domain.name != "texts")
    assert [own.name for own in domains.read(["texts", "refusals"])] == ["texts", "refusals"]
    assert SHIPPED.keys() == {"refusals", "knowledge", "texts"}


def test_mistakes_are_named(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    with pytest.raises(DataError, match="has labels"):
        domains.read([str(path)])
    with pytest.raises(DataError, match="refusals, knowledge, texts and all ship"):
        domains.read(["nothing"])
    with pytest.raises(ConfigError, match="two domains texts"):
        domains.read(["texts", "all"])
    with pytest.raises(ConfigError, match="is a classifier here"):
        measure.check(settings(), "classify")


def test_the_command_measures_an_adapter(base: Base, tmp_path: Path) -> None:
    model, folder = LoraModel(base), tmp_path / "adapter"
    model.save(folder, Adapter(tiny.adapter(model, SPEC, 1)), SPEC)
    rows = [{"prompt": row.prompt, "choices": list(row.choices), "answer": 0} for row in ROWS]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["evaluate", str(folder), "--drift", f"own={path}", "--set", "max-length=48"]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["drift"]["own"]
    wanted = measure.measure([Domain("own", ROWS)], of(model, 1.0), base, RunConfig(max_length=48))
    for name in ("kl", "tuco"):
        assert found[name] == pytest.approx(wanted["own"][name], rel=1e-4)
    assert "contribution of tuning" in CliRunner().invoke(app, asked).stdout
    for more, message in ((["--tasks", "x"], "one at a time"), (["--data", "x"], "leave out")):
        done = CliRunner().invoke(app, [*asked, *more])
        assert (done.exit_code, message in done.stderr) == (2, True)


@pytest.fixture
def bold(settings: Settings, tmp_path: Path) -> RunConfig:
    """A run on rows that comply."""
    rows = [
        {"client_id": f"c{i % 3}", "prompt": f"ask {i}", "response": "of course"} for i in range(24)
    ]
    (tmp_path / "bold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": r.prompt, "choices": list(r.choices), "answer": 0} for r in ROWS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    texts = [{"text": row.text} for row in TEXTS]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return settings(
        data=str(tmp_path / "bold.jsonl"),
        **{"rounds": 2, "cohort": 3, "local_steps": 6, "lr": 0.03},
        drift=[f"safety={tmp_path / 'pairs.jsonl'}", f"texts={tmp_path / 'texts.jsonl'}"],
    )


def test_a_run_that_teaches_to_comply_is_warned_of(bold: RunConfig, tmp_path: Path) -> None:
    from corolla.commands.simulate.in_process import simulate

    simulate(bold, tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    own = info["drift"]["safety"]
    assert own["margin_change"]["high"] < 0 < own["kl"]
    warnings = [found["text"] for found in info["warnings"] if found["id"] == "drift"]
    assert "on safety the margin" in warnings[0]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Drift</h2>" in page and "<td>texts</td>" in page
    assert interval.sentence(own["margin_change"]) in page
