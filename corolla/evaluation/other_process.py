"""A process of its own that reads what is saved: it is started, asked and ended."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from corolla.errors import ArtefactError
from corolla.host.files import scratch_folder
from corolla.host.supervised import Child

ROWS, LOGITS, ANSWER = "rows.safetensors", "logits.safetensors", "answer.json"
"""Files in the folder of a request: what is read, and what comes back."""


@dataclass(frozen=True)
class Request:
    """A request to the other process: what to load, how, and the folder (absolute) of files."""

    scratch: str
    saved: str
    """Folder of the adapter, or of a whole model."""
    base: str
    """The base model of the adapter, as transformers loads it."""
    whole: bool
    labels: int
    """Classes of a classifier; 0: a model that generates."""
    dtype: str
    quantised: dict[str, Any]
    """Arguments of BitsAndBytesConfig; empty for a base that is not quantised."""
    device: str
    threads: int
    seed: int
    pad_id: int
    new_head: Sequence[str] = ()
    """Tensors of a head that the run drew anew, though the checkpoint has one."""


@dataclass(frozen=True)
class Answer:
    """The findings of the other process, beside the logits."""

    loss: float
    """Mean of the cross-entropy over all targets of the rows, in nats."""
    stored: str
    """sha256 of the tensors that the checkpoint of the base (or of the whole model) has."""
    drawn: list[str]
    """Names of tensors that neither the checkpoint nor what was saved has: they are random."""


class OtherProcess:
    """A process that reads what is saved; it imports its libraries from `with` on.

    What it reads and says lies in a folder of its own, which is gone at the end.
    """

    def __enter__(self) -> Self:
        path = os.pathsep.join(folder for folder in sys.path if folder)
        with ExitStack() as ends:
            try:
                self._folder = ends.enter_context(scratch_folder("proof"))
                self._child = Child(
                    command(),
                    self._folder / "reader.log",
                    env={**os.environ, "PYTHONPATH": path},  # an app bundle is installed nowhere
                    cwd=self._folder,  # what lies in the user's is no module
                    listener=_nobody,
                )
                ends.callback(self._child.close)
                self._child.start()
            except OSError as error:
                raise ArtefactError(f"no other process to load what is saved: {error}") from error
            self._ends = ends.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ends.close()

    def ask(self, request: dict[str, Any], rows: dict[str, Tensor]) -> tuple[Answer, Tensor]:
        """Has rows read. Returns the answer and the logits; raises ArtefactError when it fails."""
        told = {name: tensor.cpu().contiguous() for name, tensor in rows.items()}
        try:
            save_file(told, self._folder / ROWS)
        except (OSError, SafetensorError) as error:  # a full disk
            raise ArtefactError(f"rows for another process cannot be written: {error}") from error
        asked = asdict(Request(scratch=str(self._folder), **request))
        self._child.tell(json.dumps(asked).encode() + b"\n")
        if self._child.wait() != 0:
            why = self._child.last_words(mark=";", silent="no output, ").removeprefix("error: ")
            raise ArtefactError(f"{request['saved']} cannot be loaded in another process: {why}")
        try:
            answer = Answer(**json.loads((self._folder / ANSWER).read_text()))
            return answer, load_file(self._folder / LOGITS)["logits"]
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise ArtefactError(
                f"{request['saved']}: the other process gave no answer: {error}"
            ) from error


def _nobody(line: str) -> None:
    """Hears a line: its last ones are kept, for the case that it fails."""


def command() -> list[str]:
    """Returns the command line that starts the other process."""
    return [sys.executable, "-m", "corolla.evaluation.reader"]
