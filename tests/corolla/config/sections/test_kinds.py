"""The kinds that a run can train are one row each, and nobody else asks for a kind by its name."""

import ast
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from corolla.config.run import RunConfig
from corolla.config.sections.adapter import Adapter
from corolla.config.sections.kinds import KINDS, Kind, KindName, Rates

ROOT = Path(__file__).resolve().parents[4]
OWN = {"corolla/config/sections/kinds.py", "corolla/models/kinds.py", "corolla/models/parts.py"}
"""The files of the kinds themselves."""
FOLDERS = ("corolla", "server", "client", "strategies")
"""Not experiments: each measures the kinds that it names."""
ASKED = {"parameters", "role", "kind", "name"}
"""Names of variables and attributes that hold the name of a kind."""
NAMES = tuple(KINDS)

USUAL = (3e-3, 3e-4, 3e-3, 1e-4)
"""Rates of a kind that has none of its own: first order on the embedded model and on others, zeroth
order on both."""
RATES = {
    "lora": USUAL,
    "ia3": (3e-2, 3e-3, 3e-3, 1e-4),
    "prompt": (3e-2, 3e-3, 3e-3, 1e-4),
    "bias": (3e-3, 3e-4, 3e-3, 1e-4),
    "norm": (3e-3, 3e-4, 3e-3, 1e-4),
    "head": (3e-3, 3e-4, 3e-3, 1e-4),
    "full": (3e-3, 3e-5, 3e-4, 1e-6),
    "sparse": USUAL,
}


def test_the_kinds_are_those_that_the_key_takes() -> None:
    assert get_args(KindName) == NAMES
    for name in KINDS:
        run = Adapter.model_validate({"parameters": name})
        assert run.kind is KINDS[name]
        assert run.kind.name == name
    assert RunConfig().kind.name == "lora"


@pytest.mark.parametrize("name", KINDS)
def test_a_row_has_all_facts(name: str) -> None:
    types = {"name": str, "artefact": str, "first_order": Rates, "zeroth_order": Rates}
    for fact in fields(Kind):
        wanted = types.get(fact.name, str if fact.name == "not_private" else bool)
        assert type(getattr(KINDS[name], fact.name)) is wanted, fact.name


@pytest.mark.parametrize("name", KINDS)
def test_facts_of_a_row_agree(name: str) -> None:
    kind = KINDS[name]
    assert kind.artefact in ("adapter", "model")
    assert not (kind.hooked and kind.not_private), "there is nothing to hook"
    assert not (kind.artefact == "model" and kind.quantised), "its own weights are trained"
    if kind.whole:
        assert kind.artefact == "model"
    if kind.factors:
        assert kind.artefact == "adapter"
        assert kind.target_modules
    if kind.native:
        assert kind.factors, "native clients train factors alone"


@pytest.mark.parametrize("name", KINDS)
def test_default_rates_go_by_kind_trainer_and_model(name: str) -> None:
    found = [
        RunConfig(strategy=strategy, model=model, parameters=KINDS[name].name).lr
        for strategy in ("fedavg", "seed_pool")
        for model in ("embedded", "some/model")
    ]
    assert tuple(found) == RATES.get(name, USUAL)


def test_a_text_has_virtual_tokens_before_it_where_they_are_trained() -> None:
    found = {k.name: Adapter(parameters=k.name, virtual_tokens=7).prefix for k in KINDS.values()}
    assert found == {**dict.fromkeys(KINDS, 0), "prompt": 7}


def named(node: ast.AST) -> bool:
    """Returns whether a constant of an expression is the name of a kind."""
    return any(isinstance(n, ast.Constant) and n.value in NAMES for n in ast.walk(node))


def asks(node: ast.AST) -> bool:
    """Returns whether an expression is a variable or an attribute that may hold a kind's name."""
    if isinstance(node, ast.Attribute):
        return node.attr in ASKED
    return isinstance(node, ast.Name) and node.id in ASKED


def switches(tree: ast.Module) -> list[int]:
    """Lines that compare what is trained with the name of a kind, or look it up by one."""
    found = []
    for node in ast.walk(tree):
        asked: list[ast.expr] = []
        told: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
            told = [*asked]
        elif isinstance(node, ast.Match):
            asked, told = [node.subject], [case.pattern for case in node.cases]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            asked, told = [node.slice], [node.value]
        if any(map(asks, asked)) and any(map(named, told)):
            found.append(asked[0].lineno)
    return found


@pytest.mark.parametrize(
    "line",
    [
        'config.parameters == "lora"',
        'run.config.parameters not in ("lora", "prompt")',
        '"full" != parameters',
        'config.kind.name == "ia3"',
        'role in {"bias"}',
        '{"bias": 1, "head": 2}[config.parameters]',
        'match role:\n    case "bias" | "head":\n        pass',
    ],
)
def test_a_switch_would_be_found(line: str) -> None:
    assert switches(ast.parse(line)) == [1]


def test_nobody_else_compares_what_is_trained_with_a_name() -> None:
    """A new kind is a row for its facts and one for its model: see CONTRIBUTING.md."""
    found = {}
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        where = path.relative_to(ROOT).as_posix()
        if where not in OWN and (lines := switches(ast.parse(path.read_text(encoding="utf-8")))):
            found[where] = lines
    assert found == {}
