"""Base models and tokenizers by name or path: embedded, hub, local folder, GGUF file."""

from __future__ import annotations

import importlib
import shutil
import struct
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from corolla import seeds
from corolla.config.run import RunConfig
from corolla.embedded.assets import asset
from corolla.errors import ConfigError, ModelError
from corolla.host import heap
from corolla.models import anatomy
from corolla.models.classifiers import heads
from corolla.models.devices import pick_device
from corolla.models.files import missing as lost
from corolla.models.files.folders import PACKAGED, converted, packaged
from corolla.models.tokens import rows
from corolla.tensors import tree

if TYPE_CHECKING:  # a tokenizer is loaded without the classes of models
    from transformers import PreTrainedModel

LOADING = (
    *(OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, IndexError),
    *(SafetensorError, struct.error),
)
"""Errors of transformers, safetensors and gguf for files that are damaged or of another kind."""
_DIGITS_ALONE = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""Names of llama.cpp for tokenizers that cut each digit alone, then as GPT-2's."""


@dataclass(frozen=True)
class Base:
    """A base model, its tokenizer, and where it came from. `task` is 'causal' or 'classify'."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: str
    name: str
    path: str
    fingerprint: str = ""
    """sha256 of the weights, so that two parties can tell that they have the same model."""
    missing: frozenset[str] = frozenset()
    """Names of the tensors that the checkpoint lacks: they are drawn from the run's seed."""
    stored: str = ""
    """sha256 of the weights that the checkpoint has: the same whatever the seed."""

    @property
    def pad_id(self) -> int:
        """The id used for padding; masked out everywhere, so any that the model has serves."""
        wanted = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(i) for i in wanted if i is not None and i < self.embeddings), 0)

    @property
    def embeddings(self) -> int:
        """The number of token ids that the model knows."""
        rows = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        return int(rows or self.model.config.get_text_config().vocab_size)

    def check_ids(self, sequences: Iterable[Sequence[int]]) -> None:
        """Raises ModelError for a token that the tokenizer has and the model does not."""
        highest = max((max(ids, default=0) for ids in sequences), default=0)
        if highest >= self.embeddings:
            raise ModelError(
                f"the tokenizer of {self.name} has {len(self.tokenizer)} tokens, the model "
                f"embeddings for {self.embeddings}, and the data need others: give the model's own "
                f"tokenizer, or save it after model.resize_token_embeddings({len(self.tokenizer)})"
            )


def load(config: RunConfig, labels: Sequence[str] = ()) -> Base:
    """The base model of a run, on its device, in evaluation mode, without gradients.

    With labels (and task auto or classify) a sequence classifier whose head starts from the
    run's seed unless the model has one. Raises ModelError when it cannot be loaded, or lacks
    weights that the run does not train.
    """
    task = {"auto": "classify" if labels else "causal"}.get(config.task, config.task)
    if task == "classify" and not labels:
        raise ConfigError(f"task classify needs labels, {config.data} has none")
    path = resolve(config.model)
    kwargs: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.quantization != "none":
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(**quantised(config))
    if task == "classify":
        kwargs["num_labels"] = len(labels)
        kwargs["id2label"] = dict(enumerate(labels))
        kwargs["label2id"] = {label: i for i, label in enumerate(labels)}
        kwargs["ignore_mismatched_sizes"] = config.new_head
    auto: Any = AutoModelForSequenceClassification if task == "classify" else AutoModelForCausalLM
    device = pick_device(config.device)
    # A new classifier head is drawn from torch's global state: give it one of its own.
    with torch.random.fork_rng(devices=[]), Quiet():
        torch.random.manual_seed(seeds.derive(config.seed, "head"))
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            rows.add(tokenizer, config.new_tokens)
            model, found = auto.from_pretrained(
                path, output_loading_info=True, trust_remote_code=False, **kwargs
            )
            new = lost.outside(model) if task == "classify" and config.new_head else []
            fresh = heads.draw(model, new)
        except LOADING as error:
            raise ModelError(f"cannot load model {config.model!r}: {why(error)}") from error
    if hasattr(model, "peft_config"):
        raise _nested(config.model)
    missing = frozenset(found["missing_keys"]) | fresh
    lost.refuse(
        config.model, missing, _trained(config, task, model, missing), found["unexpected_keys"]
    )
    if config.quantization == "none":
        model = model.to(device)
    if config.quantization == "4bit" and model.device.type == "cpu":
        _check_4bit_on_cpu(model)
    model.requires_grad_(False)
    whole = fingerprint(model)
    stored = fingerprint(model, missing) if missing else whole
    base = Base(model.eval(), tokenizer, task, config.model, str(path), whole, missing, stored)
    # A decoder that classifies looks for the last token before the first pad: both must agree.
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = base.pad_id
    check_length(config, model)
    if config.gradient_checkpointing:
        # Hooks that tell the gradients of examples apart work with the reentrant kind alone.
        reentrant = config.dp == "example"
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:  # which passes nothing back to a block whose inputs need no gradient
            model.enable_input_require_grads()
        heap.spare_memory()
    return base


