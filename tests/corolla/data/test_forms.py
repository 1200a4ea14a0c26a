import json
from pathlib import Path

import pytest

from corolla.data.forms import Turn
from corolla.data.rows import Example, read_rows
from corolla.errors import DataError

ASK, TELL = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
CALLED = {"type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
USER, ANSWER = Turn("user", "q"), Turn("assistant", "a", learnt=True)
SYSTEM = Turn("system", "s")
PAIR = Example("a", prompt="q")


def read(folder: Path, row: object) -> Example:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row))
    return read_rows(str(path))[0][0]


def conversation(*turns: Turn, tools: str = "") -> Example:
    return Example("", turns=turns, tools=tools)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"messages": [ASK, TELL]}, PAIR),
        ({"messages": [ASK, TELL], "prompt": "q", "prompt_id": "1"}, PAIR),
        ({"messages": [ASK, TELL, ASK]}, PAIR),
        ({"text": None, "messages": [ASK, TELL], "tools": None}, PAIR),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PAIR),
        ({"conversations": [{"from": "user", "value": "q"}, {"from": "gpt", "value": "a"}]}, PAIR),
        ({"conversations": [ASK, TELL]}, PAIR),
        ({"instruction": "q", "output": "a"}, PAIR),
        ({"instruction": "q", "input": " ", "output": "a", "system": ""}, PAIR),
        ({"instruction": "i", "input": "n", "output": "a"}, Example("a", prompt="i\nn")),
        ({"prompt": "q", "completion": "a"}, PAIR),
        ({"prompt": [ASK], "completion": [TELL]}, PAIR),
        ({"question": "q", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}}, PAIR),
        ({"question": "q", "context": "c", "answer": "a"}, Example("a", prompt="c\nq")),
        (
            {"question": "q", "context": "c", "answers": {"text": ["a"], "answer_start": [1]}},
            Example("a", prompt="c\nq"),
        ),
        (
            {"question": "q", "context": "c", "choices": ["a", "b"], "answer": 0},
            Example("a", prompt="c\nq", choices=("a", "b")),
        ),
        (
            {"messages": [ASK, TELL], "client_id": 3, "split": "test"},
            Example("a", prompt="q", client="3", split="test"),
        ),
    ],
)
def test_a_question_and_an_answer_are_the_same_in_every_form(
    tmp_path: Path, row: object, wanted: Example
) -> None:
    assert read(tmp_path, row) == wanted


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (
            {"messages": [{"role": "system", "content": "s"}, ASK, TELL]},
            conversation(SYSTEM, USER, ANSWER),
        ),
        ({"messages": [ASK, TELL, ASK, TELL]}, conversation(USER, ANSWER, USER, ANSWER)),
        (
            {"messages": [ASK, {**TELL, "weight": 0}, ASK, {**TELL, "weight": 1}]},
            conversation(USER, Turn("assistant", "a"), USER, ANSWER),
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, TELL], "system": "s"},
            conversation(SYSTEM, USER, ANSWER),
        ),
        (
            {"instruction": "q", "output": "a", "system": "s"},
            conversation(SYSTEM, USER, ANSWER),
        ),
        (
            {"prompt": [ASK, TELL, ASK], "completion": [TELL]},
            conversation(USER, Turn("assistant", "a"), USER, ANSWER),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "qr"]},
                          TELL, ASK, TELL]},
            conversation(Turn("user", "qr"), ANSWER, USER, ANSWER),
        ),
        (
            {"messages": [ASK, TELL], "tools": '[{"name": "f"}]'},
            conversation(USER, ANSWER, tools='[{"name": "f"}]'),
        ),
        (
            {
                "messages": [
                    ASK,
                    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
                    {"role": "tool", "content": "", "tool_call_id": "1", "name": None},
                    TELL,
                ],
                "tools": [{"name": "f"}],
            },
            conversation(
                USER,
                Turn("assistant", "", json.dumps({"tool_calls": [CALL]}), learnt=True),
                Turn("tool", "", '{"tool_call_id": "1"}'),
                ANSWER,
                tools='[{"name": "f"}]',
            ),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": json.dumps(CALL["function"])},
                    {"from": "observation", "value": "1"},
                    {"from": "function_call", "value": json.dumps([CALL["function"]] * 2)},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            conversation(
                USER,
                Turn("assistant", "", json.dumps({"tool_calls": [CALL]}), learnt=True),
                Turn("tool", "1"),
                Turn("assistant", "", json.dumps({"tool_calls": [CALL] * 2}), learnt=True),
                Turn("tool", "2"),
                ANSWER,
            ),
        ),
    ],
)  # fmt: skip
def test_a_conversation_keeps_its_turns(tmp_path: Path, row: object, wanted: Example) -> None:
    found = read(tmp_path, row)
    assert found == wanted
    assert hash(found) == hash(wanted)
    assert found.dialogue == wanted.turns
    assert (found.question, found.answer) == (wanted.turns[-2].content, "a")


