"""What `corolla plan` says is what then happens."""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.commands.plan import lengths
from corolla.commands.plan.plan import Privacy, plan, privacy
from corolla.commands.simulate.in_process import simulate
from corolla.config.build import build_strategy
from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.estimates.footprint import Batch
from corolla.privacy.accounting import gaussian_epsilon
from corolla.privacy.example_level import example_level
from corolla.privacy.ledger import Ledger
from corolla.server.rounds.federation import Federation
from tests.corolla.models import checkpoints

SMALL = ["clients=4", "cohort=2", "rounds=2", "local-steps=2", "batch-size=4", "eval-examples=8"]
SMALL += ["eval-clients=2", "eval-client-examples=4", "max-length=64", "threads=1"]
ROOT = Path(__file__).resolve().parent.parent.parent.parent.parent


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["plan", *arguments])
    return done.exit_code, done.output


def options(settings: Sequence[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["strategy=flora", 'codec=["int8"]', 'codec-down=["fp16"]'],
        ["strategy=rolora", "start=olora"],
        ["strategy=lisa", "strategy.layers=1"],
        ["strategy=lisa", "strategy.layers=1", "parameters=full", "rounds=4", "strategy.always=[]"],
        ["strategy=seed_pool"],
        ["strategy=fedex_lora", "cohort=4", "rounds=3", "local-steps=1", "max-rank=12"],
    ],
)
def test_bytes_are_those_of_the_run(tmp_path: Path, changes: list[str]) -> None:
    config = load(None, {}, [*SMALL, *changes])
    found = plan(config)
    summary = simulate(config, tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    if found.traffic.at_most:
        assert summary.bytes_up <= found.traffic.total_up
    else:
        assert (
            summary.bytes_up == found.traffic.total_up == sum(line["formula_up"] for line in lines)
        )
        for line in lines:
            assert found.traffic.up[0] <= line["bytes_up"] / line["clients"] <= found.traffic.up[1]
    if config.strategy == "lisa":  # who receives what is followed round by round
        assert summary.bytes_down == found.traffic.total_down
    assert summary.bytes_down <= found.traffic.total_down <= 2 * summary.bytes_down + 100_000
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (found.clients, found.cohort) == (info["num_clients"], info["cohort"])


FULL = ["--set", "parameters=full", "--set", "max-length=32"]
"""Training of all parameters."""


def test_all_parameters_fit_where_a_part_of_them_is_trained_in_a_round() -> None:
    """Gradients and two moments in fp32: 12 bytes for each value that a round trains."""
    layers = ["--set", "strategy.layers=1", "--set", "strategy.choose=suffix"]
    layers += ["--set", "strategy.always=[]"]
    given = [*FULL, "--cohort", "4", "--set", "batch-size=2", "--json"]
    least = {}
    for name, more in (("fedavg", []), ("lisa", layers)):
        code, output = run("--strategy", name, *more, *given)
        assert code == 0
        least[name] = json.loads(output)["memory"]["client"]["terms"]
    block = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 352 * 128 + 2 * 128
    name = "gradients and optimiser"
    assert (least["fedavg"][name], least["lisa"][name]) == (12 * 1_000_576, 12 * block)
    totals = {name: sum(terms.values()) for name, terms in least.items()}
    budget = f"{(totals['fedavg'] + totals['lisa']) // 2_000_000}MB"
    assert run("--strategy", "lisa", *layers, *given, "--memory", budget)[0] == 0


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _chat(folder: Path) -> Path:
    place = checkpoints.llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    return place


def _turns(number: int) -> dict[str, object]:
    told = (("user", "q"), ("assistant", "a" * (number % 9 + 1)))
    return {"messages": [{"role": role, "content": text} for role, text in told * 2]}


def _labelled(number: int) -> dict[str, object]:
    """Rows of two labels, where the checkpoint has three."""
    return {"text": "x" * (number % 17 + 1), "label": ("no", "yes")[number % 2]}


@pytest.mark.parametrize(
    ("make", "row"),
    [
        (_chat, _turns),
        (checkpoints.bert, _labelled),
        (checkpoints.masked_bert, _labelled),
        (checkpoints.masked_albert, _labelled),
    ],
)
def test_lengths_and_bytes_are_those_of_templates_and_classifiers(
    tmp_path: Path,
    make: Callable[[Path], Path],
    row: Callable[[int], dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[dict[str, object]] = [{"client_id": f"c{i % 3}", **row(i)} for i in range(30)]
    if row is _turns:
        rows += [{"client_id": "empty", "prompt": "p" * 99, "response": "a"} for _ in range(4)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(own) + "\n" for own in rows))
    given = {"model": str(make(tmp_path)), "data": str(tmp_path / "x.jsonl"), "rank": 2}
    few = ["rounds=1", "cohort=2", "local-steps=3", "batch-size=1", "max-length=64", "threads=1"]
    config = load(None, given, [*few, "eval-examples=8", "eval-clients=0"])
    drawn: list[Batch] = []
    largest = lengths._largest

    def noted(own: Sequence[Batch]) -> Batch:
        drawn.extend(own)
        return largest(own)

    monkeypatch.setattr(lengths, "_largest", noted)
    found = plan(config)
    steps: list[int] = []
    summary = simulate(config, tmp_path / "run", on_step=steps.append)
    assert [batch.tokens for batch in drawn] == steps
    assert (found.traffic.total_up, found.traffic.total_down) == (
        summary.bytes_up,
        summary.bytes_down,
    )
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (found.clients, found.cohort) == (info["num_clients"], info["cohort"])


@pytest.mark.parametrize("name", ["first order, length x 4", "zeroth order"])
def test_memory_is_right_within_a_fifth(name: str) -> None:
    """The peak of a real process that loads the embedded model and trains."""
    script = [sys.executable, "-m", "experiments.bench.memory", "--child", name, "--steps", "3"]
    done = subprocess.run(script, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["measured"] > 4e8, "a process with torch in it"
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.2)
    # Most of that is libraries, whose pages differ from machine to machine: what training adds to
    # them must be in the right order, too.
    predicted = found["predicted"] - found["terms"]["libraries"]
    assert 0.5 < predicted / (found["measured"] - found["imports"]) < 2


def test_the_table_has_every_promise() -> None:
    code, output = run(*options(SMALL), "--memory", "2GB")
    assert code == 0
    for part in ("sent by a client", "received a round", "in all", "memory of a client"):
        assert part in output
    for part in ("memory of a simulation", "within 2.0 GB", "estimated", "no differential privacy"):
        assert part in output


def test_json_is_plain(tmp_path: Path) -> None:
    code, output = run(*options(SMALL), "--json", "--memory", "700MB")
    assert code == 0
    found = json.loads(output)
    assert (found["epsilon"], found["privacy"]) == (None, None)
    for own in found["memory"].values():
        assert own["total"] == sum(own["terms"].values())
    assert found["budget"]["client"]["total"] <= 700_000_000
    assert found["estimated_seconds"]["client_round"] > 0
    assert found["bytes_per_client_round"]["up"] == [299_008, 299_008]


PRIVATE = ["--dp", "client", "--set", "noise-multiplier=2", "--rounds", "3"]


def test_epsilon_is_known_beforehand(tmp_path: Path) -> None:
    """After each round; at worst, for the run may ask a client less often."""
    config = load(None, {"dp": "client", "noise_multiplier": 2.0, "clip": 0.01}, SMALL)
    found = plan(config).privacy
    assert found is not None and found.noise == (2.0, 2.0)
    wanted = [gaussian_epsilon(rounds**0.5 / 2, 1e-5) for rounds in (1, 2)]
    assert [own.epsilon for own in found.after.values()] == pytest.approx(wanted)
    simulate(config, tmp_path / "run")
    told = json.loads((tmp_path / "run" / "run.json").read_text())["privacy"]
    assert told["epsilon"] <= found.end.epsilon


@pytest.mark.parametrize("noise", [{"epsilon": 4.0}, {"noise_multiplier": 2.0}])
def test_of_examples_the_worst_client_is_told(tmp_path: Path, noise: dict[str, float]) -> None:
    """Of 9 and 30 rows 7 and 24 are trained on; each client may take part twice."""
    names = [name for name, number in (("a", 9), ("b", 30)) for _ in range(number)]
    rows = [{"client_id": name, "text": f"{name} {i}"} for i, name in enumerate(names)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["rounds=4", "participations=2", f"data={tmp_path / 'data.jsonl'}", "cohort=2"]
    config = load(None, {"dp": "example", **noise}, [*SMALL[2:], *given])
    found = plan(config).privacy
    assert found is not None
    spent = [own.epsilon for own in found.after.values()]
    assert 0 < spent[0] < spent[1] == spent[2] == spent[3] == found.end.epsilon
    if "epsilon" in noise:
        assert found.noise[0] < found.noise[1]
        assert found.end.epsilon == pytest.approx(4.0, rel=0.01)
    else:
        assert found.noise == (2.0, 2.0)
        assert f"q = {4 / 7:.4g}" in found.end.line()


def counted(config: RunConfig, sizes: Sequence[int]) -> Privacy:
    """Returns the planned privacy of clients with so many training examples."""
    numbers = {f"c{i}": size for i, size in enumerate(sizes)}
    found = privacy(Federation("0" * 32, config, build_strategy(config), numbers, lambda spec: {}))
    assert found is not None
    return found


def ledgers(config: RunConfig, sizes: Sequence[int], folder: Path) -> list[float]:
    """The largest epsilon in the ledgers of these clients after each round of a run of all."""
    most = []
    levels = [example_level(config, size) for size in sizes]
    files = [Ledger(folder / f"{i}.jsonl") for i in range(len(sizes))]
    for round in range(1, config.rounds + 1):
        for ledger, level in zip(files, levels, strict=True):
            ledger.spend("run", round, level.release)
        most.append(max(ledger.epsilon(config.delta, "run") for ledger in files))
    return most


def by_dp_accounting(config: RunConfig, size: int) -> float:
    """Epsilon of a client of `size` examples, from dp-accounting and the text of the settings."""
    epochs, batch = config.local_epochs, config.batch_size
    steps = -(-size // batch) * epochs if epochs else config.local_steps
    assert config.noise_multiplier is not None
    one = PoissonSampledDpEvent(min(1.0, batch / size), GaussianDpEvent(config.noise_multiplier))
    accountant = PLDAccountant(
        NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3
    )
    accountant.compose(one, steps * config.rounds)
    return float(accountant.get_epsilon(config.delta))


def test_epsilon_of_a_size_between_smallest_and_largest(tmp_path: Path) -> None:
    """17 examples in batches of 16 take two steps, in which each is drawn nearly always."""
    config = RunConfig(
        dp="example", noise_multiplier=1.0, delta=1e-3, rounds=2, batch_size=16, local_epochs=1
    )
    found = counted(config, [16, 17, 400])
    assert found.end.epsilon == pytest.approx(7.268, abs=2e-3)
    assert found.end.epsilon == ledgers(config, [16, 17, 400], tmp_path)[-1]


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    batch=st.integers(4, 32),
    steps=st.sampled_from([{"local_epochs": 1}, {"local_epochs": 2}, {"local_steps": 3}]),
    rounds=st.integers(1, 3),
    noise=st.floats(1.5, 4.0),
)
def test_a_run_never_spends_more_than_was_planned(
    sizes: list[int], batch: int, steps: dict[str, int], rounds: int, noise: float
) -> None:
    """As much where all clients take part in each round; dp-accounting says the same."""
    config = RunConfig(
        dp="example",
        noise_multiplier=noise,
        delta=1e-3,
        rounds=rounds,
        batch_size=batch,
        **steps,
    )
    found = counted(config, sizes)
    with tempfile.TemporaryDirectory() as folder:
        spent = ledgers(config, sizes, Path(folder))
    assert {number: own.epsilon for number, own in found.after.items()} == dict(
        enumerate(spent, start=1)
    )
    oracle = max(by_dp_accounting(config, size) for size in sizes)
    assert found.end.epsilon == pytest.approx(oracle, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_nor_with_noise_that_is_made_for_a_budget(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 200) for _ in range(5)]
    config = RunConfig(
        dp="example", epsilon=3.0, delta=1e-3, rounds=4, batch_size=draw.randint(4, 32)
    )
    found = counted(config, sizes)
    spent = ledgers(config, sizes, tmp_path)
    assert {number: own.epsilon for number, own in found.after.items()} == dict(
        enumerate(spent, start=1)
    )
    assert 2.99 <= found.end.epsilon <= 3.0
    noises = [example_level(config, size).noise_multiplier for size in sizes]
    assert found.noise == (min(noises), max(noises))


def test_the_run_says_what_the_plan_said(tmp_path: Path) -> None:
    """Plan, terminal and run.json; with three clients that all take part in both rounds."""
    rows = [
        {"client_id": name, "text": f"{name} {i}", "split": "train"}
        for name, number in (("a", 4), ("b", 5), ("c", 12))
        for i in range(number)
    ]
    rows += [{"client_id": "a", "text": split, "split": split} for split in ("val", "test")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["rounds=2", "local-epochs=1", "batch-size=4", f"data={tmp_path / 'data.jsonl'}"]
    own += ["cohort=3", "delta=1e-3", "noise-multiplier=1"]
    config = load(None, {"dp": "example"}, [*SMALL[-3:], *own])
    found = plan(config).privacy
    assert found is not None
    summary = simulate(config, tmp_path / "run")
    told = json.loads((tmp_path / "run" / "run.json").read_text())["privacy"]
    assert told["epsilon"] == found.end.epsilon
    assert f"epsilon {found.end.epsilon:.4g} " in told["line"]
    assert summary.privacy == told["line"]


def test_many_sizes_leave_out_rounds_on_the_way() -> None:
    """The last one is told, of all sizes."""
    config = RunConfig(dp="example", noise_multiplier=2.0, delta=1e-4, rounds=20, local_epochs=1)
    assert len(counted(config, range(8, 16)).after) == 10
    assert list(counted(config, range(8, 200, 2)).after) == [20]


def test_the_plan_of_privacy_is_shown() -> None:
    small = [setting for setting in SMALL if not setting.startswith("rounds")]
    code, output = run(*options(small), *PRIVATE, "--json")
    assert code == 0, output
    found = json.loads(output)
    assert (
        found["epsilon"] == found["privacy"]["epsilon"] == found["privacy"]["after"][-1]["epsilon"]
    )
    assert found["privacy"]["noise_multiplier"] == [2.0, 2.0]
    code, output = run(*options(small), *PRIVATE)
    shown = " ".join(output.split())
    for part in ("to add or remove one client", "after round 1", "noise multiplier 2"):
        assert part in shown


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["--memory", "much"], 2, "--memory: expected a size such as 2GB"),
        (["--memory", "100MB"], 2, "the least is"),
        (
            [*FULL, "--strategy", "lisa", "--memory", "440MB"],
            2,
            "440 MB of memory is too little for lisa on embedded: the least is",
        ),
        (["--model", "./nowhere"], 1, "not on this machine"),
        (["--data", "nowhere.jsonl"], 1, "cannot read data file"),
        (["--set", "max-length=100000"], 2, "512 positions"),
        (["--cohort", "1000"], 2, "cohort 1000 is larger"),
        (["--strategy", "fedsomething"], 2, "unknown strategy"),
        ([*PRIVATE, "--cohort", "9", "--clients", "9", "--set", "separation=2"], 2, "needs 18"),
        (
            [*PRIVATE, "--cohort", "9", "--clients", "9", "--set", "participations=1"],
            2,
            "9 clients have 9: set rounds to 1 or less",
        ),
    ],
)
def test_wrong_inputs_get_one_line(arguments: list[str], code: int, why: str) -> None:
    found, output = run(*arguments)
    assert found == code
    assert why in output
    assert output.startswith("error: ") and output.count("\n") == 1


def test_nothing_of_the_model_is_loaded(tmp_path: Path, tiny_model: Path) -> None:
    """Weights that end after the header cannot be loaded; the plan does not mind."""
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(whole[:length])
    code, output = run("--model", str(tmp_path), *options(SMALL), "--json")
    assert code == 0, output
    assert json.loads(output)["parameters"] > 1000
