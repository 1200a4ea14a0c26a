import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from corolla.config.run import RunConfig
from corolla.host.text import human_bytes
from corolla.server.runs.report import write_report

SAMPLE = {"prompt": "is it?", "reference": "yes", "answer": "no"}
INFO: dict[str, Any] = {
    "config": RunConfig().model_dump(mode="json"),
    "strategy": "fedavg",
    "corolla": "0.1.0",
    "num_clients": 2,
    "cohort": 2,
    "base": {"loss": 3.0, "accuracy": 0.25},
    "final": {"loss": 2.0, "accuracy": 0.5},
    "bytes_up": 1536,
    "bytes_down": 2_500_000,
    "seconds": 12.3,
    "peak_rss": 500_000_000,
    "aggregates": "weights",
    "adapter_sha256": "ab" * 32,
    "model_sha256": "cd" * 32,
    "warnings": [],
    "data_sha256": "ef" * 32,
    "reload": {"claim": "another process loads it within 1.0e-07"},
    "personal": False,
    "target_modules": ["q_proj", "v_proj"],
    "versions": {"torch": "2"},
    "platform": "test",
    "clients": {
        "ada": {"base": {"loss": 3.25}, "final": {"loss": 2.125}},
        "ben": {"base": {"loss": 3.0}, "final": {"loss": 3.5}},
    },
    "samples": {"before": [SAMPLE], "after": [{**SAMPLE, "answer": "surely"}]},
}
LINES: list[dict[str, Any]] = [
    {
        "round": round,
        "train_loss": 3.0 / round,
        "eval_loss": 2.5 / round if round != 2 else None,
        "bytes_up": 100,
        "bytes_down": 200,
        "seconds": 1.5,
        "clients": 2,
        "dropped": 0,
    }
    for round in (1, 2, 3)
]


