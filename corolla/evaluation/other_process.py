"""A process of its own that reads what is saved: it is started, asked and ended."""

import json
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from corolla.errors import ArtefactError
from corolla.evaluation import reader
from corolla.evaluation.reader import Answer, Request
from corolla.host.supervised import Child


class OtherProcess:
    """A process that reads what is saved; it imports its libraries from `with` on.

    What it reads and says lies in a folder of its own, which is gone at the end.
    """

    def __enter__(self) -> Self:
        path = os.pathsep.join(folder for folder in sys.path if folder)
        with ExitStack() as ends:
            try:
                folder = ends.enter_context(tempfile.TemporaryDirectory(prefix="corolla-proof-"))
                self._folder = Path(folder)
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
        """What it finds in `rows`, and the logits. Raises ArtefactError when it fails."""
        told = {name: tensor.cpu().contiguous() for name, tensor in rows.items()}
        try:
            save_file(told, self._folder / reader.ROWS)
        except (OSError, SafetensorError) as error:  # a full disk
            raise ArtefactError(f"rows for another process cannot be written: {error}") from error
        asked = asdict(Request(scratch=str(self._folder), **request))
        self._child.tell(json.dumps(asked).encode() + b"\n")
        if self._child.wait() != 0:
            why = self._child.last_words(mark=";", silent="no output, ").removeprefix("error: ")
            raise ArtefactError(f"{request['saved']} cannot be loaded in another process: {why}")
        try:
            answer = Answer(**json.loads((self._folder / reader.ANSWER).read_text()))
            return answer, load_file(self._folder / reader.LOGITS)["logits"]
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise ArtefactError(
                f"{request['saved']}: the other process gave no answer: {error}"
            ) from error


def _nobody(line: str) -> None:
    """Hears a line: its last ones are kept, for the case that it fails."""


def command() -> list[str]:
    """What starts the other process."""
    return [sys.executable, "-m", "corolla.evaluation.reader"]
