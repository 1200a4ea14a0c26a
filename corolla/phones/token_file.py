"""`corolla tokens`: text as the token ids that a native client trains on.

One line per sequence: `input_ids`, `labels` (−100 where masked; absent: all ids count) and
`example`, the row that it comes from, so that windows of one long text count once.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from corolla.data import templates
from corolla.data.encoding import Encoded, Encoder
from corolla.data.rows import Example, read_rows
from corolla.errors import ConfigError, DataError
from corolla.models import pretrained
from corolla.phones import bundle


def write(model: str, source: str, out: Path, max_length: int, day: str = "") -> tuple[int, int]:
    """(sequences, examples) written to `out` from a .jsonl file of a device's own rows.

    `model` is a name, a model's folder or a bundle: its tokenizer is used. Rows for validation or
    test are left out, nothing else is. `day` is the run's template_date, which must be given where
    the model's chat template writes one. Raises DataError where nothing is left to train on.
    """
    if max_length < 2:
        raise ConfigError(f"--max-length {max_length}: a sequence has at least 2 tokens")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    rows, _ = read_rows(source)
    if any(row.label is not None for row in rows):
        raise DataError(f"{source} has labels: native clients train on text, not on classes")
    tokenizer = _tokenizer(model)
    if templates.writes_date(tokenizer) and any(row.dialogue for row in rows):
        _check_day(model, day)
    encoder = Encoder(tokenizer, (), max_length, day)
    scratch = out.with_name(out.name + ".part")
    sequences, examples = 0, set()
    try:
        with scratch.open("w", encoding="utf-8") as file:
            for encoded in encode(rows, encoder):
                file.write(json.dumps(_line(encoded), separators=(",", ":")) + "\n")
                sequences += 1
                examples.add(encoded.example)
        if not sequences:
            raise DataError(f"{source} leaves no sequence with a target: raise --max-length")
        scratch.replace(out)
    finally:
        scratch.unlink(missing_ok=True)
    return sequences, len(examples)


def _check_day(model: str, day: str) -> None:
    """Raises ConfigError for what is no date, where a chat template writes one."""
    try:
        date.fromisoformat(day)
    except ValueError as error:
        raise ConfigError(
            f"the chat template of {model!r} writes a date: give --template-date as YYYY-MM-DD, "
            f"which is template_date in the run's run.json"
        ) from error


def encode(rows: list[Example], encoder: Encoder) -> Iterator[Encoded]:
    """The sequences of the rows that are for training, with the number of their row among these."""
    training = [row for row in rows if row.split in (None, "train")]
    for number, row in enumerate(training):
        for encoded in encoder(row):
            yield replace(encoded, example=number)


def _line(encoded: Encoded) -> dict[str, object]:
    ids = list(encoded.input_ids)
    labels = {} if encoded.labels == encoded.input_ids else {"labels": encoded.labels}
    return {"input_ids": ids, **labels, "example": encoded.example}


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    bundled = (Path(model) / bundle.MANIFEST).is_file()
    return pretrained.load_tokenizer(model, model if bundled else None)
