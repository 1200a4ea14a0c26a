"""Scores of finished adapters with plain PEFT, and what the run of an adapter says of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from corolla.config.load import amended, validate
from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.data.encoding import Encoder
from corolla.errors import ArtefactError, ConfigError
from corolla.evaluation import answers, harness
from corolla.evaluation.labels import ordered
from corolla.evaluation.scoring import SHARES, score_by_row, standard_error
from corolla.models import devices, pretrained
from corolla.models.files import adapter_files
from corolla.types import Metrics


def _untold(line: str) -> None:
    """Says nothing."""


def evaluate_adapter(
    adapter: Path,
    model: str | None,
    dataset: str | None,
    settings: Sequence[str] = (),
    tell: Callable[[str], None] = _untold,
) -> dict[str, Metrics]:
    """Held-out scores of the base model and of the fine-tuned one: {"base": …, "adapter": …}.

    `adapter` is a run's folder, a PEFT adapter, or a whole model, where a run trains weights of its
    base. Model, data and the examples are those of its run (run.json beside it) unless given.
    `tell` hears which weights of the base model are random, and that rows may be known where there
    is no run.json. Raises ConfigError for another seed than the run's, with which examples that
    were trained on would be held out.
    """
    adapter = result_of(adapter)
    config = config_of(adapter, model, dataset, settings)
    if not run_info(adapter) and dataset is None:
        tell(
            f"{adapter} has no run.json beside it: scored on held-out rows of data={config.data} "
            f"with seed={config.seed}, of which it may have been trained on some; name rows that "
            f"it has not seen with --data FILE"
        )
    data = federated.load(config)
    data = replace(data, labels=ordered(config, data.labels))
    chosen = federated.spread(data.heldout, config.eval_examples)
    answers.check(chosen, config)
    base = pretrained.load(config, data.labels)
    if base.missing:
        tell(
            f"base model: {', '.join(sorted(base.missing))} are not in {config.model}, but drawn "
            f"from seed={config.seed}; what it scores depends on that"
        )
    encoder = Encoder.of(config, base.tokenizer, data.labels)
    parts = [(row, s) for row, example in enumerate(chosen) for s in encoder(example)]
    numbers, examples = [row for row, _ in parts], [sequence for _, sequence in parts]
    device = devices.pick_device(config.device)

    def measure(model: Any) -> Metrics:
        scores, rows = score_by_row(model, examples, numbers, base.pad_id, device)
        return {**scores, **standard_error(rows), **answers.ask(model, base, chosen, config)}

    return _side_by_side(adapter, config, base, data.labels, measure)


def evaluate_tasks(
    adapter: Path,
    model: str | None,
    tasks: Sequence[str],
    limit: int | None = None,
    settings: Sequence[str] = (),
) -> dict[str, Metrics]:
    """Scores of lm-evaluation-harness tasks, of the base model and of the fine-tuned one.

    `tasks` are names or .yaml files; `limit` is how many documents of each. Raises ConfigError for
    a classifier, which answers no prompts.
    """
    adapter = result_of(adapter)
    config = config_of(adapter, model, None, settings)
    config = config.model_copy(update={"max_length": 8})  # any: a task has its own lengths
    if run_info(adapter).get("labels") if is_model(adapter) else labels_of(adapter):
        raise ConfigError(f"{adapter} is a classifier: --tasks need a language model")
    loaded = harness.load(tasks)
    base = pretrained.load(config)

    def measure(model: Any) -> Metrics:
        return harness.run(model, base, loaded, limit)

    return _side_by_side(adapter, config, base, (), measure)


def _side_by_side(
    adapter: Path,
    config: RunConfig,
    base: pretrained.Base,
    labels: Sequence[str],
    measure: Callable[[Any], Metrics],
) -> dict[str, Metrics]:
    before = measure(base.model)
    if is_model(adapter):
        return {"base": before, "model": measure(whole(adapter, config, labels).model)}
    return {"base": before, "adapter": measure(tuned_of(adapter, base))}


def tuned_of(adapter: Path, base: pretrained.Base) -> Any:
    """The adapter on its base model. Raises ArtefactError for weights that neither of them has."""
    if drawn := sorted(base.missing - adapter_files.names(adapter)):
        raise ArtefactError(
            f"{adapter} lacks {', '.join(drawn)}, which base model {base.name} has not either: "
            f"each process that loads it draws others"
        )
    return adapter_files.load_adapter(base.model, adapter)


def whole(folder: Path, config: RunConfig, labels: Sequence[str]) -> pretrained.Base:
    """A saved whole model. Raises ArtefactError for weights that it lacks."""
    saved = {"model": str(folder), "new_head": False}
    found = pretrained.load(config.model_copy(update=saved), labels)
    if found.missing:
        raise ArtefactError(f"{folder} lacks {', '.join(sorted(found.missing))}")
    return found


def print_scores(console: Console, scores: Mapping[str, Metrics]) -> None:
    """A table of base and adapter."""
    table = Table("", *scores)
    for name in next(iter(scores.values())):
        shown = "{:.1%}" if name in SHARES else "{:.0f}" if name == "targets" else "{:.4f}"
        table.add_row(SHARES.get(name, name), *(shown.format(m[name]) for m in scores.values()))
    console.print(table)


def config_of(
    adapter: Path, model: str | None, dataset: str | None, settings: Sequence[str]
) -> RunConfig:
    """The settings of the adapter's run (run.json beside it) or defaults, then what is given."""
    if not (adapter / "adapter_config.json").is_file() and not is_model(adapter):
        raise ArtefactError(f"{adapter} is no adapter: it has no adapter_config.json")
    run = run_info(adapter)
    if is_model(adapter) and not run and model is None:
        raise ConfigError(f"{adapter} has no run.json beside it: name its base model with --model")
    known = {} if is_model(adapter) else {"model": model or adapter_files.base_of(adapter)}
    stored = validate(run["config"] if run else known)
    config = amended(stored, {"model": model, "data": dataset}, settings)
    if run and config.data == stored.data and config.seed != stored.seed:
        raise ConfigError(
            f"seed={config.seed} would hold out other examples of {config.data} than the run did "
            f"with seed={stored.seed}, and draw other weights where the base model lacks some: "
            f"leave it out"
        )
    return config


