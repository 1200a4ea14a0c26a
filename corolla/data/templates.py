"""Conversations as token ids, and which of them are answers: by a chat template, or in plain form.

What a model learns is what its template renders for the turns of the assistant, each with one end
of turn. Where a template marks these itself ({% generation %}), its marks count. Else the prompt of
an answer is what the rendering of the turns before it, with the generation prompt, and that of the
turns with it have in common; calls of tools are context then. A template that renders a turn
otherwise once others follow, as those do that strip thoughts, gives a sequence of its own to each
answer that would stand differently in the next.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from corolla.data.forms import Turn
from corolla.errors import DataError, ModelError

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NOW = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<form>.*?)(?P=quote)\s*\)""")
_ANY_NOW = re.compile(r"strftime_now\s*\(")
_PROBE = (Turn("user", "9274"), Turn("assistant", "6183", learnt=True))
"""A question and an answer whose digits stand nowhere in a template."""
_REFUSALS = (jinja2.TemplateError, LookupError, TypeError, ValueError, AttributeError)
"""Errors that a template raises for turns that it does not take."""


@dataclass(frozen=True)
class Rendered:
    """One sequence of a conversation: its tokens, and which of them are learnt."""

    ids: Sequence[int]
    learnt: Sequence[bool]


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the chat template of a tokenizer writes the day on which it is used."""
    template = getattr(tokenizer, "chat_template", None) or ""
    parts = template.values() if isinstance(template, dict) else [template]
    return any(_ANY_NOW.search(str(part)) for part in parts)


def renderer(tokenizer: PreTrainedTokenizerBase, day: str = "") -> "ChatTemplate | PlainForm":
    """Returns the renderer of conversations for a tokenizer.

    `day` is what its template writes for today.
    """
    if getattr(tokenizer, "chat_template", None):
        return ChatTemplate(tokenizer, day)
    return PlainForm(tokenizer)


@dataclass(frozen=True)
class PlainForm:
    """Conversations for a tokenizer without a chat template: turns on lines, answers with eos."""

    tokenizer: PreTrainedTokenizerBase

    def sequences(self, turns: Sequence[Turn], tools: str, most: int = 0) -> list[Rendered]:
        """One sequence, however long. Raises DataError for tools, which have no plain form."""
        ids, learnt = list[int](), list[bool]()
        for is_learnt, part in self._parts(turns, tools):
            ids += part
            learnt += [is_learnt] * len(part)
        return [Rendered(ids, learnt)]

    def prompt(self, turns: Sequence[Turn], tools: str) -> list[int]:
        """The tokens before the last of the turns, an answer."""
        return [i for _, part in self._parts(turns, tools)[:-1] for i in part]

    def _parts(self, turns: Sequence[Turn], tools: str) -> list[tuple[bool, list[int]]]:
        if tools or any(turn.calls for turn in turns):
            raise DataError(
                "rows have tools, which only a chat template can write, and the model has none: "
                "leave them out, or use a model with a template that takes them"
            )
        parts = list[tuple[bool, list[int]]]()
        for turn in turns:
            if turn.learnt:
                answer = _plain(self.tokenizer, turn.content)
                eos = self.tokenizer.eos_token_id
                ends = eos is None or (answer and answer[-1] == eos)
                parts.append((True, answer if ends else [*answer, eos]))
            elif parts:
                start = "\n" if self.tokenizer.eos_token_id is None and parts[-1][0] else ""
                parts.append((False, _plain(self.tokenizer, f"{start}{turn.content}\n")))
            else:
                parts.append((False, self._start(f"{turn.content}\n")))
        return parts

    def _start(self, text: str) -> list[int]:
        """The first tokens: with those that a tokenizer puts before a text, not those after it."""
        ids = list(self.tokenizer(text)["input_ids"])
        last = {self.tokenizer.eos_token_id, self.tokenizer.sep_token_id} - {None}
        return ids[:-1] if ids and ids[-1] in last else ids


@dataclass(frozen=True)
class ChatTemplate:
    """Conversations as the chat template of a tokenizer renders them.

    `day` (ISO 8601) stands where a template writes today's date, so that all parties of a run, and
    the same party tomorrow, have the same tokens; "" is today.
    """

    tokenizer: PreTrainedTokenizerBase
    day: str = ""

    def sequences(self, turns: Sequence[Turn], tools: str, most: int) -> list[Rendered]:
        """The sequences of a conversation; none where nothing is learnt.

        Answers whose prompt has `most` tokens or more are left out: they would be cut away, and
        each rendering takes time. Raises DataError for turns that the template refuses.
        """
        says = [turn for turn in turns if turn.role == "assistant" and not turn.calls]
        marks = self.tokenizer.is_fast and _MARKS.search(self._template(tools))
        if marks and all(turn.learnt for turn in says):  # marks cannot tell one from another
            return self._marked(turns, tools)
        found = list[tuple[list[int], list[bool]]]()
        for at, turn in enumerate(turns):
            if not turn.learnt or turn.calls:
                continue
            prompt, answer = self._answer(turns[: at + 1], tools)
            if len(prompt) >= most:
                break
            if found and prompt[: len(found[-1][0])] == found[-1][0]:
                ids, learnt = found.pop()
                learnt = learnt + [False] * (len(prompt) - len(ids))
            else:
                learnt = [False] * len(prompt)
            found.append((prompt + answer, learnt + [True] * len(answer)))
        return [Rendered(*own) for own in found]

    def prompt(self, turns: Sequence[Turn], tools: str) -> list[int]:
        """The tokens before the last of the turns, an answer. Raises DataError as `sequences`."""
        return self._answer(turns, tools)[0]

    def check(self) -> str:
        """Says in one line how generation prompt and answers differ; "" where they agree.

        Nothing is said of a template that takes no question and answer alone: rows tell.
        """
        try:
            asked = self._text(_PROBE[:1], "", True)
            told = self._text(_PROBE, "", False)
            common = self.tokenizer.decode(self._answer(_PROBE, "")[0])
        except DataError:
            return ""
        if told.startswith(asked):
            return ""
        return (
            f"the chat template asks with {asked[-80:]!r}, and renders an answer as "
            f"{told[-80:]!r}: answers are learnt after what both have, {common[-40:]!r}"
        )

    def _answer(self, turns: Sequence[Turn], tools: str) -> tuple[list[int], list[int]]:
        """(tokens of the prompt, tokens of the answer) of the last turn."""
        told = self._text(turns, tools, False)
        ids = _plain(self.tokenizer, told)
        if len(turns) == 1:  # nobody has asked: what is there whatever the answer is
            other = Turn("assistant", "1" if turns[0].content[:1] != "1" else "2")
            prompt = ids[: _common(ids, _plain(self.tokenizer, self._text([other], tools, False)))]
            return prompt, self._one_end(ids[len(prompt) :])
        asked = self._text(turns[:-1], tools, True)
        prompt = _plain(self.tokenizer, asked)
        if told.startswith(asked):
            if ids[: len(prompt)] != prompt:  # a token that would reach over the border
                ids = prompt + _plain(self.tokenizer, told[len(asked) :])
            return prompt, self._one_end(ids[len(prompt) :])
        before = _plain(self.tokenizer, self._text(turns[:-1], tools, False))
        common = _common(prompt, ids)
        if common < max(_common(prompt, before), _common(ids, before)):
            raise DataError(
                "the chat template renders the turns before an answer otherwise when it asks for "
                "the answer and when the answer is there: what the model learns is undefined"
            )
        return ids[:common], self._one_end(ids[common:])

    def _one_end(self, answer: list[int]) -> list[int]:
        """The answer up to its first end of turn, behind which there is only what is no text."""
        start = len(answer)
        while start and self._says_nothing(answer[start - 1]):
            start -= 1
        for at in range(start, len(answer)):
            if answer[at] in self._ends:
                return answer[: at + 1]
        eos = self.tokenizer.eos_token_id
        return answer if eos is None else [*answer, eos]

    def _says_nothing(self, token: int) -> bool:
        return token in self._special or not self.tokenizer.decode([token]).strip()

    def _marked(self, turns: Sequence[Turn], tools: str) -> list[Rendered]:
        """One sequence, with what the template marks as generated; each part has one end."""
        out = self._apply(
            turns, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, marks = list(out["input_ids"]), [bool(mark) for mark in out["assistant_masks"]]
        learnt, at = [False] * len(ids), 0
        while at < len(ids):
            if not marks[at]:
                at += 1
                continue
            end = next((i for i in range(at, len(ids)) if not marks[i]), len(ids))
            part = self._one_end(ids[at:end])
            if len(part) > end - at:  # no end of turn is marked: that which follows counts
                if end < len(ids) and ids[end] in self._ends:
                    end += 1
                elif end == len(ids):
                    ids, learnt, end = [*ids, part[-1]], [*learnt, False], end + 1
                part = ids[at:end]
            learnt[at : at + len(part)] = [True] * len(part)
            at = end
        last = max((i for i, own in enumerate(learnt) if own), default=-1)
        return [Rendered(ids[: last + 1], learnt[: last + 1])] if last >= 0 else []

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(self.tokenizer.all_special_ids) | {i for i, own in added if own.special}

    @cached_property
    def _ends(self) -> frozenset[int]:
        """The tokens that end a turn: eos, and the first special one behind an answer."""
        ends = {self.tokenizer.eos_token_id} - {None}
        try:
            _, _, tail = self._text(_PROBE, "", False).rpartition(_PROBE[1].content)
        except DataError:  # it takes no two turns alone
            tail = ""
        behind = [i for i in _plain(self.tokenizer, tail) if i in self._special]
        return frozenset(ends | set(behind[:1]))

    def _text(self, turns: Sequence[Turn], tools: str, asks: bool) -> str:
        return str(self._apply(turns, tools, tokenize=False, add_generation_prompt=asks))

    def _apply(self, turns: Sequence[Turn], tools: str, **how: Any) -> Any:
        template = self._template(tools)
        try:
            return self.tokenizer.apply_chat_template(
                [turn.message() for turn in turns],
                tools=json.loads(tools) if tools else None,
                chat_template=template,
                **how,
            )
        except _REFUSALS as error:
            # What a template says itself may be told to others; the rest may be of the row.
            own = str(error) if str(error) and str(error) in template else type(error).__name__
            raise DataError(f"the model's chat template refuses a row of turns: {own}") from error

    def _template(self, tools: str) -> str:
        """The template, with the day in place of the clock. Raises ModelError where none can be."""
        template = self.tokenizer.get_chat_template(None, json.loads(tools) if tools else None)
        day = date.fromisoformat(self.day) if self.day else date.today()
        fixed = _NOW.sub(lambda call: json.dumps(day.strftime(call["form"])), template)
        if _ANY_NOW.search(fixed):
            raise ModelError("the chat template computes the form of the date that it writes")
        return fixed


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both have at the start."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
