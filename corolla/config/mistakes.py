"""What is said of a key that does not exist, and of a value that a key cannot have."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from corolla.config.groups import ClientClass
from corolla.errors import ConfigError
from corolla.host.text import nearest
from corolla.wire.ranges import RANGES

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
"""What other tools call a key → the key here; with dashes, an option of the command."""

_FEW = 30
"""Names that a line can hold: all options of a class, or all strategies."""


def meant(name: str, known: Collection[str], cutoff: float = 0.5) -> str:
    """The question `did you mean 'KEY'?`, by meaning before spelling; "" if nothing is near."""
    found = MEANINGS.get(name.replace("-", "_").lower(), "")
    if found in known or found.startswith("--"):
        return f"did you mean {found!r}?"
    return nearest(name, known, cutoff=cutoff)


def unknown(name: str, known: Collection[str], source: str = "") -> ConfigError:
    """The error for a key that is none of those known; `source` says where it stood."""
    hint = meant(name, known)
    if not hint and len(known) > _FEW:
        hint = "corolla keys lists all there are"
    rest = f": {hint}" if hint else f"; known keys are {', '.join(known)}"
    return ConfigError(f"unknown key {name!r}{f' in {source}' if source else ''}{rest}")


def first_of(error: ValidationError, fields: Mapping[str, FieldInfo]) -> ConfigError:
    """The first mistake that pydantic has found, in one line; `fields` are those of the config."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        *outer, name = path
        return unknown(name, ClientClass.model_fields if outer else fields, ".".join(outer))
    where = ".".join(path).replace("_", "-")
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in _OUTSIDE and path[-1] in RANGES:
        message = f"expected a {RANGES[path[-1]]}"
    if first["type"] in _FORMS and len(path) == 1:
        example = json.dumps((fields[path[0]].examples or [None])[0], separators=(",", ":"))
        message = f"expected a {_FORMS[first['type']]} such as {example}"
    return ConfigError(f"{where}: {message}, found {first['input']!r}" if where else message)


_OUTSIDE = (
    "greater_than_equal",
    "less_than_equal",
    "finite_number",
    "int_from_float",
    "int_parsing_size",
)
"""What pydantic calls a number that is out of range."""

_FORMS: Mapping[str, Any] = {"list_type": "list", "dict_type": "table"}
"""What pydantic says a value is not → what it should be."""
