"""The subject of an export: an adapter or a whole model, and the base model under it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corolla.artefacts.adapters import SavedLora, cut, read_lora
from corolla.artefacts.weights import Weights, open_weights
from corolla.commands import artefacts
from corolla.config.run import RunConfig
from corolla.errors import ArtefactError, ConfigError
from corolla.models import pretrained


@dataclass(frozen=True)
class Subject:
    """A finished adapter/ or model/ folder; `config` are the settings of its run, or defaults."""

    folder: Path
    config: RunConfig
    info: Mapping[str, Any]
    """The content of run.json; empty without a run."""

    @property
    def whole(self) -> bool:
        """True for a model, which needs no base."""
        return artefacts.is_model(self.folder)

    @property
    def base(self) -> str:
        """The model that transformers loads: the base model, or the whole model itself."""
        return str(self.folder) if self.whole else pretrained.resolve(self.config.model)

    @property
    def base_name(self) -> str:
        """The base model as a new adapter may name it: a name, or a path of this machine."""
        return self.config.model

    def lora(self, rank: int | None) -> tuple[SavedLora, float]:
        """The adapter, of rank at most `rank`, and its relative error on effective weights.

        Raises ArtefactError for a whole model, or an adapter that is not LoRA.
        """
        if self.whole:
            raise ArtefactError(f"{self.folder} is a whole model: it has no rank")
        saved = read_lora(self.folder)
        return cut(saved, rank) if rank else (saved, 0.0)

    def weights(self, saved: SavedLora | None) -> Weights:
        """The base model's weights with an adapter merged in; None: those of a whole model.

        Raises ArtefactError for an adapter with tensors beside its factors.
        """
        if saved is None:
            return open_weights(self.base, {})
        if saved.heads:
            raise ArtefactError(
                f"{self.folder} trains {min(saved.heads)} as it is, beside its factors: use "
                f"--to merged without --dtype and --rank"
            )
        transposed = bool(saved.config.get("fan_in_fan_out"))
        return open_weights(self.base, saved.baked, transposed)


def open_subject(source: Path, model: str | None) -> Subject:
    """The subject that is meant by a run's folder, or by an adapter or model folder.

    Raises ArtefactError or ConfigError for one that is none.
    """
    folder = artefacts.result_of(source)
    whole = artefacts.is_model(folder)
    if whole and model:
        raise ConfigError(f"{folder} is a whole model: leave --model out")
    if whole and not artefacts.run_info(folder):
        return Subject(folder, RunConfig(model=str(folder)), {})
    config = artefacts.config_of(folder, model, None, ())
    return Subject(folder, config, artefacts.run_info(folder))


def refuse_filled(folder: Path) -> None:
    """Raises ConfigError for a folder that is not new."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out {folder} is not empty: name a new folder")
