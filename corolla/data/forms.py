"""The forms in which rows have conversations: each becomes turns with roles.

`messages` are as OpenAI's chat API has them, `conversations` as ShareGPT, `instruction`, `input`
and `output` as Alpaca, `prompt` and `completion` as TRL, `question`, `context` and `answers` as
SQuAD.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from corolla.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
_CALL = "function_call"
_SHAREGPT = {"human": "user", "gpt": "assistant", _CALL: "assistant", "function_response": "tool"}
_SHAREGPT |= {"observation": "tool", **{role: role for role in ROLES}}
_PREFERENCES = ("chosen", "rejected")


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: str
    content: str
    more: str = ""
    """Its further fields, such as tool_calls, as the JSON text of an object; "" without."""
    learnt: bool = False
    """True where it is the model that says it, and is to learn it."""

    @property
    def calls(self) -> bool:
        """True where the assistant calls a tool."""
        return "tool_calls" in json.loads(self.more or "{}")

    def message(self) -> dict[str, Any]:
        """The turn as a chat template takes it."""
        return {"role": self.role, "content": self.content, **json.loads(self.more or "{}")}


@dataclass(frozen=True)
class Conversation:
    """The conversation of a row: turns that end with the last one of the assistant, and tools."""

    turns: tuple[Turn, ...]
    tools: str = ""
    """Descriptions of the tools that it may call, as the JSON text of a list; "" without."""

    @property
    def pair(self) -> tuple[str, str] | None:
        """(prompt, response), where there is nothing else."""
        if self.tools or any(turn.more for turn in self.turns):
            return None
        if [(turn.role, turn.learnt) for turn in self.turns] != list(_PAIR):
            return None
        return self.turns[0].content, self.turns[1].content


_PAIR = (("user", False), ("assistant", True))


def conversation(row: Mapping[str, Any], where: str) -> tuple[Conversation, frozenset[str]] | None:
    """(what a row says, the names of the columns that say it); None for a row of another form.

    Raises DataError that begins with `where` for turns that cannot be used, and for preferences.
    """
    if pairs := [name for name in _PREFERENCES if row.get(name) is not None]:
        raise DataError(
            f"{where}: has {' and '.join(pairs)}: preferences are not trained on, only answers; "
            f"give the answer to learn as messages, or as prompt and response"
        )
    for needed, beside, read in _FORMS:
        if all(row.get(name) is not None for name in needed):
            turns = read(row, where)
            learnt = [i for i, turn in enumerate(turns) if turn.learnt]
            if not learnt:
                raise DataError(f"{where}: no turn of the assistant is there to be learnt")
            tools = _tools(row.get("tools"), where) if "tools" in beside else ""
            return Conversation(tuple(turns[: learnt[-1] + 1]), tools), frozenset(needed + beside)
    return None


def _messages(row: Mapping[str, Any], where: str) -> list[Turn]:
    return _turns(row["messages"], f"{where}, messages")


def _conversations(row: Mapping[str, Any], where: str) -> list[Turn]:
    return [*_system(row, where), *_turns(row["conversations"], f"{where}, conversations")]


def _completion(row: Mapping[str, Any], where: str) -> list[Turn]:
    """Strings, or lists of messages, of which those of the prompt are not learnt."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _pair(prompt, completion)
    given = _turns(prompt, f"{where}, prompt")
    return [
        *(replace(turn, learnt=False) for turn in given),
        *_turns(completion, f"{where}, completion"),
    ]


def _instruction(row: Mapping[str, Any], where: str) -> list[Turn]:
    instruction, answer = (_text(row, name, where) for name in ("instruction", "output"))
    beside = "" if row.get("input") is None else _text(row, "input", where)
    prompt = f"{instruction}\n{beside}" if beside.strip() else instruction
    return [*_system(row, where), *_pair(prompt, answer)]


def _squad(row: Mapping[str, Any], where: str) -> list[Turn]:
    """The first of the answers counts; one that is empty says that there is none."""
    answers = row["answers"]
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str):
        raise DataError(
            f"{where}: answers must be an object whose text lists at least one string; "
            f"leave out questions without an answer"
        )
    return _pair(asked(row, where), texts[0])


def asked(row: Mapping[str, Any], where: str) -> str:
    """The question of a row, after its context where it has one."""
    question = _text(row, "question", where)
    context = "" if row.get("context") is None else _text(row, "context", where)
    return f"{context}\n{question}" if context.strip() else question


