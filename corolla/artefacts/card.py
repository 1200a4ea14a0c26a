"""The model card of an adapter: what it is, what it scored, and how others load it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from corolla.artefacts.adapters import CONFIG, other, read_lora
from corolla.artefacts.demands import max_lora_rank, unmet
from corolla.config.run import RunConfig
from corolla.errors import ArtefactError, ModelError
from corolla.evaluation.scoring import SHARES
from corolla.host.files import write_atomic
from corolla.models import pretrained
from corolla.models.files.folders import folder_of

NAME = "README.md"
_LICENCE = re.compile(r"^license: *(\S+)", re.MULTILINE)


def write_card(folder: Path, info: Mapping[str, Any], served: Mapping[str, Any] | None) -> None:
    """Write README.md into an adapter folder.

    `info` is run.json of its run, empty without one; `served` are the error and the held-out loss
    of an adapter that was cut to a rank, None for the exact one.
    """
    config = json.loads((folder / CONFIG).read_text())
    licence = licence_of(str(info.get("config", {}).get("model") or _base(config)))
    lines = [*_head(config, licence), *_training(info, licence)]
    lines += _scores(info, served) if info else []
    lines += _loading(folder, config, info.get("labels", ()))
    write_atomic(folder / NAME, ("\n".join(lines) + "\n").encode())


def write_brief_card(folder: Path, what: str, model: str) -> None:
    """Write README.md beside an adapter that is no result: of one client, or of one round.

    `what` is a sentence on it, `model` the base model as the run names it. Nothing where a whole
    model is saved. It costs a small file: the licence is looked up once in a process.
    """
    if not (folder / CONFIG).is_file():
        return
    config, licence = json.loads((folder / CONFIG).read_text()), _licence(model)
    lines = [*_head(config, licence), what, "", _licence_line(licence), "", "## Load it", ""]
    lines += [
        'With PEFT in this folder ("."), which was not tried here:',
        "",
        *_with_peft(config),
    ]
    write_atomic(folder / NAME, "\n".join(lines).encode())


def write_cards(folder: Path, info: Mapping[str, Any]) -> None:
    """Write the cards of a finished run's adapters: the exact one, and the one for servers."""
    if (folder / "adapter").is_dir():
        write_card(folder / "adapter", info, None)
    if info.get("served", {}).get("folder") == "served":
        write_card(folder / "served", info, info["served"])


def licence_of(model: str) -> str:
    """The licence that the card of a base model names; "" where it names none, or has none."""
    if model == "embedded":
        return "apache-2.0"
    try:
        card = folder_of(pretrained.resolve(model)) / NAME
        found = _LICENCE.search(card.read_text(encoding="utf-8")[:4000])
    except (OSError, ValueError, ModelError):
        return ""
    return found[1] if found else ""


_licence = cache(licence_of)


def _base(config: Mapping[str, Any]) -> str:
    """The name of the base model in adapter_config.json; "" where there is none."""
    return str(config.get("base_model_name_or_path") or "")


def _head(config: Mapping[str, Any], licence: str) -> Sequence[str]:
    """The fields that hubs read, and the title."""
    name = _base(config)
    fields = [f"base_model: {json.dumps(name)}", "library_name: peft"]
    fields += [f"license: {licence}"] if licence else []
    kind = str(config["peft_type"]).lower()
    title = f"# {config['peft_type']} adapter for {name}"
    return ["---", *fields, f"tags: [{kind}, federated]", "---", "", title, ""]


def _licence_line(licence: str) -> str:
    return f"Licence of the base model: {licence or 'not named here, see the base model'}."


