"""Renderings of public families of templates, written by hand: what is learnt stands in ⟦ ⟧."""

import json
import re
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from corolla.data import encoding
from corolla.data.encoding import IGNORE, Encoder
from corolla.data.forms import Turn
from corolla.data.rows import Example
from corolla.data.templates import ChatTemplate, writes_date
from corolla.errors import DataError, ModelError

from . import chat_templates as public

ASK, TELL = Turn("user", "hi?"), Turn("assistant", "yo.", learnt=True)
MORE, END = Turn("user", "and?"), Turn("assistant", "no.", learnt=True)
SYSTEM, UNLEARNT = Turn("system", "Be."), Turn("assistant", "yo.")
FUNCTION = {"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
CALL = Turn("assistant", "", json.dumps({"tool_calls": [FUNCTION]}), learnt=True)
RESULT = Turn("tool", "3")
TOOLS = '[{"name": "f"}]'


def tokenizer(
    family: str, template: str | None, merged: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerBase:
    """One token a byte but for `merged` pairs, and one a special token of the family."""
    special = public.SPECIAL[family]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merged)]
    raw = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(words)}, merges=list(merged))
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    made: PreTrainedTokenizerBase = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=special[0],
        bos_token=special[-1],
        additional_special_tokens=list(special),
    )
    if template is not None:
        made.chat_template = template
    return made


def by_hand(family: str, text: str) -> list[tuple[str, bool]]:
    """(token, whether it is learnt) of a rendering with ⟦ ⟧ around what is."""
    parts = "|".join(map(re.escape, public.SPECIAL[family]))
    found, learnt = [], False
    for part in re.findall(rf"{parts}|.", text, re.DOTALL):
        if part in "⟦⟧":
            learnt = part == "⟦"
        else:
            found.append((part, learnt))
    return found


def encoded(
    own: PreTrainedTokenizerBase, *turns: Turn, tools: str = "", day: str = ""
) -> list[list[tuple[str, bool]]]:
    """The same of what is trained on."""
    found = Encoder(own, [], 1 << 20, day)(Example("", turns=turns, tools=tools))
    told = []
    for sequence in found:
        assert not isinstance(sequence.labels, int)
        pairs = list(zip(sequence.input_ids, sequence.labels, strict=True))
        assert all(label in (i, IGNORE) for i, label in pairs)
        told.append([(str(own.decode([i])), label != IGNORE) for i, label in pairs])
    return told


