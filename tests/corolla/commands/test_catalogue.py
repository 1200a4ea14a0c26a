"""The catalogue against the specification's formulas, and real shapes."""

import importlib
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.commands import catalogue
from corolla.commands.catalogue import COHORT, QUERIES, REFERENCES
from corolla.embedded.assets import asset
from corolla.strategies.listing.registry import STRATEGIES
from corolla.types import Size

PAGE = Path(__file__).resolve().parents[3] / "docs" / "strategies.md"
QV, ALL = "Llama-3.2-3B, q and v, rank 16", "Llama-3.2-3B, all linear layers, rank 32"
LLAMA_3B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
Bytes = Callable[[Size], tuple[set[int], set[int]]]


def both(values: Callable[[Size], int]) -> Bytes:
    return lambda s: ({4 * values(s)}, {4 * values(s)})


def of(up: Callable[[Size], int], down: Callable[[Size], int]) -> Bytes:
    return lambda s: ({up(s)}, {down(s)})


ADAPTERS = both(lambda s: s.A + s.B)
TAU = QUERIES
FORMULAS: dict[str, Bytes] = {
    **dict.fromkeys(("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"), ADAPTERS),
    **dict.fromkeys(("flexlora", "hetlora", "lora_fair", "feddpa", "fedmezo"), ADAPTERS),
    "scaffold": both(lambda s: 2 * (s.A + s.B)),
    "ffa_lora": both(lambda s: s.B),
    "fedsvd": of(lambda s: 4 * s.B, lambda s: 4 * (s.A + s.B)),
    # each of the factors is sent by turns, and a byte says which
    "rolora": lambda s: ({4 * s.A, 4 * s.B}, {4 * s.A + 1, 4 * s.B + 1}),
    "fedsa_lora": both(lambda s: s.A),
    "fed_sb": both(lambda s: s.modules * s.rank**2),
    "flora": of(lambda s: 4 * (s.A + s.B), lambda s: 4 * COHORT * (s.A + s.B)),
    "fedex_lora": of(lambda s: 4 * (s.A + s.B), lambda s: 4 * COHORT * (s.A + s.B)),
    # upwards with the step, 4 bytes, or with the step and the seed in place of indices
    "fedkseed": of(lambda s: 8 * TAU + 4, lambda s: 4 * 4096 + 4),
    "fedkseed_pro": of(lambda s: 8 * TAU + 4, lambda s: 8 * 1024 + 4),
    "seed_pool": of(lambda s: 2 * TAU + 8, lambda s: 2 * 512 + 4),
    "ferret": of(lambda s: 4 * 4096, lambda s: 4 * 4096 + 4),
    # adapters, the seed and the round of the directions
    "mixed": lambda s: ({4 * (s.A + s.B), 4 * TAU + 8}, {4 * (s.A + s.B) + 16}),
}


def formula_of(name: str) -> Bytes:
    """From the table above, or BYTES of the strategy's own test: each strategy has one."""
    if name in FORMULAS:
        return FORMULAS[name]
    found: Bytes = importlib.import_module(f"tests.strategies.test_{name}").BYTES
    return found


def test_all_strategies_are_listed_and_have_a_formula() -> None:
    assert [entry.name for entry in catalogue.entries()] == list(STRATEGIES) != []
    assert FORMULAS.keys() <= STRATEGIES.keys()
    assert all(formula_of(name) for name in STRATEGIES)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_bytes_are_those_of_the_specification(name: str, reference: str) -> None:
    found = catalogue.costs(STRATEGIES[name](), REFERENCES[reference])
    up, down = formula_of(name)(REFERENCES[reference])
    assert {cost.up for cost in found} == up
    assert {cost.down for cost in found} == down


@pytest.mark.parametrize(
    ("name", "reference", "up"),
    [
        ("fedavg", QV, 2 * 9_175_040),  # published in fp16
        ("fedavg", ALL, 2 * 97_255_424),
        ("ffa_lora", QV, 2 * 3_670_016),
        ("ffa_lora", ALL, 2 * 49_545_216),
    ],
)
def test_bytes_of_worked_figures(name: str, reference: str, up: int) -> None:
    assert catalogue.costs(STRATEGIES[name](), REFERENCES[reference])[0].up == up


def test_ranks_are_those_of_the_factors_after_so_many_rounds() -> None:
    """8 clients of rank 16: FLoRA stacks all, FedEx-LoRA the residual of 7 beside its adapter."""
    found = {e.name: e.ranks[QV] for e in catalogue.entries()}
    assert (found.pop("flora"), found.pop("fedex_lora")) == ((0, 128), (16, 112))
    assert set(found.values()) == {(16, 0)}
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| flora | ")]
    size = 4 * (REFERENCES[QV].A + REFERENCES[QV].B) * 10 * 8
    assert f"| 128 a round | ≤ {size / 1e9:.1f} GB |" in rows[0]


