"""The server's measurements: held-out loss, answers, and whether the saved adapter is right."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, Encoder, collate
from corolla.data.federated import spread
from corolla.data.rows import Example
from corolla.drift import domains, measure
from corolla.drift.pair import Pair
from corolla.errors import DataError
from corolla.evaluation import answers
from corolla.evaluation.scoring import score_by_row, standard_error
from corolla.models.trainable import Trainable
from corolla.types import Adapter, Metrics

_ANSWER_TOKENS = 64
_SAMPLES = 2


def fairness(clients: Mapping[str, Mapping[str, Metrics]]) -> dict[str, Metrics]:
    """How evenly clients are served, before and after: {"base": …, "final": …}, or empty.

    Over the losses of clients that were measured both times, each counting once: their `mean` and
    `std`, and the means of the worst and the best tenth (at least one client), as in q-FFL (Li et
    al., ICLR 2020, arXiv 1905.10497).
    """
    both = [c for c in clients.values() if "loss" in c["base"] and "loss" in c["final"]]
    return {when: _spread([c[when]["loss"] for c in both]) for when in ("base", "final") if both}


def _spread(losses: Sequence[float]) -> Metrics:
    ordered = sorted(losses)
    tenth = max(1, len(ordered) // 10)
    return {
        "clients": float(len(ordered)),
        "mean": statistics.fmean(ordered),
        "std": statistics.pstdev(ordered),
        "best_decile": statistics.fmean(ordered[:tenth]),
        "worst_decile": statistics.fmean(ordered[-tenth:]),
    }


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, what the data says, and what a model says."""

    prompt: str
    reference: str
    answer: str


class Evaluator:
    """Scores global models on the held-out set, on a model of its own or a shared one."""

    def __init__(
        self, config: RunConfig, model: Trainable, heldout: Sequence[Example], labels: Sequence[str]
    ) -> None:
        self.config, self.model, self.labels = config, model, labels
        self._encoder = Encoder.of(config, model.base.tokenizer, labels)
        self._chosen = chosen = spread(heldout, config.eval_examples)
        answers.check(chosen, config)
        encoded = [self._encoder(example) for example in chosen]
        self._data = [sequence for sequences in encoded for sequence in sequences]
        model.base.check_ids(sequence.input_ids for sequence in self._data)
        self._rows = [row for row, sequences in enumerate(encoded) for _ in sequences]
        self.skipped = sum(not sequences for sequences in encoded)
        """Held-out examples without a target left, e.g. a prompt as long as max_length."""
        if not self._data:
            raise DataError(
                f"none of {len(chosen)} held-out examples has a target left within "
                f"max_length={config.max_length}: raise it"
            )
        self._domains = domains.read(config.drift)
        if config.drift:
            measure.check(config, model.base.task)
        short = [e for e in heldout if e.size < 400]
        telling = [e for e in short if e.question or labels or len(e.text) > 40]
        self._samples = spread(telling or short, _SAMPLES)

    @property
    def probe(self) -> dict[str, torch.Tensor]:
        """A batch of up to four held-out sequences."""
        return collate(self._data[:4], self.model.base.pad_id, self.model.device)

    def score(self, adapter: Adapter) -> Metrics:
        """Loss, its standard error over rows, and accuracy on the held-out examples."""
        self.model.show(adapter, self.config.lora)
        base, device = self.model.base, self.model.device
        scores, rows = score_by_row(self.model.model, self._data, self._rows, base.pad_id, device)
        return {**scores, **standard_error(rows)}

    def examine(self, adapter: Adapter) -> Metrics:
        """All scores: also of answers and choices, which take longer than a loss."""
        scores = self.score(adapter)
        asked = answers.ask(self.model.model, self.model.base, self._chosen, self.config)
        return {**scores, **asked}

    def drift(self, before: Adapter, after: Adapter) -> dict[str, Any]:
        """The change by tuning in each domain of the key `drift`; empty without the key."""
        shown = Pair(
            partial(self._shown, before), partial(self._shown, after), bool(self.config.prefix)
        )
        return measure.measure(self._domains, shown, self.model.base, self.config)

    @contextmanager
    def _shown(self, adapter: Adapter) -> Iterator[Any]:
        self.model.show(adapter, self.config.lora)
        yield self.model.model

    def samples(self, adapter: Adapter) -> list[Sample]:
        """Greedy answers, or predicted labels, for a few held-out examples."""
        self.model.show(adapter, self.config.lora)
        return [self._answer(example) for example in self._samples]

    def save(self, adapter: Adapter, folder: Path) -> None:
        """Write a global model, an adapter or a whole one, with its tokenizer."""
        self.model.save(folder, adapter, self.config.lora)
        self.model.base.tokenizer.save_pretrained(str(folder))

    def _answer(self, example: Example) -> Sample:
        tokenizer, model = self.model.base.tokenizer, self.model
        if self.labels:
            logits = self._logits(self._encoder(example)[0])
            return Sample(example.text, str(example.label), self.labels[int(logits.argmax())])
        if example.question is not None:
            prompt, reference = example.question, example.answer
            ids = self._encoder.prompt_ids(example)
        else:
            words = example.text.split(" ")
            cut = max(1, len(words) // 3)
            prompt, reference = " ".join(words[:cut]), " ".join(words[cut:])
            ids = list(tokenizer(prompt)["input_ids"])
            ids = ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
            ids = ids or [model.base.pad_id]  # a prompt without tokens: start from any one
        kept = ids[-self.config.max_length :]
        (answer,) = answers.generate(
            model.model, model.base, [kept], _ANSWER_TOKENS, self.config.prefix
        )
        return Sample(prompt, reference, answer)

    @torch.no_grad()
    def _logits(self, sequence: Encoded) -> torch.Tensor:
        batch = collate([sequence], self.model.base.pad_id, self.model.device)
        del batch["labels"]
        logits: torch.Tensor = self.model.model(**batch).logits[0]
        return logits
