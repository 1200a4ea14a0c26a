"""A conversation with a finished model and with its base model, side by side.

Both are asked as they were trained: with the chat template of the tokenizer, with the date of the
run where the template writes one, else in the plain form of prompt and response.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from corolla.commands import artefacts
from corolla.config.run import RunConfig
from corolla.data import templates
from corolla.data.forms import Turn
from corolla.errors import ConfigError
from corolla.evaluation.answers import generate
from corolla.models import pretrained
from corolla.models.pretrained import Base

_UNKNOWN = Turn("assistant", "…", learnt=True)
"""An answer that stands for the one to come: its prompt is what comes before it."""
_HELP = "an empty line is nothing, /new begins another conversation, /quit or Ctrl-D ends"

Hear = Callable[[str], None]
"""Takes the text of an answer so far."""


@dataclass
class Speaker:
    """A model and what it has been asked and has answered."""

    name: str
    base: Base
    model: Any
    virtual: int = 0
    """The tokens of a trained prompt before the text."""
    silenced: bool = False
    """True where the model has an adapter that must not speak: the base model's turn."""
    turns: list[Turn] = field(default_factory=list)


@dataclass(frozen=True)
class Chat:
    """Speakers who are asked the same."""

    config: RunConfig
    speakers: Sequence[Speaker]
    system: str = ""
    """The instruction before each conversation; "" without."""

    def ask(self, speaker: Speaker, text: str, hear: Hear) -> str:
        """The answer of a speaker, which is heard while it is made, and remembered.

        Raises ConfigError for a conversation that is longer than the model can read, and DataError
        for turns that its chat template does not take.
        """
        before = [Turn("system", self.system)] if self.system and not speaker.turns else []
        turns = [*before, *speaker.turns, Turn("user", text)]
        day, tokenizer = self.config.template_date or "", speaker.base.tokenizer
        ids = templates.renderer(tokenizer, day).prompt([*turns, _UNKNOWN], "")
        most = getattr(speaker.model.config.get_text_config(), "max_position_embeddings", None)
        if most and len(ids) + speaker.virtual >= most:
            raise ConfigError(
                f"the conversation has {len(ids)} tokens, the model reads {most}: begin another"
            )
        own = speaker.model.disable_adapter() if speaker.silenced else nullcontext()
        with own:
            (answer,) = generate(
                *(speaker.model, speaker.base, [ids], self.config.max_new_tokens),
                virtual=speaker.virtual,
                hear=hear,
            )
        speaker.turns = [*turns, Turn("assistant", answer, learnt=True)]
        return answer

    def begin(self) -> None:
        """Begin another conversation."""
        for speaker in self.speakers:
            speaker.turns = []


def open_chat(source: Path, model: str | None, settings: Sequence[str], system: str) -> Chat:
    """A chat with an adapter or a whole model and its base.

    Raises ConfigError for a classifier, which answers no prompts, and ArtefactError for a folder
    that holds neither.
    """
    folder = artefacts.result_of(source)
    config = artefacts.config_of(folder, model, None, settings)
    config = config.model_copy(update={"max_length": 8})  # any: what is asked has its own length
    labels = artefacts.run_info(folder).get("labels") if artefacts.is_model(folder) else None
    if labels or (labels is None and artefacts.labels_of(folder)):
        raise ConfigError(f"{folder} is a classifier, which answers no prompts: score it instead")
    base = pretrained.load(config)
    if artefacts.is_model(folder):
        whole = artefacts.whole(folder, config, ())
        speakers = [Speaker("base model", base, base.model), Speaker("model", whole, whole.model)]
    else:
        tuned = artefacts.tuned_of(folder, base)
        speakers = [
            Speaker("base model", base, tuned, silenced=True),
            Speaker("fine-tuned", base, tuned, config.prefix),
        ]
    return Chat(config, speakers, system)


def once(chat: Chat, text: str) -> Mapping[str, str]:
    """The answer of each speaker to one prompt, by its name."""
    return {own.name: chat.ask(own, text, lambda _: None) for own in chat.speakers}


def talk(console: Console, chat: Chat, read: Callable[[], str]) -> None:
    """Ask what `read` returns until it raises EOFError; answers appear as they are made."""
    console.print(f"[dim]{_HELP}[/]", highlight=False)
    while True:
        try:
            text = read().strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/new":
            chat.begin()
            console.print("[dim]another conversation[/]")
        elif text:
            _show(console, chat, text)


def _show(console: Console, chat: Chat, text: str) -> None:
    """Ask all speakers, their answers side by side, or below each other where it is narrow."""
    said = dict.fromkeys((own.name for own in chat.speakers), "")
    with Live(_answers(said), console=console, refresh_per_second=8) as live:
        for own in chat.speakers:

            def hear(answer: str, name: str = own.name) -> None:
                said[name] = answer
                live.update(_answers(said))

            try:
                said[own.name] = chat.ask(own, text, hear) or "(nothing)"
            except ConfigError as error:
                said[own.name] = f"({error})"
            live.update(_answers(said))


def _answers(said: Mapping[str, str]) -> Table:
    table = Table(*(escape(name) for name in said), expand=True, show_edge=False)
    for column in table.columns:
        column.ratio, column.overflow = 1, "fold"
    table.add_row(*(Text(answer) for answer in said.values()))
    return table
