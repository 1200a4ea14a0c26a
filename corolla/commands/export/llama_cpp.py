"""An adapter, and its base with the adapter merged in, as GGUF files of llama.cpp."""

from collections.abc import Sequence
from pathlib import Path

import transformers

from corolla.artefacts import gguf_files
from corolla.artefacts.gguf_files import GgufModel, GgufType
from corolla.commands.export.subject import Subject, refuse_filled
from corolla.errors import ModelError
from corolla.host.files import making_folder
from corolla.models import pretrained


def write_gguf(subject: Subject, folder: Path, kind: GgufType, rank: int | None) -> Sequence[str]:
    """Write adapter-KIND.gguf and model-KIND.gguf; a line each of what they are.

    Raises ArtefactError for what llama.cpp does not know, ConfigError for a folder that is not new.
    """
    refuse_filled(folder)
    model = _model(subject)
    saved, error = (None, 0.0) if subject.whole and not rank else subject.lora(rank)
    weights = subject.weights(saved)
    told = f", {error:.2%} off in effective weights" if error else ""
    lines = []
    with making_folder(folder) as scratch:
        if saved is not None:
            name = f"adapter-{kind}.gguf"
            odd = gguf_files.write_lora(scratch / name, model, saved.update, saved.spec, kind)
            lines.append(f"{folder / name}: rank {saved.spec.rank}{told}{_odd(odd)}")
        name = f"model-{kind}.gguf"
        odd = gguf_files.write_model(scratch / name, model, weights, kind)
        lines.append(f"{folder / name}: merged{told}{_odd(odd)}")
    return lines


def _odd(count: int) -> str:
    """Returns the remark on matrices that have no blocks of 32 values."""
    return f"; {count} matrices in f16, their rows are no multiple of 32" if count else ""


def _model(subject: Subject) -> GgufModel:
    """The model by its configuration and tokenizer, without its weights."""
    with pretrained.Quiet():
        try:
            where = {"trust_remote_code": False}
            config = transformers.AutoConfig.from_pretrained(subject.base, **where)
            tokenizer = transformers.AutoTokenizer.from_pretrained(subject.base, **where)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"cannot load model {subject.base!r}: {error}") from error
    source = None if subject.whole else pretrained.gguf_of(subject.config.model)
    name = Path(subject.config.model).name
    return GgufModel(config, tokenizer, name, source)
