"""An order of `corolla port`, carried out: is it the same kind of model, and does it still help?

Khan et al., "PortLLM: Personalizing Evolving Large Language Models with Training-Free and Portable
Model Patches", ICLR 2025, arXiv 2410.10870, and Lin et al., "Efficient Model Development through
Fine-tuning Transfer", 2025, arXiv 2503.20110: what tuning has added to one version of a base is
added to another, m' = m_new + D. It works where the two are linearly connected, which nothing but
a measurement says.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from corolla.artefacts.adapters import CONFIG, TENSORS, SavedLora, copy_tokenizer, read_addition
from corolla.artefacts.card import write_brief_card
from corolla.artefacts.weights import open_tensors, weight_of
from corolla.commands import artefacts
from corolla.commands.export.subject import refuse_filled
from corolla.commands.port.distance import Distance, measure
from corolla.errors import ArtefactError, ConfigError, ModelError
from corolla.host.files import making_folder
from corolla.models import pretrained
from corolla.models.files import adapter_files
from corolla.tensors import factors
from corolla.tensors.stored import StoredTensor
from corolla.types import Metrics
from corolla.version import __version__

RECORD = "port.json"
"""The file beside a ported adapter that says from where to where, and what was measured."""


@dataclass(frozen=True)
class Order:
    """An order to port an adapter: to which model, where to, and the rows to measure it on."""

    adapter: Path
    to: str
    out: Path
    model: str | None = None
    """The base that it was trained on; None: the one that it names."""
    data: str | None = None
    """Rows to measure on; None: the held-out rows of its run."""
    force: bool = False
    settings: Sequence[str] = ()


@dataclass(frozen=True)
class Ported:
    """The measurements of a port."""

    folder: str
    distance: Distance
    scores: Mapping[str, Mapping[str, Metrics]] = field(default_factory=dict)
    """"new" and, where the old base is there, "old" → the scores of base and adapter."""
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """For port.json and --json."""
        return {
            "folder": self.folder,
            **self.distance.to_json(),
            "scores": self.scores,
            "notes": list(self.notes),
        }

    @property
    def lines(self) -> list[str]:
        """The sentences that are shown."""
        told = [f"{_losses('on the new base', self.scores['new'])}" if self.scores else ""]
        told += [_losses("on the old base", self.scores["old"])] if "old" in self.scores else []
        found = [*told, far(self.distance), *self.notes]
        return [f"{self.folder}: ported; {RECORD} says what was found", *filter(None, found)]


def port(order: Order) -> Ported:
    """Carry out an order, and write the adapter whole or not at all.

    Raises ConfigError for an order that makes no sense, ArtefactError for an adapter that does not
    fit the model, or makes it worse and is not forced.
    """
    refuse_filled(order.out)
    folder = artefacts.result_of(order.adapter)
    if artefacts.is_model(folder):
        raise ArtefactError(f"{folder} is a whole model: only adapters of LoRA are ported")
    saved = read_addition(folder)
    config = artefacts.config_of(folder, order.model, order.data, order.settings)
    if not (order.force or order.data or artefacts.run_info(folder)):
        raise ConfigError(
            f"{folder} has no run.json beside it, so there are no rows to tell whether it helps "
            f"{order.to}: give some with --data FILE, or port it unmeasured with --force"
        )
    new = open_tensors(pretrained.resolve(order.to))
    named = _named(saved, new, order.to)
    notes = _tokenizers(folder, config.model, order)
    old = _old(config.model)
    if old is None:
        notes.append(f"{config.model} is not on this machine: the two bases were not compared")
    transposed = bool(saved.config.get("fan_in_fan_out"))
    distance = measure(old, new, named, saved.baked, transposed)
    scores = {}
    if order.data or artefacts.run_info(folder):
        scores = _scores(folder, order, config.model if old is not None else None)
        _refuse_harm(folder, order, scores, distance)
    found = Ported(str(order.out), distance, scores, notes)
    _write(folder, order, found)
    return found


def far(distance: Distance) -> str:
    """How far the bases are apart, as a sentence; "" where it is not known."""
    if distance.ratio is None:
        return ""
    if not distance.moved:
        return "the weights under the adapter are the same in both bases"
    cosine = distance.cosine
    turned = "" if cosine is None else f", at a mean cosine of {cosine:.2f} to what it adds"
    return (
        f"from the old base to the new one the weights under the adapter have moved "
        f"{distance.ratio:.3g} times as far as the adapter moves them{turned}"
    )


def _named(saved: SavedLora, new: Mapping[str, StoredTensor], to: str) -> dict[str, str]:
    """Name of a weight in the new base → the adapter's module on it.

    Raises ArtefactError for the first module that is not there, or of another shape.
    """
    transposed, found = bool(saved.config.get("fan_in_fan_out")), {}
    for module in factors.modules(saved.update):
        b, a = (saved.update[module + role] for role in (factors.B, factors.A))
        wanted = (a.shape[1], len(b)) if transposed else (len(b), a.shape[1])
        name = weight_of(module, new)
        if name is None or new[name].shape != wanted:
            has = "no such module" if name is None else " x ".join(map(str, new[name].shape))
            raise ArtefactError(
                f"{to} is not another version of the adapter's base: {module} is "
                f"{' x '.join(map(str, wanted))} under the adapter, found {has}; adapters are "
                f"ported between models with the same modules alone"
            )
        found[name] = module
    return found


def _old(model: str) -> dict[str, StoredTensor] | None:
    """The tensors of the old base; None where they are not on this machine."""
    try:
        return open_tensors(pretrained.resolve(model))
    except (ArtefactError, ModelError):
        return None


def _tokenizers(folder: Path, model: str, order: Order) -> list[str]:
    """Notes on the tokenizers of adapter and new base.

    Raises ArtefactError where they differ and the port is not forced.
    """
    new = pretrained.load_tokenizer(order.to)
    try:
        own = str(folder) if (folder / "tokenizer_config.json").is_file() else None
        old = pretrained.load_tokenizer(model, own)
    except ModelError:
        return ["the tokenizer of the old base is not on this machine, and was not compared"]
    if (differs := _difference(old, new)) is None:
        return []
    told = f"the tokenizers differ: {differs}"
    if not order.force:
        raise ArtefactError(
            f"{order.to} reads other tokens than {folder} was trained on: {told}; --force ports "
            f"it all the same"
        )
    return [told]


def _difference(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> str | None:
    """In what two tokenizers differ; None where vocabulary and special ids are the same."""
    if _special(old) != _special(new):
        return "their special tokens are not the same"
    if _vocabulary(old) != _vocabulary(new):
        return f"they have {len(old)} and {len(new)} tokens, not the same ones"
    return None


def _special(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], list[int]]:
    return dict(tokenizer.special_tokens_map), list(tokenizer.all_special_ids)


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    entries = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return hashlib.sha256(entries).hexdigest()


def _scores(folder: Path, order: Order, old: str | None) -> dict[str, dict[str, Metrics]]:
    """Held-out scores of the new base without and with the adapter, and of the old one."""
    pairs = {"new": order.to, **({"old": old} if old is not None else {})}
    return {
        name: artefacts.evaluate_adapter(folder, model, order.data, order.settings)
        for name, model in pairs.items()
    }


def _refuse_harm(
    folder: Path, order: Order, scores: Mapping[str, Mapping[str, Metrics]], distance: Distance
) -> None:
    """Raises ArtefactError where the new base is worse with the adapter, and it is not forced."""
    before, after = scores["new"]["base"]["loss"], scores["new"]["adapter"]["loss"]
    if order.force or after <= before:
        return
    why = [_losses("on the old base", scores["old"])] if "old" in scores else []
    why += [told] if (told := far(distance)) else []
    raise ArtefactError(
        f"{folder} makes {order.to} worse: {_losses('on held-out rows', scores['new'])}"
        f"{''.join('; ' + own for own in why)}. Train on the new base, from start={folder} or "
        f"anew; --force ports it all the same"
    )


def _losses(where: str, scores: Mapping[str, Metrics]) -> str:
    before, after = scores["base"]["loss"], scores["adapter"]["loss"]
    return f"loss {before:.4f} without and {after:.4f} with it {where}"


def _write(folder: Path, order: Order, found: Ported) -> None:
    """The adapter with its tensors bit for bit, the new base's name, and the record."""
    base = str(Path(order.to).resolve()) if Path(order.to).is_dir() else order.to
    told = json.loads((folder / CONFIG).read_text())
    record = {"corolla": __version__, **found.to_json()}
    del record["folder"]
    record |= {
        "from": told["base_model_name_or_path"],
        "to": adapter_files.portable(base, order.out),
        "adapter_sha256": adapter_files.adapter_hash(folder),
        "forced": order.force,
    }
    told["base_model_name_or_path"] = adapter_files.portable(base, order.out)
    with making_folder(order.out) as scratch:
        shutil.copyfile(folder / TENSORS, scratch / TENSORS)
        (scratch / CONFIG).write_text(json.dumps(told, indent=2) + "\n")
        copy_tokenizer(folder, scratch)
        (scratch / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        write_brief_card(scratch, _origin(record["from"], found), base)


def _origin(old: str, found: Ported) -> str:
    """The sentences of the card on where a ported adapter is from, and what was measured."""
    scores = found.scores.get("new")
    measured = _losses("on held-out rows of this base", scores) if scores else "not measured"
    return f"Ported by `corolla port`, untrained, from its base {old}: {measured}."
