"""The public names: what `from corolla import …` promises."""

import importlib
import subprocess
import sys

import corolla
from corolla.interfaces import Strategy
from corolla.strategies.listing.registry import STRATEGIES


def test_every_public_name_loads() -> None:
    for name in corolla.__all__:
        assert getattr(corolla, name) is not None


def test_public_names_are_sorted_and_unique() -> None:
    assert sorted(set(corolla.__all__), key=corolla.__all__.index) == corolla.__all__
    assert sorted(corolla.__all__) == sorted(corolla.__all__, key=str)


def test_names_are_completed() -> None:
    assert set(corolla.__all__) <= set(dir(corolla))


def test_an_unknown_name_is_an_attribute_error() -> None:
    try:
        corolla.nothing  # noqa: B018
    except AttributeError as error:
        assert "nothing" in str(error)
    else:
        raise AssertionError("no error")


def test_every_public_thing_is_documented() -> None:
    names = ("conform", "simulate", "evaluate", "export", "compare", "look")
    for name in (*names, "Strategy", "Update", "Broadcast", "Client", "Adapter"):
        assert getattr(corolla, name).__doc__


def test_strategies_follow_the_protocol_and_cite_their_paper() -> None:
    for name, cls in STRATEGIES.items():
        strategy = cls()
        assert isinstance(strategy, Strategy)
        assert strategy.name == name
        assert "arXiv" in (importlib.import_module(cls.__module__).__doc__ or "")


def test_importing_corolla_loads_neither_torch_nor_flower() -> None:
    code = "import sys, corolla; print([m for m in ('torch', 'flwr', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
