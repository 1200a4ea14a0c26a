"""Messages on a key that does not exist, and on a value that a key cannot have."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from corolla.config.sections.groups import ClientClass
from corolla.errors import ConfigError
from corolla.host import wording
from corolla.host.text import nearest
from corolla.strategies.listing.registry import STRATEGIES

MEANINGS: Mapping[str, str] = {
    **dict.fromkeys(("learning_rate", "base_lr", "rate"), "lr"),
    **dict.fromkeys(("grad_clip", "max_grad_norm", "gradient_clipping", "clipnorm"), "clip_norm"),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "epoch"), "local_epochs"),
    **dict.fromkeys(("steps", "num_steps", "max_steps", "local_iterations"), "local_steps"),
    **dict.fromkeys(("batch", "bs", "per_device_train_batch_size"), "batch_size"),
    **dict.fromkeys(("micro_batch", "gradient_accumulation_steps"), "micro_batch_size"),
    **dict.fromkeys(("lora_r", "r", "lora_rank"), "rank"),
    **dict.fromkeys(("lora_alpha", "scaling"), "alpha"),
    **dict.fromkeys(("lora_dropout", "use_dropout"), "dropout"),
    **dict.fromkeys(("use_rslora", "rs_lora"), "rslora"),
    **dict.fromkeys(("use_dora", "weight_decomposed"), "dora"),
    **dict.fromkeys(("modules", "lora_target", "lora_target_modules"), "target_modules"),
    **dict.fromkeys(("peft", "peft_type", "adapter", "trainable", "train_mode"), "parameters"),
    **dict.fromkeys(("num_rounds", "comm_round", "num_server_rounds", "n_rounds"), "rounds"),
    **dict.fromkeys(("num_clients", "n_clients", "num_supernodes", "nodes"), "clients"),
    **dict.fromkeys(
        ("clients_per_round", "fraction_fit", "fraction_train", "sample_rate"), "cohort"
    ),
    **dict.fromkeys(("algorithm", "aggregator", "method", "fl_method"), "strategy"),
    **dict.fromkeys(("adam", "adamw", "sgd", "optim", "optimiser"), "optimizer"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_scheduler_type"), "schedule"),
    **dict.fromkeys(("warmup", "warmup_steps", "warmup_ratio"), "warmup_rounds"),
    **dict.fromkeys(("wd", "l2"), "weight_decay"),
    **dict.fromkeys(("random_seed", "random_state", "manual_seed", "rng"), "seed"),
    **dict.fromkeys(("model_name_or_path", "model_name", "base_model"), "model"),
    **dict.fromkeys(("dataset", "dataset_name", "train_file", "train_data"), "data"),
    **dict.fromkeys(("split", "partitioner", "non_iid"), "partition"),
    **dict.fromkeys(("dirichlet_alpha", "dir_alpha"), "partition_alpha"),
    **dict.fromkeys(("test_size", "val_size", "validation_split"), "eval_fraction"),
    **dict.fromkeys(("seq_len", "max_seq_length", "max_seq_len", "cutoff_len"), "max_length"),
    **dict.fromkeys(("noise", "sigma", "noise_scale"), "noise_multiplier"),
    **dict.fromkeys(("privacy", "differential_privacy", "privacy_level"), "dp"),
    **dict.fromkeys(("privacy_budget", "target_epsilon"), "epsilon"),
    **dict.fromkeys(("dp_delta", "target_delta"), "delta"),
    **dict.fromkeys(("clipping_norm", "clip_threshold", "l2_norm_clip"), "clip"),
    **dict.fromkeys(("compression", "compressor", "quantize_updates"), "codec"),
    **dict.fromkeys(("defence", "defense"), "robust"),
    **dict.fromkeys(("malicious", "attackers", "num_malicious", "adversaries"), "byzantine"),
    **dict.fromkeys(("gpu", "cuda", "use_gpu"), "device"),
    **dict.fromkeys(("precision", "torch_dtype", "bf16", "fp16"), "dtype"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bits"), "quantization"),
    **dict.fromkeys(("num_threads", "workers", "n_jobs", "cpus"), "threads"),
    **dict.fromkeys(("timeout", "round_timeout"), "deadline"),
    **dict.fromkeys(("early_stopping", "early_stopping_patience"), "patience"),
    **dict.fromkeys(("backend", "runtime"), "engine"),
    **dict.fromkeys(("output", "output_dir", "out", "save_dir"), "--out"),
    **dict.fromkeys(("report_to", "tracker", "wandb", "tensorboard"), "--track"),
}
"""The name of a key in other tools → the key here; with dashes, an option of the command."""

_FEW = 30
"""Names that a line can hold: all options of a class, or all strategies."""


_NEAR = 0.7
"""Similarity, as difflib has it, from which a name is taken for a misspelling of a key: one letter
of four may be wrong. At 0.5 any word is near some key."""


def meant(name: str, known: Collection[str]) -> str:
    """The question `did you mean 'KEY'?`, by meaning before spelling; "" if nothing is near."""
    asked = name.replace("-", "_").lower()
    found = MEANINGS.get(asked, "")
    if found in known or found.startswith("--"):
        return f"did you mean {found!r}?"
    return nearest(asked, known, cutoff=_NEAR)


def unknown(name: str, known: Collection[str], source: str = "") -> ConfigError:
    """The error for a key that is none of those known; `source` says where it stood."""
    hint = meant(name, known)
    if not hint and "strategy" in known:
        hint = _option(name.replace("-", "_").lower(), in_code=not source)
    if not hint and len(known) > _FEW:
        hint = "no key is like it, corolla keys lists all"
    rest = f": {hint}" if hint else f"; known keys are {', '.join(known)}"
    return ConfigError(f"unknown key {name!r}{f' in {source}' if source else ''}{rest}")


def no_table(table: str, entry: str, fields: Mapping[str, FieldInfo], source: str) -> ConfigError:
    """The error for `TABLE.ENTRY` where the table is no strategy's, nor that of classes.

    Either is a misspelt strategy with an option of it, or a key that stands in no table.
    """
    if table == "options":
        wanted = f"strategy.{entry}"
        return ConfigError(f"options of the strategy are set as {wanted!r} in {source}")
    if table in fields:
        asked = wording.expected(fields[table])
        return ConfigError(f"{_dashed([table])}: {asked}, found a table with {entry!r} in {source}")
    name = entry.partition(".")[0].replace("-", "_")
    near = nearest(table, ["strategy", "classes", *STRATEGIES])
    of_near = any(f"'{known}'" in near for known in _takers(name))
    key = "" if of_near else meant(name, fields)
    told = f"{key.removesuffix('?')}, which stands in no table?" if key else near
    if not told:
        told = "there are classes, strategy, those of strategies and, in a file, server"
    return ConfigError(f"unknown table {table!r} in {source}: {told}")


def _option(name: str, in_code: bool) -> str:
    """The question whether an option of strategies is meant; "" if none takes it."""
    takers, wanted = _takers(name), f"{name!r} in options" if in_code else repr(f"strategy.{name}")
    return f"did you mean {wanted}, an option of {', '.join(takers)}?" if takers else ""


def _takers(option: str) -> list[str]:
    """The strategies that take an option."""
    declared: Mapping[str, Any] = STRATEGIES  # dataclasses, which the protocol does not say
    fields = {name: dataclasses.fields(cls) for name, cls in declared.items()}
    return [name for name, own in fields.items() if option in [field.name for field in own]]


def first_of(error: ValidationError, fields: Mapping[str, FieldInfo]) -> ConfigError:
    """The first mistake that pydantic has found, in one line; `fields` are those of the config."""
    first = error.errors()[0]
    path, found = [str(part) for part in first["loc"]], wording.shown(first["input"])
    if not path and first["type"] == "value_error":  # of several keys together
        return ConfigError(str(first["msg"]).removeprefix("Value error, "))
    if not path:
        return ConfigError(f"expected a table of keys, found {found}")
    if first["type"] == "extra_forbidden" or path[0] not in fields:
        *outer, name = path
        return unknown(name, ClientClass.model_fields if outer else fields, ".".join(outer))
    if path[-1] == "[key]":
        return ConfigError(f"{_dashed(path[:-2])}: expected keys that are text, found {found}")
    return ConfigError(f"{_dashed(path)}: {wording.told(first, fields)}")


def _dashed(path: Sequence[str]) -> str:
    """A key as the command line writes it; the name of a class stays as it is."""
    return ".".join(
        part if path[:place] == ["classes"] else part.replace("_", "-")
        for place, part in enumerate(path)
    )