def _training(info: Mapping[str, Any], licence: str) -> Sequence[str]:
    """Base, data, strategy and privacy of the run; a sentence where none is known."""
    told = _licence_line(licence)
    if not info:
        return [told, ""]
    config: RunConfig = RunConfig.model_construct(**info["config"])
    data = config.data if not Path(config.data).is_absolute() else "a file of its own"
    privacy = info.get("privacy")
    # A card is for others: with this sha256 they could confirm a guess at all private rows.
    known = "" if privacy else f", sha256 {info['data_sha256']}"
    rows = [
        ("base model sha256", info["model_sha256"]),
        ("data", f"{data}{known}"),
        ("clients, of them in a round", f"{info['num_clients']}, {info['cohort']}"),
        ("strategy", info["strategy"]),
        ("rounds", f"{config.rounds} asked; ended with: {info.get('ended', 'not yet')}"),
        ("local steps x batch size", f"{config.local_steps} x {config.batch_size}"),
        ("target modules", ", ".join(info["target_modules"]) or "all"),
        *_limits(config, info),
        ("privacy", privacy["line"] if privacy else "no differential privacy"),
    ]
    if info.get("labels"):
        rows.insert(2, ("labels, in the order of the head", ", ".join(info["labels"])))
    return [told, "", "| trained | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows), ""]


def _limits(config: RunConfig, info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The experts and blocks that were trained, what `max_rank` has cut: where asked for."""
    if config.target_parameters:
        yield "target parameters", ", ".join(config.target_parameters)
    if config.new_tokens:
        yield "tokens of its own", ", ".join(config.new_tokens)
    if config.dora:
        yield "magnitudes", "DoRA"
    if config.layers:
        yield "blocks", config.layers
    for name, own in config.classes.items():
        if blocks := dict(own).get("layers"):
            yield f"blocks of clients of class {name}", blocks
    if config.max_rank and (errors := info.get("rank_errors")):
        yield (
            "max_rank",
            f"{config.max_rank}: the state was cut after {sum(e > 0 for e in errors)} of "
            f"{len(errors)} rounds, by {max(errors):.2%} in effective weights at most",
        )


def _scores(info: Mapping[str, Any], served: Mapping[str, Any] | None) -> Sequence[str]:
    """The held-out scores before and after; of a cut adapter its loss and its error."""
    base, final = info["base"], info["final"]
    lines = ["| held out | base model | fine-tuned |", "|---|---|---|"]
    lines.append(f"| loss | {base['loss']:.4f} | {final['loss']:.4f} |")
    for name, called in SHARES.items():
        if name in base and name in final:
            lines.append(f"| {called} | {base[name]:.1%} | {final[name]:.1%} |")
    lines.append("")
    if served:
        loss = f", and its held-out loss is {served['loss']:.4f}" if "loss" in served else ""
        lines += [
            f"The numbers above are of the run's exact adapter. This one is the best of its rank: "
            f"{served['error']:.3%} off in effective weights{loss}.",
            "",
        ]
    return lines


def _with_peft(config: Mapping[str, Any], labels: Sequence[str] = ()) -> Sequence[str]:
    """How plain PEFT loads an adapter; `labels` in the order of a classifier's head."""
    name, classify = _base(config), config.get("task_type") == "SEQ_CLS"
    auto = "AutoModelForSequenceClassification" if classify else "AutoModelForCausalLM"
    where = 'asset("model")' if name == "embedded" else f'"{name}"'
    named = f", id2label={dict(enumerate(labels))!r}" if labels else ""
    tokens = _tokens(config)
    return [
        "```python",
        "import torch",
        "from peft import PeftModel",
        f"from transformers import {auto}{', AutoTokenizer' if tokens else ''}",
        *([] if name != "embedded" else ["from corolla.embedded.assets import asset"]),
        "",
        f"base = {auto}.from_pretrained({where}, dtype=torch.float32{named})",
        'model = PeftModel.from_pretrained(base, ".").eval()',
        *(['tokenizer = AutoTokenizer.from_pretrained(".")'] if tokens else []),
        "```",
        "",
    ]


def _tokens(config: Mapping[str, Any]) -> bool:
    """True where rows of tokens are trained, which the tokenizer of the base may lack."""
    return bool(config.get("trainable_token_indices"))


def _loading(folder: Path, config: Mapping[str, Any], labels: Sequence[str]) -> Sequence[str]:
    """How programs load it, and which of them did; `labels` in the order of a classifier's head."""
    name = _base(config)
    lines = [
        "## Load it",
        "",
        'With PEFT, in this folder ("."); the run of the exact adapter ended by loading it so, in '
        "another process:",
        "",
        *_with_peft(config, labels),
    ]
    try:
        saved = read_lora(folder)
    except ArtefactError:
        why = other(config) or "cannot be read"
        if _tokens(config):
            why = "has rows of new tokens beside its factors"
        return [*lines, f"Other programs take plain LoRA alone: this adapter {why}."]
    rank = max_lora_rank(saved.spec.rank)
    lines += [
        "With vLLM and with Ollama; neither was run here:",
        "",
        "```bash",
        f"vllm serve {name} --enable-lora --max-lora-rank {rank or 512} --lora-modules tuned=.",
        "corolla export . --to gguf --dtype f16 --out gguf",
        "printf 'FROM ./gguf/model-f16.gguf\\n' > Modelfile && ollama create tuned -f Modelfile",
        "```",
        "",
        "With llama.cpp, which Corolla's tests run on files of each architecture, not on this one:",
        "",
        "```bash",
        "llama-cli -m gguf/model-f16.gguf",
        "llama-cli -m base.gguf --lora gguf/adapter-f16.gguf",
        "```",
        "",
    ]
    if told := unmet(saved):
        lines += ["Servers may refuse it as it is:", "", *(f"- {sentence}" for sentence in told)]
    else:
        lines.append("It meets what these programs demand of rank, tensors and names.")
    return lines
