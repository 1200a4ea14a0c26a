"""Benchmarks of the Language Model Evaluation Harness, run on models that are in memory.

Gao et al., https://github.com/EleutherAI/lm-evaluation-harness. An extra: corolla[evaluation].
"""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from corolla.errors import ConfigError, DataError
from corolla.models.pretrained import Base
from corolla.types import Metrics

_BATCH = 8
_BOOTSTRAP = 1000
_FEWSHOT_SEED = 1234
"""The harness's own default: examples of a prompt are those of published numbers."""


def load(names: Sequence[str]) -> Any:
    """Tasks, groups and tags by name, or .yaml files of one's own; their data is read here.

    Raises ConfigError when the harness is not installed or does not know a task, DataError when
    a task's data cannot be read (most are on the hub).
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs the harness: pip install 'corolla[evaluation]'")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = [name for name in names if Path(name).suffix in {".yaml", ".yml"}]
    for name in own:
        if not Path(name).is_file():
            raise ConfigError(f"task file {name} does not exist")
    manager = TaskManager(include_defaults=len(own) < len(names))  # its index takes a while
    for name in names:
        if name not in own and name not in manager.all_tasks:
            raise ConfigError(
                f"unknown task {name!r}: `lm-eval ls tasks` lists the known ones; or name a .yaml"
            )
    try:
        tasks = manager.load(list(names))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"cannot load tasks {', '.join(names)}: {reason}") from error
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return tasks


def run(model: Any, base: Base, tasks: Any, limit: int | None = None) -> Metrics:
    """Scores by `task/metric` (`task/metric,filter` where a task filters answers).

    `limit` is for trials: the first so many documents of each task. A task's prompt is the
    harness's: no chat template is applied.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    # peft puts a trained prompt before the padding on the left: equal lengths only.
    size = 1 if getattr(model, "prompt_encoder", None) else _BATCH
    with torch.random.fork_rng(devices=[]):
        results = evaluate(
            HFLM(pretrained=model, tokenizer=base.tokenizer, batch_size=size),
            tasks,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=False,
        )
    return {
        f"{task}/{name.removesuffix(',none')}": float(value)
        for task, scores in results["results"].items()
        for name, value in scores.items()
        if isinstance(value, float | int) and "," in name
    }