_FORMS: tuple[
    tuple[tuple[str, ...], tuple[str, ...], Callable[[Mapping[str, Any], str], list[Turn]]], ...
] = (
    (("messages",), ("tools",), _messages),
    (("conversations",), ("system", "tools"), _conversations),
    (("prompt", "completion"), ("tools",), _completion),
    (("instruction", "output"), ("input", "system"), _instruction),
    (("question", "answers"), ("context",), _squad),
)
"""The columns that a form needs, those that it can have, and how it is read."""


def _pair(prompt: str, response: str) -> list[Turn]:
    return [Turn("user", prompt), Turn("assistant", response, learnt=True)]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} must be a string, found {type(value).__name__}")
    return value


def _system(row: Mapping[str, Any], where: str) -> list[Turn]:
    if row.get("system") is None or not _text(row, "system", where).strip():
        return []
    return [Turn("system", row["system"])]


def _turns(messages: Any, where: str) -> list[Turn]:
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if isinstance(messages, list) else type(messages).__name__
        raise DataError(f"{where}: must be a list of turns, found {found}")
    return [_turn(own, f"{where}, turn {i}") for i, own in enumerate(messages, start=1)]


def _turn(message: Any, where: str) -> Turn:
    """Read one turn, with role and content, or with from and value."""
    if not isinstance(message, dict):
        raise DataError(f"{where}: must be an object, found {type(message).__name__}")
    fields = {key: value for key, value in message.items() if value is not None}
    sharegpt = "role" not in fields and "from" in fields
    if not sharegpt and "role" not in fields:
        raise DataError(f"{where}: needs role and content, or from and value")
    name = fields.pop("from" if sharegpt else "role")
    content = fields.pop("value" if sharegpt else "content", None)
    role = (_SHAREGPT if sharegpt else dict(zip(ROLES, ROLES, strict=True))).get(str(name))
    if role is None:
        known = ", ".join(_SHAREGPT if sharegpt else ROLES)
        raise DataError(f"{where}: unknown role {str(name)[:40]!r}: known are {known}")
    if sharegpt and name == _CALL:
        fields["tool_calls"], content = _said_calls(content, where), None
    weight = fields.pop("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"{where}: weight must be 0 or 1, found {str(weight)[:40]}")
    if "tool_calls" in fields and not fields["tool_calls"]:
        del fields["tool_calls"]
    if "tool_calls" in fields:
        fields["tool_calls"] = _calls(fields["tool_calls"], where)
    text = _content(content, where)
    if not text.strip() and role in ("user", "assistant") and "tool_calls" not in fields:
        raise DataError(f"{where}: the {role} says nothing")
    turn = Turn(role, text, _json(fields, where), role == "assistant" and weight == 1)
    if not encodable(turn.content) or not encodable(turn.more):
        raise DataError(f"{where}: has half of a surrogate pair, which is no text")
    return turn


def _content(content: Any, where: str) -> str:
    """Text, or a list of parts that are text, as one."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise DataError(f"{where}: content must be a string, found {type(content).__name__}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{where}: content has a part of type {str(kind)[:40]!r}: only text is")
    return "".join(part["text"] for part in content)


def _calls(calls: Any, where: str) -> list[Any]:
    """Calls of tools whose arguments are objects, as templates take them, not their JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where}: tool_calls must be a list of objects")
    found = []
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str):
            try:
                told = json.loads(arguments)
            except (ValueError, RecursionError):
                told = None
            if isinstance(told, dict):
                function = {**function, "arguments": told}
                call = {**call, "function": function} if "function" in call else function
        found.append(call)
    return found


def _said_calls(content: Any, where: str) -> list[Any]:
    """Calls of tools from the JSON text of one, or of a list, as LLaMA-Factory's data have them."""
    try:
        told = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        told = None
    calls = told if isinstance(told, list) else [told]
    if not calls or not all(isinstance(own, dict) and "name" in own for own in calls):
        raise DataError(
            f"{where}: {_CALL} must be the JSON of an object with name and arguments, or of a "
            f"list of such"
        )
    return [{"type": "function", "function": own} for own in calls]


def _tools(tools: Any, where: str) -> str:
    """Descriptions of tools as JSON text, from a list of objects or its text."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: tools is text that is not JSON") from error
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return ""
    if not isinstance(tools, Sequence) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: tools must be a list of objects, or its JSON text")
    return _json(tools, where)


def encodable(text: str) -> bool:
    """Returns whether a string is text: one with half of a surrogate pair is not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json(value: Any, where: str) -> str:
    if not value:
        return ""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: has a field that JSON cannot hold") from error