def test_prompt_and_response_are_a_dialogue_of_two_turns() -> None:
    assert PAIR.dialogue == (USER, ANSWER)
    assert (PAIR.question, PAIR.answer) == ("q", "a")
    assert Example("text").dialogue == ()
    assert (Example("text").question, Example("text").answer) == (None, "text")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "chosen and rejected: preferences"),
        ({"chosen": [ASK, TELL], "rejected": [ASK, TELL]}, "preferences are not trained on"),
        ({"messages": [ASK, TELL], "chosen": "a"}, "has chosen: preferences"),
        ({"messages": []}, "messages: must be a list of turns, found an empty list"),
        ({"messages": "hello"}, "must be a list of turns, found str"),
        ({"messages": [ASK]}, "no turn of the assistant"),
        ({"messages": [ASK, {**TELL, "weight": 0}]}, "no turn of the assistant"),
        ({"messages": [ASK, {**TELL, "weight": 2}]}, "weight must be 0 or 1, found 2"),
        ({"messages": [ASK, ["a"]]}, "turn 2: must be an object, found list"),
        ({"messages": [{"content": "q"}, TELL]}, "turn 1: needs role and content"),
        ({"messages": [{"role": "bot", "content": "q"}]}, "turn 1: unknown role 'bot'"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "unknown role 'alien'"),
        ({"messages": [{"role": "user", "content": " "}, TELL]}, "turn 1: the user says nothing"),
        ({"messages": [ASK, {"role": "assistant"}]}, "turn 2: the assistant says nothing"),
        ({"messages": [{"role": "user", "content": 5}]}, "content must be a string, found int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "content has a part of type 'image_url'",
        ),
        ({"messages": [ASK, {**TELL, "tool_calls": "f()"}]}, "tool_calls must be a list"),
        (
            {"conversations": [{"from": "function_call", "value": "f()"}, TELL]},
            "turn 1: function_call must be the JSON of an object with name and arguments",
        ),
        ({"messages": [ASK, TELL], "tools": "{"}, "tools is text that is not JSON"),
        ({"messages": [ASK, TELL], "tools": ["f"]}, "tools must be a list of objects"),
        ({"messages": [ASK, {**TELL, "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [ASK, {**TELL, "name": "\ud800"}]}, "half of a surrogate pair"),
        ({"instruction": 5, "output": "a"}, "instruction must be a string, found int"),
        ({"instruction": "q", "input": [1], "output": "a"}, "input must be a string, found list"),
        ({"prompt": "q", "completion": [TELL]}, "prompt: must be a list of turns, found str"),
        ({"question": "q", "answers": {"text": []}}, "at least one string"),
        ({"question": "q", "answers": "a"}, "answers must be an object"),
        ({"question": "q", "context": 5, "answer": "a"}, "context must be a string, found int"),
    ],
)
def test_turns_that_cannot_be_used_are_named_in_one_line(
    tmp_path: Path, row: object, reason: str
) -> None:
    with pytest.raises(DataError, match="line 1") as caught:
        read(tmp_path, row)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"prompt": "q", "response": "a", "system": "s", "id": 4}, {"system"}),
        ({"text": "t", "instruction": "i", "input": "", "output": "o"}, {"instruction", "output"}),
        ({"question": "q", "answer": "a", "context": "c"}, set()),
        ({"question": "q", "answer": "a", "history": [["q", "a"]]}, {"history"}),
        ({"messages": [ASK, TELL], "tools": [{"name": "f"}], "prompt": "q"}, set()),
        ({"messages": [ASK, TELL], "context": None, "system": "s"}, {"system"}),
        ({"instruction": "q", "output": "a", "input": "b", "system": "s"}, set()),
    ],
)
def test_columns_that_change_the_meaning_and_are_not_used_are_kept_by_name(
    tmp_path: Path, row: object, unused: set[str]
) -> None:
    assert read(tmp_path, row).unused == unused


def test_a_row_is_shortened_to_its_first_characters() -> None:
    turns = (SYSTEM, Turn("user", "abc"), Turn("assistant", "defg", learnt=True))
    wanted = (*turns[:2], Turn("assistant", "d", learnt=True))
    assert Example("", turns=turns).shortened(7).turns == wanted
    assert Example("", turns=turns).shortened(99).turns == turns
    assert Example("abcd", prompt="efgh").shortened(3) == Example("abc", prompt="efg")
    called = Turn("assistant", "", json.dumps({"tool_calls": [CALL]}), learnt=True)
    assert Example("", turns=(USER, called)).shortened(9).turns == (USER,)
