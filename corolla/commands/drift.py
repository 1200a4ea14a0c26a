"""`corolla evaluate --drift`: a finished adapter or model beside its base, on rows of its owner."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from corolla.commands import artefacts
from corolla.drift import domains, interval, measure, pair
from corolla.models import pretrained
from corolla.warnings.outcome import drifted

DEMONSTRATION = (
    "the embedded model was never tuned to refuse: its numbers demonstrate the tool, nothing else"
)


def evaluate_drift(
    adapter: Path, model: str | None, asked: Sequence[str], settings: Sequence[str] = ()
) -> dict[str, Any]:
    """The entry of run.json: {"drift": domain → numbers, "warnings": […], "note": …}.

    `asked` are files, NAME=FILE, or domains that ship with Corolla. Raises ConfigError for a
    classifier, DataError for rows that cannot be measured.
    """
    adapter = artefacts.result_of(adapter)
    config = artefacts.config_of(adapter, model, None, settings)
    found = domains.read(asked)
    whole = artefacts.is_model(adapter)
    labels = artefacts.run_info(adapter).get("labels") if whole else artefacts.labels_of(adapter)
    measure.check(config, "classify" if labels else "causal")
    base = pretrained.load(config)
    if whole:
        models = pair.of_models(base.model, artefacts.whole(adapter, config, ()).model)
    else:
        models = pair.of_peft(artefacts.tuned_of(adapter, base))
    told = measure.measure(found, models, base, config)
    note = {"note": DEMONSTRATION} if config.model == "embedded" else {}
    return {"drift": told, "warnings": [own.to_json() for own in drifted(told)], **note}


def print_drift(console: Console, told: Mapping[str, Any]) -> None:
    """A column a domain, then the warnings."""
    table = Table("", *told["drift"])
    rows: dict[str, list[str]] = {}
    for own in told["drift"].values():
        for name, shown in _shown(own).items():
            rows.setdefault(name, []).append(shown)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)
    for warning in told["warnings"]:
        console.print(f"[yellow]warning:[/] {warning['text']}", highlight=False, soft_wrap=True)
    if "note" in told:
        console.print(told["note"], highlight=False, soft_wrap=True)


def _shown(own: Mapping[str, Any]) -> dict[str, str]:
    margin = own.get("margin")
    return {
        "rows": str(own["rows"]),
        "loss": f"{own['loss']['before']:.4f} → {own['loss']['after']:.4f}",
        "change": interval.sentence(own["forgetting"]),
        "rows worse": f"{own['worse_share']:.0%}",
        "margin": f"{margin['before']:.4f} → {margin['after']:.4f}" if margin else "",
        "change of margin": interval.sentence(own["margin_change"]) if margin else "",
        "right": f"{own['right']['before']:.0%} → {own['right']['after']:.0%}" if margin else "",
        "KL": f"{own['kl']:.4f}",
        "same top guess": f"{own['agreement']:.0%}",
        "contribution of tuning": "-" if own["tuco"] is None else f"{own['tuco']:.1%}",
    }