def load_tokenizer(
    name: str, path: str | None = None, added: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; `path` is where it lies, if not where `resolve` finds it.

    It has the tokens `added` beside its own. Raises ModelError.
    """
    try:
        with Quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                path or resolve(name), trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the tokenizer of {name!r}: {why(error)}") from error
    rows.add(tokenizer, added)
    return tokenizer


def why(error: Exception) -> str:
    """One line of what transformers says of a model that it does not load."""
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return "it brings code of its own, which is never run: use an architecture of transformers"
    return reason[:300]


def check_length(config: RunConfig, model: PreTrainedModel) -> None:
    """Raises ModelError when a run's sequences have more tokens than the model has positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and config.max_length > positions:
        raise ModelError(
            f"max_length {config.max_length} is more than the {positions} positions of "
            f"{config.model}: use --set max-length={positions}"
        )
    if positions and config.max_length + config.prefix > positions:
        raise ModelError(
            f"max_length {config.max_length} after {config.prefix} virtual_tokens is more than the "
            f"{positions} positions of {config.model}: lower one of them"
        )


def resolve(name: str) -> str:
    """A folder or hub name that transformers loads: GGUF files are converted once and cached.

    Raises ModelError for a path that is no model.
    """
    if name == "embedded":
        return str(asset("model"))
    if gguf := gguf_of(name):
        return str(_convert(gguf))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"folder {path} is no model: it has no config.json")
        if (path / "adapter_config.json").is_file():
            raise _nested(str(path))
        return str(path.resolve())
    if path.exists() or name.startswith((".", "/", "~")):
        raise ModelError(f"{name} is neither a model folder nor a .gguf file")
    return name


def gguf_of(name: str) -> Path | None:
    """The GGUF file that a base model comes from, or None. Raises ModelError for a missing one."""
    if name in PACKAGED:
        return packaged(name)
    path = Path(name).expanduser()
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise ModelError(f"GGUF file {path} does not exist")
    return path


def _nested(name: str) -> ModelError:
    """The error for a base model that brings an adapter: a second one would be trained on both."""
    return ModelError(
        f"{name} holds a model and an adapter: move adapter_config.json and adapter_model.* to "
        f"another FOLDER, then corolla export FOLDER --model {name} --to merged --out MERGED"
    )


def fingerprint(model: PreTrainedModel, without: Collection[str] = ()) -> str:
    """sha256 over the base model's tensors, by name; some can be left out."""
    return tree.digest({n: t for n, t in model.state_dict().items() if n not in without})


def heads_of(base: Base) -> list[str]:
    """Modules that a classifier trains as they are: its head, and a pooler that is new."""
    if base.task != "classify":
        return []
    return [*lost.outside(base.model), *lost.poolers(base.model, base.missing)]


def _convert(gguf: Path) -> Path:
    """Dequantise a GGUF file to a folder of fp32 safetensors, once: it takes minutes."""
    target = converted(gguf)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        with torch.random.fork_rng(devices=[]), Quiet():
            where = {"gguf_file": gguf.name, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
            _cut_digits(tokenizer, anatomy.metadata_of(gguf))
            model, found = AutoModelForCausalLM.from_pretrained(
                gguf.parent, dtype=torch.float32, output_loading_info=True, **where
            )
            lost.refuse(str(gguf), found["missing_keys"], (), found["unexpected_keys"])
            # The tensors are plain fp32 by now; what says otherwise would forbid saving them.
            model.hf_quantizer = None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            with Quiet():
                model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    except LOADING as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"cannot convert {gguf}: {reason} (pip install 'corolla[gguf]')"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _cut_digits(tokenizer: PreTrainedTokenizerBase, told: Mapping[str, Any]) -> None:
    """Let a tokenizer cut each digit alone where llama.cpp does: transformers knows no such steps.

    Texts with digits of few languages alone show it: merges with a plain digit are rare.
    """
    if told.get("tokenizer.ggml.pre") in _DIGITS_ALONE:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def quantised(config: RunConfig) -> dict[str, Any]:
    """Returns arguments of BitsAndBytesConfig, {} for a base as it is. Raises ConfigError."""
    if config.quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization {config.quantization} needs bitsandbytes: pip install 'corolla[quant]'"
        )
    if config.quantization == "8bit":
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": config.dtype,
    }


def _trained(
    config: RunConfig, task: str, model: PreTrainedModel, missing: Collection[str]
) -> list[str]:
    """Modules that a run trains and saves whole, if the checkpoint lacks them."""
    if task == "classify":
        return [*lost.outside(model), *lost.poolers(model, missing)]
    output = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if m is output and config.kind.output]


def _check_4bit_on_cpu(model: PreTrainedModel) -> None:
    """The CPU kernel of bitsandbytes packs blocks of 64 values along a row."""
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and module.in_features % 64:
            raise ModelError(
                f"4-bit layers on a CPU need an input width that is a multiple of 64, {name} has "
                f"{module.in_features}: use quantization=8bit or a CUDA device"
            )


class Quiet:
    """Silences transformers' progress bars and advice while a model loads."""

    def __enter__(self) -> None:
        self._level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        transformers.logging.set_verbosity(self._level)
        transformers.logging.enable_progress_bar()