def result_of(source: Path) -> Path:
    """The adapter or model folder that is meant: of a run's folder, its result.

    Raises ArtefactError for a run that has none yet, and where there is nothing.
    """
    if not source.exists():
        raise ArtefactError(f"{source} is no adapter: there is no such folder")
    if not (source / "run.json").is_file():
        return source
    found = [source / name for name in ("adapter", "model") if (source / name).is_dir()]
    if not found:
        raise ArtefactError(f"{source} has no result yet: go on with --resume")
    return found[0]


def is_model(folder: Path) -> bool:
    """Returns whether a folder holds a whole model and no adapter."""
    whole, adapter = folder / "config.json", folder / "adapter_config.json"
    return whole.is_file() and not adapter.is_file()


def run_info(adapter: Path) -> dict[str, Any]:
    """run.json of the run that the adapter is the result of; empty where it is not beside it."""
    path = adapter.resolve().parent / "run.json"
    if not path.is_file():
        return {}
    try:
        info: dict[str, Any] = json.loads(path.read_text())
        return {**info, "config": dict(info["config"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} cannot be read: {error!r}") from error


def labels_of(adapter: Path) -> Sequence[str]:
    """Labels of a classifier, from its run or counted from its head; empty for a causal model."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    if config.get("task_type") != "SEQ_CLS":
        return ()
    if labels := run_info(adapter).get("labels"):
        return [str(label) for label in labels]
    head = adapter_files.head_of(adapter)
    if not head:
        raise ArtefactError(f"{adapter} is one of a classifier, and has no head")
    # Other layers of a head, and a pooler, are as wide as the model.
    return [f"LABEL_{i}" for i in range(min(len(tensor) for tensor in head.values()))]