def test_what_is_sent_once() -> None:
    size = REFERENCES[QV]
    once = {e.name: {cost.once for cost in e.costs[QV]} for e in catalogue.entries()}
    assert once.pop("ffa_lora") == {4 * size.A}
    assert once.pop("fed_sb") == {4 * (size.A + size.B)}
    assert once.pop("rolora") == {4 * size.A, 4 * size.B}
    assert set.union(*once.values()) == {0}


@pytest.mark.parametrize(
    ("reference", "targets"),
    [
        (QV, ["q_proj", "v_proj"]),
        (ALL, "all-linear"),
        ("embedded model, all linear layers, rank 8", "all-linear"),
    ],
)
def test_reference_sizes_are_pefts(reference: str, targets: list[str] | str) -> None:
    wanted = REFERENCES[reference]
    config = LLAMA_3B if "Llama" in reference else AutoConfig.from_pretrained(asset("model"))
    with torch.device("meta"):
        plan = LoraConfig(r=wanted.rank, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_config(config), plan)
    a, b = (
        [p.numel() for name, p in model.named_parameters() if role in name]
        for role in ("lora_A", "lora_B")
    )
    assert Size(sum(a), sum(b), rank=wanted.rank, modules=len(a)) == wanted


def test_everything_is_said_of_every_strategy() -> None:
    for entry in catalogue.entries():
        assert entry.title, entry.name
        assert entry.papers, entry.name
        assert 20 < len(entry.traits.when) < 80, entry.name
        assert not entry.dp or entry.secure_sum, entry.name


def test_what_shows_single_updates_allows_no_secure_sum() -> None:
    can = {e.name: (e.secure_sum, e.dp) for e in catalogue.entries()}
    for name in ("flora", "fedex_lora", "flexlora", "lora_fair", "hetlora"):
        assert can[name] == (False, False)
    for name in ("fedavg", "ffa_lora", "rolora", "fedsvd", "fed_sb", "fedkseed"):
        assert can[name] == (True, True)
    for name in ("scaffold", "mixed", "fedkseed_pro", "fedsa_lora", "feddpa"):
        assert can[name] == (False, False), "more than a sum is looked at, or kept"


def test_strategies_that_send_only_scalars_say_so() -> None:
    """Or a codec would be tried on them."""
    said = {e.name for e in catalogue.entries() if e.traits.updates == "scalars"}
    assert said == {"seed_pool", "fedkseed", "fedkseed_pro", "ferret"}


def test_the_page_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(app, ["strategies", "--markdown"])
    assert printed.exit_code == 0
    assert printed.stdout == PAGE.read_text(encoding="utf-8"), (
        "python -m corolla strategies --markdown > docs/strategies.md"
    )


def test_tables_of_the_page_are_whole() -> None:
    lines = catalogue.markdown().splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert [re.findall(r"`(\w+)`", row)[0] for row in rows] == 3 * list(STRATEGIES)
    for above, line in pairwise(lines):
        if above.startswith("|") and line.startswith("|"):
            assert above.count("|") == line.count("|"), line
    for name in STRATEGIES:
        assert re.search(rf"\| `{name}` \|.*arxiv\.org/abs/\d{{4}}\.\d{{5}}", "\n".join(rows)), name


def test_json_has_all_facts_as_plain_values() -> None:
    printed = CliRunner().invoke(app, ["strategies", "--json"])
    found = {own["name"]: own for own in json.loads(printed.stdout)}
    assert found.keys() == STRATEGIES.keys()
    scaffold = found["scaffold"]
    assert scaffold["optimizers"] == ["sgd"]
    assert scaffold["keeps"] is True
    assert scaffold["papers"] == ["1910.06378"]
    assert "traits" not in scaffold
    assert found["fedavg"]["costs"][QV] == [
        {"up": 18_350_080, "down": 18_350_080, "once": 0, "at_most": False}
    ]


def test_the_terminal_gets_a_table() -> None:
    printed = CliRunner().invoke(app, ["strategies"], env={"COLUMNS": "200"})
    assert printed.exit_code == 0
    for name in STRATEGIES:
        assert f" {name} " in printed.stdout
    assert " 128 a round " in printed.stdout


def test_the_terminal_table_fits_80_columns() -> None:
    printed = CliRunner().invoke(app, ["strategies"], env={"COLUMNS": "80"})
    assert max(map(len, printed.stdout.splitlines())) <= 80


def test_two_forms_at_once_are_refused() -> None:
    printed = CliRunner().invoke(app, ["strategies", "--json", "--markdown"])
    assert printed.exit_code == 2
    assert "choose one" in printed.output
