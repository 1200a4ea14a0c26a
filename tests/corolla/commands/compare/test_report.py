import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from corolla.commands.compare.cells import Cell, Point
from corolla.commands.compare.plots import COLOURS, style
from corolla.commands.compare.report import interval, sentences, write_comparison
from corolla.commands.compare.results import results as compute
from corolla.commands.compare.screen import print_comparison
from corolla.config.run import RunConfig


def cells(method: str, *finals: float, price: float = 1e5, **changes: Any) -> list[Cell]:
    """One run of two rounds a seed; the loss falls from 5 to `finals[seed]`."""
    values: dict[str, Any] = {
        **{"method": method, "lr": 0.1, "personal": False, "accuracy": 0.25, "own_loss": 3.0},
        **{"pooled": False, "choosing_loss": 3.0},
        **{"peak_rss": 5e8, "bytes_up": 1.0, "bytes_down": 2.0, "dropped": 0, "simulated": False},
        **{"evidence": {"cohorts": ["c"], "model": "m" * 64, "data": "d" * 64}, "work": [1]},
        **{"tokens": [1.0], "cpu_seconds": 12.0, "beside": True, "aggregation_errors": [0.1, 0.2]},
    }
    values["evidence"] |= {"partition": "p" * 64, "base model's loss": 5.0}
    return [
        Cell(
            **{
                **values,
                "seed": seed,
                "points": [Point(0, 0, 0, 5.0), Point(1, price, 2, 4.0), Point(2, 2 * price, 4, x)],
                **changes,
            }
        )
        for seed, x in enumerate(finals)
    ]


def made(**finals: list[Cell]) -> dict[str, Any]:
    """Results as `compare` hands them on."""
    trained: dict[str, Any] = {"aggregates": "factors", "trainers": ["first_order"]}
    methods = [
        {"label": n, "strategy": n, "personal": bool(g) and g[0].personal, **trained}
        | {"baseline": "local" if n == "local" else None, "file_name": n}
        for n, g in finals.items()
    ]
    searches: dict[str, dict[float, float | None]] = {
        n: {0.03: 3.5 if g else None, 0.1: 3.0 if g else None, 0.3: None} for n, g in finals.items()
    }
    config = RunConfig().model_dump(mode="json")
    return {
        **compute(methods, searches, finals),
        "seeds": sorted({cell.seed for group in finals.values() for cell in group}),
        "failed": {} if all(finals.values()) else {"lost-0.1-0": "a <b>reason</b>"},
        "diverged": {"a-0.3-0": "lower lr"},
        "jobs": 2,
        "differing_settings": {"local_steps": dict.fromkeys(finals, 10)},
        "plan": {"methods": [{"label": n, "lrs": [0.1], "config": config} for n in finals]},
        **{"corolla": "0.1", "versions": {"torch": "2"}, "platform": "test", "cores": 2},
        **{"memory": 8e9, "date": "2026-01-01"},
    }


class Words(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k.rpartition(":")[2] in ("src", "href")]