DEFAULT = "<|im_start|>system\nYou are helpful.<|im_end|>\n"
LLAMA = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: 31 Jan 2026\n\n{}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhi?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
CASES = {
    "chatml, one answer": (
        "chatml", public.CHATML, (ASK, TELL), "",
        [DEFAULT + "<|im_start|>user\nhi?<|im_end|>\n<|im_start|>assistant\n⟦yo.<|im_end|>⟧"],
    ),
    "chatml, system and two answers": (
        "chatml", public.CHATML, (SYSTEM, ASK, TELL, MORE, END), "",
        [
            "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nhi?<|im_end|>\n"
            "<|im_start|>assistant\n⟦yo.<|im_end|>⟧\n<|im_start|>user\nand?<|im_end|>\n"
            "<|im_start|>assistant\n⟦no.<|im_end|>⟧"
        ],
    ),
    "chatml, an answer that is context": (
        "chatml", public.CHATML, (SYSTEM, ASK, UNLEARNT, MORE, END), "",
        [
            "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nhi?<|im_end|>\n"
            "<|im_start|>assistant\nyo.<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n"
            "<|im_start|>assistant\n⟦no.<|im_end|>⟧"
        ],
    ),
    "chatml, tools": (
        "chatml", public.CHATML, (SYSTEM, ASK, CALL, RESULT, TELL), TOOLS,
        [
            '<|im_start|>system\nBe.\n\nTools: [{"name": "f"}]<|im_end|>\n'
            "<|im_start|>user\nhi?<|im_end|>\n"
            '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n'
            "</tool_call><|im_end|>\n"
            "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n⟦yo.<|im_end|>⟧"
        ],
    ),
    "chatml, the assistant begins": (
        "chatml", public.CHATML, (TELL, MORE, END), "",
        [
            DEFAULT + "<|im_start|>assistant\n⟦yo.<|im_end|>⟧\n<|im_start|>user\nand?<|im_end|>\n"
            "<|im_start|>assistant\n⟦no.<|im_end|>⟧"
        ],
    ),
    "llama 3, one answer": (
        "llama3", public.LLAMA3, (ASK, TELL), "", [LLAMA.format("") + "⟦yo.<|eot_id|>⟧"],
    ),
    "llama 3, system, tools and two answers": (
        "llama3", public.LLAMA3, (SYSTEM, ASK, CALL, RESULT, TELL, MORE, END), "",
        [
            LLAMA.format("Be.") + '{"name": "f", "parameters": {"n": 1}}<|eot_id|>'
            "<|start_header_id|>ipython<|end_header_id|>\n\n3<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦yo.<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nand?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦no.<|eot_id|>⟧"
        ],
    ),
    "gemma": (
        "gemma", public.GEMMA, (ASK, TELL, MORE, END), "",
        [
            "<bos><start_of_turn>user\nhi?<end_of_turn>\n<start_of_turn>model\n"
            "⟦yo.<end_of_turn>⟧\n<start_of_turn>user\nand?<end_of_turn>\n<start_of_turn>model\n"
            "⟦no.<end_of_turn>⟧"
        ],
    ),
    "mistral": (
        "mistral", public.MISTRAL, (ASK, TELL, MORE, END), "",
        ["<s>[INST] hi? [/INST]⟦ yo.</s>⟧[INST] and? [/INST]⟦ no.</s>⟧"],
    ),
    "phi": (
        "phi", public.PHI, (SYSTEM, ASK, TELL, MORE, END), "",
        [
            "<|system|>\nBe.<|end|>\n<|user|>\nhi?<|end|>\n<|assistant|>\n⟦yo.<|end|>⟧\n"
            "<|user|>\nand?<|end|>\n<|assistant|>\n⟦no.<|end|>⟧"
        ],
    ),
    "think, one answer": (
        "chatml", public.THINK, (ASK, TELL), "",
        [
            "<|im_start|>user\nhi?<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\n\n</think>\n\nyo.<|im_end|>⟧"
        ],
    ),
    "think, history is stripped": (
        "chatml", public.THINK,
        (ASK, Turn("assistant", "<think>\nhm\n</think>\n\nyo.", learnt=True), MORE, END), "",
        [
            "<|im_start|>user\nhi?<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\nhm\n</think>\n\nyo.<|im_end|>⟧",
            "<|im_start|>user\nhi?<|im_end|>\n<|im_start|>assistant\nyo.<|im_end|>\n"
            "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\n\n</think>\n\nno.<|im_end|>⟧",
        ],
    ),
    "a thought that the generation prompt opens": (
        "chatml", public.OPEN_THINK, (ASK, TELL, MORE, END), "",
        [
            "<|im_start|>user\nhi?<|im_end|>\n<|im_start|>assistant\n⟦yo.<|im_end|>⟧\n"
            "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n⟦no.<|im_end|>⟧"
        ],
    ),
    "marks": (
        "chatml", public.MARKED, (ASK, CALL, RESULT, TELL), "",
        [
            "<|im_start|>user\nhi?<|im_end|>\n<|im_start|>assistant\n⟦CALL f<|im_end|>⟧\n"
            "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n⟦yo.<|im_end|>⟧"
        ],
    ),
    "marks without the end of a turn": (
        "chatml", public.BARELY_MARKED, (ASK, TELL, MORE, END), "",
        [
            "<|im_start|>user\nhi?<|im_end|>\n<|im_start|>assistant\n⟦yo.<|im_end|>⟧\n"
            "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n⟦no.<|im_end|>⟧"
        ],
    ),
    "marks, and an answer that is context": (
        "chatml", public.MARKED, (ASK, UNLEARNT, MORE, END), "",
        [
            "<|im_start|>user\nhi?<|im_end|>\n<|im_start|>assistant\nyo.<|im_end|>\n"
            "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n⟦no.<|im_end|>⟧"
        ],
    ),
    "no template": (
        "chatml", None, (SYSTEM, ASK, TELL, MORE, END), "",
        ["Be.\nhi?\n⟦yo.<|im_end|>⟧and?\n⟦no.<|im_end|>⟧"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_learnt_is_what_a_template_renders_for_the_assistant(case: str) -> None:
    family, template, turns, tools, wanted = CASES[case]
    found = encoded(tokenizer(family, template), *turns, tools=tools, day="2026-01-31")
    assert found == [by_hand(family, text) for text in wanted]


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_asked_with_what_stands_before_its_last_answer(case: str) -> None:
    family, template, turns, tools, wanted = CASES[case]
    own = tokenizer(family, template)
    asked = Encoder(own, [], 80, "2026-01-31").prompt_ids(Example("", turns=turns, tools=tools))
    before, _, _ = wanted[-1].rpartition("⟦")
    assert [str(own.decode([i])) for i in asked] == [token for token, _ in by_hand(family, before)]


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral", "phi"])
def test_prompt_and_response_are_a_conversation_of_two_turns(family: str) -> None:
    encoder = Encoder(tokenizer(family, getattr(public, family.upper())), [], 200)
    assert encoder(Example("yo.", prompt="hi?")) == encoder(Example("", turns=(ASK, TELL)))


def test_an_answer_that_writes_its_own_end_of_turn_has_one() -> None:
    answer = Turn("assistant", "yo.<|im_end|>", learnt=True)
    (found,) = encoded(tokenizer("chatml", public.OPEN_THINK), ASK, answer)
    assert [token for token, learnt in found if learnt] == ["y", "o", ".", "<|im_end|>"]


def test_a_conversation_is_cut_at_the_end() -> None:
    own = tokenizer("mistral", public.MISTRAL)
    whole = encoded(own, ASK, TELL, MORE, END)[0]
    row = Example("", turns=(ASK, TELL, MORE, END))
    for length in range(2, len(whole) + 1):
        found = Encoder(own, [], length)(row)
        learnt = sum(own for _, own in whole[:length])
        assert [sequence.targets for sequence in found] == ([learnt] if learnt else [])


def test_what_would_be_cut_away_is_not_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation of very many turns takes no longer than one that fills a sequence."""
    own = tokenizer("mistral", public.MISTRAL)
    wanted = sum(learnt for _, learnt in encoded(own, *(ASK, TELL) * 8)[0][:60])
    rendered, apply = list[object](), own.apply_chat_template

    def counted(*given: Any, **how: Any) -> Any:
        rendered.append(how)
        return apply(*given, **how)

    monkeypatch.setattr(own, "apply_chat_template", counted)
    turns = (ASK, TELL) * 400
    (found,) = Encoder(own, [], 60)(Example("", turns=turns))
    assert found.targets == wanted > 0
    assert len(rendered) < 20


def test_a_token_that_reaches_over_the_start_of_an_answer_is_parted() -> None:
    """A model is asked with the prompt alone, so it says the answer from its first letter on."""
    template = "{% for m in messages %}{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant>{% endif %}"
    own = tokenizer("chatml", template, merged=((">", "y"), ("e", "s")))
    (found,) = encoded(own, ASK, Turn("assistant", "yes", learnt=True))
    assert found[-4:] == [(">", False), ("y", True), ("es", True), ("<|im_end|>", True)]


@pytest.mark.parametrize(
    ("family", "template", "turns", "reason"),
    [
        ("gemma", public.GEMMA, (SYSTEM, ASK, TELL), ": System role not supported"),
        (
            "mistral",
            public.MISTRAL,
            (ASK, MORE, TELL),
            ": Conversation roles must alternate user/assistant",
        ),
        (
            "chatml",
            "{{ raise_exception(messages[0].content) }}",
            (ASK, TELL),
            "refuses a row of turns: TemplateError",
        ),
    ],
)
def test_turns_that_a_template_refuses_are_refused_without_their_words(
    family: str, template: str, turns: tuple[Turn, ...], reason: str
) -> None:
    with pytest.raises(DataError) as caught:
        encoded(tokenizer(family, template), *turns)
    assert str(caught.value).endswith(reason)
    assert "hi?" not in str(caught.value)


def test_a_template_that_renders_the_question_anew_is_refused() -> None:
    own = tokenizer(
        "chatml",
        "{% if add_generation_prompt %}Q:{{ messages[0].content }} A:"
        "{% else %}{{ messages | map(attribute='content') | join }}{% endif %}",
    )
    with pytest.raises(DataError, match="what the model learns is undefined"):
        encoded(own, ASK, TELL)
    assert ChatTemplate(own).check() == ""


def test_a_template_that_asks_otherwise_than_it_answers_is_told_with_both_renderings() -> None:
    why = ChatTemplate(tokenizer("chatml", public.OPEN_THINK)).check()
    assert r"asks with '<|im_start|>user\n9274<|im_end|>\n<|im_start|>assistant\n<think>\n'" in why
    assert r"<|im_start|>assistant\n6183<|im_end|>\n'" in why
    assert "\n" not in why
    for template in (public.CHATML, public.THINK, public.MARKED):
        assert ChatTemplate(tokenizer("chatml", template)).check() == ""
    assert ChatTemplate(tokenizer("phi", public.PHI)).check() == ""


def test_a_day_is_written_in_place_of_the_clock() -> None:
    own = tokenizer("llama3", public.LLAMA3)
    days = ("2026-01-31", "2024-02-29")
    first, second = (encoded(own, ASK, TELL, day=day)[0] for day in days)
    assert "31 Jan 2026" in "".join(token for token, _ in first)
    assert "29 Feb 2024" in "".join(token for token, _ in second)
    assert writes_date(own)
    assert not writes_date(tokenizer("chatml", public.CHATML))
    assert not writes_date(tokenizer("chatml", None))


def test_a_date_whose_form_is_computed_is_refused() -> None:
    own = tokenizer("chatml", "{{ strftime_now(form) }}")
    assert writes_date(own)
    with pytest.raises(ModelError, match="computes the form of the date"):
        ChatTemplate(own, "2026-01-31").check()


def test_tools_need_a_template() -> None:
    with pytest.raises(DataError, match="only a chat template can write"):
        encoded(tokenizer("chatml", None), ASK, TELL, tools=TOOLS)
    with pytest.raises(DataError, match="only a chat template can write"):
        encoded(tokenizer("chatml", None), ASK, CALL, RESULT, TELL)


def test_a_conversation_without_eos_still_parts_its_turns() -> None:
    own = tokenizer("chatml", None)
    own.eos_token = None
    (found,) = encoding.Encoder(own, [], 99)(Example("", turns=(ASK, TELL, MORE, END)))
    assert own.decode(found.input_ids) == "hi?\nyo.\nand?\nno."