class Page(HTMLParser):
    """What a browser would load, run and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            loads = ("src", "href", "srcset", "data", "action", "poster", "background")
            if name.rpartition(":")[2] in loads:
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def report(tmp_path: Path, info: dict[str, Any] | None = None, lines: Any = None) -> str:
    path = tmp_path / "report.html"
    write_report(path, info or INFO, LINES if lines is None else lines)
    return path.read_text(encoding="utf-8")


def with_client(name: str) -> dict[str, Any]:
    info = copy.deepcopy(INFO)
    info["clients"][name] = {"base": {"loss": 3.0}, "final": {"loss": 2.0}}
    return info


def assert_alone(text: str) -> Page:
    """Nothing is loaded from anywhere and nothing runs."""
    page = Page(text)
    assert [link for link in page.links if not link.startswith("#")] == []
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & set(page.tags)
    assert page.handlers == []
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    return page


def test_a_report_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    page = assert_alone(report(tmp_path))
    assert page.tags.count("svg") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_report_has_a_dark_form_whose_charts_are_in_the_colours_of_the_page(
    tmp_path: Path,
) -> None:
    """What matplotlib draws black or white would not be seen on a page of that colour."""
    text = report(tmp_path)
    assert "color-scheme: light dark" in text
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "currentColor" in drawn
    assert not {"#000000", "#ffffff"} & set(re.findall(r"#[0-9a-f]{6}", drawn))


def test_a_report_names_its_data_without_the_folders_of_the_machine(tmp_path: Path) -> None:
    info = copy.deepcopy(INFO)
    info["config"]["data"] = "/home/ada/rows.jsonl"
    assert "<h1>fedavg on rows.jsonl</h1>" in report(tmp_path, info)


def test_a_report_shows_what_was_measured(tmp_path: Path) -> None:
    text = Page(report(tmp_path)).text
    for shown in (
        *("3.000 → 2.000", "25.0 → 50.0 %", "1.5 KB", "2.5 MB", "500.0 MB", "12 s"),
        *("3.2500", "2.1250", "-1.1250", "+0.5000"),
        *("is it?", "yes", "no", "surely", "ab" * 32, "1.0e-07", "q_proj, v_proj"),
    ):
        assert shown in text, shown


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        '"><img src=http://evil.example onerror=alert(1)>',
        "</svg></figure><script src='//evil.example'></script>",
        "' onmouseover='alert(1)",
        "{{ 7 * 7 }}",
        "{% for x in y %}",
        "&lt;b&gt;",
        "]]>",
        "a$b",
        "$x$",
        r"$\frac{",
        r"\$",
        "_^{}",
        "日本語",
        "مرحبا",
        "🦜",
        "a\nb\tc",
        "a\x00b\x07",
        "",
        " ",
        "x" * 500,
    ],
    ids=lambda name: ascii(name)[:30],
)
def test_any_name_of_a_client_is_text(tmp_path: Path, name: str) -> None:
    text = report(tmp_path, with_client(name))
    page = assert_alone(text)
    assert "img" not in page.tags
    assert text.count("<td>") == Path(tmp_path / "report.html").read_text().count("<td>")
    if name.isprintable() and name.strip():
        assert name in page.text


@pytest.mark.parametrize("value", ["<script>x</script>", "{{ 7 * 7 }}", '" onload="x'])
def test_everything_else_is_text_too(tmp_path: Path, value: str) -> None:
    info = copy.deepcopy(INFO)
    for key in ("strategy", "data", "model"):
        info["config"][key] = value
    for sample in (*info["samples"]["before"], *info["samples"]["after"]):
        sample.update(prompt=value, reference=value, answer=value)
    info["platform"], info["target_modules"] = value, [value]
    page = assert_alone(report(tmp_path, info))
    assert "49" not in page.text.split()
    assert value in page.text


def test_little_is_enough_for_a_report(tmp_path: Path) -> None:
    """One round, no client measured, no sample, one client that was unreachable at the start."""
    info = copy.deepcopy(INFO)
    info["clients"] = {"ada": {"base": {}, "final": {"loss": 2.0}}}
    info["samples"] = {"before": [], "after": []}
    page = assert_alone(report(tmp_path, info, LINES[:1]))
    assert page.tags.count("svg") == 3
    assert "No held-out example" in page.text


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e300, None])
def test_odd_numbers_do_not_cost_a_report(tmp_path: Path, loss: float | None) -> None:
    line = {**LINES[0], "train_loss": loss}
    assert_alone(report(tmp_path, None, [line, *LINES[1:]]))


def test_a_thousand_clients_and_rounds_fit(tmp_path: Path) -> None:
    info = copy.deepcopy(INFO)
    info["clients"] = {
        f"c{i}": {"base": {"loss": 3.0}, "final": {"loss": 3.0 - i / 1000}} for i in range(1000)
    }
    lines = [{**LINES[0], "round": round} for round in range(1, 201)]
    page = assert_alone(report(tmp_path, info, lines))
    assert page.tags.count("tr") == 1 + 200 + 1 + 1000


def test_reports_of_equal_runs_are_equal(tmp_path: Path) -> None:
    assert report(tmp_path) == report(tmp_path)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (1536, "1.5 KB"), (10**6, "1.0 MB")),
        *((2_500_000_000, "2.5 GB"), (10**13, "10.0 TB")),
    ],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_a_report_shows_what_else_was_measured(tmp_path: Path) -> None:
    info = copy.deepcopy(INFO)
    info["base"] |= {"f1": 0.125, "exact_match": 0.0}
    info["final"] |= {"f1": 0.25, "exact_match": 0.4375, "choice_accuracy": 0.875}
    measured = {"clients": 2.0, "mean": 3.125, "std": 0.125}
    info["fairness"] = {
        "base": {**measured, "best_decile": 3.0, "worst_decile": 3.25},
        "final": {**measured, "best_decile": 2.125, "worst_decile": 3.5},
    }
    text = assert_alone(report(tmp_path, info)).text
    for shown in ("12.5 → 25.0 %", "0.0 → 43.8 %", "macro F1", "exact match", "3.2500 → 3.5000"):
        assert shown in text, shown
    assert "right choice" not in text  # measured once only


def test_refused_replies_and_rounds_tried_again_are_told(tmp_path: Path) -> None:
    assert "Replies:" not in Page(report(tmp_path)).text
    accepted = [{**line, "verdicts": {"accepted": 2}} for line in LINES]
    assert "Replies:" not in Page(report(tmp_path, lines=accepted)).text
    lines = copy.deepcopy(accepted)
    lines[1] |= {"verdicts": {"accepted": 1, "norm": 1}, "attempt": 2}
    text = Page(report(tmp_path, {**INFO, "ended": "patience 3 <is> over"}, lines)).text
    assert "Replies: 5 accepted, 1 norm." in text
    assert "Rounds tried again (attempts that were abandoned): 2 (2)." in text
    assert "patience 3 <is> over" in text


def test_warnings_stand_above_all_else_and_are_text(tmp_path: Path) -> None:
    assert 'class="warn"' not in report(tmp_path)
    told = {"id": "worse", "text": "worse <b>than</b> the base: lower lr", "numbers": {}}
    text = report(tmp_path, {**INFO, "warnings": [told, {**told, "id": "no_effect"}]})
    page = assert_alone(text)
    assert page.text.count("worse <b>than</b> the base: lower lr") == 2
    assert text.index('class="warn"') < text.index('class="cards"')
    assert "(no effect)" in text