def page(results: dict[str, Any], folder: Path) -> Words:
    write_comparison(folder, results)
    return Words((folder / "report.html").read_text())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take seconds: who does not look at them leaves them out."""
    monkeypatch.setattr(
        "corolla.commands.compare.plots.render", lambda draw, methods: ("<svg/>", b"")
    )


def test_the_report_of_a_full_comparison(tmp_path: Path) -> None:
    results = made(
        a=cells("a", 3.00, 3.01, 3.02),
        b=cells("b", 2.00, 2.01, 2.021, price=1e7),
        own=cells("own", 1.0, 1.1, 1.2, personal=True),
        lost=[],
    )
    found = page(results, tmp_path)
    assert all(link.startswith("#") for link in found.links)  # parts of the charts themselves
    assert "3.0100 ± 0.0248" in found.text  # 4.303 * 0.01 / sqrt(3)
    assert "b has a lower held-out loss than a: by 0.9997" in found.text
    assert "no finished run" in found.text
    assert "a <b>reason</b>" in found.text  # shown, not obeyed
    assert "Equal terms" in found.text
    assert "diverged" in found.text
    assert "own (personal)" in found.text
    assert "Runs shared the machine" in found.text
    plots = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert plots == {
        *("loss-rounds", "loss-bytes", "loss-seconds", "pareto", "loss-personal"),
        *("lr-search", "aggregation-error"),
    }
    assert json.loads((tmp_path / "results.json").read_text())["seeds"] == [0, 1, 2]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert len(rows) == 3 * 3 * 3
    last = rows[8]
    assert (last["method"], last["seed"], last["round"], last["loss"]) == ("a", "2", "2", "3.02")


def test_the_report_of_one_seed_claims_nothing(undrawn: None, tmp_path: Path) -> None:
    results = made(a=cells("a", 3.0), b=cells("b", 1.0))
    found = page(results, tmp_path)
    assert "One seed: no interval" in found.text
    assert "±" not in found.text.replace("± half", "")
    wanted = "b and a: held-out loss not judged on 1 seed; a verdict needs 3 or more."
    assert sentences(results) == [wanted]


def test_one_method_alone_and_personal_ones_alone_have_a_report(tmp_path: Path) -> None:
    assert "nothing to compare with" in page(made(a=cells("a", 3.0, 3.1)), tmp_path).text
    own = {n: cells(n, 3.0, 3.1, personal=True) for n in ("p", "q")}
    results = made(**own)
    assert results["budgets"] is None
    other = tmp_path / "personal"
    other.mkdir()
    assert "p (personal)" in page(results, other).text
    assert not (other / "plots" / "loss-rounds.svg").exists()


def test_unequal_terms_are_shouted(undrawn: None, tmp_path: Path) -> None:
    others = cells("b", 2.0, 2.1, evidence={**cells("b", 1.0)[0].evidence, "cohorts": ["x"]})
    found = page(made(a=cells("a", 3.0, 3.1), b=others), tmp_path)
    assert "Unequal terms: seed 0: cohorts of b and a differ" in found.text
    assert "Equal terms, from" not in found.text


def test_names_with_signs_of_mathematics_and_html_are_shown_as_they_are(tmp_path: Path) -> None:
    name = "_a$b$<i>"
    found = page(made(**{name: cells(name, 3.0, 3.1)}), tmp_path)
    assert name in found.text
    assert "<i>" not in (tmp_path / "report.html").read_text()


def test_more_methods_than_colours_differ_in_their_lines(tmp_path: Path) -> None:
    many = {f"m{i}": cells(f"m{i}", 3.0 + i / 10) for i in range(9)}
    page(made(**many), tmp_path)
    svg = (tmp_path / "plots" / "loss-rounds.svg").read_text()
    first, eighth = (f"stroke: {COLOURS[0].lower()}", "stroke-dasharray")
    assert first in svg and eighth in svg
    styles = [str(sorted(style(i).items())) for i in range(9)]
    assert len(set(styles)) == 9


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        ({"mean": 1.5, "low": None, "high": None, "n": 1}, "1.5000"),
        ({"mean": 1.5, "low": 1.25, "high": 1.75, "n": 3}, "1.5000 ± 0.2500"),
    ],
)
def test_how_a_mean_is_written(value: dict[str, float] | None, shown: str) -> None:
    assert interval(value) == shown


def test_the_terminal_fits_eighty_columns_and_says_what_went_wrong(tmp_path: Path) -> None:
    text = io.StringIO()
    results = made(
        federated=cells("federated", 3.0, 3.1, 3.2), b=cells("b", 1.0, 1.1, 1.2), lost=[]
    )
    print_comparison(Console(file=text, width=80), results, tmp_path)
    lines = text.getvalue().splitlines()
    tables = [line for line in lines if "±" in line or "KB" in line]
    assert len(tables) >= 4
    assert all("…" not in line for line in tables)
    assert "3.100 ± 0.248" in text.getvalue()
    assert "failed: lost-0.1-0: a <b>reason</b>" in text.getvalue()


def test_the_verdict_and_warnings_are_shown_and_baselines_have_no_bytes(
    undrawn: None, tmp_path: Path
) -> None:
    told = {"id": "worse", "text": "worse <than> the base model", "numbers": {}}
    exact = {"rank": 96, "bytes": 3_600_000, "loss": 3.0}
    small = {"folder": "served", "rank": 64, "bytes": 2_400_000, "error": 0.0123, "exact": exact}
    whole = {"folder": "adapter", "rank": 8, "error": 0.0, "exact": {**exact, "rank": 8}}
    results = made(
        fedavg=cells("fedavg", 3.0, 3.01, 3.02, warnings=[told], served=whole),
        flora=cells("flora", 3.01, 3.0, 3.021, served=small),
        local=cells("local", 1.0, 1.1, 1.2, personal=True),
    )
    found = page(results, tmp_path)
    assert "Warning, fedavg, seed 0: worse <than> the base model" in found.text
    assert found.text.count("worse <than> the base model") == 1  # once for all seeds
    assert "local is each client alone" in found.text
    assert "no difference" in found.text
    (said,) = [s for s in sentences(results) if "held-out" in s]
    assert said.startswith("flora and fedavg: no difference in held-out loss is shown (paired")
    text = io.StringIO()
    print_comparison(Console(file=text, width=120), results, tmp_path)
    assert "warning: fedavg, seed 0: worse <than> the base model" in text.getvalue()
    for said in ("rank 96, 3.6 MB", "rank 64, 2.4 MB, 1.23% off", "rank 8, ", "adapter/ itself"):
        assert said in text.getvalue()
        assert said in found.text


def test_a_long_name_takes_lines_and_cuts_no_number(tmp_path: Path) -> None:
    text, name = io.StringIO(), "fedavg@parameters=ia3,lr=0.03,local_steps=20"
    results = made(**{"fedavg": cells("fedavg", 3.0, 3.1, 3.2), name: cells(name, 1.0, 1.1, 1.2)})
    print_comparison(Console(file=text, width=80), results, tmp_path)
    assert "…" not in text.getvalue().partition("report")[0]
    folded = [line.split(" ")[1] for line in text.getvalue().splitlines() if line.startswith(" ")]
    assert name in "".join(folded)
    assert "1.100 ± 0.248" in text.getvalue()
